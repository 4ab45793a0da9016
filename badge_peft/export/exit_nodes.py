"""`ExitNodes`: one exit inside of an exported graph, with which a policy writes itself as ONNX nodes.

The math that policies share is written once for a graph, as `ExitHistory` and `divergences` have it in numpy. Nothing
here needs onnx: `badge_peft.export` hands over the graph, and a `Value` is what the graph makes of a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from badge_peft.early_exit.divergences import LARGEST_LOGIT, max_entropy

#: A tensor of the graph: whatever `ExitNodes.op` returns.
Value = Any

_FLOAT, _INT64 = 1, 7  # as ONNX numbers its types


@dataclass
class ExitNodes:
    """One exit.

    Args:
        graph: Where nodes are added.
        index: j, the place of the exit among all.
        logits: [n, K].
        uncertainty: [n], what a learned exit layer predicts; None where the adapter has none.
        state: Among other things, what the exits before have kept; then what this one keeps.
        threshold: Scalar, in the unit of the policy's score; or [n], one for each row.
        patience: int64 scalar, or [n].
        num_labels: K.
        problem_type: As transformers has it.
        by_row: Whether each row has a threshold and a patience of its own.
    """

    graph: Any
    index: int
    logits: Value
    uncertainty: Value
    state: dict[str, Value]
    threshold: Value
    patience: Value
    num_labels: int
    problem_type: str
    by_row: bool = False

    def __post_init__(self) -> None:
        #: The largest entropy, in nats.
        self.scale = float(np.float32(max_entropy(self.num_labels, self.problem_type)))
        self.many_labels = self.problem_type == "multi_label_classification"
        self.values = self.problem_type == "regression"

    # -------------------------------------------------------------------------------------------------------- building

    def op(self, op_type: str, *inputs: Value, **attributes: Any) -> Value:
        """Adds a node, whose first output is returned."""
        return self.graph.op(op_type, *inputs, **attributes)

    def floats(self, value: Any) -> Value:
        """A float32 constant."""
        return self.graph.floats(value)

    def ints(self, value: Any) -> Value:
        """An int64 constant."""
        return self.graph.ints(value)

    def as_int(self, value: Value) -> Value:
        """A value as int64."""
        return self.op("Cast", value, to=_INT64)

    def as_float(self, value: Value) -> Value:
        """A value as float32."""
        return self.op("Cast", value, to=_FLOAT)

    def beside(self, limit: Value) -> Value:
        """`threshold` or `patience` as it is compared with values [n, i]."""
        return self.op("Unsqueeze", limit, self.ints([1])) if self.by_row else limit

    def total(self, values: Value) -> Value:
        """The sum over the last axis."""
        return self.op("ReduceSum", values, self.ints([-1]), keepdims=0)

    # --------------------------------------------------------------------------------------------------- distributions

    def log_probs(self, logits: Value = None) -> Value:
        """[n, W]: log p; of K independent labels, log p beside log(1 - p), W = 2K. None: of the exit's own logits."""
        clipped = self._clipped(self.logits if logits is None else logits)
        if not self.many_labels:
            return self.op("LogSoftmax", clipped, axis=-1)
        yes = self.op("Neg", self.op("Softplus", self.op("Neg", clipped)))
        no = self.op("Neg", self.op("Softplus", clipped))
        return self.op("Concat", yes, no, axis=-1)

    def entropy(self, log_p: Value = None) -> Value:
        """[n], nats."""
        log_p = self.log_probs() if log_p is None else log_p
        return self.op("Neg", self.total(self.op("Mul", self.op("Exp", log_p), log_p)))

    def confidence(self, log_p: Value = None) -> Value:
        """[n]: the largest probability; multi-label: that of the least sure label."""
        log_p = self.log_probs() if log_p is None else log_p
        if not self.many_labels:
            return self.op("Exp", self.op("ReduceMax", log_p, self.ints([-1]), keepdims=0))
        k = self.num_labels
        yes = self.op("Slice", log_p, self.ints([0]), self.ints([k]), self.ints([-1]))
        no = self.op("Slice", log_p, self.ints([k]), self.ints([2 * k]), self.ints([-1]))
        return self.op("Exp", self.op("ReduceMin", self.op("Max", yes, no), self.ints([-1]), keepdims=0))

    def margin(self, log_p: Value, confidence: Value) -> Value:
        """[n]: how far the largest probability lies above the next; multi-label: of the least sure label."""
        if self.many_labels:
            return self.op("Sub", self.op("Mul", self.floats(2), confidence), self.floats(1))
        if self.num_labels == 1:
            return confidence
        top = self.op("Exp", self.op("TopK", log_p, self.ints([2]), axis=-1, outputs=2))  # [n, 2]
        first, second = (self.op("Gather", top, self.ints([i]), axis=1) for i in (0, 1))
        return self.op("Squeeze", self.op("Sub", first, second), self.ints([1]))

    def represent(self, kind: str) -> Value:
        """[n, 1, W]: what a divergence of this kind compares."""
        if self.values:
            here = self._clipped(self.logits)
        elif kind != "label":
            here = self.log_probs()
        elif self.many_labels:
            here = self.as_float(self.op("Greater", self.logits, self.floats(0)))
        else:
            here = self.op("ArgMax", self.logits, axis=-1, keepdims=1)
        return self.op("Unsqueeze", here, self.ints([1]))

    def divergence(self, kind: str, here: Value, others: Value) -> Value:
        """S(p, q), Eq. 3-4: [n, 1, W] and [n, i, W], from `represent`, -> [n, i]."""
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

    def _clipped(self, values: Value) -> Value:
        return self.op("Clip", values, self.floats(-LARGEST_LOGIT), self.floats(LARGEST_LOGIT))

    # ----------------------------------------------------------------------------------------------- from exit to exit

    def kept(self, name: str) -> Value | None:
        """What the exits so far have left under this name; None at the first."""
        return self.state.get(f"kept_{name}")

    def keep(self, name: str, value: Value, axes: int) -> None:
        """Leaves a value for the next exit: `axes` of them, of which the first is the rows that still go on."""
        self.state[f"kept_{name}"] = self.graph.shaped(value, [None] * axes)

    def append(self, name: str, value: Value) -> None:
        """As `keep`, with three axes: what is kept under this name, and `value` [n, 1, W] behind it."""
        before = self.kept(name)
        self.keep(name, value if before is None else self.op("Concat", before, value, axis=1), axes=3)

    def run_of(self, agrees: Value) -> Value:
        """[n] bool: whether as many exits in a row as `patience` agree, with this one."""
        return self.op("GreaterOrEqual", self._run("run", agrees), self.patience)

    def trusts(self, lookback: int | None, patience: int | None, seen: int) -> Value:
        """[n] bool: `ExitPolicy.trusts`, by the policy's lookback and the patience with which it grows (None: with
        none), after `seen` exits with this one."""
        # 0 times NaN or infinity is NaN, which equals nothing
        finite = self.op("Equal", self.total(self.op("Mul", self.logits, self.floats(0))), self.floats(0))
        if patience is None and lookback == 0:
            return finite
        run = self._run("finite", finite)
        if lookback is None:
            needed = self.ints(seen)
        elif patience is None:
            needed = self.ints(min(lookback + 1, seen))
        else:
            needed = self.op("Add", self.patience, self.ints(lookback - patience + 1))
        return self.op("GreaterOrEqual", run, needed)

    def _run(self, name: str, holds: Value) -> Value:
        """[n] int64: at how many exits in a row, up to this one, something [n] bool holds."""
        count = self.as_int(holds)
        before = self.kept(name)
        if before is not None:  # one more where it holds here, and back to 0 where not
            count = self.op("Mul", count, self.op("Add", before, self.ints(1)))
        self.keep(name, count, axes=1)
        return count
