"""Token classification in an early-exit graph: each token stops by itself, and a row is taken out with its last token.

What policies see is a token a row, n S of them for n rows that still go on; answers are [B, S, K] and [B, S]. Tokens
that nobody asks about (padding, and 1 in the input `special_tokens_mask`) have their answer from the start, 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from badge_peft.evaluation.collate import SPECIAL
from badge_peft.export.chain import ANSWERS, Chain
from badge_peft.export.graph import INT64, Graph
from badge_peft.export.policies import Decision


class TokenChain(Chain):
    """As `Chain`, where each token has an answer.

    Args:
        decision: The policy.
        inputs: Of the graph, `attention_mask` among them.
        per_row: As for `Chain`.
    """

    def __init__(self, decision: Decision, inputs: Sequence[ir.Value], per_row: set[str]) -> None:
        super().__init__(decision, inputs, per_row)
        special = special_input()
        self.graph.body.inputs.insert(len(inputs), special)
        asked = asked_tokens(self.graph, self.outer["attention_mask"], special)
        self.carried |= dict(zip(ANSWERS, no_answers(self.graph, asked, decision.num_labels), strict=True))

    def outputs(self) -> list[tuple[str, str, ir.Shape]]:
        """What is carried, the name that it has as an output, and its dimensions."""
        dims = ir.Shape(["batch", "sequence", self.decision.num_labels]), ir.Shape(["batch", "sequence"])
        return list(zip(ANSWERS, ("logits", "exit_layer"), dims, strict=True))

    def decide(self, g: Graph, number: int, made: dict[str, ir.Value]) -> bool:
        """The decision at block `number`, token by token; returns whether all rows answer here."""
        return super().decide(g, number, by_token(g, made, "", self.decision.num_labels))

    def _store(self, g: Graph, number: int, logits: ir.Value, stops: ir.Value | None) -> None:
        """Notes the answers of the tokens that stop, None: all, and takes rows out that have all of theirs."""
        rows = self.carried["rows"]
        answer, exits = (self.carried[name] for name in ANSWERS)
        given = stops if stops is None else by_row(g, stops, exits)
        answer, exits = note_answers(g, number, by_row(g, logits, answer), given, answer, exits, rows)
        self.carried |= dict(zip(ANSWERS, (answer, exits), strict=True))
        if stops is None:
            return
        lowest = least_answered(g, exits)
        going = g.op("Less", g.op("Gather", lowest, rows, axis=0), g.ints(0))
        of_tokens = by_tokens_of(g, going, exits)
        for name, value in self.carried.items():
            if name not in (*ANSWERS, "done"):
                kept = of_tokens if name.startswith("kept_") else going
                self.carried[name] = g.shaped(g.op("Compress", value, kept, axis=0), value.shape)
        self.carried["done"] = g.op("Equal", g.op("Size", self.carried["rows"]), g.ints(0))


def special_input() -> ir.Value:
    """The input that says which tokens need no answer."""
    return ir.val(SPECIAL, INT64, ["batch", "sequence"])


def asked_tokens(g: Graph, attention_mask: ir.Value, special: ir.Value) -> ir.Value:
    """[B, S] bool: the tokens that need an answer."""
    return g.op("And", g.op("Not", g.op("Equal", attention_mask, g.ints(0))), g.op("Equal", special, g.ints(0)))


def no_answers(g: Graph, asked: ir.Value, num_labels: int) -> tuple[ir.Value, ir.Value]:
    """Answers [B, S, K] and exits [B, S] before any token has stopped: -1, or 0 for those that nobody asks about."""
    shape = g.op("Concat", g.op("Shape", asked), g.ints([num_labels]), axis=0)
    return g.op("Expand", g.floats(0), shape), g.op("Where", asked, g.ints(-1), g.ints(0))


def by_token(g: Graph, made: dict[str, ir.Value], prefix: str, num_labels: int) -> dict[str, ir.Value]:
    """What a piece gives with tokens as rows: logits [n S, K] and uncertainty [n S]; all else as it is."""
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
    """Answers and exits, once what stops at block `number` and had no answer has its own.

    Args:
        g: The graph.
        number: Of the block.
        logits: [n, S, K], of the rows that still go on; or, where a row has one answer, [n, K].
        stops: [n, S] or [n] bool, or what broadcasts to it; None: all.
        answer: [B, S, K] or [B, K], before.
        exits: [B, S] or [B], before.
        rows: [n], the numbers of the rows that still go on.
    """
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
