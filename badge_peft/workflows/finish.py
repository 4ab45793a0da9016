"""What every training does once model and rows are there: exits are added and trained, a policy is chosen, and all
that was made lies in the folder at once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from badge_peft._version import package_version
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.text import describe
from badge_peft.evaluation import ExitLogits, collect_exit_logits
from badge_peft.hub import LOGITS
from badge_peft.model import get_badge_model
from badge_peft.model_card import CARD, CONFIG, PICTURE, REPORT, write_model_card
from badge_peft.utils import distributed
from badge_peft.utils.files import install, write_json
from badge_peft.workflows.base_model import Base, add_exits, keeps_answers, local_path
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import compare_with_checkpoint, time_rows
from badge_peft.workflows.report import draw
from badge_peft.workflows.settings import TrainSettings

Choose = Callable[[], tuple[EarlyExitConfig, dict[str, Any], list[str]]]


def train_and_save(
    model_name: str,
    data: str,
    settings: TrainSettings,
    examples: TextDataset,
    eval_examples: TextDataset,
    base: Base,
    tokenizer: Any,
    eval_rows: Dataset,
    counts: tuple[str, str],
    train: Callable[[PeftModel], dict[str, Any]],
    choose: Callable[[PeftModel, ExitLogits], tuple[ExitLogits, dict[str, Any], Choose]],
    start: float,
) -> dict[str, Any] | None:
    """Trains exits on a model that is loaded, saves and measures them; the report, None in a process that is not the
    first.

    Args:
        model_name, data: As they were asked for.
        settings: With what was found out of model and rows.
        examples, eval_examples: The rows to train on, and to evaluate and calibrate on, as they were read.
        base, tokenizer: The model.
        eval_rows: Of the evaluation examples, encoded.
        counts: What is trained and calibrated on, in words.
        train: Trains a model; what the report says of it.
        choose: From the exit logits of the evaluation rows these with all that belongs to them, what the report says,
            and a function for the config, what was measured of it, and what the calibration warned of. Where that
            raises ValueError, the adapter is saved with the policy that it has.
        start: When this began.
    """
    apart = eval_examples.split != examples.split
    evaluation = f"{data}, split {eval_examples.split}" if apart else f"held out of {data}"
    options, ranks, out = settings.training, settings.task == "ranking", Path(str(settings.output_dir))
    model = add_exits(base, settings.exits)
    badge = get_badge_model(model)
    trainable, total = model.get_nb_trainable_parameters()
    pooling = badge.config_of().exit_pooling
    pooled = "" if base.pooling is None or ranks else f"; a sentence encoder: exits pool by {pooling!r}"
    print(f"2. model: {badge.num_blocks} blocks; {trainable:,} of {total:,} parameters are trained{pooled}")
    print(f"3. training over {counts[0]}, epochs: {options.epochs}")
    trained = train(model)
    collected = collect_exit_logits(model, eval_rows, options.batch_size, progress=True, split_between_processes=True)

    def save() -> dict[str, Any]:
        exit_logits, facts, chosen = choose(model, collected)
        report = {
            "model": model_name,
            "data": data,
            "columns": examples.columns,
            "max_length": tokenizer.model_max_length,
            "label_names": base.labels.names,
            "problem_type": base.labels.problem_type,
            "evaluation": settings.columns.eval_data or evaluation,
            "weights_hash": exit_logits.weights_hash,
            "processes": distributed.rank_world()[1],
            "trainable_parameters": trainable,
            "settings": settings.to_dict(),
            "versions": {"badge_peft": package_version(), "torch": torch.__version__},
            **facts,
            **trained,
        }
        trouble = None
        try:
            config, measured, report["notes"] = chosen()
            model.set_early_exit_config(config)
            report |= measured
        except ValueError as error:
            trouble, report["notes"] = error, []
        report["calibration"] = badge.get_early_exit_config().calibration
        install_adapter(model, tokenizer, exit_logits, report, out)
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
    print(f"4. saved to {out}; policy, calibrated on {counts[1]}: {describe(config)}")
    same = keeps_answers(model)
    report["full_depth_is_checkpoint"] = (
        compare_with_checkpoint(model, local_path(model_name), eval_rows, options.batch_size) if same else None
    )
    timed = settings.latency and not ranks
    report["latency"] = time_rows(model, eval_rows, settings.latency) if timed else None
    report["adapter_bytes"] = (out / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    title = f"{Path(model_name).name}: {report['rows']} rows"
    if not ranks and not draw(collected, config, report["metric"], out / PICTURE, title):
        print(f"   no {PICTURE}: plots need matplotlib: pip install 'badge-peft[plots]'")
    report["seconds"] = time.perf_counter() - start
    write_json(out / REPORT, report)
    write_model_card(out)
    return report


def install_adapter(
    model: PeftModel, tokenizer: Any, exit_logits: ExitLogits, report: dict[str, Any], out: Path
) -> None:
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
