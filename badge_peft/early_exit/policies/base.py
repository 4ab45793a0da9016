"""`ExitPolicy`: one definition of when rows stop, used live, on stored logits and in an exported graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from badge_peft.early_exit.config import POLICIES, EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory, as_history

Array = np.ndarray
_DEFAULT = {name: field.default for name, field in EarlyExitConfig.__dataclass_fields__.items()}
_IN_A_LINE = (
    *("top_k", "threshold", "patience", "depth", "min_exit", "max_exit", "exit_layers", "decide_every"),
    "temperature",
)


class ExitPolicy:
    """When rows stop. A subclass says in `should_exit` which rows may; everything else has a default here.

    Whatever other parts of the library want to know of a policy they ask its class: how a sweep varies it, how it
    is called, how it is written as ONNX nodes. `register_policy` makes a subclass known by its name.

    A policy keeps no state between calls: a decision is a function of the history of exits, so the live pass and the
    replay of stored logits cannot differ.

    Args:
        config: The config; `None` takes the defaults.
        **fields: Fields of `EarlyExitConfig`, which win over `config`.
    """

    #: By which `EarlyExitConfig(policy=...)` knows it.
    name: ClassVar[str]
    #: The fields with a default other than None or False that this policy reads; all policies read the others.
    own_fields: ClassVar[tuple[str, ...]] = ()
    #: Whether several exits have to agree: as many as the field `patience` says.
    counts_exits: ClassVar[bool] = False
    #: Whether `should_exit` reads the uncertainty that a learned exit layer predicts.
    reads_uncertainty: ClassVar[bool] = False
    #: Whether the field `depth` says where rows stop.
    takes_depth: ClassVar[bool] = False
    #: What `patience=None` stands for.
    default_patience: ClassVar[int] = 1
    #: Whether `fit` has to fill in `parameters` before the policy can be built.
    needs_fit: ClassVar[bool] = False
    #: Whether rows of a group decide together, so that a row's exit depends on the others.
    by_group: ClassVar[bool] = False
    #: Whether a sweep takes it where no policies are named.
    in_default_sweep: ClassVar[bool] = False

    def __init__(self, config: EarlyExitConfig | dict[str, Any] | None = None, **fields: Any) -> None:
        if not isinstance(config, EarlyExitConfig) or fields or config.policy != self.name:
            config = EarlyExitConfig.of({**vars(EarlyExitConfig.of(config)), "policy": self.name, **fields})
        self.config = config

    # ------------------------------------------------------------------------------------------------------ decisions

    def should_exit(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: the rows that may stop at exit j (index), from the exits up to j."""
        raise NotImplementedError  # by each policy

    def is_final(self, exits: Sequence[int], j: int) -> bool:
        """Whether every row that comes to exit j (index) stops there, whatever the logits are: the last exit, or the
        last up to `max_exit`."""
        cap = self.max_exit
        return j == len(exits) - 1 or (cap is not None and exits[j + 1] > cap)

    def batching_key(self, num_labels: int) -> Hashable | None:
        """What policies have in common whose tasks an exported graph decides in one operation, each with its own
        threshold, beside the exits and the problem type; None: this policy decides by itself."""
        return None

    def can_exit(self, exits: Sequence[int], j: int) -> bool:
        """Whether a row may stop at exit j (index): not before `min_exit`, at every `decide_every`-th
        exit, and of these at `exit_layers`."""
        low, blocks = self.config.min_exit, self.config.exit_layers
        due = (j + 1) % self.config.decide_every == 0 and (low is None or exits[j] >= low)
        return (due and (blocks is None or exits[j] in blocks)) or self.is_final(exits, j)

    def lookback(self) -> int | None:
        """How many exits before j `should_exit` looks at; None: all of them."""
        return None

    def needs_logits(self, exits: Sequence[int], j: int) -> bool:
        """Whether anything depends on the logits of exit j (index): they can be an answer, or `should_exit` looks
        at them. An exit for which this is False need not be computed."""
        if self.can_exit(exits, j):
            return True
        back = self.lookback()
        readers = range(j + 1, len(exits) if back is None else min(len(exits), j + 1 + back))
        first = next((i for i in readers if self.can_exit(exits, i)), None)
        return first is not None and not self.is_final(exits, first)

    def may_stop(self, history: ExitHistory) -> bool:
        """Whether any of these rows might stop before the last exit, whatever the next exits say; where none may,
        these need not be computed."""
        return True

    def stops(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: the rows that stop at exit j (index). The last exit (or the last up to `max_exit`) answers,
        whatever its logits are."""
        if self.is_final(history.exits, j):
            return np.ones(history.rows, dtype=bool)
        if not self.can_exit(history.exits, j):
            return np.zeros(history.rows, dtype=bool)
        stops = self.should_exit(history, j)
        return stops if history.finite is None else stops & self.trusts(history, j)

    def trusts(self, history: ExitHistory, j: int) -> Array:
        """[n] bool: the rows whose logits are finite at all exits that `should_exit` looks at, exit j (index) among
        them. No other row stops: NaN and infinity say nothing."""
        back = self.lookback()
        first = 0 if back is None else max(0, j - back)
        if history.finite is None:
            return np.ones(history.rows, dtype=bool)
        return np.logical_and.reduce(history.finite[first : j + 1], axis=0)

    def replay(
        self,
        exit_logits: Any,
        exit_layers: Sequence[int] | None = None,
        problem_type: str | None = None,
        uncertainty: Any = None,
        groups: Any = None,
    ) -> torch.Tensor:
        """The block at which each row stops, from stored logits: what the live pass would have done.

        Args:
            exit_logits: [N, E, K], a tensor or array, or an `ExitLogits`, which knows the rest.
            exit_layers: Block numbers of the E exits; None means 1 to E.
            problem_type: None means regression for K = 1, else single-label classification.
            uncertainty: [N, E], what `learned` reads.
            groups: [N], an id for each row, the same for the candidates of a query: what `top_k` reads. None means one
                query.

        Returns:
            [N] long: block numbers, as in `EarlyExitOutput.exit_layer`.
        """
        history = as_history(exit_logits, exit_layers, problem_type, uncertainty, groups)
        return torch.from_numpy(self.replay_history(history))

    def replay_history(self, history: ExitHistory) -> Array:
        """[N]: as `replay`, on a history whose derived numbers are shared between calls."""
        self.check(history.exits, history.num_labels, history.problem_type)
        answer = np.full(history.rows, -1, dtype=np.int64)
        for j, block in enumerate(history.exits):
            answer[(answer < 0) & self.stops(history, j)] = block
            if (answer >= 0).all():
                break
        return answer

    # ---------------------------------------------------------------------------------------------------- its config

    @classmethod
    def check_config(cls, config: EarlyExitConfig) -> None:
        """Refuses fields that cannot be right for any model; called when a config is made.

        Raises:
            ValueError: with the field, what is allowed and the remedy.
        """

    @classmethod
    def suits(cls, problem_type: str) -> bool:
        """Whether the policy has a meaning for models of this kind."""
        return True

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses a config that cannot work for a model with these exits, before anything runs.

        Raises:
            ValueError: `min_exit`, `max_exit` or `depth` lies outside of the model.
        """
        last = exits[-1]
        cap = self.max_exit
        for name, value in (("min_exit", self.config.min_exit), ("max_exit", self.config.max_exit)):
            if value is not None and value > last:
                raise ValueError(f"{name}={value} is not allowed: the model has {last} blocks.")
        if cap is not None and cap < exits[0]:
            raise ValueError(f"max_exit={cap} is not allowed: the first exit is at block {exits[0]}.")

    def check_learned(self, learned: bool) -> None:
        """Refuses an adapter without the layer whose uncertainty `should_exit` reads.

        Args:
            learned: Whether the adapter has one (`learn_to_exit`).

        Raises:
            ValueError: it has none.
        """
        if self.reads_uncertainty and not learned:
            raise ValueError(
                f"policy={self.name!r} needs an adapter with an LTE layer: train with BadgeConfig(learn_to_exit=True)."
            )

    @property
    def max_exit(self) -> int | None:
        """The block that no row goes past."""
        return self.config.max_exit

    @property
    def patience(self) -> int:
        """t in force; 1 for a policy that does not count."""
        if not self.counts_exits:
            return 1
        return self.config.patience if self.config.patience is not None else self.default_patience

    @property
    def group_size(self) -> int:
        """How many rows of a group count, where rows decide `by_group`."""
        return 1

    def uses_threshold(self, problem_type: str) -> bool:
        """Whether the field `threshold` changes anything."""
        return False

    def threshold(self, num_labels: int, problem_type: str, j: int = 0) -> float:
        """The threshold in force at exit j (index); 0 where nothing is compared."""
        return 0.0

    def threshold_range(
        self, num_labels: int, problem_type: str, widest: float | None = None
    ) -> tuple[float, float] | None:
        """The thresholds worth trying by hand; None where there is nothing to choose.

        Args:
            num_labels: K.
            problem_type: As transformers has it.
            widest: The largest distance between two exits' values that was seen, for regression.
        """
        return None

    def resolve(self, num_labels: int, problem_type: str) -> EarlyExitConfig:
        """The config with the numbers that its open fields stand for, of those that the policy reads."""
        return replace(self.config, patience=self.patience) if self.counts_exits else self.config

    # ------------------------------------------------------------------------------------- what a sweep makes of it

    @classmethod
    def templates(cls, problem_type: str) -> list[EarlyExitConfig]:
        """The forms that `policy="auto"` tries."""
        return [EarlyExitConfig(policy=cls.name)] if cls.suits(problem_type) else []

    @classmethod
    def fit(
        cls, config: EarlyExitConfig, history: ExitHistory, labels: torch.Tensor | None, reference: int
    ) -> EarlyExitConfig:
        """`config` with its `parameters` fitted on these rows; for policies that `needs_fit`.

        Args:
            config: What is asked for.
            history: The rows, all exits seen.
            labels: Of the rows, where there are any.
            reference: Block number of the exit, from `min_exit` on, that is best on these rows.
        """
        return config

    def per_exit_forms(self, history: ExitHistory, labels: torch.Tensor | None) -> list[EarlyExitConfig]:
        """The config with numbers fitted for each exit, other than thresholds, where it leaves them open."""
        return []

    # A sweep varies the threshold; of a policy that counts exits and has no threshold, the patience.

    def variants(self, patience: Sequence[int], problem_type: str) -> list[EarlyExitConfig]:
        """The configs that a search tries, each without its threshold: with these patiences where it is left open."""
        if not self.counts_exits or self.config.patience is not None or not self.uses_threshold(problem_type):
            return [self.config]
        return [replace(self.config, patience=t) for t in patience]

    def opened(self, problem_type: str) -> EarlyExitConfig | None:
        """The config with what a sweep varies left open, all else as it is; None where it is a fixed depth."""
        patience = self.config.patience if self.uses_threshold(problem_type) else None
        return replace(self.config, threshold=None, patience=patience, calibration=None)

    def grid(self, exits: Sequence[int], problem_type: str) -> list[EarlyExitConfig] | None:
        """The settings of one variant, slow to fast; None: thresholds, as the scores on the data suggest them."""
        if self.uses_threshold(problem_type) or not self.counts_exits or self.config.patience is not None:
            return [self.config]
        return [replace(self.config, patience=t) for t in reversed(range(1, max(2, len(exits))))]

    # -------------------------------------------------------------------------------------------------------- in words

    @classmethod
    def title(cls, config: EarlyExitConfig) -> str:
        """The policy and its form: `divergence (kl)`."""
        return cls.name

    @classmethod
    def label(cls, config: EarlyExitConfig) -> str:
        """A short name of the variant, for curves and tables: `divergence-kl-consecutive t=2`."""
        own = [getattr(config, name) for name in cls.own_fields if getattr(config, name) != _DEFAULT[name]]
        form = "-".join([cls.name, *own])
        return f"{form} t={config.patience}" if cls.counts_exits and config.patience is not None else form

    @classmethod
    def fitted_numbers(cls, config: EarlyExitConfig) -> str:
        """What of `parameters` tells settings apart, for a line; empty where the other fields do."""
        return ""

    # ---------------------------------------------------------------------------------------------------------- ONNX

    def nodes(self, at: Any) -> Any:
        """[n] bool: `should_exit` as nodes of an exported graph, where threshold and patience come with the call; None
        where no row can stop. `at` is the `badge_peft.export.exit_nodes.ExitNodes` of the exit. Without it the policy
        cannot be exported."""
        raise NotImplementedError  # by those that can be exported


def describe(config: EarlyExitConfig) -> str:
    """The policy and what is set: `divergence (ce), threshold=0.2, patience=1`."""
    shown = [f"{name}={short(value)}" for name, value in _set(config).items()]
    kind = POLICIES[config.policy]
    return ", ".join(filter(None, [kind.title(config), *shown, kind.fitted_numbers(config)]))


def short(value: float | list[float] | list[int]) -> str:
    """Four digits, also of each number of a list."""
    if isinstance(value, list):
        return f"[{', '.join(map(short, value))}]"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def policy_label(config: EarlyExitConfig) -> str:
    """A short name of a policy's variant, for curves and tables: `divergence-kl-consecutive t=2`."""
    return POLICIES[config.policy].label(config)


def set_fields(config: EarlyExitConfig) -> dict[str, Any]:
    """The fields that say how a config stops, of those that its policy reads; open ones are left out."""
    own = ("policy", *POLICIES[config.policy].own_fields)
    return {name: getattr(config, name) for name in own} | _set(config)


def _set(config: EarlyExitConfig) -> dict[str, Any]:
    return {name: value for name in _IN_A_LINE if (value := getattr(config, name)) != _DEFAULT[name]}


class Schedule(NamedTuple):
    """Of a policy and E exits.

    Args:
        needed: [E], `ExitPolicy.needs_logits`.
        able: [E], `ExitPolicy.can_exit`.
        final: [E], `ExitPolicy.is_final`.
    """

    needed: tuple[bool, ...]
    able: tuple[bool, ...]
    final: tuple[bool, ...]

    @property
    def end(self) -> int:
        """The first exit (index) at which every row stops."""
        return self.final.index(True)

    @property
    def decides(self) -> bool:
        """Whether logits decide at any exit."""
        return any(self.able[: self.end])


def schedule_of(policy: ExitPolicy, exits: Sequence[int]) -> Schedule:
    """The schedule of a policy for a model with these exits, by block number."""
    if policy.config.parameters is not None:  # whatever was fitted may take longer to compare
        return _work_out(policy, tuple(exits))
    return _known(type(policy), policy.config, tuple(exits))  # type: ignore[arg-type]  # mypy: a class has no hash


@lru_cache(maxsize=1024)
def _known(kind: type[ExitPolicy], config: EarlyExitConfig, exits: tuple[int, ...]) -> Schedule:
    return _work_out(kind(config), exits)


def _work_out(policy: ExitPolicy, exits: tuple[int, ...]) -> Schedule:
    places = range(len(exits))
    return Schedule(
        tuple(policy.needs_logits(exits, j) for j in places),
        tuple(policy.can_exit(exits, j) for j in places),
        tuple(policy.is_final(exits, j) for j in places),
    )
