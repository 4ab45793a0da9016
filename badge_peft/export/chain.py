"""The early-exit graph: a flat chain of `If`, one per block, which hands a stub on or computes the block.

    embeddings -> If(done) {} else {block 1, exit 1, decision} -> If(done) {} else {block 2, ...} -> ... -> answers

Nothing nests, so that the runtime packs each block's weights once, when it loads the file. Blocks behind the exit are
not computed: their branch hands on the answers, and empty stubs in place of the states.

Rows that have all their answers are taken out of the states and of everything that has a row per input. Tasks that
decide alike do so side by side, in a `TaskGroup`, as tokens of a row do: T tasks have answers [B, T, K] and exits [B,
T], and a policy sees n T rows. Until a row's last task has answered the exits of all are computed for it, as an `If`
around each of them would cost more than it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.convenience import extract
from onnx_ir.passes.common import DeduplicateHashedInitializersPass, RemoveUnusedNodesPass

from badge_peft.evaluation.collate import SPECIAL
from badge_peft.export.exit_nodes import ExitNodes
from badge_peft.export.folder import LARGEST_PATIENCE
from badge_peft.export.graph import FLOAT, INT64, IR_VERSION, Graph, quantize
from badge_peft.export.pieces import BEFORE, FOLLOWING, LEFT, inner_names
from badge_peft.export.policies import Decision
from badge_peft.export.task_groups import TaskGroup, grouped
from badge_peft.export.units import (
    asked_tokens,
    by_row,
    by_tokens_of,
    by_unit,
    least_answered,
    no_answers,
    note_answers,
)

ANSWERS = ("answer", "exit_layer")


class Chain:
    """Puts pieces into a graph one after another.

    Args:
        decisions: By task; of a file of one task, that of `ALONE`.
        inputs: Of the graph; each has a row per input.
        per_row: Names of these, and of what the embeddings share, that have one row per input.
    """

    def __init__(self, decisions: Mapping[str, Decision], inputs: Sequence[ir.Value], per_row: set[str]) -> None:
        self.decisions, self.per_row = dict(decisions), per_row
        self.groups = grouped(decisions)
        self.inner = inner_names(group.tasks for group in self.groups)
        self.graph = g = Graph("main")
        self.thresholds = {
            task: ir.val(_outer(task) + "threshold", FLOAT, list(np.shape(own.threshold)))
            for task, own in decisions.items()
        }
        self.counts = {task: ir.val(_outer(task) + own.count_name, INT64, []) for task, own in decisions.items()}
        #: What pieces may read, beside the states.
        self.outer = {str(value.name): value for value in inputs}
        g.body.inputs.extend(inputs)
        asked = None
        if any(own.reads_tokens for own in decisions.values()):
            special = ir.val(SPECIAL, INT64, ["batch", "sequence"])
            g.body.inputs.append(special)
            asked = asked_tokens(g, self.outer["attention_mask"], special)
        g.body.inputs.extend([*self.thresholds.values(), *self.counts.values()])
        rows = g.op("Shape", inputs[0], start=0, end=1)
        #: What goes from block to block: the answers [B, K] and [B], the states, the numbers of the rows that still go
        #: on, whether there are none (from the first exit on), what policies keep, and what exits leave for others.
        self.carried: dict[str, ir.Value] = {}
        for group in self.groups:
            self._begin(group, rows, asked)
        #: Of what is carried, what the graph gives in the end.
        self.answers = tuple(name for name in self.carried if not name.startswith("kept_"))
        self.open = [*self.groups]  # those that have not answered all rows before
        #: Whether rows that stop are rows that leave.
        self.leaves_at_once = len(self.groups) == 1 and not self.groups[0].has_units
        numbers = g.op("Range", g.ints(0), g.op("Squeeze", rows), g.ints(1))
        self.carried["rows"] = g.shaped(numbers, [None])

    def _begin(self, group: TaskGroup, rows: ir.Value, asked: ir.Value | None) -> None:
        """The answers before any row has its own; of several tasks also thresholds and patiences, [B T]."""
        g, name, count = self.graph, self._name(group), len(group.tasks)
        units = rows
        if count > 1:
            units = g.op("Concat", rows, g.ints([count]), axis=0)
            limits = {
                "threshold": [self._threshold(g, task) for task in group.tasks],
                "patience": [self.counts[task] for task in group.tasks],
            }
            for kind, values in limits.items():
                side = g.op("Concat", *(g.op("Unsqueeze", value, g.ints([0])) for value in values), axis=0)
                flat = g.op("Reshape", g.op("Expand", side, units), g.ints([-1]))
                self.carried[f"kept_{name}{kind}"] = g.shaped(flat, [None])
        if asked is not None and group.first.reads_tokens:
            answers = no_answers(g, asked, group.num_labels)
        else:
            wide = g.op("Concat", units, g.ints([group.num_labels]), axis=0)
            answers = g.op("Expand", g.floats(0), wide), g.op("Expand", g.ints(-1), units)
        self.carried |= zip((name + kind for kind in ANSWERS), answers, strict=True)

    def _name(self, group: TaskGroup) -> str:
        """What stands in front of a group's names in the graph: that of its first task."""
        return self.inner[group.tasks[0]]

    def _threshold(self, g: Graph, task: str, index: int = 0) -> ir.Value:
        """The threshold of a task at an exit, a scalar."""
        decision, taken = self.decisions[task], self.thresholds[task]
        if not decision.uses_threshold:
            return g.floats(decision.threshold)
        return g.op("Gather", taken, g.ints(index), axis=0) if isinstance(decision.threshold, list) else taken

    def add(self, number: int, parts: Sequence[ir.Graph]) -> None:
        """One more block, or first of all the embeddings, as number 0: what its piece consists of, one part after
        another, of which each may read what those before it give."""
        done = self.carried.get("done")
        if done is None:  # nobody can have answered
            self._block(self.graph, number, parts)
            return
        before = dict(self.carried)
        block, skip = Graph(f"block{number}", self.graph), Graph(f"skip{number}", self.graph)
        last = self._block(block, number, parts)
        changed = {name: value for name, value in self.carried.items() if value is not before.get(name)}
        if last:  # nobody reads anything else
            changed = {name: changed[name] for name in self.answers if name in changed}
        block.body.outputs.extend(changed.values())
        # when all have answered: the answers as they are, and something empty in place of all else
        skip.body.outputs.extend(
            skip.op("Identity", before[name] if name in (*self.answers, "done") else skip.empty(value))
            for name, value in changed.items()
        )
        branches = {"then_branch": skip.body, "else_branch": block.body}
        outputs = self.graph.node("If", [done], branches, len(changed))
        for (name, value), made in zip(changed.items(), outputs, strict=True):
            made.type, made.shape = value.type, value.shape
            self.carried[name] = made

    def model(self) -> onnx.ModelProto:
        """The file, with all weights in the main graph, equal ones once (ALBERT runs one block M times)."""
        g = self.graph
        self._part_groups()
        for kind, name, shape in self.outputs():
            output = g.op("Identity", self.carried[kind])
            output.name, output.shape = name, shape
            g.body.outputs.append(output)
        model = ir.Model(g.body, ir_version=IR_VERSION, producer_name="badge_peft")
        RemoveUnusedNodesPass()(model)
        DeduplicateHashedInitializersPass()(model)
        for value, default in self.defaults():
            value.const_value = ir.tensor(default)
            g.body.register_initializer(value)
        return ir.to_proto(model)

    def outputs(self) -> list[tuple[str, str, ir.Shape]]:
        """What is carried, the name that it has as an output, and its dimensions; in the order of the inputs."""
        found = []
        for task, own in self.decisions.items():
            rows: list[int | str] = ["batch", "sequence"] if own.reads_tokens else ["batch"]
            for kind, name, dims in (
                ("answer", "logits", [*rows, own.num_labels]),
                ("exit_layer", "exit_layer", rows),
            ):
                found.append((self.inner[task] + kind, _outer(task) + name, ir.Shape(dims)))
        return found

    def defaults(self) -> list[tuple[ir.Value, Any]]:
        """Inputs that may be left out, with their values."""
        found: list[tuple[ir.Value, Any]] = []
        for task, own in self.decisions.items():
            found.append((self.thresholds[task], np.asarray(own.threshold, dtype=np.float32)))
            found.append((self.counts[task], np.int64(min(own.count, LARGEST_PATIENCE))))
        return found

    # ---------------------------------------------------------------------------------------------------------- inside

    def _block(self, g: Graph, number: int, parts: Sequence[ir.Graph]) -> bool:
        """Computes a block and, at an exit that anybody reads, the decision; returns whether all rows answer here."""
        given = dict(self.outer)
        if number:
            given["hidden"] = self.carried["hidden"]
        if "done" in self.carried:
            for name in sorted(self.per_row & given.keys()):
                given[name] = g.op("Gather", given[name], self.carried["rows"], axis=0)
        left = {name: value for name, value in self.carried.items() if name.startswith(LEFT)}
        given |= {BEFORE + name.removeprefix(LEFT): value for name, value in left.items()}
        made = self.compute(g, number, parts, given)
        dims = {str(value.name): value.shape for part in parts for value in part.outputs}
        for name, value in made.items():
            if name == FOLLOWING or name.startswith(LEFT):
                self.carried["hidden" if name == FOLLOWING else name] = g.shaped(value, dims[name])
        self.outer |= {name: value for name, value in made.items() if name.startswith("shared_")}
        return self.decide(g, number, made)

    def compute(
        self, g: Graph, number: int, parts: Sequence[ir.Graph], given: Mapping[str, ir.Value]
    ) -> dict[str, ir.Value]:
        """What the parts of block `number` make of what is given, by the names of their outputs."""
        made: dict[str, ir.Value] = {}
        for part in parts:
            made |= g.insert(part, {**given, **made})
        return made

    def decide(self, g: Graph, number: int, made: dict[str, ir.Value]) -> bool:
        """The decisions at block `number`, of whose piece this was `made`; returns whether all rows have all answers
        then."""
        stopped: list[ir.Value | None] = []
        for group in [*self.open]:
            exits = group.first.exits
            if number in exits and group.reads(index := exits.index(number)):
                stopped += self._decide(g, number, group, index, made)
        if not self.open:
            return True
        if stopped:
            self._take_out(g, stopped[0])
        return False

    def _decide(
        self, g: Graph, number: int, group: TaskGroup, index: int, made: dict[str, ir.Value]
    ) -> list[ir.Value | None]:
        """The decision of one group; returns what stops, where anything may."""
        final, stops = group.final(index), None
        if (final | group.closed(index)).all():
            self.open.remove(group)
        else:
            stops = self._stops(g, group, index, made)
            if not (final | group.able(index)).any() or (stops is None and not final.any()):
                return []
            if len(group.tasks) > 1:
                stops = group.allowed(g, stops, index)
        name, rows = self._name(group), self.carried["rows"]
        logits, (answer, exits) = made[f"{name}logits"], (self.carried[name + kind] for kind in ANSWERS)
        if self.leaves_at_once:
            if stops is not None:
                rows, logits = (g.op("Compress", value, stops, axis=0) for value in (rows, logits))
            places = g.op("Unsqueeze", rows, g.ints([1]))
            numbers = g.op("Expand", g.ints(number), g.op("Shape", rows))
            noted = g.op("ScatterND", answer, places, logits), g.op("ScatterND", exits, places, numbers)
        else:
            if group.first.reads_tokens and stops is not None:
                stops = by_row(g, stops, exits)
            noted = note_answers(g, number, logits, stops, answer, exits, rows)
        self.carried |= zip((name + kind for kind in ANSWERS), noted, strict=True)
        return [stops]

    def _stops(self, g: Graph, group: TaskGroup, index: int, made: dict[str, ir.Value]) -> ir.Value | None:
        """What the policy says of each row, token, or row of each task; None: none can stop."""
        name, several, task = self._name(group), len(group.tasks) > 1, group.tasks[0]
        if group.has_units:
            made = by_unit(g, made, name, group.num_labels)
        prefix = f"kept_{name}"
        state = {f"kept_{k.removeprefix(prefix)}": v for k, v in self.carried.items() if k.startswith(prefix)}
        limits = (
            (state.pop("kept_threshold"), state.pop("kept_patience"))
            if several
            else (self._threshold(g, task, index), self.counts[task])
        )
        at = ExitNodes(
            g,
            index,
            made[f"{name}logits"],
            made.get(f"{name}uncertainty"),
            state,
            *limits,
            group.num_labels,
            group.first.problem_type,
            by_row=several,
        )
        stops = group.stops(at, index)
        self.carried |= {prefix + k.removeprefix("kept_"): v for k, v in state.items()}
        return stops

    def _take_out(self, g: Graph, stopped: ir.Value | None) -> None:
        """Goes on with the rows that lack an answer alone."""
        if self.leaves_at_once:
            assert stopped is not None
            going = g.op("Not", stopped)
        else:
            least, *others = [self._least(g, group) for group in self.open]
            for other in others:
                least = g.op("Min", least, other)
            going = g.op("Less", g.op("Gather", least, self.carried["rows"], axis=0), g.ints(0))
        for group in self.open:
            name = self._name(group)
            kept = [key for key in self.carried if key.startswith(f"kept_{name}")]
            if kept:
                exits = self.carried[f"{name}exit_layer"]
                self._keep(g, kept, by_tokens_of(g, going, exits) if group.has_units else going)
        self._keep(g, [k for k in self.carried if k in ("hidden", "rows") or k.startswith(LEFT)], going)
        self.carried["done"] = g.op("Equal", g.op("Size", self.carried["rows"]), g.ints(0))

    def _keep(self, g: Graph, names: Sequence[str], which: ir.Value) -> None:
        for name in names:
            value = self.carried[name]
            self.carried[name] = g.shaped(g.op("Compress", value, which, axis=0), value.shape)

    def _least(self, g: Graph, group: TaskGroup) -> ir.Value:
        """[B]: below 0 where a row lacks an answer of the group."""
        exits = self.carried[f"{self._name(group)}exit_layer"]
        return least_answered(g, exits) if group.has_units else exits

    def _part_groups(self) -> None:
        """Once all pieces are there: each task's own answers, out of those of its group."""
        g = self.graph
        for group in self.groups:
            if len(group.tasks) == 1:
                continue
            answer, exits = (self.carried[self._name(group) + kind] for kind in ANSWERS)
            for i, (task, decision) in enumerate(zip(group.tasks, group.decisions, strict=True)):
                own = g.op("Gather", answer, g.ints(i), axis=1)
                if decision.num_labels < group.num_labels:
                    own = g.op("Slice", own, g.ints([0]), g.ints([decision.num_labels]), g.ints([1]))
                self.carried[f"{self.inner[task]}answer"] = own
                self.carried[f"{self.inner[task]}exit_layer"] = g.op("Gather", exits, g.ints(i), axis=1)


def _outer(task: str) -> str:
    """What stands in front of the names of a task's inputs and outputs."""
    return task and f"{task}."


def in_int8(piece: ir.Graph) -> list[ir.Graph]:
    """What leads to the states of a piece in int8, and its exit, which reads values of the first part, in float32:
    there int8 would save little and change decisions. The last piece, which has no states, is quantized whole."""
    ends = [value for value in piece.outputs if value.name == FOLLOWING]
    trunk: set[ir.Node] = set()
    open_ = list(ends)
    while open_:
        node = open_.pop().producer()
        if node is not None and node not in trunk:
            trunk.add(node)
            open_ += [value for value in node.inputs if value is not None]
    for value in (value for node in piece if node in trunk for value in node.outputs):
        if value not in ends and (value in piece.outputs or not trunk.issuperset(value.consumers())):
            ends.append(value)
    others = [value for value in piece.outputs if value not in ends]
    if not trunk or not others:
        return [quantize(piece)]
    exit_ = extract(piece, [*piece.inputs, *ends], others)
    exit_.name = f"{piece.name}_exit"
    return [quantize(extract(piece, piece.inputs, ends)), exit_]
