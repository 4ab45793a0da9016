"""`train_adapter`: from a model and a file of texts to a calibrated adapter. What `badge-peft train` does."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import set_seed

from badge_peft.early_exit.policies.text import describe
from badge_peft.evaluation import collect_exit_logits
from badge_peft.evaluation.costs import measure_costs
from badge_peft.model import get_badge_model
from badge_peft.model_card import PICTURE, REPORT, write_model_card
from badge_peft.utils import distributed
from badge_peft.utils.files import write_json
from badge_peft.workflows.adapter_dir import choose_device
from badge_peft.workflows.base_model import Base, add_exits, keeps_answers, keeps_head, load_base, local_path
from badge_peft.workflows.calibrate import choose, take_full_depth
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import load_tokenizer
from badge_peft.workflows.evaluate import (
    compare_with_checkpoint,
    constant_answer,
    metric_of,
    resolve_metric,
    time_rows,
)
from badge_peft.workflows.finish import finish, report_of_training
from badge_peft.workflows.fit import train_exits
from badge_peft.workflows.forms import choose_form, form_table
from badge_peft.workflows.report import draw, latency_line, measured_table, summary, warning
from badge_peft.workflows.search import Search
from badge_peft.workflows.settings import TrainSettings
from badge_peft.workflows.splits import read_training_data
from badge_peft.workflows.validate import check_output_dir, check_settings, check_training, with_output_dir


def train_adapter(model: str, data: str, settings: TrainSettings) -> dict[str, Any] | None:
    """Trains exits, saves them as an adapter, and chooses how to stop, with what it costs, on evaluation rows.

    `output_dir` gets the adapter (PEFT's files and the tokenizer's), `exit_logits.safetensors` (of the evaluation
    rows, for more sweeps and calibrations), `report.json`, `tradeoff.png` and a card, `README.md`.

    Several processes share each batch of the training and the evaluation rows; each has to make the call. The first
    writes.

    Args:
        model: Folder or Hub repository of a classifier, or of an encoder that is to become one.
        data: Texts, labeled or not: see `read_examples`.
        settings: What to train, and how.

    Returns:
        What `report.json` holds; None in a process that is not the first.

    Raises:
        ValueError: settings, model and data do not fit one another; nothing has been written then.
        OSError: there is no such model or data.
    """
    settings = with_output_dir(settings, model)
    check_settings(settings)
    if settings.task == "ranking":
        raise ValueError("task='ranking' is trained by train_ranker, which asks other things of model and data.")
    examples, eval_examples = read_training_data(data, settings.columns, settings.training.seed)
    report = train_on(model, examples, eval_examples, settings, data=data)
    if report is not None:
        tried = f"\n{form_table(report['forms'], report['metric'])}\n" if report["forms"] else ""
        print(f"{tried}\n{warning(report)}{measured_table(report)}\n\n{summary(report)}\n{checks(report)}")
    return report


def train_on(
    model_name: str,
    examples: TextDataset,
    eval_examples: TextDataset,
    settings: TrainSettings,
    *,
    data: str,
    new_head: bool = False,
) -> dict[str, Any] | None:
    """As `train_adapter`, on rows that have been read and that the report calls `data`. With `new_head`, labels are
    those of the data, and a trained head of the model is left aside."""
    start = time.perf_counter()
    out, training = check_output_dir(settings), settings.training
    set_seed(training.seed)
    base = load_base(model_name, settings, examples, new_head)
    tokenizer = load_tokenizer(local_path(settings.tokenizer or model_name), base.model, settings.max_length)
    if training.objective != "joint" and settings.exits.keep_head is None:  # which may train the head
        settings = replace(settings, exits=replace(settings.exits, keep_head=False))
    settings = replace(settings, exits=replace(settings.exits, keep_head=keeps_head(settings.exits, base.has_head)))
    eval_rows = base.encode(eval_examples, tokenizer, scored=True)
    learns_labels = check_training(settings, base, bool(examples.labels), len(eval_rows))
    train_rows = base.encode(examples, tokenizer, labeled=learns_labels)
    print(f"1. data: {_data_line(train_rows, eval_rows, base, examples, learns_labels)}")

    metric = resolve_metric(settings.metric, base.labels.problem_type, len(base.labels.names), base.tags)
    base.model.to(choose_device(None))  # states are computed before Trainer takes the model there
    choosing = partial(choose_form, base, train_rows, eval_rows, tokenizer, settings, learns_labels, metric)
    states, search = None, None
    if settings.search.trials:
        wanted = Search(base, train_rows, tokenizer, settings, learns_labels, model_name)
        settings, forms = wanted.choose_form(choosing)
        set_seed(training.seed)
        print(f"   search: {settings.search.trials} trials for {settings.search.search_for}")
        settings, states, search = wanted.run(lambda line: print(f"   {line}", flush=True))
        training = settings.training
    else:
        settings, forms = choosing()
    set_seed(training.seed)
    model = add_exits(base, settings.exits)
    badge = get_badge_model(model)
    trainable, total = model.get_nb_trainable_parameters()
    pooled = "" if base.pooling is None else f"; a sentence encoder: exits pool by {badge.config_of().exit_pooling!r}"
    print(f"2. model: {badge.num_blocks} blocks; {trainable:,} of {total:,} parameters are trained{pooled}")
    print(f"3. training over {len(train_rows)} rows, epochs: {training.epochs}")
    measured_training = train_exits(model, train_rows, tokenizer, training, learns_labels, states)
    if states is not None:
        states.close()
    exit_logits = collect_exit_logits(
        model, eval_rows, training.batch_size, progress=True, split_between_processes=True
    )

    def save() -> dict[str, Any]:
        constant = None
        if exit_logits.labels is not None:
            constant = constant_answer(exit_logits, metric_of(exit_logits, settings.metric), base.labels.names)
        if constant is None or constant["beaten"]:
            costs = measure_costs(model, eval_rows)
            chosen = partial(choose, exit_logits, settings.goal, settings.metric, costs)
        else:
            chosen = partial(take_full_depth, exit_logits, settings.goal, settings.metric)
        report = {
            **({"task": "tokens"} if base.reads_tokens else {}),
            **report_of_training(
                model_name, data, settings, examples, eval_examples, base, tokenizer, model, exit_logits
            ),
            "train_rows": len(train_rows),
            "learned_from": "labels" if learns_labels else "the model's own answers",
            "constant_answer": constant,
            "forms": forms,
            **measured_training,
            "search": search,
        }
        return finish(model, tokenizer, exit_logits, chosen, report, out)

    report = distributed.on_main(save)
    if not distributed.is_main():
        return None
    chosen = badge.get_early_exit_config()
    print(f"4. saved to {out}; policy, calibrated on {len(eval_rows)} evaluation rows: {describe(chosen)}")
    same = keeps_answers(model)
    report |= {
        "full_depth_is_checkpoint": (
            compare_with_checkpoint(model, local_path(model_name), eval_rows, training.batch_size) if same else None
        ),
        "latency": time_rows(model, eval_rows, settings.latency) if settings.latency else None,
        "adapter_bytes": (out / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
    }
    title = f"{Path(model_name).name}: {report['rows']} rows"
    if not draw(exit_logits, chosen, report["metric"], out / PICTURE, title):
        print(f"   no {PICTURE}: plots need matplotlib: pip install 'badge-peft[plots]'")
    report["seconds"] = time.perf_counter() - start
    write_json(out / REPORT, report)
    write_model_card(out)
    return report


def _data_line(train: Dataset, held_out: Dataset, base: Base, examples: TextDataset, learns_labels: bool) -> str:
    names = base.labels.names
    what = f"{len(names)} labels ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    what = "values" if base.labels.problem_type == "regression" else what
    what = what.replace("labels", "tags of tokens", 1) if base.reads_tokens else what
    source = f"column {examples.columns.get('label')!r}" if learns_labels else "the model's answers"
    pair = examples.columns.get("text_pair")
    texts = "" if pair is None else f"; pairs of texts from columns {examples.columns['text']!r} and {pair!r}"
    return (
        f"{len(train)} rows to train on, {len(held_out)} to evaluate and calibrate on; {what}, learning from {source}"
        f"{texts}"
    )


def checks(report: dict[str, Any]) -> str:
    """What was checked and timed after the training, as lines."""
    lines = []
    same, latency = report["full_depth_is_checkpoint"], report["latency"]
    if latency is not None:
        lines.append(latency_line(latency))
    if same is not None and same["equal"]:
        lines.append(f"full depth answers as the checkpoint, bit for bit (checked on {same['rows']} rows)")
    elif same is not None:
        lines.append(f"WARNING: full depth DIFFERS from the checkpoint, by up to {same['largest_difference']:.3g}")
    return "\n".join(lines)
