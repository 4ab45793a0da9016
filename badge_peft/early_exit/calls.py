"""Which adapters a call of `early_exit_forward` asks, about which rows: one for all rows, one for each row, or many
for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from badge_peft.early_exit.policy_reader import PolicyReader
from badge_peft.outputs import EarlyExitOutput


@dataclass(frozen=True)
class Question:
    """What a call asks of one adapter.

    Args:
        adapter: Its name.
        first: The first of its rows, which lie side by side.
        rows: How many.
        config: How to stop, as the call has it; None: the adapter's own.
    """

    adapter: str
    first: int
    rows: int
    config: Any


@dataclass(frozen=True)
class RowFacts:
    """What a call knows of its rows beside the model's inputs.

    Args:
        rows: B.
        length: S.
        mask: [B, S], the attention mask, or None. One of another first dimension holds for all rows.
        ends: [B, S], whose last position that is not 0 is a row's last token; the mask but for decoders.
        special: [B, S'], 1 for tokens that need no answer.
        groups: [B], a number for each row, the same for the candidates of a query, or None.
    """

    rows: int
    length: int
    mask: Tensor | None
    ends: Tensor | None
    special: Tensor
    groups: Tensor | None = None

    def part(self, first: int, rows: int) -> RowFacts:
        """The same of some rows, which lie side by side."""
        if rows == self.rows:
            return self
        own = slice(first, first + rows)
        mask, ends = (x[own] if x is not None and x.shape[0] == self.rows else x for x in (self.mask, self.ends))
        groups = None if self.groups is None else self.groups[own]
        return RowFacts(rows, self.length, mask, ends, self.special[own], groups)


class Call(Protocol):
    """One call.

    Attributes:
        questions: For each adapter.
    """

    questions: list[Question]

    def sort(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs with the rows of each adapter side by side."""

    def heads(self, readers: Sequence[PolicyReader]) -> Any:
        """Who answers at the model's own head; None: the active adapter."""

    def output(self, readers: Sequence[PolicyReader]) -> Any:
        """What the call returns, once every row has its answers."""


class OneAdapter:
    """A call of one adapter, which all rows are of."""

    def __init__(self, adapter: str, batch_size: int, config: Any) -> None:
        self.questions = [Question(adapter, 0, batch_size, config)]

    def sort(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As they are."""
        return inputs

    def heads(self, readers: Sequence[PolicyReader]) -> Any:
        """The active adapter's."""
        return None

    def output(self, readers: Sequence[PolicyReader]) -> EarlyExitOutput:
        """Its reader's."""
        return readers[0].output()
