"""`Decision`: a policy for one model, in a graph that has `threshold` and `patience` as inputs.

A policy in numpy knows its patience and reads its score off the whole history; here the patience comes with the call,
so what is carried from exit to exit are counts. `replay` is what the nodes are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

from badge_peft.early_exit.policies import POLICIES, ExitPolicy
from badge_peft.export.exit_nodes import ExitNodes, Value


@dataclass
class Decision:
    """A policy for one model, whose exits are behind the blocks with these numbers."""

    policy: ExitPolicy
    exits: list[int]
    num_labels: int
    problem_type: str
    reads_tokens: bool = False

    def __post_init__(self) -> None:
        self.policy.check(self.exits, self.num_labels, self.problem_type)

    def check_exportable(self, learned: bool) -> None:
        """Refuses a policy that has no ONNX form, before anything is exported."""
        kind = type(self.policy)
        self.policy.check_learned(learned)
        if _depth(kind, "nodes", "score_nodes") > _depth(kind, "should_exit", "score"):
            able = [name for name, policy in POLICIES.items() if policy.nodes is not ExitPolicy.nodes]
            raise ValueError(
                f"policy={self.policy.name!r} of class {kind.__name__} cannot be exported, as the class does not say "
                f"how its decision is written as nodes: give it `nodes`, or `score_nodes`. Exportable are "
                f"{', '.join(able)}."
            )

    def reads(self, index: int) -> bool:
        """Whether anything depends on the answers of exit `index`, whatever patience a call brings: with one, any exit
        may be the first of those that agree."""
        return self.policy.counts_exits or self.policy.needs_logits(self.exits, index)

    def stops(self, at: ExitNodes, index: int, seen: int) -> Value | None:
        """[n] bool, the rows that stop at exit `index` by logits that can be trusted; None: none can stop there.
        `seen` is how many exits' logits have been given so far, with this one."""
        policy = self.policy
        found = policy.nodes(at)
        trusted = at.trusts(policy.lookback(), policy.patience if policy.counts_exits else None, seen)
        return None if found is None else at.op("And", found, trusted)

    @property
    def count_name(self) -> str:
        """What the whole number is called that comes with a call."""
        return "top_k" if self.policy.by_group else "patience"

    @property
    def count(self) -> int:
        """The config's own: t, or k where rows are the candidates of a query."""
        return self.policy.group_size if self.policy.by_group else self.policy.patience

    @property
    def uses_threshold(self) -> bool:
        """Whether the policy compares a number with a threshold."""
        return self.policy.uses_threshold(self.problem_type)

    @property
    def threshold(self) -> float | list[float]:
        """The config's own, one or one for each exit; where there is none to choose, the number that
        takes its place."""
        given = self.policy.resolve(self.num_labels, self.problem_type).threshold
        if given is None or not self.uses_threshold:
            return self.policy.threshold(self.num_labels, self.problem_type)
        return given


def _depth(kind: type, *names: str) -> int:
    """How far up its ancestors a class finds one of these methods: 0 is the class itself."""
    return min(i for i, ancestor in enumerate(kind.__mro__) if any(name in vars(ancestor) for name in names))
