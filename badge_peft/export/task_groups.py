"""`TaskGroup`: tasks of one file whose rows are decided side by side, in one operation.

Eight decisions in turn are eight times as many nodes, and a node costs the same for one row as for eight. A file of
one task has one group of one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from badge_peft.export.exit_nodes import ExitNodes, Value
from badge_peft.export.graph import Graph
from badge_peft.export.policies import Decision


@dataclass(frozen=True)
class TaskGroup:
    """T tasks with the same exits and problem type, whose policies differ in threshold, patience and where rows may
    stop alone; or one task."""

    tasks: tuple[str, ...]
    decisions: tuple[Decision, ...]

    @property
    def first(self) -> Decision:
        """Says what all of them have in common."""
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
        closed = self.closed(index)
        return any(own.reads(index) and not ended for own, ended in zip(self.decisions, closed, strict=True))

    def blocks(self) -> set[int]:
        """The numbers of the blocks whose exits are read."""
        return {number for i, number in enumerate(self.first.exits) if self.reads(i)}

    def closed(self, index: int) -> np.ndarray:
        """[T] bool: the tasks that have answered every row at an exit before `index`."""
        return np.logical_or.reduce([self.final(i) for i in range(index)] or [np.zeros(len(self.tasks), dtype=bool)])

    def final(self, index: int) -> np.ndarray:
        """[T] bool: the tasks that answer every row at exit `index`."""
        return np.array([decision.policy.is_final(decision.exits, index) for decision in self.decisions])

    def able(self, index: int) -> np.ndarray:
        """[T] bool: the tasks of which rows may stop at exit `index`."""
        return np.array([decision.policy.can_exit(decision.exits, index) for decision in self.decisions])

    def stops(self, at: ExitNodes, index: int) -> Value | None:
        """[n T] bool, or [n] of one task: as `Decision.stops`, whichever of the tasks may stop here."""
        return self.first.stops(at, index, seen=sum(self.reads(i) for i in range(index + 1)))

    def allowed(self, g: Graph, stops: Value | None, index: int) -> Value:
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
