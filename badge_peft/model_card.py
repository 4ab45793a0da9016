"""The model card of a saved adapter: what it is, how good and how fast, and the lines that load it.

A card is made from what lies in the adapter's folder: `adapter_config.json` with what `calibrate` recorded, and the
report and picture of `badge-peft train` where there are any. `save_pretrained` of a model writes it in the place of
PEFT's. The text is `model_card_template.md`; here stands what it is filled in with.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

import peft
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from yaml import YAMLError

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.text import set_fields

TEMPLATE = Path(__file__).with_name("model_card_template.md")
START, END = "<!-- badge_peft:start -->", "<!-- badge_peft:end -->"
#: Metrics that are read as per cent.
PERCENTAGES = ("accuracy", "f1", "acc_and_f1", "macro_f1")
CARD = "README.md"
CONFIG = "adapter_config.json"
REPORT = "report.json"
PICTURE = "tradeoff.png"
TAGS = ("badge", "early-exit", "peft", "transformers")
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
    old = ModelCard.load(file) if file.exists() else None
    data = old.data if old is not None else ModelCardData()
    _fill(data, config, license)
    report = _current_report(folder, config)
    picture = PICTURE if _shows(folder, report) else None
    card = ModelCard.from_template(data, str(TEMPLATE), **_template_fields(config, report, picture, repo_id))
    text = card.text if old is None or _PEFTS_OWN in old.text else _put_in(old.text, card.text.lstrip("\n"))
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text.strip()}\n").save(file)


def write_card_of_adapter(folder: str | Path) -> None:
    """`write_model_card`, where an adapter's weights lie: a config that is saved alone has no card."""
    if any(Path(folder, name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        write_model_card(folder)


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


def _template_fields(
    config: dict[str, Any], report: dict[str, Any] | None, picture: str | None, repo_id: str | None
) -> dict[str, Any]:
    """What the template is filled in with, from `adapter_config.json` and the report of `badge-peft train`."""
    policy = config.get("early_exit") or {}
    calibration = policy.get("calibration") or {}
    base = str(config.get("base_model_name_or_path") or "a model")
    labels, layers = config.get("label_names"), config.get("exit_layers")
    return {
        "start": START,
        "end": END,
        "config": config,
        "base": PurePath(base).name if PurePath(base).is_absolute() else base,
        "backbone": _backbone_text(config),
        "outputs": f"{config.get('num_labels')}" + (f" ({', '.join(labels)})" if labels else ""),
        "exit_layers": "all" if layers is None else f"{', '.join(map(str, layers))}, and the last",
        "repo_id": repo_id or "user/repo",
        "policy": _policy_rows(policy),
        "calibration": {
            **calibration,
            "metric_name": _metric_name(calibration),
            "score_text": _score_text(calibration.get("score"), calibration),
            "full_depth_text": _score_text(calibration.get("full_depth_score"), calibration),
        }
        if calibration
        else None,
        "scores": _scores(calibration, report),
        "speed": _speed(calibration, report, config.get("num_blocks")),
        "picture": picture,
        "peft_version": peft.__version__,
    }


def _backbone_text(config: dict[str, Any]) -> str:
    unchanged = not config.get("train_head") and config.get("final_exit") == "base_head"
    kept = ", and full depth answers as before, bit for bit" if unchanged else ""
    texts = {
        "frozen": f"Its backbone is frozen{kept}.",
        "lora": "A LoRA in its blocks was trained with the exits and is in the file.",
        "full": "Its backbone was trained with the exits and is in the file.",
    }
    return texts.get(str(config.get("backbone")), "")


def _policy_rows(policy: dict[str, Any]) -> list[tuple[str, str]]:
    shown = set_fields(EarlyExitConfig.of(policy)) if policy else {}
    return [(f"`{name}`", f"`{value:.6g}`" if _is_number(value) else f"`{value}`") for name, value in shown.items()]


def _scores(calibration: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any] | None:
    """The score of each exit: of the report's rows, or else of those that the adapter was calibrated on."""
    stopped: list[int] | None = None
    if report and report.get("per_exit"):
        source = report
        exits = dict(zip(report["exit_layers"], report["per_exit"], strict=True))
        stopped = report.get("early_exit", {}).get("rows_stopped")
    else:
        source = calibration
        exits = {int(m): score for m, score in (calibration.get("exit_scores") or {}).items()}
    if not exits:
        return None
    values = list(exits.values())
    return {
        "header": ["exit after block", _metric_name(source), *(["rows it answers"] if stopped else [])],
        "rows": [
            (m, _score_text(score, source), *([f"{stopped[i] / source['rows']:.1%}"] if stopped else []))
            for i, (m, score) in enumerate(exits.items())
        ],
        "average": _score_text(sum(values) / len(values), source),
        "best": _score_text(max(values), source),
        "count": source.get("rows"),
    }


def _speed(
    calibration: dict[str, Any], report: dict[str, Any] | None, num_blocks: int | None
) -> dict[str, Any] | None:
    rows = []
    if calibration.get("mean_exit") is not None:
        rows.append(("blocks run, mean", f"{num_blocks}", f"{calibration['mean_exit']:.2f}"))
    latency = (report or {}).get("latency") or {}
    for name in ("p50", "p95") if latency else ():
        full_depth, early = latency[f"full_depth_{name}_ms"], latency[f"{name}_ms"]
        rows.append((f"time of a row, {name}", f"{full_depth:.2f} ms", f"{early:.2f} ms"))
    if not rows:
        return None
    text = f"{calibration['layer_speedup']:.1%} of the blocks are saved" if "layer_speedup" in calibration else ""
    if latency:
        text += (
            f"; on the clock {latency['speedup_paper']:.1%} of the time ({latency['rows']} rows, one at a time, "
            f"{latency['device']}, {latency['threads']} threads)"
        )
    return {"rows": rows, "text": text}


def _metric_name(source: dict[str, Any]) -> str:
    name = str(source.get("metric") or "score").replace("_", " ")
    return name if source.get("labels") in (None, "given") else f"{name} against full depth"


def _score_text(value: Any, source: dict[str, Any]) -> str:
    if not _is_number(value):
        return "unknown"
    return f"{value:.1%}" if source.get("metric") in PERCENTAGES else f"{value:.3f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
