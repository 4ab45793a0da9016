"""The rows of the paper's Table 1: what each method trains, and with which adapter."""

from __future__ import annotations

from typing import Any, NamedTuple


class Method(NamedTuple):
    """One way to train exits: its title in tables, the objective of `MultiExitTrainer`, the fields of `BadgeConfig`
    that make it what it is (a grid's variants come on top), the method whose learning rates it shares, and further
    arguments of the trainer."""

    title: str
    objective: str = "joint"
    adapter: dict[str, Any] = {"placement": "none"}  # noqa: RUF012
    rates_of: str | None = None
    training: dict[str, Any] = {}  # noqa: RUF012


_BLOCK = {"placement": "block"}
METHODS: dict[str, Method] = {
    # `single_final` and `single_exits` become runs of `single`, one per depth.
    "single": Method("single exit", "single_exit"),
    "two_stage": Method("2ST", "two_stage"),
    "joint": Method("JT"),
    "joint_mha": Method("JT + MHA exit", adapter={"placement": "none", "exit_type": "mha"}),
    "gradient_equilibrium": Method("GradEquil", "gradient_equilibrium"),
    "alternating": Method("ALT", "alternating"),
    "past_future": Method("GPF", "past_future", {"placement": "none", "exit_type": "past_future"}),
    "badge": Method("BADGE", adapter=_BLOCK),
    # Beyond Table 1: the exits of LTE for Figure 2, and bypasses with the objectives of rivals.
    "badge_lte": Method("BADGE + LTE", adapter={**_BLOCK, "learn_to_exit": True}, rates_of="badge"),
    "badge_alternating": Method("BADGE + ALT", "alternating", _BLOCK),
    "badge_distilled": Method(
        "BADGE + distillation", adapter=_BLOCK, rates_of="badge", training={"distillation": 0.5}
    ),
    "badge_distilled_soft": Method(
        "BADGE + distillation, T = 2",
        adapter=_BLOCK,
        rates_of="badge",
        training={"distillation": 0.5, "distillation_temperature": 2.0},
    ),
    "badge_gradient_equilibrium": Method("BADGE + GradEquil", "gradient_equilibrium", _BLOCK),
}
SINGLE = {"single_final": "single final exit", "single_exits": "single exits"}
TITLES = {**{name: method.title for name, method in METHODS.items()}, **SINGLE}
#: The order of Table 1.
TABLE_1 = (
    *SINGLE,
    *("two_stage", "joint", "joint_mha", "gradient_equilibrium", "alternating", "past_future", "badge"),
)
