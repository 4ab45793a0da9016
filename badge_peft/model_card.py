"""The model card of a saved adapter: what it is, how good and how fast, and the lines that load it.

A card is made from what lies in the adapter's folder: `adapter_config.json` with what `calibrate` recorded, and the
report and picture of `badge-peft train` where there are any. `save_pretrained` writes it in the place of PEFT's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from badge_peft.card_text import END, START, card_text

CARD = "README.md"
CONFIG = "adapter_config.json"
REPORT = "report.json"
PICTURE = "tradeoff.png"
TAGS = ("badge", "early-exit", "peft", "transformers")
_PEFTS_OWN = "# Model Card for Model ID"  # the heading of the empty form that PEFT writes


def write_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> None:
    """Writes or updates `README.md` in an adapter's folder.

    PEFT's empty form is replaced, and so is the part of an earlier card of ours that lies between its two marks. Text
    that somebody wrote stays: with the marks taken out, the whole of it.

    Args:
        folder: Holds `adapter_config.json`.
        repo_id: Where the adapter can be loaded from; None is a stand-in.
        license: Of the base model; None looks for it in the base model's local or cached files.
    """
    folder = Path(folder)
    config = _read(folder / CONFIG)
    file = folder / CARD
    old = ModelCard.load(file) if file.exists() else None
    data = old.data if old is not None else ModelCardData()
    _fill(data, config, license)
    report = _current_report(folder, config)
    new = card_text(config, report, PICTURE if _shows(folder, report) else None, repo_id)
    text = new if old is None or _PEFTS_OWN in old.text else _put_in(old.text, new)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text.rstrip()}\n").save(file)


def hub_id(name: str | None) -> str | None:
    """`name` where it can be a repository's name on the Hub; None for a local path."""
    if not name or Path(name).exists() or name.startswith((".", "/", "~")) or "\\" in name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def base_license(name: str | None, revision: str | None = None) -> str | None:
    """The licence that the base model's card or config states, from its folder or the Hub's cache: without a network.

    Args:
        name: Path or repository of the base model.
        revision: Of the repository.
    """
    if not name:
        return None
    for file in (CARD, "config.json"):
        path = Path(name, file)
        if hub_id(name):
            cached = try_to_load_from_cache(name, file, revision=revision)
            path = Path(cached) if isinstance(cached, str) else path
        if not path.is_file():
            continue
        try:
            found = ModelCard.load(path).data.get("license") if file == CARD else _read(path).get("license")
        except (ValueError, YAMLError):  # a file that somebody else wrote may be anything
            continue
        if isinstance(found, str):
            return found
    return None


def _fill(data: Any, config: dict[str, Any], license: str | None) -> None:
    """The metadata; what stands there already and is not ours to say stays."""
    name = config.get("base_model_name_or_path")
    base = hub_id(name)
    tags = {tag for tag in data.get("tags") or [] if not tag.startswith("base_model:")}
    data["tags"] = sorted(tags | set(TAGS) | ({f"base_model:adapter:{base}"} if base else set()))
    data["library_name"] = "peft"
    data["pipeline_tag"] = data.get("pipeline_tag") or "text-classification"
    if base:
        data["base_model"] = base
    else:
        data.pop("base_model", None)  # PEFT writes a local path here, which the Hub refuses
    license = data.get("license") or license or base_license(name, config.get("revision"))
    if license:
        data["license"] = license


def _put_in(old: str, new: str) -> str:
    if START not in old or END not in old:
        return old
    before, _, rest = old.partition(START)
    return before + new.rstrip("\n") + rest.partition(END)[2]


def _current_report(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The report of `badge-peft train`, unless the adapter has been calibrated or trained again since."""
    try:
        report = _read(folder / REPORT)
    except (OSError, ValueError):
        return None
    calibration = (config.get("early_exit") or {}).get("calibration")
    return report if calibration and report.get("calibration") == calibration else None


def _shows(folder: Path, report: dict[str, Any] | None) -> bool:
    """Whether there is a picture, and of the rule that is in force."""
    return (folder / PICTURE).exists() and (report is not None or not (folder / REPORT).exists())


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return found
