"""`ExitNodes`: what an exported graph offers a policy at one exit, so that it can write itself as ONNX nodes.

The maths that policies share is written once for a graph, as `ExitHistory` has it in numpy. Values are named by
strings. Nothing here needs onnx: `badge_peft.export` hands over the object.
"""

from __future__ import annotations

from typing import Any, Protocol


class ExitNodes(Protocol):
    """One exit inside of a graph.

    Attributes:
        index: j, the place of the exit among all.
        problem_type: As transformers has it.
        scale: The largest entropy, in nats.
        logits: [n, K].
        uncertainty: [n], what a learned exit layer predicts.
        patience: int64 scalar.
    """

    index: int
    problem_type: str
    scale: float
    logits: str
    uncertainty: str
    patience: str

    @property
    def threshold(self) -> str:
        """Scalar, in the unit of the policy's score."""

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output, whose name is returned."""

    def floats(self, value: Any) -> str:
        """A float32 constant."""

    def ints(self, value: Any) -> str:
        """An int64 constant."""

    def as_int(self, value: str) -> str:
        """A value as int64."""

    def as_float(self, value: str) -> str:
        """A value as float32."""

    def log_probs(self, logits: str | None = None) -> str:
        """[n, W]: log p; of K independent labels, log p beside log(1 - p), W = 2K. None: of the exit's own logits."""

    def entropy(self, log_p: str | None = None) -> str:
        """[n], nats."""

    def confidence(self, log_p: str | None = None) -> str:
        """[n]: the largest probability; multi-label: that of the least sure label."""

    def margin(self, log_p: str, confidence: str) -> str:
        """[n]: how far the largest probability lies above the next; multi-label: of the least sure label."""

    def represent(self, kind: str) -> str:
        """[n, 1, W]: what a divergence of this kind compares."""

    def divergence(self, kind: str, here: str, others: str) -> str:
        """S(p, q), Eq. 3-4: [n, 1, W] and [n, i, W], from `represent`, -> [n, i]."""

    def total(self, values: str) -> str:
        """The sum over the last axis."""

    def kept(self, name: str) -> str | None:
        """What the exits so far have left under this name; None at the first."""

    def keep(self, name: str, value: str, axes: int) -> None:
        """Leaves a value for the next exit: `axes` of them, of which the first is the rows that still go on."""

    def append(self, name: str, value: str) -> None:
        """As `keep`, with three axes: what is kept under this name, and `value` [n, 1, W] behind it."""

    def run_of(self, agrees: str) -> str:
        """[n] bool: whether as many exits in a row as `patience` agree, with this one."""
