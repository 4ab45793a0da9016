"""`Decision`: a policy for one model, in a graph that has `threshold` and `patience` as inputs.

A policy in numpy knows its patience and reads its score off the whole history; here the patience comes with the call,
so what is carried from exit to exit are counts. `replay` is what the nodes are tested against.
"""

from __future__ import annotations

from badge_peft.early_exit.policies import POLICIES, ExitPolicy
from badge_peft.export.graph import Graph
from badge_peft.export.nodes import ExitNode, State


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

    def stops(
        self,
        graph: Graph,
        index: int,
        logits: str,
        uncertainty: str | None,
        state: State,
        threshold: str,
        patience: str,
    ) -> str | None:
        """[n] bool: the rows that may stop at an exit; None where no row can. The state goes on to the next exit; the
        arguments are those of `ExitNode`."""
        task = (self.num_labels, self.problem_type)
        tau = threshold if self.uses_threshold else self.policy.threshold(*task)
        return self.policy.nodes(ExitNode(graph, index, logits, uncertainty or "", state, tau, patience, *task))

    def check_exportable(self, learned: bool) -> None:
        """Refuses a policy that has no ONNX form, before anything is exported.

        Raises:
            ValueError: its class has no nodes for what it decides, or it needs an LTE layer that the adapter lacks.
        """
        kind = type(self.policy)
        if self.policy.reads_uncertainty and not learned:
            raise ValueError(
                f"policy={self.policy.name!r} needs an adapter with an LTE layer: train with "
                "BadgeConfig(learn_to_exit=True)."
            )
        if _depth(kind, "nodes", "score_nodes") > _depth(kind, "should_exit", "score"):
            able = [name for name, policy in POLICIES.items() if policy.nodes is not ExitPolicy.nodes]
            raise ValueError(
                f"policy={self.policy.name!r} of class {kind.__name__} cannot be exported, as the class does not say "
                f"how its decision is written as nodes: give it `nodes`, or `score_nodes`. Exportable are "
                f"{', '.join(able)}."
            )

    def may_stop(self, index: int) -> bool:
        """Whether the config lets rows stop at exit `index`."""
        return self.policy.can_exit(self.exits, index)

    def is_last(self, index: int) -> bool:
        """Whether every row that comes to exit `index` answers there."""
        return self.policy.is_final(self.exits, index)

    def reads(self, index: int) -> bool:
        """Whether anything depends on the answers of exit `index`, whatever patience a call brings."""
        if self.uses_patience:  # any exit may be the first of those that agree
            return True
        return self.policy.needs_logits(self.exits, index)

    def threshold(self) -> tuple[float, float]:
        """The config's own threshold, and the unit by which a threshold is multiplied before it meets the score."""
        task = (self.num_labels, self.problem_type)
        given = self.policy.resolve(*task).threshold
        if given is None or not self.uses_threshold:
            given = self.policy.threshold(*task)  # in the unit of the score, which is 1 where nothing is to choose
        return given, self.policy.unit(*task)

    @property
    def patience(self) -> int:
        """The policy's own; 1 where it does not count."""
        return self.policy.patience

    @property
    def uses_patience(self) -> bool:
        """Whether the policy counts exits."""
        return self.policy.counts_exits

    @property
    def uses_threshold(self) -> bool:
        """Whether the policy compares a number with a threshold."""
        return self.policy.uses_threshold(self.problem_type)


def _depth(kind: type, *names: str) -> int:
    """How far up its ancestors a class finds one of these methods: 0 is the class itself."""
    return min(i for i, ancestor in enumerate(kind.__mro__) if any(name in vars(ancestor) for name in names))
