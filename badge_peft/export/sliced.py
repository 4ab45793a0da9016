"""`assemble`: from the pieces of a model and its policies to one graph; and the graph of a query, whose blocks run for
a few candidates at a time, each slice as long as its longest.

    If(done) {} else { Loop over slices { rows of the slice, without what is padding in all of them -> block, exit }
                       -> decision on all candidates }

A query has candidates of many lengths, and in one batch most of the work would be padding. The bar is that of the
whole query, so the decision stands behind the loop. Whoever calls the graph gives long candidates first, so that those
of a slice are of similar length; in another order the answers are the same, and take longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from badge_peft.export.chain import Chain, in_int8
from badge_peft.export.graph import BOOL, INT64, Graph
from badge_peft.export.pieces import BEFORE, FOLLOWING, LEFT
from badge_peft.export.policies import Decision
from badge_peft.export.trace import ExportedBlocks

SLICE = 8  # candidates in a block at once: more save calls, and cost more padding than that

_RESULTS = (FOLLOWING, "logits", "uncertainty")  # what a piece gives to the graph, beside what its exit leaves
Values = Mapping[str, ir.Value]


def assemble(pieces: ExportedBlocks, decisions: Mapping[str, Decision], *, int8: bool) -> onnx.ModelProto:
    """The graph, whose inputs and outputs are those of `export_onnx`; of many tasks, of `export_tasks_onnx`.

    Args:
        pieces: Of the model, with the exits of all tasks.
        decisions: The policy of each task, of a file of one that of `ALONE`; with one that looks at a query, blocks
            run slice by slice, and `scores`, the logits of the candidates as [N], come beside the answers.
        int8: Quantize the blocks; exits and decisions stay in float32.
    """
    inputs = [ir.val(name, INT64, ["batch", "sequence"]) for name in pieces.inputs]
    given = decisions, inputs, {*pieces.inputs, *pieces.per_row}
    by_group = any(own.policy.by_group for own in decisions.values())
    chain = SlicedChain(*given, pieces) if by_group else Chain(*given)
    for number, piece in pieces.graphs.items():
        chain.add(number, in_int8(piece) if int8 else [piece])
    return chain.model()


class SlicedChain(Chain):
    """A `Chain` whose blocks run slice by slice, cut where `pieces` say that there are positions. Where these do not
    know, a slice stays as long as the query; what a decoder's head reads is not cut, either."""

    def __init__(
        self, decisions: Mapping[str, Decision], inputs: Sequence[ir.Value], per_row: set[str], pieces: ExportedBlocks
    ) -> None:
        super().__init__(decisions, inputs, per_row)
        self.positions, self.padding_token = pieces.positions, pieces.padding_token

    def compute(self, g: Graph, number: int, parts: Sequence[ir.Graph], given: Values) -> dict[str, ir.Value]:
        """As `Chain.compute`, where it is a block."""
        if number == 0:
            return super().compute(g, number, parts, given)
        outputs = {str(value.name): value for part in parts for value in part.outputs}
        kept = {name: value for name, value in outputs.items() if name in _RESULTS or name.startswith(LEFT)}
        rows, length = (g.op("Shape", given["hidden"], start=i, end=i + 1) for i in range(2))
        trips = g.op("Squeeze", g.op("Div", g.op("Add", rows, g.ints([SLICE - 1])), g.ints([SLICE])))
        places = g.op("Range", g.ints(1), g.op("Add", g.op("Squeeze", length), g.ints(1)), g.ints(1))

        body = Graph(f"slice{number}", g.main)
        step, going = body.input("step", INT64, []), body.input("going", BOOL, [])
        made = self._slice(body, step, places, given, parts)
        body.body.outputs.append(body.op("Identity", going))
        lengths = {  # of those whose second dimension is one of positions
            name: length if name == FOLLOWING or (name.startswith(LEFT) and len(_open(value)) > 2) else None
            for name, value in kept.items()
        }
        for name, value in kept.items():
            body.body.outputs.append(_filled(body, made[name], lengths[name], len(_open(value))))
        # what an iteration gives beside `going` is put together by the runtime, once: [trips, SLICE, ...]
        always = g.constant(np.asarray(True))
        stacked = g.node("Loop", [trips, always], {"body": body.body}, len(kept))
        made = {}
        for (name, value), found in zip(kept.items(), stacked, strict=True):
            made[name] = _rows(g, value, found, rows, lengths[name])
            made[name].type, made[name].shape = value.type, _open(value)
        return made

    def _slice(
        self, g: Graph, step: ir.Value, places: ir.Value, given: Values, parts: Sequence[ir.Graph]
    ) -> dict[str, ir.Value]:
        """What the parts make of the rows of one slice."""
        start = g.op("Unsqueeze", g.op("Mul", step, g.ints(SLICE)), g.ints([0]))
        end = g.op("Add", start, g.ints([SLICE]))
        cut: dict[str, ir.Value] = {}
        for name in sorted(given):
            value = given[name]
            has_rows = name == "hidden" or name in self.per_row or name.startswith(BEFORE)
            cut[name] = g.op("Slice", value, start, end, g.ints([0])) if has_rows else value
        if self.positions is not None:
            real = g.op("Cast", cut["attention_mask"], to=BOOL)
            if self.padding_token is not None:
                real = g.op("Or", real, g.op("Not", g.op("Equal", cut["input_ids"], g.ints(self.padding_token))))
            last = g.op("ReduceMax", g.op("Mul", g.op("Cast", real, to=INT64), places), keepdims=0)
            last = g.op("Unsqueeze", g.op("Max", last, g.ints(1)), g.ints([0]))
            for name, axes in self.positions.items():
                if name in cut:
                    zeros, ends = g.ints([0] * len(axes)), g.op("Concat", *[last] * len(axes), axis=0)
                    cut[name] = g.op("Slice", cut[name], zeros, ends, g.ints(axes))
        return super().compute(g, 0, parts, cut)


def _open(value: ir.Value) -> ir.Shape:
    """The shape of a value, without the names of sizes."""
    assert value.shape is not None
    return ir.Shape([d if isinstance(d, int) else None for d in value.shape])


def _filled(g: Graph, value: ir.Value, length: ir.Value | None, rank: int) -> ir.Value:
    """[w, L, ...] -> [SLICE, S, ...], or [w, ...] -> [SLICE, ...], zeros behind: nobody looks there."""
    missing = [g.op("Sub", g.ints([SLICE]), g.op("Shape", value, start=0, end=1))]
    if length is not None:
        missing.append(g.op("Sub", length, g.op("Shape", value, start=1, end=2)))
    zeros = [g.ints([0] * rank), *missing, g.ints([0] * (rank - len(missing)))]
    return g.op("Pad", value, g.op("Concat", *zeros, axis=0))


def _rows(g: Graph, like: ir.Value, stacked: ir.Value, rows: ir.Value, length: ir.Value | None) -> ir.Value:
    """[trips, SLICE, ...] -> [n, ...], the shape of `like`; it has this length, where it has positions."""
    dims = [d if isinstance(d, int) else 0 for d in _open(like)]
    known = [g.ints(dims[1:])] if length is None else [length, g.ints(dims[2:])]
    flat = g.op("Reshape", stacked, g.op("Concat", g.ints([-1]), *known, axis=0))
    return g.op("Slice", flat, g.ints([0]), rows, g.ints([0]))
