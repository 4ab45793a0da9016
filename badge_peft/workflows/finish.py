"""What every training ends with: a policy is chosen, and all that was made lies in the folder at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from badge_peft._version import package_version
from badge_peft.evaluation import ExitLogits
from badge_peft.hub import LOGITS
from badge_peft.model import get_badge_model
from badge_peft.model_card import CARD, CONFIG, PICTURE, REPORT
from badge_peft.utils import distributed
from badge_peft.utils.files import install, write_json
from badge_peft.workflows.base_model import Base
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.settings import TrainSettings


def finish(
    model: PeftModel,
    tokenizer: Any,
    exit_logits: ExitLogits,
    choose: Callable[[], tuple[Any, ...]],
    report: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Chooses how the exits stop, and installs the adapter with its report.

    Args:
        model: The trained one; its early-exit config is set.
        tokenizer: Of the model.
        exit_logits: Of the evaluation rows.
        choose: Gives the config, what was measured of it, and what the calibration warned of; ValueError where
            no setting will do.
        report: What is known of the training.
        out: The folder.

    Returns:
        The report with what was measured and how it was calibrated.

    Raises:
        ValueError: no setting will do. The adapter is installed nevertheless, with the policy that it had.
        OSError: `out` cannot be written; what was there is as before.
    """
    trouble, measured, notes = None, {}, []
    try:
        config, measured, notes = choose()
        model.set_early_exit_config(config)
    except ValueError as error:
        trouble = error
    report = {**report, "notes": notes, **measured}
    report["calibration"] = get_badge_model(model).get_early_exit_config().calibration
    install_adapter(model, tokenizer, exit_logits, report, out)
    if trouble is not None:
        raise ValueError(
            f"{trouble} The exits are trained and saved in {out}, but not calibrated: choose how they stop with "
            f"`badge-peft calibrate {out}`."
        ) from trouble
    return report


def report_of_training(
    model_name: str,
    data: str,
    settings: TrainSettings,
    examples: TextDataset,
    eval_examples: TextDataset,
    base: Base,
    tokenizer: Any,
    model: PeftModel,
    exit_logits: ExitLogits,
) -> dict[str, Any]:
    """What the report of every training begins with, as JSON-able values.

    Args:
        model_name: Of the base model.
        data: Where the rows are from.
        settings: As asked for.
        examples: The rows to train on, as they were read.
        eval_examples: The rows to calibrate on.
        base: The base model with its labels.
        tokenizer: Of the model.
        model: The trained one.
        exit_logits: Of the evaluation rows.
    """
    apart = eval_examples.split != examples.split
    evaluation = f"{data}, split {eval_examples.split}" if apart else f"held out of {data}"
    return {
        "model": model_name,
        "data": data,
        "columns": examples.columns,
        "max_length": tokenizer.model_max_length,
        "label_names": base.labels.names,
        "problem_type": base.labels.problem_type,
        "evaluation": settings.columns.eval_data or evaluation,
        "weights_hash": exit_logits.weights_hash,
        "processes": distributed.rank_world()[1],
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "settings": settings.to_dict(),
        "versions": {"badge_peft": package_version(), "torch": torch.__version__},
    }


def install_adapter(
    model: PeftModel, tokenizer: Any, exit_logits: ExitLogits, report: dict[str, Any], out: Path
) -> None:
    """Puts all that was made into `out` at once: what is there is of one training, whenever this process ends.

    Raises:
        OSError: it cannot be written; what was there is as before.
    """
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
