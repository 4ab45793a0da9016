"""The model card of a saved adapter: what it is, how good and how fast, and the lines that load it.

A card is made from what lies in the adapter's folder: `adapter_config.json` with what `calibrate` recorded, and the
report and picture of `badge-peft train` where there are any. `save_pretrained` of a model writes it in the place of
PEFT's. The text is `model_card_template.md`; here stands what it is filled in with.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import peft
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Template
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from yaml import YAMLError

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.base import set_fields
from badge_peft.utils.checks import is_number
from badge_peft.utils.files import is_local, write_text

TEMPLATE = Path(__file__).with_name("model_card_template.md")
START, END = "<!-- badge_peft:start -->", "<!-- badge_peft:end -->"
#: Metrics that are read as per cent.
PERCENTAGES = ("accuracy", "f1", "acc_and_f1", "macro_f1", "entity_f1", "top_k_kept")
CARD = "README.md"
CONFIG = "adapter_config.json"
REPORT = "report.json"
PICTURE = "tradeoff.png"
TAGS = ("badge", "early-exit", "peft", "transformers")
_TIMES = ("p50_ms", "p95_ms", "full_depth_p50_ms", "full_depth_p95_ms", "time_saved")  # of a report
_PEFTS_OWN = "# Model Card for Model ID"  # the heading of the empty form that PEFT writes


def write_model_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> None:
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
    old = read_card(folder)
    data: Any = old.data if old is not None else ModelCardData()
    _fill(data, config, license)
    fields = {**data.to_dict(), "repo_id": repo_id or "user/repo", **_template_fields(folder, config)}
    card = ModelCard(_template().render(card_data=data.to_yaml(), **fields))
    text = card.text if old is None or _PEFTS_OWN in old.text else _put_in(old.text, card.text.lstrip("\n"))
    write_text(file, f"---\n{data.to_yaml()}\n---\n{text.strip()}\n")


@cache
def _template() -> Template:
    """Compiled once: it takes longer than all else of a small adapter's save."""
    return Template(TEMPLATE.read_text(encoding="utf-8"))


def read_card(folder: Path) -> ModelCard | None:
    """The `README.md` in a folder; None where there is none."""
    file = folder / CARD
    try:
        return ModelCard.load(file) if file.exists() else None
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"{file} cannot be read as a model card, so it cannot be kept: fix its first lines (YAML, UTF-8), or "
            f"take it away. ({error})"
        ) from error


def read_report(folder: str | Path) -> dict[str, Any]:
    """What `badge-peft train` wrote into `report.json`; empty where there is none that can be read."""
    try:
        return _read(Path(folder) / REPORT)
    except (OSError, ValueError, RecursionError):  # a file that somebody else wrote may be anything
        return {}


def write_card_of_adapter(folder: str | Path) -> None:
    """`write_model_card`, where an adapter's weights lie: a config that is saved alone has no card."""
    if any(Path(folder, name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        write_model_card(folder)


def hub_id(name: str | None) -> str | None:
    """`name` where it can be a repository's name on the Hub; None for a local path."""
    if not name or is_local(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def base_license(name: str | None, revision: str | None = None) -> str | None:
    """The license that the base model's card or config states, from its folder or the Hub's cache."""
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
    tag = "token-classification" if config.get("task_type") == "TOKEN_CLS" else "text-classification"
    data["pipeline_tag"] = data.get("pipeline_tag") or tag
    if base:
        data["base_model"] = base
    else:
        data.pop("base_model", None)  # PEFT writes a local path here, which the Hub refuses
    license = data.get("license") or license or base_license(name, config.get("revision"))
    if license:
        data["license"] = license


def _put_in(old: str, new: str) -> str:
    before, _, rest = old.partition(START)
    if END not in rest:  # one mark is not there, or the two are in the wrong order
        return old
    return before + new.rstrip("\n") + rest.partition(END)[2]


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return found


def _template_fields(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the template is filled in with, from `adapter_config.json` and the report of `badge-peft train`, unless the
    adapter has been calibrated or trained again since."""
    policy = config.get("early_exit") or {}
    if policy:
        policy = EarlyExitConfig.of(policy).measured_on(config.get("weights_hash")).to_dict()
    calibration = policy.get("calibration") or {}
    report = read_report(folder)
    if not calibration or report.get("calibration") != calibration or not _has_numbers(report):
        report = {}
    measured, stopped = report, report["early_exit"]["rows_stopped"] if report else None
    exits = dict(zip(report.get("exit_layers", ()), report.get("per_exit", ()), strict=False))
    if not exits:
        measured, stopped, exits = calibration, None, calibration.get("exit_scores") or {}
    drawn = (folder / PICTURE).exists() and (report or not (folder / REPORT).exists())  # of the rule in force
    base = str(config.get("base_model_name_or_path") or "a model")
    return {
        "start": START,
        "end": END,
        "config": config,
        "base": PurePath(base).name if PurePath(base).is_absolute() else base,
        "policy": set_fields(EarlyExitConfig.of(policy)) if policy else {},
        "calibration": calibration,
        "measured": measured,
        "exits": exits,
        "stopped": stopped,
        "latency": report.get("latency"),
        "picture": PICTURE if drawn else None,
        "peft_version": peft.__version__,
        "metric_name": metric_name,
        "score": lambda value, source: score_text(value, source.get("metric")),
        "percent": "{:.1%}".format,
    }


def _has_numbers(report: dict[str, Any]) -> bool:
    """Whether a report, which may have been edited, holds what a card shows of one."""
    early, latency = report.get("early_exit"), report.get("latency")
    stopped = early.get("rows_stopped") if isinstance(early, dict) else None
    lists: list[Any] = [report.get("exit_layers"), report.get("per_exit"), stopped]
    if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        return False
    times = [latency.get(name) for name in _TIMES] if isinstance(latency, dict) else [latency or 0]
    return all(map(is_number, [report.get("rows"), *times, *chain.from_iterable(lists)]))


def metric_name(source: dict[str, Any]) -> str:
    """What a record calls its scores: `macro f1`, `accuracy against full depth`."""
    name = str(source.get("metric") or "score").replace("_", " ")
    return name if source.get("labels") in (None, "given") else f"{name} against full depth"


def score_text(value: Any, metric: str | None) -> str:
    """A score as it is usually read."""
    if not is_number(value):
        return "unknown"
    return f"{value:.1%}" if metric in PERCENTAGES else f"{value:.3f}"
