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
from badge_peft.model import get_badge_model
from badge_peft.model_card import write_model_card
from badge_peft.utils import distributed
from badge_peft.workflows.adapter_dir import LOGITS, REPORT
from badge_peft.workflows.base_model import Base, add_exits, keeps_answers, load_base, local_path
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import encode, limit_length, load_tokenizer
from badge_peft.workflows.evaluate import default_metric, measure, time_rows
from badge_peft.workflows.plots import PICTURE, draw
from badge_peft.workflows.report import latency_line, measured_table, summary
from badge_peft.workflows.settings import TrainSettings
from badge_peft.workflows.splits import read_training_data
from badge_peft.workflows.trainer import train_exits
from badge_peft.workflows.validate import check_settings, check_training
from badge_peft.workflows.verify import compare_with_checkpoint

Echo = Callable[[str], None]


def train_adapter(model: str, data: str, settings: TrainSettings, echo: Echo = print) -> dict[str, Any] | None:
    """Trains exits, saves them as an adapter, and chooses how to stop, with what it costs, on evaluation rows.

    `output_dir` gets the adapter (PEFT's files and the tokenizer's), `exit_logits.safetensors` (of the evaluation
    rows, for more sweeps and calibrations), `report.json`, `tradeoff.png` and a card, `README.md`.

    Several processes (`accelerate launch`, `torchrun`) share each batch of the training and the evaluation rows; each
    has to make the call. The first writes and speaks.

    Args:
        model: Folder or Hub repository of a classifier, or of an encoder that is to become one.
        data: Texts, labeled or not: see `read_examples`.
        settings: What to train, and how.
        echo: Takes a line of text, to tell how far it is.

    Returns:
        What `report.json` holds; None in a process that is not the first.

    Raises:
        ValueError: settings, model and data do not fit one another; nothing has been written then.
        OSError: there is no such model or data.
    """
    distributed.init_process_group()
    check_settings(settings)
    examples, eval_examples = read_training_data(data, settings.columns, settings.training.seed)
    report = train_on(model, examples, eval_examples, settings, echo, data=data)
    if report is not None:
        echo(f"\n{measured_table(report)}\n\n{summary(report)}\n{_checks(report)}")
    return report


def train_on(
    model_name: str,
    examples: TextDataset,
    eval_examples: TextDataset,
    settings: TrainSettings,
    echo: Echo = print,
    *,
    data: str,
    new_head: bool = False,
) -> dict[str, Any] | None:
    """As `train_adapter`, on rows that have been read.

    Args:
        model_name: Folder or Hub repository.
        examples: To train on.
        eval_examples: To calibrate and evaluate on.
        settings: As for `train_adapter`.
        echo: As for `train_adapter`.
        data: What the data is called in the report.
        new_head: Leave the model's trained head aside: labels are those of the data.
    """
    start = time.perf_counter()
    main = distributed.is_main()
    echo = echo if main else _no_echo
    out, training = _output_dir(settings), settings.training
    set_seed(training.seed)
    base = load_base(model_name, settings, examples, new_head)
    tokenizer = load_tokenizer(local_path(settings.tokenizer or model_name))
    limit = limit_length(tokenizer, base.model, settings.max_length)
    if base.model.config.pad_token_id is None:
        base.model.config.pad_token_id = tokenizer.pad_token_id
    targets, eval_targets = base.labels.targets(examples), base.labels.targets(eval_examples)
    learns_labels = check_training(settings, base, targets, eval_targets, eval_examples)
    train_rows = encode(examples, tokenizer, targets if learns_labels else None)
    eval_rows = encode(eval_examples, tokenizer, eval_targets)
    echo(f"1. data: {_data_line(train_rows, eval_rows, base, examples, learns_labels)}")

    model = add_exits(base, settings.exits)
    badge = get_badge_model(model)
    trainable, total = model.get_nb_trainable_parameters()
    pooled = "" if base.pooling is None else f"; a sentence encoder: exits pool by {badge.config_of().exit_pooling!r}"
    echo(f"2. model: {badge.num_blocks} blocks; {trainable:,} of {total:,} parameters are trained{pooled}")
    echo(f"3. training, {training.epochs} epochs over {len(train_rows)} rows")
    train_exits(model, train_rows, tokenizer, training, learns_labels)

    exit_logits = collect_exit_logits(
        model, eval_rows, training.batch_size, progress=True, split_between_processes=True
    )
    chosen = distributed.on_main(partial(_save, model, tokenizer, exit_logits, settings, out))
    if not main:
        return None
    echo(f"4. saved to {out}; policy, calibrated on {len(eval_rows)} evaluation rows: {describe(chosen)}")
    report: dict[str, Any] = {
        "model": model_name,
        "data": data,
        "columns": examples.columns,
        "max_length": limit,
        "label_names": base.labels.names,
        "problem_type": base.labels.problem_type,
        "train_rows": len(train_rows),
        "learned_from": "labels" if learns_labels else "the model's own answers",
        "evaluation": settings.columns.eval_data or f"held out of {data}",
        **measure(exit_logits, chosen, settings.metric),
        "calibration": chosen.calibration,
        "full_depth_is_checkpoint": (
            compare_with_checkpoint(model, local_path(model_name), eval_rows, training.batch_size)
            if keeps_answers(model)
            else None
        ),
        "latency": time_rows(model, eval_rows, settings.latency) if settings.latency else None,
        "processes": distributed.rank_world()[1],
        "trainable_parameters": trainable,
        "adapter_bytes": (out / "adapter_model.safetensors").stat().st_size,
        "settings": settings.to_dict(),
        "versions": {"badge_peft": package_version(), "torch": torch.__version__},
    }
    title = f"{Path(model_name).name}: {report['rows']} rows"
    if not draw(exit_logits, chosen, report["metric"], out / PICTURE, title):
        echo(f"   no {PICTURE}: plots need matplotlib: pip install 'badge-peft[plots]'")
    report["seconds"] = time.perf_counter() - start
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_model_card(out)
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


def _save(
    model: PeftModel, tokenizer: Any, exit_logits: ExitLogits, settings: TrainSettings, out: Path
) -> EarlyExitConfig:
    """Chooses the adapter's policy, and writes everything; with a default policy where none reaches the goal."""
    failure: ValueError | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a fixed depth won is seen in the policy
            metric = settings.metric or default_metric(exit_logits.problem_type)
            chosen = calibrate(exit_logits, settings.goal.policy, metric=metric, **settings.goal.arguments())
        model.set_early_exit_config(chosen)
    except ValueError as error:
        failure = error
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    exit_logits.save(out / LOGITS)
    if failure is not None:
        raise ValueError(
            f"{failure} The exits are trained and saved in {out}, with a default policy: choose one with "
            f"`badge-peft calibrate {out}`."
        ) from failure
    return chosen


def _no_echo(line: str) -> None:
    """For processes that are not the first."""


def _data_line(train: Dataset, held_out: Dataset, base: Base, examples: TextDataset, learns_labels: bool) -> str:
    names = base.labels.names
    what = f"{len(names)} labels ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    what = "values" if base.labels.problem_type == "regression" else what
    source = f"column {examples.columns.get('label')!r}" if learns_labels else "the model's answers"
    return (
        f"{len(train)} rows to train on, {len(held_out)} to evaluate and calibrate on; {what}, learning from {source}"
    )


def _checks(report: dict[str, Any]) -> str:
    lines = []
    same, latency = report["full_depth_is_checkpoint"], report["latency"]
    if latency is not None:
        lines.append(latency_line(latency))
    if same is not None and same["equal"]:
        lines.append(f"full depth answers as the checkpoint, bit for bit (checked on {same['rows']} rows)")
    elif same is not None:
        lines.append(f"WARNING: full depth DIFFERS from the checkpoint, by up to {same['largest_difference']:.3g}")
    return "\n".join(lines)
