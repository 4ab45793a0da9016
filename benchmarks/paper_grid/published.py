"""The paper's own figures, for the comparisons that are made here. Scores are per cent, S-avg / S-best over 12 exits.

Source: "BADGE: Speeding Up BERT Inference after Deployment via Block-wise Bypasses and Divergence-Based Early
Exiting", ACL 2023 industry track, Tables 1 and 6.
"""

from __future__ import annotations

#: Table 1, ALBERT-base: method -> task -> (S-avg, S-best).
TABLE_1: dict[str, dict[str, tuple[float | None, float]]] = {
    "single_final": {"RTE": (None, 77.6), "MRPC": (None, 89.1), "MNLI": (None, 83.7)},
    "single_exits": {"RTE": (67.5, 77.6), "MRPC": (85.4, 89.1), "MNLI": (76.4, 83.7)},
    "two_stage": {"RTE": (68.9, 77.6), "MRPC": (83.0, 89.1), "MNLI": (76.2, 83.7)},
    "joint": {"RTE": (66.8, 72.5), "MRPC": (84.4, 87.9), "MNLI": (76.0, 83.8)},
    "joint_mha": {"RTE": (67.5, 75.9), "MRPC": (84.8, 87.9), "MNLI": (76.8, 83.2)},
    "gradient_equilibrium": {"RTE": (67.3, 77.4), "MRPC": (84.2, 88.4), "MNLI": (76.5, 83.6)},
    "alternating": {"RTE": (68.5, 77.8), "MRPC": (84.6, 88.3), "MNLI": (76.6, 82.9)},
    "past_future": {"RTE": (68.1, 78.4), "MRPC": (84.3, 88.1), "MNLI": (75.9, 82.9)},
    "badge": {"RTE": (70.2, 77.9), "MRPC": (86.0, 89.6), "MNLI": (77.8, 83.8)},
}
TASKS_1 = ("RTE", "MRPC", "MNLI")

#: Table 6, RTE: backbone -> method -> (S-avg, S-best).
TABLE_6: dict[str, dict[str, tuple[float, float]]] = {
    "BERT-base": {"joint": (61.5, 68.9), "alternating": (61.9, 69.3), "badge": (62.7, 70.5)},
    "ElasticBERT": {"joint": (62.3, 70.7), "alternating": (63.1, 70.9), "badge": (64.5, 72.3)},
}


def paper_difference(method: str) -> str:
    """What Table 1 has for BADGE minus `method`, S-avg, over its tasks."""
    if TABLE_1[method]["RTE"][0] is None:
        return "-"
    found = []
    for task in TASKS_1:
        ours = TABLE_1["badge"][task][0]
        theirs = TABLE_1[method][task][0]
        assert ours is not None and theirs is not None
        found.append(ours - theirs)
    return f"{min(found):+.1f} to {max(found):+.1f}"
