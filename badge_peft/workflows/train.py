"""`train_adapter`: from a model and a file of texts to a calibrated adapter. What `badge-peft train` does."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import set_seed

from badge_peft._version import package_version
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.text import describe
from badge_peft.evaluation import ExitLogits, calibrate, collect_exit_logits
from badge_peft.evaluation.latency import measure_latency
from badge_peft.hub import load_pretrained
from badge_peft.model import get_badge_model
from badge_peft.model_card import write_card
from badge_peft.utils import distributed
from badge_peft.utils.logs import quiet
from badge_peft.workflows.adapter import LOGITS, REPORT
from badge_peft.workflows.base import Base, add_exits, keeps_answers, load_base, local_path
from badge_peft.workflows.encode import encode, limit_length, load_tokenizer
from badge_peft.workflows.equality import compare_with_checkpoint
from badge_peft.workflows.evaluate import latency_line, latency_summary
from badge_peft.workflows.fit import fit
from badge_peft.workflows.measure import default_metric, measure, measured_table, summary
from badge_peft.workflows.picture import PICTURE, draw
from badge_peft.workflows.plan import check_plan, check_settings, read_splits
from badge_peft.workflows.rows import TextRows
from badge_peft.workflows.settings import TrainSettings

Say = Callable[[str], None]


def train_adapter(name: str, data: str, settings: TrainSettings, say: Say = print) -> dict[str, Any] | None:
    """Trains exits, saves them as an adapter, and chooses how to stop, with what it costs, on evaluation rows.

    `output_dir` gets the adapter (PEFT's files and the tokenizer's), `exit_logits.safetensors` (of the evaluation
    rows, for more sweeps and calibrations), `report.json`, `tradeoff.png` and a card, `README.md`.

    Several processes (`accelerate launch`, `torchrun`) share each batch of the training and the evaluation rows; each
    has to make the call. The first writes and speaks.

    Args:
        name: Folder or Hub repository of a classifier, or of an encoder that is to become one.
        data: Texts, labelled or not: see `read_rows`.
        settings: What to train, and how.
        say: Takes a line of text, to tell how far it is.

    Returns:
        What `report.json` holds; None in a process that is not the first.

    Raises:
        ValueError: settings, model and data do not fit one another; nothing has been written then.
        OSError: there is no such model or data.
    """
    start = time.perf_counter()
    distributed.join()
    main = distributed.is_main()
    say = say if main else _nothing
    out = _output_dir(settings)
    check_settings(settings)
    training = settings.training
    set_seed(training.seed)
    rows, held = read_splits(data, settings.columns, training.seed)
    base = load_base(name, settings, rows)
    tokenizer = load_tokenizer(local_path(settings.tokenizer or name))
    limit = limit_length(tokenizer, base.model, settings.max_length)
    if base.model.config.pad_token_id is None:
        base.model.config.pad_token_id = tokenizer.pad_token_id
    targets, held_targets = base.labels.targets(rows), base.labels.targets(held)
    learns_labels = check_plan(settings, base, targets, held_targets, held)
    train_rows = encode(rows, tokenizer, targets if learns_labels else None)
    eval_rows = encode(held, tokenizer, held_targets)
    say(_say_data(train_rows, eval_rows, base, rows, learns_labels))

    model = add_exits(base, settings.exits)
    badge = get_badge_model(model)
    trainable, total = model.get_nb_trainable_parameters()
    pooled = "" if base.pooling is None else f"; a sentence encoder: exits pool by {badge.config_of().exit_pooling!r}"
    say(f"2. model: {badge.num_blocks} blocks; {trainable:,} of {total:,} parameters are trained{pooled}")
    say(f"3. training, {training.epochs} epochs over {len(train_rows)} rows")
    fit(model, train_rows, tokenizer, training, learns_labels)

    exit_logits = _collect(model, eval_rows, settings, progress=True)
    chosen = distributed.in_main(partial(_save, model, tokenizer, exit_logits, settings, out))
    model.set_early_exit_config(chosen)
    say(f"4. saved to {out}; exit rule, chosen on the {len(eval_rows)} evaluation rows: {describe(chosen)}")

    promised = keeps_answers(model)
    with quiet():
        loaded = load_pretrained(str(out)).to(next(model.parameters()).device)
    del model
    reloaded = torch.equal(_collect(loaded, eval_rows, settings).logits, exit_logits.logits)
    if not main:
        return None
    report: dict[str, Any] = {
        "model": name,
        "data": data,
        "columns": rows.columns,
        "max_length": limit,
        "label_names": base.labels.names,
        "problem_type": base.labels.problem_type,
        "train_rows": len(train_rows),
        "learned_from": "labels" if learns_labels else "the model's own answers",
        "evaluation": settings.columns.eval_data or f"held out of {data}",
        **measure(exit_logits, chosen, settings.metric),
        "calibration": chosen.calibration,
        "reloaded_bit_for_bit": reloaded,
        "full_depth_is_checkpoint": _compare(loaded, name, training.batch_size, eval_rows) if promised else None,
        "latency": _latency(loaded, eval_rows, settings.latency),
        "processes": distributed.together()[1],
        "trainable_parameters": trainable,
        "adapter_bytes": (out / "adapter_model.safetensors").stat().st_size,
        "settings": settings.to_dict(),
        "versions": {"badge_peft": package_version(), "torch": torch.__version__},
    }
    if not draw(exit_logits, chosen, report["metric"], out / PICTURE, f"{Path(name).name}: {report['rows']} rows"):
        say(f"   no {PICTURE}: pictures need matplotlib: pip install 'badge-peft[plots]'")
    report["seconds"] = time.perf_counter() - start
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_card(out)
    say(f"\n{measured_table(report)}\n\n{summary(report)}\n{_say_checks(report)}")
    return report


def _output_dir(settings: TrainSettings) -> Path:
    """Where the adapter goes; refused where it would be in the way of something else.

    Raises:
        ValueError: it is the model's folder or a file, or it is not empty.
    """
    out = Path(settings.output_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"output_dir={str(out)!r} is a file: name a folder.")
    if (out / "config.json").exists():
        raise ValueError(f"output_dir={str(out)!r} holds a model: an adapter goes into a folder of its own.")
    if out.is_dir() and any(out.iterdir()) and not settings.overwrite:
        raise ValueError(f"output_dir={str(out)!r} is not empty: name another, or overwrite it with --overwrite.")
    return out


def _collect(model: PeftModel, rows: Dataset, settings: TrainSettings, progress: bool = False) -> ExitLogits:
    size = settings.training.batch_size
    return collect_exit_logits(model, rows, size, progress=progress, split_between_processes=True)


def _save(
    model: PeftModel, tokenizer: Any, exit_logits: ExitLogits, settings: TrainSettings, out: Path
) -> EarlyExitConfig:
    """Writes the adapter, chooses its exit rule, and writes that too."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    exit_logits.save(out / LOGITS)
    chosen = _calibrate(exit_logits, settings, out)
    model.set_early_exit_config(chosen)
    model.save_pretrained(str(out))
    return chosen


def _calibrate(exit_logits: ExitLogits, settings: TrainSettings, out: Path) -> EarlyExitConfig:
    metric = settings.metric or default_metric(exit_logits.problem_type)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a fixed depth won is seen in the rule
            return calibrate(exit_logits, settings.goal.policy, metric=metric, **settings.goal.arguments())
    except ValueError as error:
        raise ValueError(
            f"{error} The exits are trained and saved in {out}, with a default rule: choose one with "
            f"`badge-peft calibrate {out}`."
        ) from error


def _compare(model: PeftModel, name: str, batch_size: int, rows: Dataset) -> dict[str, Any]:
    return compare_with_checkpoint(model, local_path(name), rows, batch_size)


def _latency(model: PeftModel, rows: Dataset, count: int) -> dict[str, Any] | None:
    if not count:
        return None
    timed = rows.select(range(min(count, len(rows))))
    return latency_summary(measure_latency(model, timed, progress=True).to_dict(), len(timed))


def _nothing(line: str) -> None:
    """For processes that have nothing to say."""


def _say_data(train: Dataset, held: Dataset, base: Base, rows: TextRows, learns_labels: bool) -> str:
    names = base.labels.names
    what = "values" if base.labels.problem_type == "regression" else f"{len(names)} labels ({', '.join(names[:5])}"
    what += "" if what == "values" else ", ...)" if len(names) > 5 else ")"
    source = (
        f"learning from column {rows.columns['label']!r}" if learns_labels else "learning from the model's answers"
    )
    return f"1. data: {len(train)} rows to train on, {len(held)} to evaluate and calibrate on; {what}, {source}"


def _say_checks(report: dict[str, Any]) -> str:
    lines = []
    same, latency = report["full_depth_is_checkpoint"], report["latency"]
    if latency is not None:
        lines.append(latency_line(latency))
    if same is not None and same["equal"]:
        lines.append(f"full depth answers as the checkpoint, bit for bit (checked on {same['rows']} rows)")
    elif same is not None:
        lines.append(f"WARNING: full depth DIFFERS from the checkpoint, by up to {same['largest_difference']:.3g}")
    if not report["reloaded_bit_for_bit"]:
        lines.append("WARNING: the saved adapter, loaded again, DIFFERS from the one that was trained")
    return "\n".join(lines)
