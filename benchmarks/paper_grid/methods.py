"""The rows of the paper's Table 1: what each method trains, and with which adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to train exits.

    Args:
        title: In tables.
        objective: Of `MultiExitTrainer`.
        adapter: Fields of `BadgeConfig` that make it what it is; a grid's variants come on top.
        rates_of: The method whose learning rates it shares, where a search of its own would be a waste.
        training: Further arguments of `MultiExitTrainer`.
    """

    title: str
    objective: str = "joint"
    adapter: dict[str, Any] = field(default_factory=dict)
    rates_of: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    # `single_final` and `single_exits` become runs of `single`, one per depth.
    "single": Method("single exit", "single_exit", {"placement": "none"}),
    "two_stage": Method("2ST", "two_stage", {"placement": "none"}),
    "joint": Method("JT", "joint", {"placement": "none"}),
    "joint_mha": Method("JT + MHA exit", "joint", {"placement": "none", "exit_type": "mha"}),
    "gradient_equilibrium": Method("GradEquil", "gradient_equilibrium", {"placement": "none"}),
    "alternating": Method("ALT", "alternating", {"placement": "none"}),
    "past_future": Method("GPF", "past_future", {"placement": "none", "exit_type": "past_future"}),
    "badge": Method("BADGE", "joint", {"placement": "block"}),
    # Beyond Table 1: the exits of LTE for Figure 2, and bypasses with the objectives of rivals.
    "badge_lte": Method("BADGE + LTE", "joint", {"placement": "block", "learn_to_exit": True}, rates_of="badge"),
    "badge_alternating": Method("BADGE + ALT", "alternating", {"placement": "block"}),
    "badge_distilled": Method(
        "BADGE + distillation", "joint", {"placement": "block"}, rates_of="badge", training={"distillation": 0.5}
    ),
    "badge_distilled_soft": Method(
        "BADGE + distillation, T = 2",
        "joint",
        {"placement": "block"},
        rates_of="badge",
        training={"distillation": 0.5, "distillation_temperature": 2.0},
    ),
    "badge_gradient_equilibrium": Method("BADGE + GradEquil", "gradient_equilibrium", {"placement": "block"}),
}

SINGLE = ("single_final", "single_exits")
#: The order of Table 1.
TABLE_1 = (
    "single_final",
    "single_exits",
    "two_stage",
    "joint",
    "joint_mha",
    "gradient_equilibrium",
    "alternating",
    "past_future",
    "badge",
)
TITLES = {
    **{name: method.title for name, method in METHODS.items()},
    "single_final": "single final exit",
    "single_exits": "single exits",
}


def check_method(name: str) -> str:
    """`name`, when it is one.

    Raises:
        ValueError: it is not.
    """
    if name not in METHODS and name not in SINGLE:
        allowed = ", ".join([*SINGLE, *(m for m in METHODS if m != "single")])
        raise ValueError(f"method {name!r} is not known: a grid's methods are among {allowed}.")
    return name
