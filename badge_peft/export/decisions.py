"""The exit policies as ONNX nodes, with `threshold` and `patience` as inputs of the graph.

The maths is that of `early_exit/policies`, whose `replay` is what these nodes are tested against. A policy there knows
its patience and reads the score off the whole history; here the patience comes with the call, so what is carried from
exit to exit are counts.
"""

from __future__ import annotations

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
from badge_peft.export.agreement import agreement
from badge_peft.export.distributions import Distributions, total
from badge_peft.export.graph import INT64
from badge_peft.export.state import Answers


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
        self.of = Distributions(num_labels, problem_type)
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
        return agreement(at, policy, self.of, self.scale)

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
        return self.policy.can_exit(self.exits, index)

    def is_last(self, index: int) -> bool:
        """Whether everybody who comes to exit `index` answers there."""
        return self.policy.is_final(self.exits, index)

    def reads(self, index: int) -> bool:
        """Whether the answers of exit `index` matter to anybody, whatever patience a call brings."""
        if self.uses_patience:  # any exit may be the first of those that agree
            return True
        return self.policy.needs_logits(self.exits, index)

    def threshold(self) -> tuple[float, float]:
        """The config's own threshold, and the unit by which a threshold is multiplied before it meets the score."""
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
        """The policy's own; 1 where the rule does not count."""
        policy = self.policy
        return policy.patience if isinstance(policy, (DivergencePolicy, ConfidentPatiencePolicy)) else 1

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

    # ------------------------------------------------------------------------------------------------------- scores

    def _entropy(self, at: Answers) -> str:
        return self.of.entropy(at.graph, self.of.log_probs(at.graph, at.logits))

    def _tempered_confidence(self, at: Answers, policy: MaxProbPolicy) -> str:
        g, logits = at.graph, at.logits
        if policy.config.temperature is not None:
            logits = g.op("Div", logits, g.floats(policy.config.temperature[at.index]))
        return self.of.confidence(g, self.of.log_probs(g, logits))

    def _divergence(self, at: Answers, policy: DivergencePolicy) -> str | None:
        g, state, kind = at.graph, at.state, policy.config.divergence
        here, dtype = self.of.represent(g, kind, at.logits)
        here = g.op("Unsqueeze", here, g.ints([1]))  # [n, 1, W]
        earlier = state.values.get("history")
        if earlier is None:
            state.put("history", here, dtype)
            return None
        tau = at.threshold if self.uses_threshold else g.floats(0.5)
        agrees = g.op("Less", self.of.compare(g, kind, here, earlier), tau)  # [n, j] or [n, 1]
        if policy.config.window == "all":
            state.put("history", g.op("Concat", earlier, here, axis=1), dtype)
            return g.op("GreaterOrEqual", total(g, g.op("Cast", agrees, to=INT64)), at.patience)
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
