"""The early-exit graph of many tasks: the flat chain of `chain.py`, which ends when every task has answered every row.

Tasks that decide alike do so side by side, in a `TaskGroup`, as tokens of a row do: of T tasks the graph has answers
[B, T, K] and exits [B, T], and a policy sees n T rows. A row is taken out when its last task has answered; until then
the exits of all tasks are computed for it, as an `If` around each of them would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from badge_peft.export.chain import Chain, in_int8
from badge_peft.export.exit_nodes import ExitNodes
from badge_peft.export.folder import LARGEST_PATIENCE
from badge_peft.export.graph import FLOAT, INT64, Graph
from badge_peft.export.pieces import LEFT
from badge_peft.export.policies import Decision
from badge_peft.export.task_groups import TaskGroup, grouped, inner_names
from badge_peft.export.tokens import (
    asked_tokens,
    by_row,
    by_token,
    by_tokens_of,
    least_answered,
    no_answers,
    note_answers,
    special_input,
)
from badge_peft.export.trace import ExportedBlocks


def assemble_tasks(pieces: ExportedBlocks, decisions: Mapping[str, Decision], *, int8: bool) -> onnx.ModelProto:
    """The graph, from `input_ids`, `attention_mask` (, `token_type_ids`) and for each task `<task>.threshold` and
    `<task>.patience`, which may be left out, to `<task>.logits` and `<task>.exit_layer`.

    Args:
        pieces: Of the model, with the exits of all tasks.
        decisions: The policy of each task.
        int8: Quantize the blocks; exits and decisions stay in float32.
    """
    inputs = [ir.val(name, INT64, ["batch", "sequence"]) for name in pieces.inputs]
    chain = TaskChain(decisions, inputs, {*pieces.inputs, *pieces.per_row})
    for number, piece in pieces.graphs.items():
        chain.add(number, in_int8(piece) if int8 else [piece])
    chain.part_groups()
    return chain.model()


class TaskChain(Chain):
    """Puts pieces into a graph one after another, for many tasks.

    Args:
        decisions: By task.
        inputs: Of the graph; each has a row per input.
        per_row: As for `Chain`.
    """

    def __init__(self, decisions: Mapping[str, Decision], inputs: Sequence[ir.Value], per_row: set[str]) -> None:
        self.decisions, self.per_row = dict(decisions), per_row
        self.groups = grouped(decisions)
        self.inner = inner_names(group.tasks for group in self.groups)
        self.graph = g = Graph("main")
        self.thresholds = {task: ir.val(f"{task}.threshold", FLOAT, []) for task in decisions}
        self.patiences = {task: ir.val(f"{task}.patience", INT64, []) for task in decisions}
        g.body.inputs.extend([*inputs, *self.thresholds.values(), *self.patiences.values()])
        self.outer = {str(value.name): value for value in inputs}
        rows = g.op("Shape", inputs[0], start=0, end=1)
        self.carried = {}
        #: Threshold and patience of each group that is one task.
        self.limits: dict[str, tuple[ir.Value, ir.Value]] = {}
        asked = None
        if any(decision.reads_tokens for decision in decisions.values()):
            g.body.inputs.insert(len(inputs), special := special_input())
            asked = asked_tokens(g, self.outer["attention_mask"], special)
        for group in self.groups:
            self._begin(group, rows, asked)
        self.answers = tuple(name for name in self.carried if not name.startswith("kept_"))
        self.open = [*self.groups]  # those that have not answered all rows before
        numbers = g.op("Range", g.ints(0), g.op("Squeeze", rows), g.ints(1))
        self.carried["rows"] = g.shaped(numbers, [None])

    def _begin(self, group: TaskGroup, rows: ir.Value, asked: ir.Value | None) -> None:
        """The answers before any row has its own; thresholds and patiences, of several tasks [B T]."""
        g, name, count = self.graph, self._name(group), len(group.tasks)
        limits = [self._limit_of(task) for task in group.tasks]
        patiences = [self.patiences[task] for task in group.tasks]
        units = rows if count == 1 else g.op("Concat", rows, g.ints([count]), axis=0)
        if count == 1:
            self.limits[name] = limits[0], patiences[0]
        else:
            for kind, values in (("threshold", limits), ("patience", patiences)):
                side = g.op("Concat", *(g.op("Unsqueeze", value, g.ints([0])) for value in values), axis=0)
                flat = g.op("Reshape", g.op("Expand", side, units), g.ints([-1]))
                self.carried[f"kept_{name}.{kind}"] = g.shaped(flat, [None])
        if asked is not None and group.first.reads_tokens:
            answers = no_answers(g, asked, group.num_labels)
        else:
            wide = g.op("Concat", units, g.ints([group.num_labels]), axis=0)
            answers = g.op("Expand", g.floats(0), wide), g.op("Expand", g.ints(-1), units)
        self.carried[f"{name}.answer"], self.carried[f"{name}.exit_layer"] = answers

    def _name(self, group: TaskGroup) -> str:
        """What a group is called in the graph: as its first task."""
        return self.inner[group.tasks[0]]

    def _limit_of(self, task: str) -> ir.Value:
        """The threshold of a task."""
        decision = self.decisions[task]
        return self.thresholds[task] if decision.uses_threshold else self.graph.floats(decision.threshold)

    def part_groups(self) -> None:
        """Once all pieces are there: each task's own answers, out of those of its group."""
        g = self.graph
        for group in self.groups:
            if len(group.tasks) == 1:
                continue
            answer, exits = (self.carried[f"{self._name(group)}.{kind}"] for kind in ("answer", "exit_layer"))
            for i, (task, decision) in enumerate(zip(group.tasks, group.decisions, strict=True)):
                own = g.op("Gather", answer, g.ints(i), axis=1)
                if decision.num_labels < group.num_labels:
                    own = g.op("Slice", own, g.ints([0]), g.ints([decision.num_labels]), g.ints([1]))
                self.carried[f"{self.inner[task]}.answer"] = own
                self.carried[f"{self.inner[task]}.exit_layer"] = g.op("Gather", exits, g.ints(i), axis=1)

    def outputs(self) -> list[tuple[str, str, Any]]:
        """What is carried, the name that it has as an output, and its dimensions; in the order of the inputs."""
        return [
            (f"{self.inner[task]}.{kind}", f"{task}.{name}", ir.Shape(dims))
            for task, decision in self.decisions.items()
            for kind, name, dims in _dims(decision)
        ]

    def defaults(self) -> list[tuple[ir.Value, Any]]:
        """Inputs that may be left out, with their values."""
        found: list[tuple[ir.Value, Any]] = []
        for task, decision in self.decisions.items():
            found.append((self.thresholds[task], np.asarray(decision.threshold, dtype=np.float32)))
            found.append((self.patiences[task], np.int64(min(decision.policy.patience, LARGEST_PATIENCE))))
        return found

    def decide(self, g: Graph, number: int, made: dict[str, ir.Value]) -> bool:
        """The decisions of all tasks at block `number`; returns whether all rows have all answers then."""
        answered = False
        for group in [*self.open]:
            exits = group.first.exits
            if number in exits and group.reads(index := exits.index(number)):
                answered = self._decide(g, number, group, index, made) or answered
        if not self.open:
            return True
        if answered:
            self._take_out(g)
        return False

    def _decide(self, g: Graph, number: int, group: TaskGroup, index: int, made: dict[str, ir.Value]) -> bool:
        """The decision of one group; returns whether rows may have got an answer."""
        given, final = made[f"{self._name(group)}.logits"], group.final(index)
        stops = None
        if (final | group.closed(index)).all():
            self.open.remove(group)
        else:
            stops = self._stops(g, group, index, made)
            if not (final | group.able(index)).any() or (stops is None and not final.any()):
                return False
            if len(group.tasks) > 1:
                stops = group.allowed(g, stops, index)
        answer, exits = (self.carried[f"{self._name(group)}.{kind}"] for kind in ("answer", "exit_layer"))
        if group.first.reads_tokens and stops is not None:
            stops = by_row(g, stops, exits)
        noted = note_answers(g, number, given, stops, answer, exits, self.carried["rows"])
        self.carried[f"{self._name(group)}.answer"], self.carried[f"{self._name(group)}.exit_layer"] = noted
        return True

    def _stops(self, g: Graph, group: TaskGroup, index: int, made: dict[str, ir.Value]) -> ir.Value | None:
        """What the policy says of each row, token, or row of each task; None: none can stop."""
        name, several, labels = self._name(group), len(group.tasks) > 1, group.num_labels
        if several or group.first.reads_tokens:
            made = by_token(g, made, f"{name}.", labels)
        prefix = f"kept_{name}."
        state = {f"kept_{k.removeprefix(prefix)}": v for k, v in self.carried.items() if k.startswith(prefix)}
        threshold, patience = self.limits.get(name) or (state.pop("kept_threshold"), state.pop("kept_patience"))
        at = ExitNodes(
            g,
            index,
            made[f"{name}.logits"],
            made.get(f"{name}.uncertainty"),
            state,
            threshold,
            patience,
            labels,
            group.first.problem_type,
            by_row=several,
        )
        stops = group.stops(at, index)
        self.carried |= {prefix + k.removeprefix("kept_"): v for k, v in state.items()}
        return stops

    def _take_out(self, g: Graph) -> None:
        """Goes on with the rows that lack an answer alone."""
        least, *others = [self._least(g, group) for group in self.open]
        for other in others:
            least = g.op("Min", least, other)
        going = g.op("Less", g.op("Gather", least, self.carried["rows"], axis=0), g.ints(0))
        for group in self.open:
            prefix = f"kept_{self._name(group)}."
            own = {name: value for name, value in self.carried.items() if name.startswith(prefix)}
            if own:
                units = (
                    by_tokens_of(g, going, self.carried[f"{self._name(group)}.exit_layer"])
                    if _has_units(group)
                    else going
                )
                self._keep(g, own, units)
        of_rows = {k: v for k, v in self.carried.items() if k in ("hidden", "rows") or k.startswith(LEFT)}
        self._keep(g, of_rows, going)
        self.carried["done"] = g.op("Equal", g.op("Size", self.carried["rows"]), g.ints(0))

    def _keep(self, g: Graph, values: Mapping[str, ir.Value], which: ir.Value) -> None:
        for name, value in values.items():
            self.carried[name] = g.shaped(g.op("Compress", value, which, axis=0), value.shape)

    def _least(self, g: Graph, group: TaskGroup) -> ir.Value:
        """[B]: below 0 where a row lacks an answer of the group."""
        exits = self.carried[f"{self._name(group)}.exit_layer"]
        return least_answered(g, exits) if _has_units(group) else exits


def _has_units(group: TaskGroup) -> bool:
    """Whether a row has several answers: of tokens, or of several tasks."""
    return group.first.reads_tokens or len(group.tasks) > 1


def _dims(decision: Decision) -> list[tuple[str, str, list[int | str]]]:
    """What is carried for a task, the name of the output that it becomes, and its dimensions."""
    rows: list[int | str] = ["batch", "sequence"] if decision.reads_tokens else ["batch"]
    return [("answer", "logits", [*rows, decision.num_labels]), ("exit_layer", "exit_layer", rows)]
