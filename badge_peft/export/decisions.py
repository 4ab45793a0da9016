"""The exit policies as ONNX nodes, with `threshold` and `patience` as inputs of the graph.

The maths is that of `early_exit/policies`, whose `replay` is what these nodes are tested against. A policy there knows
its patience and reads the signal off the whole history; here the patience comes with the call, so what is carried from
exit to exit are counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from badge_peft.early_exit.policies import (
    POLICIES,
    AgreementPolicy,
    ConfidentPatiencePolicy,
    DivergencePolicy,
    EntropyPolicy,
    ExitPolicy,
    FixedDepthPolicy,
    LearnedPolicy,
    MaxProbPolicy,
    NeverPolicy,
    PatiencePolicy,
    ThresholdPolicy,
)
from badge_peft.early_exit.policies.base import max_entropy
from badge_peft.export.graph import FLOAT, INT64, Graph

_LARGEST = 1e30  # as early_exit/divergences.py
_LIMIT = 50.0  # as early_exit/policies/agreement.py


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


class Decision:
    """A policy for one model.

    Args:
        policy: Checked against the model.
        exits: Block numbers of the model's exits.
        num_labels: K.
        problem_type: As transformers has it.
    """

    def __init__(self, policy: ExitPolicy, exits: list[int], num_labels: int, problem_type: str) -> None:
        policy.check(exits, num_labels, problem_type)
        self.policy = policy
        self.exits = exits
        self.num_labels = num_labels
        self.problem_type = problem_type
        self.scale = float(np.float32(max_entropy(num_labels, problem_type)))

    def stops(self, at: Answers) -> str | None:
        """[n] bool: the rows that may stop here; None where no row can. The state goes on to the next exit."""
        policy = self.policy
        if isinstance(policy, (NeverPolicy, FixedDepthPolicy)):
            return None
        if isinstance(policy, DivergencePolicy):  # PatiencePolicy is one
            return self._divergence(at, policy)
        g = at.graph
        if isinstance(policy, ConfidentPatiencePolicy):
            share = g.op("Div", self._entropy(at), g.floats(self.scale))
            return self._streak(at, g.op("Less", share, at.threshold))
        if isinstance(policy, EntropyPolicy):
            return g.op("Less", self._entropy(at), at.threshold)
        if isinstance(policy, MaxProbPolicy):
            return g.op("GreaterOrEqual", self._tempered_confidence(at, policy), at.threshold)
        if isinstance(policy, LearnedPolicy):
            assert at.doubt is not None  # check_exportable
            return g.op("Less", at.doubt, at.threshold)
        assert isinstance(policy, AgreementPolicy)
        return self._agreement(at, policy)

    def check_exportable(self, learned: bool) -> None:
        """Refuses a policy that has no ONNX form, before anything is exported.

        Raises:
            ValueError: it is somebody's own, or it needs an LTE layer that the adapter lacks.
        """
        if isinstance(self.policy, LearnedPolicy) and not learned:
            raise ValueError(
                "policy='learned' needs an adapter with an LTE layer: train with BadgeConfig(learn_to_exit=True)."
            )
        if POLICIES.get(self.policy.name) is not type(self.policy):
            raise ValueError(
                f"policy={self.policy.name!r} of class {type(self.policy).__name__} cannot be exported: only "
                f"badge_peft's own have an ONNX form, {', '.join(POLICIES)}."
            )

    def may_stop(self, index: int) -> bool:
        """Whether the config lets rows stop at exit `index`."""
        return self.policy.decides(self.exits, index)

    def is_last(self, index: int) -> bool:
        """Whether everybody who comes to exit `index` answers there."""
        return self.policy.answers(self.exits, index)

    def reads(self, index: int) -> bool:
        """Whether the answers of exit `index` matter to anybody, whatever patience a call brings."""
        if self.uses_patience:  # any exit may be the first of those that agree
            return True
        return self.policy.reads(self.exits, index)

    def threshold(self) -> tuple[float, float]:
        """The config's own threshold, and the unit by which a threshold is multiplied before it meets the signal."""
        policy = self.policy
        if not isinstance(policy, ThresholdPolicy):
            return 0.0, 1.0
        if isinstance(policy, PatiencePolicy) and self.problem_type != "regression":
            return 0.5, 1.0
        unit = self.scale if policy.config.normalize and policy.in_nats(self.problem_type) else 1.0
        given = policy.config.threshold
        if given is None:
            given = policy.default_threshold(self.num_labels, self.problem_type) / unit
        return given, unit

    @property
    def patience(self) -> int:
        """The config's own patience; 1 where the rule does not count."""
        if not self.uses_patience:
            return 1
        return self.policy.config.patience or self.policy.default_patience  # type: ignore[attr-defined]

    @property
    def uses_patience(self) -> bool:
        """Whether the rule counts exits."""
        return isinstance(self.policy, (DivergencePolicy, ConfidentPatiencePolicy))

    @property
    def uses_threshold(self) -> bool:
        """Whether the rule compares a number."""
        if isinstance(self.policy, PatiencePolicy):
            return self.problem_type == "regression"
        return not isinstance(self.policy, (NeverPolicy, FixedDepthPolicy))

    # ------------------------------------------------------------------------------------- distributions of an exit

    def _log_probs(self, g: Graph, logits: str) -> str:
        """[n, K] -> [n, W]: log p; of K independent labels, log p beside log(1 - p), W = 2K."""
        clipped = g.op("Clip", logits, g.floats(-_LARGEST), g.floats(_LARGEST))
        if self.problem_type != "multi_label_classification":
            return g.op("LogSoftmax", clipped, axis=-1)
        yes = g.op("Neg", g.op("Softplus", g.op("Neg", clipped)))
        no = g.op("Neg", g.op("Softplus", clipped))
        return g.op("Concat", yes, no, axis=-1)

    def _entropy(self, at: Answers) -> str:
        log_p = self._log_probs(at.graph, at.logits)
        return self._sum(at.graph, at.graph.op("Mul", at.graph.op("Exp", log_p), log_p), sign=-1)

    def _confidence(self, g: Graph, log_p: str) -> str:
        """[n, W] -> [n]: the largest probability; multi-label: that of the least sure label."""
        if self.problem_type != "multi_label_classification":
            return g.op("Exp", g.op("ReduceMax", log_p, g.ints([-1]), keepdims=0))
        k = self.num_labels
        yes = g.op("Slice", log_p, g.ints([0]), g.ints([k]), g.ints([-1]))
        no = g.op("Slice", log_p, g.ints([k]), g.ints([2 * k]), g.ints([-1]))
        return g.op("Exp", g.op("ReduceMin", g.op("Max", yes, no), g.ints([-1]), keepdims=0))

    def _tempered_confidence(self, at: Answers, policy: MaxProbPolicy) -> str:
        g, logits = at.graph, at.logits
        if policy.config.temperature is not None:
            logits = g.op("Div", logits, g.floats(policy.config.temperature[at.index]))
        return self._confidence(g, self._log_probs(g, logits))

    @staticmethod
    def _sum(g: Graph, values: str, sign: int = 1) -> str:
        """Over the last axis."""
        total = g.op("ReduceSum", values, g.ints([-1]), keepdims=0)
        return g.op("Neg", total) if sign < 0 else total

    # ------------------------------------------------------------------------------------------ divergences (Eq. 3-4)

    def _represent(self, g: Graph, kind: str, logits: str) -> tuple[str, int]:
        """What a divergence of this kind compares, [n, W] or [n], and its type."""
        if self.problem_type == "regression":
            return g.op("Clip", logits, g.floats(-_LARGEST), g.floats(_LARGEST)), FLOAT
        if kind != "label":
            return self._log_probs(g, logits), FLOAT
        if self.problem_type == "multi_label_classification":
            return g.op("Cast", g.op("Greater", logits, g.floats(0)), to=FLOAT), FLOAT
        return g.op("ArgMax", logits, axis=-1, keepdims=1), INT64

    def _compare(self, g: Graph, kind: str, here: str, others: str) -> str:
        """S(p, q): [n, 1, W] and [n, i, W] -> [n, i]."""
        if self.problem_type == "regression" or (kind == "label" and self._many_labels):
            return self._sum(g, g.op("Abs", g.op("Sub", here, others)))
        if kind == "label":
            differ = g.op("Not", g.op("Equal", here, others))
            return self._sum(g, g.op("Cast", differ, to=FLOAT))
        p = g.op("Exp", here)
        if kind == "ce":
            return self._sum(g, g.op("Mul", p, others), sign=-1)
        if kind == "kl":
            return self._sum(g, g.op("Mul", p, g.op("Sub", here, others)))
        apart = g.op("Neg", g.op("Abs", g.op("Sub", here, others)))
        mean = g.op("Softplus", apart)  # ln(e^a + e^b) = max(a, b) + ln(1 + e^-|a - b|)
        middle = g.op("Sub", g.op("Add", g.op("Max", here, others), mean), g.floats(np.log(2.0)))
        left = g.op("Mul", p, g.op("Sub", here, middle))
        right = g.op("Mul", g.op("Exp", others), g.op("Sub", others, middle))
        return g.op("Mul", self._sum(g, g.op("Add", left, right)), g.floats(0.5))

    @property
    def _many_labels(self) -> bool:
        return self.problem_type == "multi_label_classification"

    def _divergence(self, at: Answers, policy: DivergencePolicy) -> str | None:
        g, state, kind = at.graph, at.state, policy.config.divergence
        here, dtype = self._represent(g, kind, at.logits)
        here = g.op("Unsqueeze", here, g.ints([1]))  # [n, 1, W]
        earlier = state.values.get("history")
        if earlier is None:
            state.put("history", here, dtype)
            return None
        tau = at.threshold if self.uses_threshold else g.floats(0.5)
        agrees = g.op("Less", self._compare(g, kind, here, earlier), tau)  # [n, j] or [n, 1]
        if policy.config.window == "all":
            state.put("history", g.op("Concat", earlier, here, axis=1), dtype)
            return g.op("GreaterOrEqual", self._sum(g, g.op("Cast", agrees, to=INT64)), at.patience)
        state.put("history", here, dtype)
        return self._streak(at, g.op("Squeeze", agrees, g.ints([1])))

    def _streak(self, at: Answers, agrees: str) -> str:
        """[n] bool: whether as many exits in a row as `patience` agree, with this one."""
        g = at.graph
        count = g.op("Cast", agrees, to=INT64)
        if "streak" in at.state.values:  # one more where this exit agrees, and back to 0 where not
            count = g.op("Mul", count, g.op("Add", at.state.values["streak"], g.ints(1)))
        at.state.put("streak", count, INT64)
        return g.op("GreaterOrEqual", count, at.patience)

    # ------------------------------------------------------------------------------------------------------ agreement

    def _agreement(self, at: Answers, policy: AgreementPolicy) -> str:
        g = at.graph
        fitted = policy.config.parameters
        assert fitted is not None  # the policy has checked
        columns = self._regression_features(at) if self.problem_type == "regression" else self._class_features(at)
        stacked = g.op("Concat", *(g.op("Unsqueeze", column, g.ints([1])) for column in columns), axis=1)  # [n, F]
        clipped = g.op("Clip", stacked, g.floats(-_LIMIT), g.floats(_LIMIT))
        weighted = self._sum(g, g.op("Mul", clipped, g.floats(fitted["coefficients"][at.index])))
        linear = g.op("Add", weighted, g.floats(fitted["intercepts"][at.index]))
        if not policy.stops_above:
            return g.op("Less", linear, at.threshold)
        chance = g.op("Sigmoid", g.op("Clip", linear, g.floats(-_LIMIT), g.floats(_LIMIT)))
        return g.op("GreaterOrEqual", chance, at.threshold)

    def _class_features(self, at: Answers) -> list[str]:
        """As `features` of the policy: each [n]."""
        g, state, scale = at.graph, at.state, at.graph.floats(self.scale)
        tiny = g.floats(1e-6)
        log_p = self._log_probs(g, at.logits)  # [n, W]
        sure = self._confidence(g, log_p)
        doubt = g.op("Max", g.op("Sub", g.floats(1), sure), tiny)
        here = g.op("Unsqueeze", log_p, g.ints([1]))  # [n, 1, W]
        label, label_type = self._represent(g, "label", at.logits)
        label = g.op("Unsqueeze", label, g.ints([1]))
        columns = [
            g.op("Div", self._sum(g, g.op("Mul", g.op("Exp", log_p), log_p), sign=-1), scale),
            sure,
            g.op("Log", g.op("Div", g.op("Max", sure, tiny), doubt)),
            self._margin(g, log_p, sure),
        ]
        history, labels = state.values.get("history"), state.values.get("labels")
        if history is not None and labels is not None:
            before = self._at(g, history, -1)  # [n, 1, W]
            divergences = g.op("Div", self._compare(g, "ce", here, history), scale)  # [n, j]
            same = self._same(g, label, labels)
            columns += [
                g.op("ReduceMin", divergences, g.ints([1]), keepdims=0),
                g.op("Squeeze", self._at(g, divergences, -1), g.ints([1])),
                g.op("ReduceMean", divergences, g.ints([1]), keepdims=0),
                g.op("Squeeze", g.op("Div", self._compare(g, "kl", here, before), scale), g.ints([1])),
                g.op("ReduceMean", same, g.ints([1]), keepdims=0),
                self._confidence(g, g.op("Squeeze", before, g.ints([1]))),
            ]
        self._append(at, "history", history, here, FLOAT)
        self._append(at, "labels", labels, label, label_type)
        return columns

    def _same(self, g: Graph, label: str, labels: str) -> str:
        """[n, j] float: 1 where an earlier exit gave the same label (all labels, where there are many)."""
        return g.op("Cast", g.op("Equal", self._compare(g, "label", label, labels), g.floats(0)), to=FLOAT)

    def _margin(self, g: Graph, log_p: str, sure: str) -> str:
        if self._many_labels:
            return g.op("Sub", g.op("Mul", g.floats(2), sure), g.floats(1))
        values = g.fresh("TopK")
        g.ops("TopK", [log_p, g.ints([2])], [values, g.fresh("TopK_places")], axis=-1)
        top = g.op("Exp", values)  # [n, 2]
        first, second = (self._at(g, top, i) for i in (0, 1))
        return g.op("Squeeze", g.op("Sub", first, second), g.ints([1]))

    def _regression_features(self, at: Answers) -> list[str]:
        g, state = at.graph, at.state
        here = g.op("Unsqueeze", self._represent(g, "ce", at.logits)[0], g.ints([1]))
        columns = [g.op("ReduceMean", at.logits, g.ints([-1]), keepdims=0)]
        history = state.values.get("history")
        if history is not None:
            apart = self._compare(g, "ce", here, history)  # [n, j]
            reduce: Callable[[str], str] = lambda kind: g.op(kind, apart, g.ints([1]), keepdims=0)  # noqa: E731
            last = g.op("Squeeze", self._at(g, apart, -1), g.ints([1]))
            columns += [reduce("ReduceMin"), last, reduce("ReduceMean"), reduce("ReduceMax")]
        self._append(at, "history", history, here, FLOAT)
        return columns

    @staticmethod
    def _at(g: Graph, values: str, index: int) -> str:
        """The entry `index` of axis 1, which stays."""
        return g.op("Gather", values, g.ints([index]), axis=1)

    @staticmethod
    def _append(at: Answers, name: str, before: str | None, value: str, dtype: int) -> None:
        at.state.put(name, value if before is None else at.graph.op("Concat", before, value, axis=1), dtype)
