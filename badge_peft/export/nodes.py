"""`ExitNode`: one exit inside of a graph, with which a policy writes itself as ONNX nodes.

The maths is that of `early_exit/divergences.py` and `ExitHistory`; what it is for is said in `ExitNodes`, the protocol
that policies are written against.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from badge_peft.early_exit.divergences import max_entropy
from badge_peft.export.graph import FLOAT, INT64, Graph

_LARGEST = 1e30  # as early_exit/divergences.py


@dataclass
class State:
    """What the exits so far have left for the next one: every value has one row per input row that still goes on.

    Args:
        values: Name -> value.
        types: Name -> ONNX type.
        axes: Name -> number of axes.
    """

    values: dict[str, str] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)


class ExitNode:
    """One exit.

    Args:
        graph: Where nodes are added.
        index: j, the number of exits before this one.
        logits: [n, K].
        uncertainty: [n], LTE's; empty where the adapter has none.
        state: Of the exits before; replaced by that of this one.
        threshold: Scalar, in the unit of the policy's score; a number where no call may bring another.
        patience: Scalar.
        num_labels: K.
        problem_type: As transformers has it.
    """

    def __init__(
        self,
        graph: Graph,
        index: int,
        logits: str,
        uncertainty: str,
        state: State,
        threshold: str | float,
        patience: str,
        num_labels: int,
        problem_type: str,
    ) -> None:
        self.graph, self.index, self.logits, self.uncertainty = graph, index, logits, uncertainty
        self.state, self._threshold, self.patience = state, threshold, patience
        self.num_labels, self.problem_type = num_labels, problem_type
        self.scale = float(np.float32(max_entropy(num_labels, problem_type)))
        self.many_labels = problem_type == "multi_label_classification"
        self.values = problem_type == "regression"
        self._types: dict[str, int] = {}  # of what is not float32

    @property
    def threshold(self) -> str:
        """Scalar, in the unit of the policy's score."""
        return self._threshold if isinstance(self._threshold, str) else self.floats(self._threshold)

    # -------------------------------------------------------------------------------------------------------- building

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output, whose name is returned."""
        return self.graph.op(op_type, *inputs, **attributes)

    def floats(self, value: Any) -> str:
        """A float32 constant."""
        return self.graph.floats(value)

    def ints(self, value: Any) -> str:
        """An int64 constant."""
        return self.graph.ints(value)

    def as_int(self, value: str) -> str:
        """A value as int64."""
        return self._typed(self.op("Cast", value, to=INT64), INT64)

    def as_float(self, value: str) -> str:
        """A value as float32."""
        return self.op("Cast", value, to=FLOAT)

    def total(self, values: str) -> str:
        """The sum over the last axis."""
        return self.op("ReduceSum", values, self.ints([-1]), keepdims=0)

    def _typed(self, value: str, dtype: int) -> str:
        self._types[value] = dtype
        return value

    # --------------------------------------------------------------------------------------------------- distributions

    def log_probs(self, logits: str | None = None) -> str:
        """[n, W]: log p; of K independent labels, log p beside log(1 - p), W = 2K."""
        clipped = self._clipped(logits or self.logits)
        if not self.many_labels:
            return self.op("LogSoftmax", clipped, axis=-1)
        yes = self.op("Neg", self.op("Softplus", self.op("Neg", clipped)))
        no = self.op("Neg", self.op("Softplus", clipped))
        return self.op("Concat", yes, no, axis=-1)

    def entropy(self, log_p: str | None = None) -> str:
        """[n], nats."""
        log_p = log_p or self.log_probs()
        return self.op("Neg", self.total(self.op("Mul", self.op("Exp", log_p), log_p)))

    def confidence(self, log_p: str | None = None) -> str:
        """[n]: the largest probability; multi-label: that of the least sure label."""
        log_p = log_p or self.log_probs()
        if not self.many_labels:
            return self.op("Exp", self.op("ReduceMax", log_p, self.ints([-1]), keepdims=0))
        k = self.num_labels
        yes = self.op("Slice", log_p, self.ints([0]), self.ints([k]), self.ints([-1]))
        no = self.op("Slice", log_p, self.ints([k]), self.ints([2 * k]), self.ints([-1]))
        return self.op("Exp", self.op("ReduceMin", self.op("Max", yes, no), self.ints([-1]), keepdims=0))

    def margin(self, log_p: str, confidence: str) -> str:
        """[n]: how far the largest probability lies above the next; multi-label: of the least sure label."""
        if self.many_labels:
            return self.op("Sub", self.op("Mul", self.floats(2), confidence), self.floats(1))
        values = self.graph.fresh("TopK")
        self.graph.ops("TopK", [log_p, self.ints([2])], [values, self.graph.fresh("TopK_places")], axis=-1)
        top = self.op("Exp", values)  # [n, 2]
        first, second = (self.op("Gather", top, self.ints([i]), axis=1) for i in (0, 1))
        return self.op("Squeeze", self.op("Sub", first, second), self.ints([1]))

    def represent(self, kind: str) -> str:
        """[n, 1, W]: what a divergence of this kind compares."""
        if self.values:
            here, dtype = self._clipped(self.logits), FLOAT
        elif kind != "label":
            here, dtype = self.log_probs(), FLOAT
        elif self.many_labels:
            here, dtype = self.as_float(self.op("Greater", self.logits, self.floats(0))), FLOAT
        else:
            here, dtype = self.op("ArgMax", self.logits, axis=-1, keepdims=1), INT64
        return self._typed(self.op("Unsqueeze", here, self.ints([1])), dtype)

    def divergence(self, kind: str, here: str, others: str) -> str:
        """S(p, q), Eq. 3-4: [n, 1, W] and [n, i, W] -> [n, i]."""
        if self.values or (kind == "label" and self.many_labels):
            return self.total(self.op("Abs", self.op("Sub", here, others)))
        if kind == "label":
            return self.total(self.as_float(self.op("Not", self.op("Equal", here, others))))
        p = self.op("Exp", here)
        if kind == "ce":
            return self.op("Neg", self.total(self.op("Mul", p, others)))
        if kind == "kl":
            return self.total(self.op("Mul", p, self.op("Sub", here, others)))
        apart = self.op("Neg", self.op("Abs", self.op("Sub", here, others)))
        mean = self.op("Softplus", apart)  # ln(e^a + e^b) = max(a, b) + ln(1 + e^-|a - b|)
        middle = self.op("Sub", self.op("Add", self.op("Max", here, others), mean), self.floats(np.log(2.0)))
        left = self.op("Mul", p, self.op("Sub", here, middle))
        right = self.op("Mul", self.op("Exp", others), self.op("Sub", others, middle))
        return self.op("Mul", self.total(self.op("Add", left, right)), self.floats(0.5))

    def _clipped(self, values: str) -> str:
        return self.op("Clip", values, self.floats(-_LARGEST), self.floats(_LARGEST))

    # ----------------------------------------------------------------------------------------------- from exit to exit

    def kept(self, name: str) -> str | None:
        """What the exits so far have left under this name; None at the first."""
        return self.state.values.get(name)

    def keep(self, name: str, value: str, axes: int) -> None:
        """Leaves a value for the next exit."""
        self.state.values[name], self.state.axes[name] = value, axes
        self.state.types[name] = self._types.get(value, FLOAT)

    def append(self, name: str, value: str) -> None:
        """Leaves what is kept under this name with `value` [n, 1, W] behind it."""
        before, dtype = self.kept(name), self._types.get(value, FLOAT)
        if before is not None:
            value = self._typed(self.op("Concat", before, value, axis=1), dtype)
        self.keep(name, value, axes=3)

    def run_of(self, agrees: str) -> str:
        """[n] bool: whether as many exits in a row as `patience` agree, with this one."""
        count = self.as_int(agrees)
        before = self.kept("run")
        if before is not None:  # one more where this exit agrees, and back to 0 where not
            count = self._typed(self.op("Mul", count, self.op("Add", before, self.ints(1))), INT64)
        self.keep("run", count, axes=1)
        return self.op("GreaterOrEqual", count, self.patience)
