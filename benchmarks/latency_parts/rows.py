"""One line of a result: what ran, where its rows left, how long it took, and against what."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from latency_parts.turns import Timing

Row = dict[str, Any]


def make_row(
    variant: str,
    base: str,
    timing: Timing,
    blocks: int,
    length: int,
    forced: Sequence[int] | None,
    measured: Sequence[int] | None,
    whole: bool = False,
) -> Row:
    """One line.

    Args:
        variant: What ran.
        base: What it is compared with, at full depth.
        timing: From `against_base`.
        blocks: M.
        length: S.
        forced: [B], the blocks at which the rows were meant to leave; None where nothing leaves and all exits run.
        measured: [B], where they left.
        whole: The ratio is to the base's whole time, not to the share of blocks that ran.

    Returns:
        `share` is what the ratio divides the base's time by: the measured mean exit / M.
    """
    mean = statistics.fmean(measured) if measured else float(blocks)
    share = 1.0 if whole else mean / blocks
    return {
        "variant": variant,
        "base": base,
        "batch": len(forced) if forced else 1,
        "length": length,
        "forced": sorted(set(forced)) if forced else None,
        "as_forced": None if forced is None or measured is None else list(forced) == list(measured),
        "mean_exit": mean,
        "blocks": blocks,
        "share": share,
        **timing.summary(share),
    }
