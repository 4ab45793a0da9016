"""The early-exit graph: a flat chain of `If`, one per block, which hands a stub on or computes the block.

    embeddings -> If(done) {} else {block 1, exit 1, decision} -> If(done) {} else {block 2, ...} -> ... -> answers

Nothing nests, so that the runtime packs each block's weights once, when it loads the file. Blocks behind the exit are
not computed: their branch hands on the answers, and empty stubs in place of the states.

Rows that have answered are taken out of the states and of everything that has a row per input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.convenience import extract
from onnx_ir.passes.common import DeduplicateHashedInitializersPass, RemoveUnusedNodesPass

from badge_peft.export.exit_nodes import ExitNodes
from badge_peft.export.folder import LARGEST_PATIENCE
from badge_peft.export.graph import FLOAT, INT64, IR_VERSION, Graph, quantize
from badge_peft.export.pieces import BEFORE, FOLLOWING, LEFT
from badge_peft.export.policies import Decision

ANSWERS = ("answer", "exit_layer")


class Chain:
    """Puts pieces into a graph one after another.

    Args:
        decision: The policy.
        inputs: Of the graph; each has a row per input.
        per_row: Names of these, and of what the embeddings share, that have one row per input.
    """

    def __init__(self, decision: Decision, inputs: Sequence[ir.Value], per_row: set[str]) -> None:
        self.decision, self.per_row = decision, per_row
        self.graph = g = Graph("main")
        taus = decision.threshold
        self.threshold = ir.val("threshold", FLOAT, [len(taus)] if isinstance(taus, list) else [])
        self.patience = ir.val(decision.count_name, INT64, [])
        g.body.inputs.extend([*inputs, self.threshold, self.patience])
        #: What pieces may read, beside the states.
        self.outer = {str(value.name): value for value in inputs}
        rows = g.op("Shape", inputs[0], start=0, end=1)
        shape = g.op("Concat", rows, g.ints([decision.num_labels]), axis=0)
        #: What goes from block to block: the answers [B, K] and [B], the states, the numbers of the rows that still go
        #: on, whether there are none (from the first exit on), what the policy keeps, and what exits leave for others.
        self.carried = {"answer": g.op("Expand", g.floats(0), shape), "exit_layer": g.op("Expand", g.ints(-1), rows)}
        numbers = g.op("Range", g.ints(0), g.op("Squeeze", rows), g.ints(1))
        self.carried["rows"] = g.shaped(numbers, [None])
        #: Of what is carried, what the graph gives in the end.
        self.answers: tuple[str, ...] = ANSWERS

    def add(self, number: int, parts: Sequence[ir.Graph]) -> None:
        """One more block, or first of all the embeddings, as number 0.

        Args:
            number: Of the block.
            parts: What its piece consists of, one after another. Inputs and outputs are those of `ModelPiece`; a part
                may read what the parts before it give.
        """
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

    def outputs(self) -> list[tuple[str, str, Any]]:
        """What is carried, the name that it has as an output, and its dimensions."""
        dims = ir.Shape(["batch", self.decision.num_labels]), ir.Shape(["batch"])
        return list(zip(ANSWERS, ("logits", "exit_layer"), dims, strict=True))

    def defaults(self) -> list[tuple[ir.Value, Any]]:
        """Inputs that may be left out, with their values."""
        patience = min(self.decision.count, LARGEST_PATIENCE)
        return [
            (self.threshold, np.asarray(self.decision.threshold, dtype=np.float32)),
            (self.patience, np.int64(patience)),
        ]

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
        """The decision at block `number`, of whose piece this was `made`; returns whether all rows answer here."""
        decision, policy = self.decision, self.decision.policy
        if number not in decision.exits or not decision.reads(index := decision.exits.index(number)):
            return False
        stops, last = None, policy.is_final(decision.exits, index)
        if not last:
            at = ExitNodes(
                g,
                index,
                made["logits"],
                made.get("uncertainty"),
                self.carried,
                self._limit(g, index) if decision.uses_threshold else g.floats(decision.threshold),
                self.patience,
                decision.num_labels,
                decision.problem_type,
            )
            stops = decision.stops(at, index)
        if last or (stops is not None and policy.can_exit(decision.exits, index)):
            self._store(g, number, made["logits"], stops)
        return last

    def _limit(self, g: Graph, index: int) -> ir.Value:
        """The threshold of an exit, a scalar."""
        each = isinstance(self.decision.threshold, list)
        return g.op("Gather", self.threshold, g.ints(index), axis=0) if each else self.threshold

    def _store(self, g: Graph, number: int, logits: ir.Value, stops: ir.Value | None) -> None:
        """Notes the answers of the rows that stop, None: all, and takes them out of everything."""
        leaving = self.carried["rows"]
        if stops is not None:
            leaving, logits = (g.op("Compress", value, stops, axis=0) for value in (leaving, logits))
        places = g.op("Unsqueeze", leaving, g.ints([1]))
        numbers = g.op("Expand", g.ints(number), g.op("Shape", leaving))
        for name, values in zip(ANSWERS, (logits, numbers), strict=True):
            self.carried[name] = g.op("ScatterND", self.carried[name], places, values)
        if stops is None:
            return
        going = g.op("Not", stops)
        for name, value in self.carried.items():
            if name not in (*ANSWERS, "done"):
                self.carried[name] = g.shaped(g.op("Compress", value, going, axis=0), value.shape)
        self.carried["done"] = g.op("Equal", g.op("Size", self.carried["rows"]), g.ints(0))


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
