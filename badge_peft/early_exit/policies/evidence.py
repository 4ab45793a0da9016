"""What a policy sees at an exit when it decides: its numbers, the threshold, and its counter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Quantity(NamedTuple):
    """What a policy compares with its threshold.

    Args:
        name: `divergence (ce)`, `entropy`, `largest probability`, ...
        symbol: In a formula.
    """

    name: str
    symbol: str


@dataclass(frozen=True)
class Measured:
    """One number that a policy compares with its threshold.

    Args:
        block: Of the exit that it belongs to: the earlier exit of a divergence, else the exit itself.
        value: S(p_m, p_i) of Eq. 4, an entropy, a probability, ...
        passes: Whether it lies on the stopping side of the threshold.
    """

    block: int
    value: float
    passes: bool


@dataclass(frozen=True)
class Evidence:
    """What a policy saw at one exit.

    Args:
        quantity: What the numbers are.
        symbol: Of the number in a formula.
        threshold: In the unit of the numbers; None for policies without one.
        above: Whether a number passes at or above the threshold, not below it.
        measured: The numbers at this exit, shallow to deep; none where there is no earlier exit to compare with.
        count: cnt_m, or the length of the unbroken run that ends here; None for policies that do not count.
        patience: t; None for policies that do not count.
        in_a_row: Whether `count` is an unbroken run.
        of_pairs: Whether the numbers lie between this exit and earlier ones, and are not its own.
    """

    quantity: str
    symbol: str
    threshold: float | None
    above: bool
    measured: tuple[Measured, ...]
    count: int | None = None
    patience: int | None = None
    in_a_row: bool = False
    of_pairs: bool = False

    @property
    def comparison(self) -> str:
        """What decides, as a formula: `cnt = 0 < t = 1`, or `H = 0.31 ≥ tau = 0.2`."""
        if self.count is not None and self.patience is not None:
            sign = "≥" if self.count >= self.patience else "<"
            return f"{'run' if self.in_a_row else 'cnt'} = {self.count} {sign} t = {self.patience}"
        sign = "≥" if self.measured[0].passes == self.above else "<"
        return f"{self.symbol} = {number(self.measured[0].value)} {sign} tau = {self.limit}"

    @property
    def limit(self) -> str:
        """The threshold as it is read."""
        return "" if self.threshold is None else number(self.threshold)


def number(value: float) -> str:
    """Four digits, as many as a comparison needs to be seen."""
    return f"{value:.4g}"


def exits_in_words(count: int, kind: str = "") -> str:
    """`1 exit`, `2 earlier exits`."""
    return f"{count} {kind}exit" + ("" if count == 1 else "s")


def capitalized(clause: str) -> str:
    """A clause as a sentence."""
    return f"{clause[0].upper()}{clause[1:]}."
