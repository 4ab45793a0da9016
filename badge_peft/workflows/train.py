"""`train_adapter`: from a model and a file of texts to a calibrated adapter. What `badge-peft train` does."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
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
from badge_peft.workflows.base_model import add_exits, keeps_answers, load_base, local_path
from badge_peft.workflows.calibrate import choose, take_full_depth
from badge_peft.workflows.encode import load_tokenizer
from badge_peft.workflows.evaluate import compare_with_checkpoint, constant_answer, metric_of, time_rows, with_queries
from badge_peft.workflows.plans import Plan, plan_exits, plan_ranking
from badge_peft.workflows.report import checks, draw, form_table, measured_table, summary, warning
from badge_peft.workflows.settings import TrainSettings
from badge_peft.workflows.splits import read_training_data
from badge_peft.workflows.validate import check_settings, with_output_dir


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
    start = time.perf_counter()
    ranks = settings.task == "ranking"
    settings = with_output_dir(check_settings(settings), model)
    out = Path(str(settings.output_dir))
    examples, eval_examples = read_training_data(data, settings.columns, settings.training.seed, ranks)
    set_seed(settings.training.seed)
    base = load_base(model, settings, examples)
    tokenizer = load_tokenizer(local_path(settings.tokenizer or model), base.model, settings.max_length)
    prepare = plan_ranking if ranks else plan_exits
    plan = prepare(model, base, tokenizer, examples, eval_examples, settings)
    batch_size = plan.settings.training.batch_size
    exits = add_exits(plan.base, plan.settings.exits)
    badge = get_badge_model(exits)
    trainable, total = exits.get_nb_trainable_parameters()
    pooling = badge.config_of().exit_pooling
    pooled = "" if plan.base.pooling is None or ranks else f"; a sentence encoder: exits pool by {pooling!r}"
    print(f"2. model: {badge.num_blocks} blocks; {trainable:,} of {total:,} parameters are trained{pooled}")
    print(f"3. training over {plan.counts[0]}, epochs: {plan.settings.training.epochs}")
    trained = plan.train(exits)
    collected = collect_exit_logits(exits, plan.eval_rows, batch_size, progress=True, split_between_processes=True)
    apart = eval_examples.split != examples.split
    report = {
        "model": model,
        "data": data,
        "columns": examples.columns,
        "max_length": tokenizer.model_max_length,
        "label_names": base.labels.names,
        "problem_type": base.labels.problem_type,
        "evaluation": settings.columns.eval_data
        or (f"{data}, split {eval_examples.split}" if apart else f"held out of {data}"),
        "processes": distributed.rank_world()[1],
        "trainable_parameters": trainable,
        "settings": plan.settings.to_dict(),
        "versions": {"badge_peft": package_version(), "torch": torch.__version__},
        **plan.facts,
        **trained,
    }
    exit_logits = with_queries(collected, eval_examples) if ranks else collected
    report = distributed.on_main(lambda: _calibrate_and_save(exits, tokenizer, plan, exit_logits, report, out))
    if not distributed.is_main():
        return None
    config = badge.get_early_exit_config()
    print(f"4. saved to {out}; policy, calibrated on {plan.counts[1]}: {describe(config)}")
    same = None
    if keeps_answers(exits):
        same = compare_with_checkpoint(exits, local_path(model), plan.eval_rows, batch_size)
    timed = settings.latency and not ranks
    report["full_depth_is_checkpoint"] = same
    report["latency"] = time_rows(exits, plan.eval_rows, settings.latency) if timed else None
    report["adapter_bytes"] = (out / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    title = f"{Path(model).name}: {report['rows']} rows"
    if not ranks and not draw(collected, config, report["metric"], out / PICTURE, title):
        print(f"   no {PICTURE}: plots need matplotlib: pip install 'badge-peft[plots]'")
    report["seconds"] = time.perf_counter() - start
    write_json(out / REPORT, report)
    write_model_card(out)
    tried = f"\n{form_table(report['forms'], report['metric'])}\n" if report.get("forms") else ""
    print(f"{tried}\n{warning(report)}{measured_table(report)}\n\n{summary(report)}\n{checks(report)}")
    return report


def _calibrate_and_save(
    model: PeftModel, tokenizer: Any, plan: Plan, exit_logits: ExitLogits, report: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Chooses how to stop and saves everything; where nothing can be chosen, everything with the policy that is there,
    before the error."""
    settings, trouble = plan.settings, None
    metric = metric_of(exit_logits, settings.metric)
    constant = None
    if exit_logits.groups is None and exit_logits.labels is not None:
        constant = constant_answer(exit_logits, metric, plan.base.labels.names)
    report |= {"weights_hash": exit_logits.weights_hash, "constant_answer": constant, "notes": []}
    try:
        if constant is not None and not constant["beaten"]:
            config, measured, report["notes"] = take_full_depth(exit_logits, settings.goal, metric)
        else:
            costs = None if exit_logits.groups is not None else measure_costs(model, plan.eval_rows)
            config, measured, report["notes"] = choose(exit_logits, settings.goal, settings.metric, costs)
        model.set_early_exit_config(config)
        report |= measured
    except ValueError as error:
        trouble = error
    report["calibration"] = get_badge_model(model).get_early_exit_config().calibration
    _install(model, tokenizer, exit_logits, report, out)
    if trouble is not None:
        raise ValueError(
            f"{trouble} The exits are trained and saved in {out}, but not calibrated: choose how they stop with "
            f"`badge-peft calibrate {out}`."
        ) from trouble
    return report


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
