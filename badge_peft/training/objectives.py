"""Training objectives: which exits' losses count, at which step, and how their gradients reach the backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.early_exit.full_depth import sum_losses
from badge_peft.outputs import MultiExitOutput
from badge_peft.training.criterion import Criterion, distillation_loss
from badge_peft.training.passes import NEEDS, GradientEquilibriumPass, ImitationPass
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.losses import loss_weights
from badge_peft.utils.checks import check_choice, check_number

NOT_IN_STAGES = (
    "objective='two_stage' is not allowed with exit_type='past_future': exit M reads the weights of the exits below "
    "it, and stage 2 would move its answers. Use objective='past_future' or 'joint'."
)
GROUPS = "groups"  # the name in a batch of the query that each row belongs to


@dataclass
class Step:
    """What an objective may know about the pass that it scores."""

    exits: list[int]  # block numbers; the last is M
    logits: list[Tensor]  # one [B, K] per exit
    labels: Tensor | None  # as the loss needs them
    problem_type: str
    number: int  # optimizer steps done before this one
    output: MultiExitOutput
    criterion: Criterion = field(default_factory=Criterion)
    groups: Tensor | None = None  # [B], the query of each row, where the batch has it
    training: bool = True  # a step is made of it; else an evaluation

    def loss(self, index: int) -> Tensor:
        """Loss of one exit against the labels."""
        if self.labels is None:
            raise ValueError("this objective needs labels; without them, distil: MultiExitTrainer(distillation=1.0).")
        return self.criterion(self.logits[index], self.labels, self.problem_type)


@dataclass
class Objective:
    """Joint training (JT, Eq. 8): the weighted sum of all exits' losses.

    Args:
        weights: `uniform` (Eq. 8), `linear` (m, PABEE), a list, or None for the objective's own: `uniform`, and for
            `PastFuture` `linear`.
        distillation: Share in [0, 1] of the loss of exits below M that follows exit M's distribution and not the
            label; 1 needs no labels.
        temperature: Of the distillation.
    """

    weights: str | list[float] | None = None
    distillation: float = 0.0
    temperature: float = 1.0
    exit_pass: type[EarlyExitPass] = field(default=EarlyExitPass, repr=False)

    def __post_init__(self) -> None:
        check_number("distillation", self.distillation, lambda share: 0 <= share <= 1, "it is a share, in [0, 1]")
        check_number("temperature", self.temperature, lambda t: t > 0, "it must be positive")

    def __call__(self, step: Step) -> Tensor:
        """The loss of one batch."""
        weights = loss_weights(self.weights or "uniform", step.exits)
        losses = [self.exit(step, i) for i in range(len(step.exits))]
        kept = [(x, w) for x, w in zip(losses, weights, strict=True) if x is not None]
        return sum_losses([x for x, _ in kept], [w for _, w in kept])

    def check(self, config: BadgeConfig, exits: list[int]) -> None:
        """Refuses an adapter that it cannot train, by its config and the block numbers of its exits."""
        loss_weights(self.weights or "uniform", exits)
        if self.distillation:
            check_earlier_exits(f"distillation={self.distillation}", exits)

    def final_exit_alone(self, exits: list[int]) -> bool:
        """Whether the loss of some step is that of exit M (the last of `exits`) and no other."""
        return False

    @property
    def best_by(self) -> str:
        """The score by which checkpoints are compared, where the arguments leave it open."""
        return "s_avg"

    @property
    def reads_labels(self) -> bool:
        """Whether the loss of any exit is one against labels."""
        return self.distillation < 1

    def trains_lte_at(self, number: int) -> bool:
        """Whether learning to exit (LTE) is trained at exit `number`: where this objective trains the exit."""
        return True

    def start_loss(self, step: Step, index: int) -> Tensor | None:
        """The loss from which an exit's linear layer starts (`start_exits`); None: as it was drawn."""
        return self.exit(step, index)

    def exit(self, step: Step, index: int) -> Tensor | None:
        """Loss of one exit: label, distillation, or both; None for exit M where there is no label to learn from."""
        last = len(step.exits) - 1
        if index == last:
            return step.loss(index) if step.labels is not None and self.distillation < 1 else None
        share = self.distillation
        loss = (1 - share) * step.loss(index) if share < 1 else 0.0
        if share > 0:
            loss = loss + share * distillation_loss(
                step.logits[index], step.logits[last].detach(), step.problem_type, self.temperature
            )
        return cast(Tensor, loss)  # one of the two shares is above 0


@dataclass
class Alternating(Objective):
    """ALT (BERxiT): the final exit alone at odd optimizer steps (counted from 1), all exits at even ones and in every
    evaluation."""

    def __call__(self, step: Step) -> Tensor:
        if step.training and step.number % 2 == 0:
            return step.loss(-1)
        return super().__call__(step)

    def final_exit_alone(self, exits: list[int]) -> bool:
        return True


@dataclass
class GradientEquilibrium(Objective):
    """GradEquil (IMTA): the sum of all losses, and the gradient that reaches block m is the *mean*, not the sum, of
    the gradients of exits m..M. Source: Li et al., "Improved Techniques for Training Adaptive Deep Networks", 2019."""

    exit_pass: type[EarlyExitPass] = field(default=GradientEquilibriumPass, repr=False)


@dataclass
class PastFuture(Objective):
    """GPF: half the m-weighted mean of all losses, half the imitation loss; needs `exit_type="past_future"`."""

    exit_pass: type[EarlyExitPass] = field(default=ImitationPass, repr=False)

    def start_loss(self, step: Step, index: int) -> Tensor | None:
        return None  # an exit reads what others have left

    def __call__(self, step: Step) -> Tensor:
        weights = loss_weights(self.weights or "linear", step.exits)
        classify = sum_losses([step.loss(i) for i in range(len(step.exits))], weights)
        assert step.output.imitation_loss is not None  # by its pass
        return (classify + step.output.imitation_loss.mean()) / 2

    def check(self, config: BadgeConfig, exits: list[int]) -> None:
        if config.exit_type != "past_future":
            raise ValueError(NEEDS)
        super().check(config, exits)


@dataclass
class FinalExit(Objective):
    """One exit alone, here exit M: stage 1 of two-stage training."""

    def __call__(self, step: Step) -> Tensor:
        return step.loss(self._index(step.exits))

    def start_loss(self, step: Step, index: int) -> Tensor | None:
        return super().start_loss(step, index) if index == self._index(step.exits) else None

    def final_exit_alone(self, exits: list[int]) -> bool:
        return self._index(exits) == len(exits) - 1

    def _index(self, exits: list[int]) -> int:
        return len(exits) - 1


@dataclass
class SingleExit(FinalExit):
    """The exit after block `depth`, as if the model ended there: the paper's "single exits", one training for each."""

    depth: int = 0

    def check(self, config: BadgeConfig, exits: list[int]) -> None:
        self._index(exits)  # other exits have no weight

    def _index(self, exits: list[int]) -> int:
        if self.depth not in exits:
            raise ValueError(f"depth={self.depth} is not allowed: the model has exits at blocks {exits}.")
        return exits.index(self.depth)

    @property
    def best_by(self) -> str:
        return f"exit_{self.depth}"

    def trains_lte_at(self, number: int) -> bool:
        """At this exit alone: the loss of LTE reaches the bypass of every exit that it judges."""
        return number == self.depth


@dataclass
class EarlierExits(Objective):
    """Stage 2 of two-stage training: every exit but M, on a backbone that no longer moves. With labels as DeeBERT does
    it (Eq. 6), or with `distillation` from exit M as FastBERT does, whose teacher is not disturbed by dropout here."""

    def check(self, config: BadgeConfig, exits: list[int]) -> None:
        check_earlier_exits("objective='two_stage'", exits)
        if config.exit_type == "past_future":
            raise ValueError(NOT_IN_STAGES)
        super().check(config, exits)

    def exit(self, step: Step, index: int) -> Tensor | None:
        return None if index == len(step.exits) - 1 else super().exit(step, index)


_KINDS: dict[str, type[Objective]] = {
    "joint": Objective,
    "two_stage": FinalExit,
    "alternating": Alternating,
    "gradient_equilibrium": GradientEquilibrium,
    "past_future": PastFuture,
    "single_exit": SingleExit,
}
OBJECTIVES = tuple(_KINDS)


def make_objective(name: str, depth: int | None = None, **options: Any) -> Objective:
    """The objective called `name`; `two_stage` gives its first stage."""
    check_choice("objective", name, OBJECTIVES)
    if options.get("distillation") and name in ("single_exit", "past_future"):
        raise ValueError(
            f"distillation={options['distillation']} is not allowed with objective={name!r}, in whose loss nothing "
            "follows exit M: leave it out, or take another objective, such as 'joint'."
        )
    if name == "single_exit":
        if depth is None:
            raise ValueError("objective='single_exit' needs depth: the block number of the exit.")
        options["depth"] = depth
    return _KINDS[name](**options)


def check_earlier_exits(what: str, exits: list[int]) -> None:
    """Refuses an option that trains the exits below M where there are none."""
    if len(exits) == 1:
        raise ValueError(
            f"{what} is not allowed: it trains the exits below exit {exits[0]}, and there is no other exit. Give the "
            "adapter earlier ones (exit_layers), or train with objective='joint' and labels alone."
        )
