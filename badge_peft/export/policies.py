"""`Decision`: a policy for one model, in a graph that has `threshold` and `patience` as inputs; and `TaskGroup`: tasks
whose rows are decided side by side, in one operation.

A policy in numpy knows its patience and reads its score off the whole history; here the patience comes with the call,
so what is carried from exit to exit are counts. `replay` is what the nodes are tested against.

Eight decisions in turn are eight times as many nodes, and a node costs the same for one row as for eight. A file of
one task has one group of one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from badge_peft.early_exit.policies import POLICIES, ExitPolicy
from badge_peft.export.exit_nodes import ExitNodes, Value


@dataclass(frozen=True)
class Decision:
    """A policy for one model, whose exits are behind the blocks with these numbers."""

    policy: ExitPolicy
    exits: list[int]
    num_labels: int
    problem_type: str
    reads_tokens: bool = False

    def __post_init__(self) -> None:
        self.policy.check(self.exits, self.num_labels, self.problem_type)

    def check_exportable(self, learned: bool) -> None:
        """Refuses a policy that has no ONNX form, before anything is exported."""
        kind = type(self.policy)
        self.policy.check_learned(learned)
        if _depth(kind, "nodes", "score_nodes") > _depth(kind, "should_exit", "score"):
            able = [name for name, policy in POLICIES.items() if policy.nodes is not ExitPolicy.nodes]
            raise ValueError(
                f"policy={self.policy.name!r} of class {kind.__name__} cannot be exported, as the class does not say "
                f"how its decision is written as nodes: give it `nodes`, or `score_nodes`. Exportable are "
                f"{', '.join(able)}."
            )

    def reads(self, index: int) -> bool:
        """Whether anything depends on the answers of exit `index`, whatever patience a call brings: with one, any exit
        may be the first of those that agree."""
        return self.policy.counts_exits or self.policy.needs_logits(self.exits, index)

    @property
    def count_name(self) -> str:
        """What the whole number is called that comes with a call."""
        return "top_k" if self.policy.by_group else "patience"

    @property
    def count(self) -> int:
        """The config's own: t, or k where rows are the candidates of a query."""
        return self.policy.group_size if self.policy.by_group else self.policy.patience

    @property
    def uses_threshold(self) -> bool:
        """Whether the policy compares a number with a threshold."""
        return self.policy.uses_threshold(self.problem_type)

    @property
    def threshold(self) -> float | list[float]:
        """The config's own, one or one for each exit; where there is none to choose, the number in its place."""
        given = self.policy.resolve(self.num_labels, self.problem_type).threshold
        if given is None or not self.uses_threshold:
            return self.policy.threshold(self.num_labels, self.problem_type)
        return given


def _depth(kind: type, *names: str) -> int:
    """How far up its ancestors a class finds one of these methods: 0 is the class itself."""
    return min(i for i, ancestor in enumerate(kind.__mro__) if any(name in vars(ancestor) for name in names))


@dataclass(frozen=True)
class TaskGroup:
    """T tasks with the same exits and problem type, whose policies differ in threshold, patience and where rows may
    stop alone; or one task. `first` has what all have in common."""

    tasks: tuple[str, ...]
    decisions: tuple[Decision, ...]

    @property
    def first(self) -> Decision:
        return self.decisions[0]

    @property
    def num_labels(self) -> int:
        """The most labels of a task, K; those that another lacks are as good as impossible."""
        return max(decision.num_labels for decision in self.decisions)

    @property
    def has_units(self) -> bool:
        """Whether a row has several answers: of tokens, or of several tasks."""
        return self.first.reads_tokens or len(self.tasks) > 1

    def reads(self, index: int) -> bool:
        """Whether anything depends on exit `index`: something of a task that has not answered all rows before."""
        return any(
            own.reads(index) and not ended for own, ended in zip(self.decisions, self.closed(index), strict=True)
        )

    def blocks(self) -> set[int]:
        """The numbers of the blocks whose exits are read."""
        return {number for i, number in enumerate(self.first.exits) if self.reads(i)}

    def closed(self, index: int) -> np.ndarray:
        """[T] bool: the tasks that have answered every row at an exit before `index`."""
        return np.any([np.zeros(len(self.tasks), dtype=bool), *map(self.final, range(index))], axis=0)

    def final(self, index: int) -> np.ndarray:
        """[T] bool: the tasks that answer every row at exit `index`."""
        return np.array([decision.policy.is_final(decision.exits, index) for decision in self.decisions])

    def able(self, index: int) -> np.ndarray:
        """[T] bool: the tasks of which rows may stop at exit `index`."""
        return np.array([decision.policy.can_exit(decision.exits, index) for decision in self.decisions])

    def stops(self, at: ExitNodes, index: int) -> Value | None:
        """[n T] bool: what stops at exit `index`, whichever of the tasks may, by logits that can be trusted; None:
        nothing can."""
        policy, seen = self.first.policy, sum(map(self.reads, range(index + 1)))
        found = policy.nodes(at)
        trusted = at.trusts(policy.lookback(), policy.patience if policy.counts_exits else None, seen)
        return None if found is None else at.op("And", found, trusted)

    def allowed(self, g: Any, stops: Value | None, index: int) -> Value:
        """[n, T] bool, or [T]: `stops` [n T] for the tasks whose rows may stop at exit `index`, and every row of those
        that end there."""
        final, able = self.final(index), self.able(index)
        if stops is None:
            return g.constant(final)
        stops = g.op("Reshape", stops, g.ints([-1, len(self.tasks)]))
        if not able.all():
            stops = g.op("And", stops, g.constant(able))
        return g.op("Or", stops, g.constant(final)) if final.any() else stops


def grouped(decisions: Mapping[str, Decision]) -> list[TaskGroup]:
    """The tasks of a file in groups, in the order of their first tasks."""
    alike: dict[Hashable, list[str]] = {}
    for task, own in decisions.items():
        batch = None if own.reads_tokens else own.policy.batching_key(own.num_labels)
        key: Hashable = (batch, tuple(own.exits), own.problem_type)
        alike.setdefault((task,) if batch is None else key, []).append(task)
    return [TaskGroup(tuple(tasks), tuple(decisions[task] for task in tasks)) for tasks in alike.values()]
