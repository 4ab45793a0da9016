"""The trainings that an objective consists of: one, or the two of `two_stage`, each in a folder of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from badge_peft.training.arguments import OWN_FIELDS, MultiExitTrainingArguments
from badge_peft.training.objectives import EarlierExits, Objective, make_objective

_CARRY = ".carry."  # in the name of what brings earlier exits into a later one
_OF_OBJECTIVE = ("depth", "exit_weights", "distillation", "distillation_temperature")


@dataclass(frozen=True)
class Stage:
    """One training: its loss, its folder in `output_dir` ("": the whole), which of the trainable parameters it trains
    (True: those of the exits below M, False: the others, None: all), and by which score its best checkpoint is chosen
    (None: as the arguments say)."""

    objective: Objective
    folder: str = ""
    earlier_exits: bool | None = None
    metric: str | None = None

    def path(self, args: MultiExitTrainingArguments) -> str:
        """Its folder."""
        return str(Path(str(args.output_dir), self.folder))

    def arguments(self, args: MultiExitTrainingArguments, chosen_on: str | None = None) -> MultiExitTrainingArguments:
        """`args`, or a copy with the folder and the metric of the stage, which of several evaluation sets `chosen_on`
        has."""
        if not self.folder:
            return args
        own = copy.copy(args)
        own.output_dir = self.path(args)
        if self.metric is not None and args.load_best_model_at_end:
            own.metric_for_best_model = self.metric if chosen_on is None else f"{chosen_on}_{self.metric}"
            own.greater_is_better = True  # that of `args` is of their metric, which may be a loss
        return own

    def resume(self, args: MultiExitTrainingArguments, wanted: Any) -> Any:
        """`wanted`, but for True the newest whole checkpoint; None where a stage of several has none yet."""
        if wanted is not True:
            return wanted
        newest = newest_checkpoint(Path(self.path(args)))
        if newest is None and not self.folder:
            place = self.path(args)
            raise ValueError(f"there is no whole checkpoint in {place}: train without resume_from_checkpoint.")
        return newest

    @contextmanager
    def selected(self, model: nn.Module, last: int) -> Iterator[None]:
        """Of what is trainable in `model`, only what the stage trains takes gradients; M is `last`."""
        others = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and self.earlier_exits not in (None, is_earlier_exit(name, last))
        ]
        for parameter in others:
            parameter.requires_grad = False
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad = True

    def set_modes(self, model: nn.Module, last: int) -> None:
        """Where all that the exits read is frozen, it is in evaluation mode, and so is exit M, which is `last`: a
        teacher without dropout gives the same answer every time."""
        if self.earlier_exits is not True:
            return
        training = model.training
        for name, module in model.named_modules():
            module.training = training and is_earlier_exit(f"{name}.", last)


def stages_left(stages: list[Stage], args: MultiExitTrainingArguments, wanted: Any) -> list[Stage]:
    """Of several stages those that a resumed training has before it."""
    if not wanted or len(stages) == 1:
        return stages
    if wanted is True:
        reached = [newest_checkpoint(Path(stage.path(args))) is not None for stage in stages]
    else:
        reached = [stage.folder in Path(wanted).parts for stage in stages]
        if not any(reached):
            raise ValueError(
                f"resume_from_checkpoint={str(wanted)!r} is a checkpoint of no stage: name one in a folder "
                f"{' or '.join(stage.folder for stage in stages)}, or take True for the newest."
            )
    return stages[max((i for i, found in enumerate(reached) if found), default=0) :]


def newest_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in `folder` that was written whole: the state of the trainer, its last file, can be read.
    None where there is none."""
    numbered = [(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"), path) for path in folder.glob("*-*")]
    for _, path in sorted((-int(number), path) for number, path in numbered if number.isdecimal()):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def make_stages(
    args: MultiExitTrainingArguments, exit_weights: str | list[float], own: Objective | None = None
) -> list[Stage]:
    """The stages of the objective that `args` name, or of one in its place; `exit_weights` are the adapter's, for
    where `args` have none."""
    if own is not None:
        for name in _OF_OBJECTIVE:
            if getattr(args, name) != OWN_FIELDS[name]:
                raise ValueError(
                    f"{name}={getattr(args, name)!r} would be ignored: the objective is an object of your own, with "
                    f"its own options. Leave it out, and give it to {type(own).__name__}."
                )
        return [Stage(own)]
    weights = exit_weights if args.exit_weights is None else args.exit_weights
    options: dict[str, Any] = {
        # None is an objective's own: GPF weighs by depth
        "weights": None if args.objective == "past_future" and args.exit_weights is None else weights,
        "distillation": args.distillation,
        "temperature": args.distillation_temperature,
    }
    first = make_objective(args.objective, args.depth, **options)
    if args.objective != "two_stage":
        return [Stage(first)]
    return [Stage(first, "stage1", False, "final"), Stage(EarlierExits(**options), "stage2", True)]


def is_earlier_exit(name: str, last: int) -> bool:
    """Whether a parameter belongs to a bypass or an exit below M, which is `last` (or judges them, as LTE does), or
    brings them into exit M: trained without them, that would make of M's answer what they happen to start with."""
    rest = name.partition(".badge_")[2]
    return bool(rest) and (f".{last}." not in rest or _CARRY in rest)


def check_final_stays(stages: list[Stage], model: nn.Module, adapter: str, last: int) -> None:
    """Refuses a stage of the earlier exits that would move exit M, which builds on them."""
    if not any(stage.earlier_exits for stage in stages):
        return
    for name, parameter in model.named_parameters():
        if f".{adapter}.{last}." in name and _CARRY in name and parameter.any():
            raise ValueError(
                f"objective='two_stage' is not allowed for this adapter: exit {last} has learned to build on the "
                f"exits below it ({name} is not zero), and stage 2 would move its answers. Use objective='joint', or "
                "begin with a new adapter."
            )
