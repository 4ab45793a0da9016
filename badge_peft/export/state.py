"""What the policies' nodes carry from exit to exit, and what they are given at each."""

from __future__ import annotations

from dataclasses import dataclass, field

from badge_peft.export.graph import Graph


@dataclass
class State:
    """What the exits so far have left for the next one: every value has one row per input row that still goes on.

    Args:
        values: Name -> value. `history` [n, j, W], `labels` [n, j] or [n, j, K], `streak` [n].
        types: Name -> ONNX type.
    """

    values: dict[str, str] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, value: str, dtype: int) -> None:
        """Sets a value."""
        self.values[name], self.types[name] = value, dtype


@dataclass
class Answers:
    """One exit's answers inside of a graph.

    Args:
        graph: Where nodes are added.
        index: j, the number of exits before this one.
        logits: [n, K].
        doubt: [n], LTE's, where there is one.
        state: Of the exits before; replaced by that of this one.
        threshold: Scalar, in the unit of the signal.
        patience: Scalar.
    """

    graph: Graph
    index: int
    logits: str
    doubt: str | None
    state: State
    threshold: str
    patience: str
