"""`train_adapter`: from a model and a file of texts to a calibrated adapter. What `badge-peft train` does."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import set_seed

from badge_peft._version import package_version
from badge_peft.early_exit.policies.base import describe
from badge_peft.evaluation import ExitLogits, collect_exit_logits
from badge_peft.evaluation.costs import measure_costs
from badge_peft.hub import LOGITS
from badge_peft.model import get_badge_model
from badge_peft.model_card import CARD, CONFIG, PICTURE, REPORT, write_model_card
from badge_peft.utils import distributed
from badge_peft.utils.files import install, write_json
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
from badge_peft.workflows.fit import Choose, Plan, train_exits
from badge_peft.workflows.forms import choose_form, form_table
from badge_peft.workflows.report import draw, latency_line, measured_table, summary, warning
from badge_peft.workflows.search import Search
from badge_peft.workflows.settings import TrainSettings
from badge_peft.workflows.splits import read_training_data
from badge_peft.workflows.train_ranking import for_ranking, plan_ranking, read_rankings
from badge_peft.workflows.validate import check_output_dir, check_settings, check_training, with_output_dir


def train_adapter(model: str, data: str, settings: TrainSettings) -> dict[str, Any] | None:
    """Trains exits, saves them as an adapter, and chooses how to stop, with what it costs, on evaluation rows.

    With `task="ranking"` exits learn the scores that the model itself gives to pairs of a query and a document, and
    margins are chosen on queries that did not train. No labels are needed; full depth stays the model's own.

    `output_dir` gets the adapter (PEFT's files and the tokenizer's), `exit_logits.safetensors` (of the evaluation
    rows, for more sweeps and calibrations), `report.json`, `tradeoff.png` and a card, `README.md`.

    Several processes share each batch of the training and the evaluation rows; each has to make the call. The first
    writes.

    Args:
        model: Folder or Hub repository of a classifier, of an encoder that is to become one, or of a cross-encoder.
        data: Texts, labeled or not: see `read_examples`. For ranking, the candidates of each query as the reranker
            will see them; with `settings.columns.corpus` queries alone, whose candidates BM25 finds there.
        settings: What to train, and how.

    Returns:
        What `report.json` holds; None in a process that is not the first.
    """
    ranks = settings.task == "ranking"
    settings = with_output_dir(for_ranking(settings) if ranks else settings, model)
    check_settings(settings)
    read = read_rankings if ranks else read_training_data
    report = train_on(model, *read(data, settings.columns, settings.training.seed), settings, data=data)
    if report is not None:
        tried = f"\n{form_table(report['forms'], report['metric'])}\n" if report.get("forms") else ""
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
    out = check_output_dir(settings)
    ranks = settings.task == "ranking"
    set_seed(settings.training.seed)
    base = load_base(model_name, settings, examples, new_head)
    tokenizer = load_tokenizer(local_path(settings.tokenizer or model_name), base.model, settings.max_length)
    prepare = plan_ranking if ranks else _plan
    plan = prepare(model_name, base, tokenizer, examples, eval_examples, settings)
    batch_size = plan.settings.training.batch_size
    model = add_exits(plan.base, plan.settings.exits)
    badge = get_badge_model(model)
    trainable, total = model.get_nb_trainable_parameters()
    pooling = badge.config_of().exit_pooling
    pooled = "" if plan.base.pooling is None or ranks else f"; a sentence encoder: exits pool by {pooling!r}"
    print(f"2. model: {badge.num_blocks} blocks; {trainable:,} of {total:,} parameters are trained{pooled}")
    print(f"3. training over {plan.counts[0]}, epochs: {plan.settings.training.epochs}")
    trained = plan.train(model)
    collected = collect_exit_logits(
        model,
        plan.eval_rows,
        batch_size,
        progress=True,
        split_between_processes=True,
    )

    def save() -> dict[str, Any]:
        exit_logits, facts, choose = plan.choose(model, collected)
        apart = eval_examples.split != examples.split
        report = {
            "model": model_name,
            "data": data,
            "columns": examples.columns,
            "max_length": tokenizer.model_max_length,
            "label_names": base.labels.names,
            "problem_type": base.labels.problem_type,
            "evaluation": settings.columns.eval_data
            or (f"{data}, split {eval_examples.split}" if apart else f"held out of {data}"),
            "weights_hash": exit_logits.weights_hash,
            "processes": distributed.rank_world()[1],
            "trainable_parameters": trainable,
            "settings": plan.settings.to_dict(),
            "versions": {"badge_peft": package_version(), "torch": torch.__version__},
            **facts,
            **trained,
        }
        trouble = None
        try:
            config, measured, report["notes"] = choose()
            model.set_early_exit_config(config)
            report |= measured
        except ValueError as error:
            trouble, report["notes"] = error, []
        report["calibration"] = badge.get_early_exit_config().calibration
        _install(model, tokenizer, exit_logits, report, out)
        if trouble is not None:
            raise ValueError(
                f"{trouble} The exits are trained and saved in {out}, but not calibrated: choose how they stop with "
                f"`badge-peft calibrate {out}`."
            ) from trouble
        return report

    report = distributed.on_main(save)
    if not distributed.is_main():
        return None
    config = badge.get_early_exit_config()
    print(f"4. saved to {out}; policy, calibrated on {plan.counts[1]}: {describe(config)}")
    report["full_depth_is_checkpoint"] = None
    if keeps_answers(model):
        report["full_depth_is_checkpoint"] = compare_with_checkpoint(
            model, local_path(model_name), plan.eval_rows, batch_size
        )
    timed = settings.latency and not ranks
    report["latency"] = time_rows(model, plan.eval_rows, settings.latency) if timed else None
    report["adapter_bytes"] = (out / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    title = f"{Path(model_name).name}: {report['rows']} rows"
    if not ranks and not draw(collected, config, report["metric"], out / PICTURE, title):
        print(f"   no {PICTURE}: plots need matplotlib: pip install 'badge-peft[plots]'")
    report["seconds"] = time.perf_counter() - start
    write_json(out / REPORT, report)
    write_model_card(out)
    return report


def _plan(
    model_name: str,
    base: Base,
    tokenizer: Any,
    examples: TextDataset,
    eval_examples: TextDataset,
    settings: TrainSettings,
) -> Plan:
    """Of exits that classify: the form that is chosen, and the best settings where they are searched for."""
    training = settings.training
    if training.objective != "joint" and settings.exits.keep_head is None:  # which may train the head
        settings = replace(settings, exits=replace(settings.exits, keep_head=False))
    settings = replace(settings, exits=replace(settings.exits, keep_head=keeps_head(settings.exits, base.has_head)))
    eval_rows = base.encode(eval_examples, tokenizer, scored=True)
    learns_labels = check_training(settings, base, bool(examples.labels), len(eval_rows))
    rows = base.encode(examples, tokenizer, labeled=learns_labels)
    print(f"1. data: {_data_line(rows, eval_rows, base, examples, learns_labels)}")

    metric = resolve_metric(settings.metric, base.labels.problem_type, len(base.labels.names), base.tags)
    base.model.to(choose_device(None))  # states are computed before Trainer takes the model there
    choosing = partial(choose_form, base, rows, eval_rows, tokenizer, settings, learns_labels, metric)
    states, search = None, None
    if settings.search.trials:
        wanted = Search(base, rows, tokenizer, settings, learns_labels, model_name)
        settings, forms = wanted.choose_form(choosing)
        set_seed(training.seed)
        print(f"   search: {settings.search.trials} trials for {settings.search.search_for}")
        settings, states, search = wanted.run(lambda line: print(f"   {line}", flush=True))
    else:
        settings, forms = choosing()
    set_seed(training.seed)

    def train(model: PeftModel) -> dict[str, Any]:
        found = train_exits(model, rows, tokenizer, settings.training, learns_labels, states)
        if states is not None:
            states.close()
        return found

    def chosen(model: PeftModel, found: ExitLogits) -> tuple[ExitLogits, dict[str, Any], Choose]:
        constant = None
        if found.labels is not None:
            constant = constant_answer(found, metric_of(found, settings.metric), base.labels.names)
        facts = {
            **({"task": "tokens"} if base.reads_tokens else {}),
            "train_rows": len(rows),
            "learned_from": "labels" if learns_labels else "the model's own answers",
            "constant_answer": constant,
            "forms": forms,
            "search": search,
        }
        if constant is not None and not constant["beaten"]:
            return found, facts, partial(take_full_depth, found, settings.goal, settings.metric)
        return (
            found,
            facts,
            partial(
                choose,
                found,
                settings.goal,
                settings.metric,
                measure_costs(model, eval_rows),
            ),
        )

    return Plan(
        base,
        settings,
        eval_rows,
        (f"{len(rows)} rows", f"{len(eval_rows)} evaluation rows"),
        train,
        chosen,
    )


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
    same = report["full_depth_is_checkpoint"]
    latency = report["latency"]
    if latency is not None:
        lines.append(latency_line(latency))
    if same is not None and same["equal"]:
        lines.append(f"full depth answers as the checkpoint, bit for bit (checked on {same['rows']} rows)")
    elif same is not None:
        lines.append(f"WARNING: full depth DIFFERS from the checkpoint, by up to {same['largest_difference']:.3g}")
    return "\n".join(lines)


def _install(model: PeftModel, tokenizer: Any, exit_logits: ExitLogits, report: dict[str, Any], out: Path) -> None:
    """Puts all that was made into `out` at once: what is there is of one training, whenever this process ends."""
    with TemporaryDirectory() as temporary:
        staged = Path(temporary)
        if (out / CARD).exists():  # what somebody wrote there is kept
            shutil.copyfile(out / CARD, staged / CARD)
        try:
            model.save_pretrained(temporary)
            exit_logits.save(staged / LOGITS)
        except SafetensorError as error:
            raise OSError(f"the adapter cannot be written into {temporary}: {error}") from error
        tokenizer.save_pretrained(temporary)
        write_json(staged / REPORT, report)
        # PEFT takes the config inside of the weights where it finds that of another adapter beside them
        install(staged, out, last=(SAFETENSORS_WEIGHTS_NAME, CONFIG, LOGITS, REPORT, CARD))
    (out / PICTURE).unlink(missing_ok=True)  # of another training; this one's is still to be drawn
