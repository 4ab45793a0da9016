"""The early-exit graph: a flat chain of `If`, one per block, which hands a stub on or computes the block.

    embeddings -> If(done) {} else {block 1, exit 1, decision} -> If(done) {} else {block 2, ...} -> ... -> answers

Nothing nests, so that the runtime packs each block's weights once, when it loads the file. Blocks behind the exit are
not computed: their branch hands on the answers, and empty stubs in place of the states.

Rows that have all their answers are taken out of the states and of everything that has a row per input. A row may
have several, of its U units: its tokens, or T tasks that decide alike, in a `TaskGroup`. Then answers are [B, U, K]
and exits [B, U], and a policy sees n U rows for the n that still go on. Tokens that nobody asks about (padding, and 1
in the input `special_tokens_mask`) have their answer from the start, 0. Until a row's last task has answered the
exits of all are computed for it, as an `If` around each of them would cost more than it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce

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
from badge_peft.export.policies import Decision, TaskGroup, grouped

ANSWERS = ("answer", "exit_layer")


class Chain:
    """Puts pieces into a graph one after another. `decisions` are by task; `inputs` have a row per input, as have the
    values named in `per_row`, of these and of what the embeddings share."""

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
            real = g.op("Not", g.op("Equal", self.outer["attention_mask"], g.ints(0)))
            asked = g.op("And", real, g.op("Equal", special, g.ints(0)))  # [B, S] bool
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
        asked = asked if group.first.reads_tokens else None
        shape = units if asked is None else g.op("Shape", asked)
        answer = g.op("Expand", g.floats(0), g.op("Concat", shape, g.ints([group.num_labels]), axis=0))
        exits = g.op("Expand", g.ints(-1), units) if asked is None else g.op("Where", asked, g.ints(-1), g.ints(0))
        self.carried |= {f"{name}answer": answer, f"{name}exit_layer": exits}

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
        outputs: dict[str, tuple[ir.Value, list[int | str]]] = {}
        for task, own in self.decisions.items():
            rows: list[int | str] = ["batch", "sequence"] if own.reads_tokens else ["batch"]
            answer, exits = (self.carried[self.inner[task] + kind] for kind in ANSWERS)
            outputs[f"{_outer(task)}logits"] = answer, [*rows, own.num_labels]
            outputs[f"{_outer(task)}exit_layer"] = exits, rows
            if own.policy.by_group:  # a query has one score for each candidate
                outputs["scores"] = g.op("Squeeze", answer, g.ints([1])), rows
        for name, (value, dims) in outputs.items():
            output = g.op("Identity", value)
            output.name, output.shape = name, ir.Shape(dims)
            g.body.outputs.append(output)
        model = ir.Model(g.body, ir_version=IR_VERSION, producer_name="badge_peft")
        RemoveUnusedNodesPass()(model)
        DeduplicateHashedInitializersPass()(model)
        for task, own in self.decisions.items():  # inputs that may be left out
            count = np.int64(min(own.count, LARGEST_PATIENCE))
            tau = np.asarray(own.threshold, dtype=np.float32)
            for value, default in ((self.thresholds[task], tau), (self.counts[task], count)):
                value.const_value = ir.tensor(default)
                g.body.register_initializer(value)
        return ir.to_proto(model)

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
            if group.first.reads_tokens and stops is not None:  # [n S] -> [n, S]
                stops = g.op("Reshape", stops, g.op("Concat", g.ints([-1]), g.op("Shape", exits, start=1), axis=0))
            noted = _note_answers(g, number, logits, stops, answer, exits, rows)
        self.carried |= zip((name + kind for kind in ANSWERS), noted, strict=True)
        return [stops]

    def _stops(self, g: Graph, group: TaskGroup, index: int, made: dict[str, ir.Value]) -> ir.Value | None:
        """What the policy says of each row, token, or row of each task; None: none can stop."""
        name, several, task = self._name(group), len(group.tasks) > 1, group.tasks[0]
        logits, uncertainty = made[f"{name}logits"], made.get(f"{name}uncertainty")
        if group.has_units:
            logits = g.op("Reshape", logits, g.ints([-1, group.num_labels]))
            uncertainty = None if uncertainty is None else g.op("Reshape", uncertainty, g.ints([-1]))
        prefix = f"kept_{name}"
        state = {f"kept_{k.removeprefix(prefix)}": v for k, v in self.carried.items() if k.startswith(prefix)}
        limits = (
            (state.pop("kept_threshold"), state.pop("kept_patience"))
            if several
            else (self._threshold(g, task, index), self.counts[task])
        )
        problem = group.num_labels, group.first.problem_type
        stops = group.stops(ExitNodes(g, index, logits, uncertainty, state, *limits, *problem, several), index)
        self.carried |= {prefix + k.removeprefix("kept_"): v for k, v in state.items()}
        return stops

    def _take_out(self, g: Graph, stopped: ir.Value | None) -> None:
        """Goes on with the rows that lack an answer alone."""
        if self.leaves_at_once:
            assert stopped is not None
            going = g.op("Not", stopped)
        else:
            least = []  # [B] each: below 0 where a row has a unit without an answer
            for group in self.open:
                exits = self.carried[f"{self._name(group)}exit_layer"]
                least.append(g.op("ReduceMin", exits, g.ints([1]), keepdims=0) if group.has_units else exits)
            first = reduce(partial(g.op, "Min"), least)
            going = g.op("Less", g.op("Gather", first, self.carried["rows"], axis=0), g.ints(0))
        for group in self.open:
            name = self._name(group)
            kept, which = [key for key in self.carried if key.startswith(f"kept_{name}")], going
            if kept and group.has_units:  # [n] of rows to [n U]
                units = g.op("Shape", self.carried[f"{name}exit_layer"], start=1, end=2)
                shape = g.op("Concat", g.op("Shape", going), units, axis=0)
                spread = g.op("Expand", g.op("Unsqueeze", going, g.ints([1])), shape)
                which = g.op("Reshape", spread, g.ints([-1]))
            self._keep(g, kept, which)
        self._keep(g, [k for k in self.carried if k in ("hidden", "rows") or k.startswith(LEFT)], going)
        self.carried["done"] = g.op("Equal", g.op("Size", self.carried["rows"]), g.ints(0))

    def _keep(self, g: Graph, names: Sequence[str], which: ir.Value) -> None:
        for name in names:
            value = self.carried[name]
            self.carried[name] = g.shaped(g.op("Compress", value, which, axis=0), value.shape)

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


def _note_answers(
    g: Graph,
    number: int,
    logits: ir.Value,
    stops: ir.Value | None,
    answer: ir.Value,
    exits: ir.Value,
    rows: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Answers [B, U, K] or [B, K] and exits [B, U] or [B], once what stops at block `number` and had no answer has its
    own, of `logits` [n, U, K] or [n, K] of the `rows` [n] that still go on. `stops` [n, U] or [n] bool, or what
    broadcasts to it; None: all."""
    before = g.op("Gather", exits, rows, axis=0)
    newly = g.op("Less", before, g.ints(0))
    if stops is not None:
        newly = g.op("And", newly, stops)
    own = g.op("Gather", answer, rows, axis=0)
    own = g.op("Where", g.op("Unsqueeze", newly, g.ints([-1])), logits, own)
    found = g.op("Where", newly, g.ints(number), before)
    places = g.op("Unsqueeze", rows, g.ints([1]))
    return g.op("ScatterND", answer, places, own), g.op("ScatterND", exits, places, found)


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
