"""Rows that have several answers, of tokens or of tasks: each unit stops by itself, a row with its last one.

What policies see is a unit a row, n U of them for n rows that still go on; answers are [B, U, K] and exits [B, U].
Tokens that nobody asks about (padding, and 1 in the input `special_tokens_mask`) have their answer from the start, 0.
"""

from __future__ import annotations

import onnx_ir as ir

from badge_peft.export.graph import Graph


def asked_tokens(g: Graph, attention_mask: ir.Value, special: ir.Value) -> ir.Value:
    """[B, S] bool: the tokens that need an answer."""
    return g.op("And", g.op("Not", g.op("Equal", attention_mask, g.ints(0))), g.op("Equal", special, g.ints(0)))


def no_answers(g: Graph, asked: ir.Value, num_labels: int) -> tuple[ir.Value, ir.Value]:
    """Answers [B, S, K] and exits [B, S] before any token has stopped: -1, or 0 for those that nobody asks about."""
    shape = g.op("Concat", g.op("Shape", asked), g.ints([num_labels]), axis=0)
    return g.op("Expand", g.floats(0), shape), g.op("Where", asked, g.ints(-1), g.ints(0))


def by_unit(g: Graph, made: dict[str, ir.Value], prefix: str, num_labels: int) -> dict[str, ir.Value]:
    """What a piece gives with units as rows: logits [n U, K] and uncertainty [n U]; all else as it is."""
    shapes = {f"{prefix}logits": [-1, num_labels], f"{prefix}uncertainty": [-1]}
    return made | {name: g.op("Reshape", made[name], g.ints(dims)) for name, dims in shapes.items() if name in made}


def by_row(g: Graph, values: ir.Value, like: ir.Value) -> ir.Value:
    """What each token has, [n S, ...], as [n, S, ...]: beside the answers or exits `like`, [B, S, ...]."""
    return g.op("Reshape", values, g.op("Concat", g.ints([-1]), g.op("Shape", like, start=1), axis=0))


def note_answers(
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


def least_answered(g: Graph, exits: ir.Value) -> ir.Value:
    """[B]: below 0 where a row has a token without an answer."""
    return g.op("ReduceMin", exits, g.ints([1]), keepdims=0)


def by_tokens_of(g: Graph, rows: ir.Value, exits: ir.Value) -> ir.Value:
    """[n] of rows to [n S] of their tokens."""
    length = g.op("Shape", exits, start=1, end=2)
    shape = g.op("Concat", g.op("Shape", rows), length, axis=0)
    spread = g.op("Expand", g.op("Unsqueeze", rows, g.ints([1])), shape)
    return g.op("Reshape", spread, g.ints([-1]))
