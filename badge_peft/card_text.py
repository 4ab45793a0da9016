"""The text of a model card, in Markdown, from an adapter's config and the report of its training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import peft

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.text import set_fields

START, END = "<!-- badge_peft:start -->", "<!-- badge_peft:end -->"
_PAPER = "https://doi.org/10.18653/v1/2023.acl-industry.48"
SHARES = ("accuracy", "f1", "acc_and_f1", "macro_f1")  # read as per cent


def card_text(
    config: dict[str, Any],
    report: dict[str, Any] | None = None,
    picture: str | None = None,
    repo_id: str | None = None,
) -> str:
    """The card between its two marks.

    Args:
        config: What `adapter_config.json` holds.
        report: Of `badge-peft train`, about the exit rule in `config`.
        picture: File name of the trade-off's picture.
        repo_id: What the example loads.
    """
    rule = config.get("early_exit") or {}
    parts = [
        _head(config),
        _load(repo_id or "user/repo"),
        _how_it_stops(rule),
        _scores(config, rule.get("calibration") or {}, report),
        _speed(rule.get("calibration") or {}, report, config.get("num_blocks")),
        f"![Score against speed-up]({picture})" if picture else "",
        f"### Framework versions\n\n- PEFT {peft.__version__}\n- badge_peft {config.get('badge_version')}",
    ]
    return "\n\n".join([START, *filter(None, parts), END]) + "\n"


def _head(config: dict[str, Any]) -> str:
    base = str(config.get("base_model_name_or_path") or "a model")
    name = PurePath(base).name if PurePath(base).is_absolute() else base
    kept = (
        config.get("backbone") == "frozen" and not config.get("train_head") and config.get("final_exit") == "base_head"
    )
    trained = {
        "frozen": "Its backbone is frozen" + (", and full depth answers as before, bit for bit." if kept else "."),
        "lora": "A LoRA in its blocks was trained with the exits and is in the file.",
        "full": "Its backbone was trained with the exits and is in the file.",
    }
    labels = config.get("label_names")
    return (
        f"# Early exits for {name}\n\n"
        f"A [BADGE]({_PAPER}) adapter for [PEFT](https://github.com/huggingface/peft): bypasses and exits on the "
        f"{config.get('num_blocks')} blocks of `{name}`, so that an input may stop at any of them. "
        f"{trained.get(str(config.get('backbone')), '')}\n\n"
        + _table(
            ("", ""),
            [
                ("outputs", f"{config.get('num_labels')}" + (f" ({', '.join(labels)})" if labels else "")),
                ("exits after blocks", _listed(config.get("exit_layers"))),
                ("bypass", f"`{config.get('placement')}`, r = {config.get('r')}"),
                ("exit", f"`{config.get('exit_type')}`; the last is `{config.get('final_exit')}`"),
                ("backbone", f"`{config.get('backbone')}`"),
            ],
        )
    )


def _load(name: str) -> str:
    return (
        "## Use\n\n```python\n"
        "import badge_peft  # pip install badge-peft; without the import PEFT does not know this type of adapter\n"
        f'classify = badge_peft.pipeline("text-classification", model="{name}")\n'
        'print(classify("a text to classify"))  # label, score, and exit_layer: the block that answered\n```\n\n'
        f'`badge_peft.load_pretrained("{name}")` gives the model; its `early_exit_forward(**batch)` returns logits '
        "and `exit_layer`."
    )


def _how_it_stops(rule: dict[str, Any]) -> str:
    if not rule:
        return (
            "## How it stops\n\nNo rule is saved: `divergence` with its default threshold, unless the call says more."
        )
    shown = set_fields(EarlyExitConfig.of(rule))
    rows = [(f"`{name}`", f"`{value:.6g}`" if _number(value) else f"`{value}`") for name, value in shown.items()]
    text = f"## How it stops\n\n{_table(('field', 'value'), rows)}"
    found = rule.get("calibration")
    if not found:
        return text
    text += (
        f"\n\nChosen on {found.get('rows')} rows: {_named(found)} {_show(found.get('score'), found)}, at full depth "
        f"{_show(found.get('full_depth_score'), found)}."
    )
    if found.get("confidence"):
        text += (
            f" With a confidence of {found['confidence']:g}, the loss on new data of the same kind is below "
            f"{found['max_score_drop']:g}."
        )
    return text


def _scores(config: dict[str, Any], calibration: dict[str, Any], report: dict[str, Any] | None) -> str:
    source = report if report and report.get("per_exit") else calibration
    if report and source is report:
        exits = dict(zip(report["exit_layers"], report["per_exit"], strict=True))
    else:
        exits = {int(m): score for m, score in (calibration.get("exit_scores") or {}).items()}
    if not exits:
        return ""
    stopped = (report or {}).get("early_exit", {}).get("rows_stopped") if source is report else None
    header = ("exit after block", _named(source), *(["rows it answers"] if stopped else []))
    rows = [
        (str(m), _show(value, source), *([f"{stopped[i] / source['rows']:.1%}"] if stopped else []))
        for i, (m, value) in enumerate(exits.items())
    ]
    values = list(exits.values())
    best = f"S-avg {_show(sum(values) / len(values), source)}, S-best {_show(max(values), source)}"
    return f"## Scores of the exits\n\n{_table(header, rows)}\n\n{best} ({source.get('rows')} rows)."


def _speed(calibration: dict[str, Any], report: dict[str, Any] | None, num_blocks: int | None) -> str:
    rows = []
    if calibration.get("mean_exit") is not None:
        rows.append(("blocks run, mean", f"{num_blocks}", f"{calibration['mean_exit']:.2f}"))
    latency = (report or {}).get("latency")
    if latency:
        for name in ("p50", "p95"):
            rows.append(
                (
                    f"time of a row, {name}",
                    f"{latency[f'full_depth_{name}_ms']:.2f} ms",
                    f"{latency[f'{name}_ms']:.2f} ms",
                )
            )
    if not rows:
        return ""
    text = f"## Speed\n\n{_table(('', 'full depth', 'early exits'), rows)}\n\n"
    text += f"{calibration['layer_speedup']:.1%} of the blocks are saved" if "layer_speedup" in calibration else ""
    if latency:
        text += (
            f"; on the clock {latency['speedup_paper']:.1%} of the time ({latency['rows']} rows, one at a time, "
            f"{latency['device']}, {latency['threads']} threads)"
        )
    return text + "."


def _named(source: dict[str, Any]) -> str:
    name = str(source.get("metric") or "score").replace("_", " ")
    return name if source.get("labels") in (None, "given") else f"{name} against full depth"


def _show(value: Any, source: dict[str, Any]) -> str:
    if not _number(value):
        return "unknown"
    return f"{value:.1%}" if source.get("metric") in SHARES else f"{value:.3f}"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _listed(layers: Any) -> str:
    return "all" if layers is None else f"{', '.join(map(str, layers))}, and the last"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
