"""`Settings`: the base of what can be asked of a workflow. A number has the same range wherever its name stands."""

from __future__ import annotations

from badge_peft.utils.checks import check_int, check_number

# a name has the same range wherever it stands
_AT_LEAST = {
    0: ("depth", "latency", "seed", "trials"),
    1: ("batch_size", "candidates", "epochs", "max_eval", "max_rows", "max_train", "patience", "r", "top_k"),
    4: ("max_length",),
}
_RANGES = (
    (("adapter_lr", "backbone_lr", "learning_rate"), lambda x: x > 0, "it must be a number above 0"),
    (("confidence", "eval_share"), lambda x: 0 < x < 1, "it must lie between 0 and 1"),
    (("keep",), lambda x: 0 < x <= 1, "it is a share of the queries, in (0, 1]"),
    (("distillation",), lambda x: 0 <= x <= 1, "it is a fraction, in [0, 1]"),
    (("max_score_drop",), lambda x: x >= 0, "it must be 0 or more"),
    (("target_blocks_saved", "target_time_saved"), lambda x: 0 <= x < 1, "it is a share, in [0, 1)"),
)


class Settings:
    """Base of the groups of fields."""

    def __post_init__(self) -> None:
        for least, names in _AT_LEAST.items():
            for name in names:
                check_int(name, getattr(self, name, None), at_least=least)
        for names, allowed, rule in _RANGES:
            for name in names:
                check_number(name, getattr(self, name, None), allowed, rule)
