"""The early-exit graph of many tasks: the flat chain of `chain.py`, which ends when every task has answered every row.

Each task has its own answers, thresholds and state of its policy. A row is taken out when its last task has answered;
until then the exits of all tasks are computed for it, as an `If` around each of them would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from badge_peft.early_exit.policies.nodes import ExitNodes
from badge_peft.export.chain import Chain, in_int8
from badge_peft.export.graph import FLOAT, INT64, Graph
from badge_peft.export.policies import Decision
from badge_peft.export.runtime import LARGEST_PATIENCE
from badge_peft.export.tokens import (
    asked_tokens,
    by_token,
    by_tokens_of,
    least_answered,
    no_answers,
    note_answers,
    special_input,
)
from badge_peft.export.trace import ExportedBlocks

OUTPUTS = ("logits", "exit_layer")


def assemble_tasks(
    pieces: ExportedBlocks, decisions: Mapping[str, Decision], *, int8: bool, compact: bool
) -> onnx.ModelProto:
    """The graph, from `input_ids`, `attention_mask` (, `token_type_ids`) and for each task `<task>.threshold` and
    `<task>.patience`, which may be left out, to `<task>.logits` and `<task>.exit_layer`.

    Args:
        pieces: Of the model, with the exits of all tasks.
        decisions: The policy of each task.
        int8: Quantize the blocks; exits and decisions stay in float32.
        compact: Take rows that all tasks have answered out of the batch.
    """
    inputs = [ir.val(name, INT64, ["batch", "sequence"]) for name in pieces.inputs]
    chain = TaskChain(decisions, inputs, {*pieces.inputs, *pieces.per_row}, compact=compact)
    for number, piece in pieces.graphs.items():
        chain.add(number, in_int8(piece) if int8 else [piece])
    return chain.model()


class TaskChain(Chain):
    """Puts pieces into a graph one after another, for many tasks.

    Args:
        decisions: By task.
        inputs: Of the graph; each has a row per input.
        per_row: As for `Chain`.
        compact: Whether rows that have all answers are taken out.
    """

    def __init__(
        self, decisions: Mapping[str, Decision], inputs: Sequence[ir.Value], per_row: set[str], *, compact: bool
    ) -> None:
        self.decisions, self.per_row, self.compact = dict(decisions), per_row, compact
        self.graph = g = Graph("main")
        self.thresholds = {task: ir.val(f"{task}.threshold", FLOAT, []) for task in decisions}
        self.patiences = {task: ir.val(f"{task}.patience", INT64, []) for task in decisions}
        g.body.inputs.extend([*inputs, *self.thresholds.values(), *self.patiences.values()])
        self.outer = {str(value.name): value for value in inputs}
        rows = g.op("Shape", inputs[0], start=0, end=1)
        self.carried = {}
        self.limits: dict[str, ir.Value] = {}
        asked = None
        if any(decision.reads_tokens for decision in decisions.values()):
            g.body.inputs.insert(len(inputs), special := special_input())
            asked = asked_tokens(g, self.outer["attention_mask"], special)
        for task, decision in decisions.items():
            shape = g.op("Concat", rows, g.ints([decision.num_labels]), axis=0)
            answers = g.op("Expand", g.floats(0), shape), g.op("Expand", g.ints(-1), rows)
            if decision.reads_tokens:
                assert asked is not None
                answers = no_answers(g, asked, decision.num_labels)
            self.carried[f"{task}.answer"], self.carried[f"{task}.exit_layer"] = answers
            own = self.thresholds[task]
            self.limits[task] = g.op("Mul", own, g.floats(decision.unit)) if decision.unit != 1 else own
        self.answers = tuple(self.carried)
        self.open = list(decisions)  # tasks that do not answer all rows before
        if compact:
            numbers = g.op("Range", g.ints(0), g.op("Squeeze", rows), g.ints(1))
            self.carried["rows"] = g.shaped(numbers, [None])

    def outputs(self) -> list[tuple[str, str, Any]]:
        """What is carried, the name that it has as an output, and its dimensions."""
        return [
            (f"{task}.{kind}", f"{task}.{name}", ir.Shape(dims))
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
        for task in [*self.open]:
            decision = self.decisions[task]
            if number in decision.exits and decision.reads(index := decision.exits.index(number)):
                answered = self._decide(g, number, task, decision, index, made) or answered
        if not self.open:
            return True
        if answered:
            self._take_out(g)
        return False

    def _decide(
        self, g: Graph, number: int, task: str, decision: Decision, index: int, made: dict[str, ir.Value]
    ) -> bool:
        """The decision of one task; returns whether rows may have got their answer."""
        policy, last = decision.policy, decision.policy.is_final(decision.exits, index)
        if decision.reads_tokens:
            made = by_token(g, made, f"{task}.", decision.num_labels)
        logits, stops = made[f"{task}.logits"], None
        if last:
            self.open.remove(task)
        else:
            prefix = f"kept_{task}."
            state = {f"kept_{k.removeprefix(prefix)}": v for k, v in self.carried.items() if k.startswith(prefix)}
            at = ExitNodes(
                g,
                index,
                logits,
                made.get(f"{task}.uncertainty"),
                state,
                self.limits[task] if decision.uses_threshold else g.floats(decision.threshold),
                self.patiences[task],
                decision.num_labels,
                decision.problem_type,
            )
            stops = decision.stops(at, index)
            self.carried |= {prefix + k.removeprefix("kept_"): v for k, v in state.items()}
            if stops is None or not policy.can_exit(decision.exits, index):
                return False
        self._store(g, number, task, logits, stops)
        return True

    def _store(self, g: Graph, number: int, task: str, logits: ir.Value, stops: ir.Value | None) -> None:
        """Notes the answers of the rows in the states that stop, None: all, and had none of this task."""
        answer, exits = self.carried[f"{task}.answer"], self.carried[f"{task}.exit_layer"]
        rows = self.carried.get("rows")
        if self.decisions[task].reads_tokens:
            noted = note_answers(g, number, logits, stops, answer, exits, rows)
            self.carried[f"{task}.answer"], self.carried[f"{task}.exit_layer"] = noted
            return
        newly = g.op("Less", exits if rows is None else g.op("Gather", exits, rows, axis=0), g.ints(0))
        if stops is not None:
            newly = g.op("And", newly, stops)
        if rows is None:
            self.carried[f"{task}.answer"] = g.op("Where", g.op("Unsqueeze", newly, g.ints([1])), logits, answer)
            self.carried[f"{task}.exit_layer"] = g.op("Where", newly, g.ints(number), exits)
            return
        leaving = g.op("Compress", rows, newly, axis=0)
        places = g.op("Unsqueeze", leaving, g.ints([1]))
        numbers = g.op("Expand", g.ints(number), g.op("Shape", leaving))
        self.carried[f"{task}.answer"] = g.op("ScatterND", answer, places, g.op("Compress", logits, newly, axis=0))
        self.carried[f"{task}.exit_layer"] = g.op("ScatterND", exits, places, numbers)

    def _take_out(self, g: Graph) -> None:
        """Finds out which rows lack an answer, and with `compact` goes on with these alone."""
        least, *others = [self._least(g, task) for task in self.open]
        for other in others:
            least = g.op("Min", least, other)
        if not self.compact:
            lowest = g.op("ReduceMin", least, g.ints([0]), keepdims=0)
            self.carried["done"] = g.op("GreaterOrEqual", lowest, g.ints(0))
            return
        going = g.op("Less", g.op("Gather", least, self.carried["rows"], axis=0), g.ints(0))
        tokens = [task for task, decision in self.decisions.items() if decision.reads_tokens]
        of_tokens = by_tokens_of(g, going, self.carried[f"{tokens[0]}.exit_layer"]) if tokens else going
        for name, value in self.carried.items():
            if name not in (*self.answers, "done"):
                kept = of_tokens if name.startswith(tuple(f"kept_{task}." for task in tokens)) else going
                self.carried[name] = g.shaped(g.op("Compress", value, kept, axis=0), value.shape)
        self.carried["done"] = g.op("Equal", g.op("Size", self.carried["rows"]), g.ints(0))

    def _least(self, g: Graph, task: str) -> ir.Value:
        """[B]: below 0 where a row lacks an answer of the task."""
        exits = self.carried[f"{task}.exit_layer"]
        return least_answered(g, exits) if self.decisions[task].reads_tokens else exits


def _dims(decision: Decision) -> list[tuple[str, str, list[int | str]]]:
    """What is carried for a task, the name of the output that it becomes, and its dimensions."""
    rows: list[int | str] = ["batch", "sequence"] if decision.reads_tokens else ["batch"]
    return [("answer", "logits", [*rows, decision.num_labels]), ("exit_layer", "exit_layer", rows)]
