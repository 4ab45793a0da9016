"""An exit's logits as distributions, their divergences and their confidence, in ONNX nodes.

The maths is that of `early_exit/divergences.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from badge_peft.export.graph import FLOAT, INT64, Graph

_LARGEST = 1e30  # as early_exit/divergences.py


@dataclass(frozen=True)
class Distributions:
    """Of one task.

    Args:
        num_labels: K.
        problem_type: As transformers has it.
    """

    num_labels: int
    problem_type: str

    @property
    def many_labels(self) -> bool:
        """Whether a row may have several labels."""
        return self.problem_type == "multi_label_classification"

    @property
    def regression(self) -> bool:
        """Whether the answer is a number."""
        return self.problem_type == "regression"

    def log_probs(self, g: Graph, logits: str) -> str:
        """[n, K] -> [n, W]: log p; of K independent labels, log p beside log(1 - p), W = 2K."""
        clipped = g.op("Clip", logits, g.floats(-_LARGEST), g.floats(_LARGEST))
        if not self.many_labels:
            return g.op("LogSoftmax", clipped, axis=-1)
        yes = g.op("Neg", g.op("Softplus", g.op("Neg", clipped)))
        no = g.op("Neg", g.op("Softplus", clipped))
        return g.op("Concat", yes, no, axis=-1)

    def entropy(self, g: Graph, log_p: str) -> str:
        """[n, W] -> [n], nats."""
        return total(g, g.op("Mul", g.op("Exp", log_p), log_p), sign=-1)

    def confidence(self, g: Graph, log_p: str) -> str:
        """[n, W] -> [n]: the largest probability; multi-label: that of the least sure label."""
        if not self.many_labels:
            return g.op("Exp", g.op("ReduceMax", log_p, g.ints([-1]), keepdims=0))
        k = self.num_labels
        yes = g.op("Slice", log_p, g.ints([0]), g.ints([k]), g.ints([-1]))
        no = g.op("Slice", log_p, g.ints([k]), g.ints([2 * k]), g.ints([-1]))
        return g.op("Exp", g.op("ReduceMin", g.op("Max", yes, no), g.ints([-1]), keepdims=0))

    def represent(self, g: Graph, kind: str, logits: str) -> tuple[str, int]:
        """What a divergence of this kind compares, [n, W] or [n], and its type."""
        if self.regression:
            return g.op("Clip", logits, g.floats(-_LARGEST), g.floats(_LARGEST)), FLOAT
        if kind != "label":
            return self.log_probs(g, logits), FLOAT
        if self.many_labels:
            return g.op("Cast", g.op("Greater", logits, g.floats(0)), to=FLOAT), FLOAT
        return g.op("ArgMax", logits, axis=-1, keepdims=1), INT64

    def compare(self, g: Graph, kind: str, here: str, others: str) -> str:
        """S(p, q), Eq. 3-4: [n, 1, W] and [n, i, W] -> [n, i]."""
        if self.regression or (kind == "label" and self.many_labels):
            return total(g, g.op("Abs", g.op("Sub", here, others)))
        if kind == "label":
            differ = g.op("Not", g.op("Equal", here, others))
            return total(g, g.op("Cast", differ, to=FLOAT))
        p = g.op("Exp", here)
        if kind == "ce":
            return total(g, g.op("Mul", p, others), sign=-1)
        if kind == "kl":
            return total(g, g.op("Mul", p, g.op("Sub", here, others)))
        apart = g.op("Neg", g.op("Abs", g.op("Sub", here, others)))
        mean = g.op("Softplus", apart)  # ln(e^a + e^b) = max(a, b) + ln(1 + e^-|a - b|)
        middle = g.op("Sub", g.op("Add", g.op("Max", here, others), mean), g.floats(np.log(2.0)))
        left = g.op("Mul", p, g.op("Sub", here, middle))
        right = g.op("Mul", g.op("Exp", others), g.op("Sub", others, middle))
        return g.op("Mul", total(g, g.op("Add", left, right)), g.floats(0.5))


def total(g: Graph, values: str, sign: int = 1) -> str:
    """The sum over the last axis."""
    summed = g.op("ReduceSum", values, g.ints([-1]), keepdims=0)
    return g.op("Neg", summed) if sign < 0 else summed
