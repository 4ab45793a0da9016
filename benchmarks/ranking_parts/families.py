"""Ways to choose the margins of `top_k`, on stored scores: what each keeps and saves on queries that did not choose.

* *one factor*: as `calibrate_ranking` does it, one factor on margins of a few shapes;
* *one factor on one shape*: the spread of each exit's error, and no other shape;
* *exit by exit*: no shape. Of the queries that may change, one after another is given up: that without which the
  largest margins that the others need save most;
* *in units of the query's spread*: one factor, on scores that are divided by the root of their deviation within the
  query, relative to that of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from badge_peft import EarlyExitConfig, ExitLogits
from badge_peft.ranking.calibration import RankingPoint, evaluate_ranking
from badge_peft.ranking.margins import margin_settings, needed_margins
from ranking_parts.scores import PoolScores

KEEPS = (0.9, 0.95, 0.98)
_WIDER = 1 + 1e-5  # than what was needed, so that rounding loses nothing

Settings = list[EarlyExitConfig]
Choose = Callable[[ExitLogits, EarlyExitConfig], Settings]


def one_factor(scores: ExitLogits, asked: EarlyExitConfig) -> Settings:
    points = _points(scores, asked)
    return [_fastest(points, keep) for keep in KEEPS]


def one_shape(scores: ExitLogits, asked: EarlyExitConfig) -> Settings:
    points = _points(scores, asked)
    widths = [sum(_margins(point)) for point in points]
    end = next(i for i in range(1, len(widths)) if not widths[i])  # each shape begins with margins of 0
    return [_fastest(points[:end], keep) for keep in KEEPS]


def exit_by_exit(scores: ExitLogits, asked: EarlyExitConfig) -> Settings:
    need = needed_margins(*_arrays(scores), top_k=asked.top_k or 10)  # [Q, E - 1]

    def point(queries: Sequence[int]) -> RankingPoint:
        margins = [*(need[list(queries)].max(axis=0) * _WIDER).tolist(), 0.0]
        return evaluate_ranking(scores, replace(asked, parameters={"margins": margins}))

    def chosen(keep: float) -> EarlyExitConfig:
        left = list(range(len(need)))
        for _ in range(int((1 - keep) * len(need) + 1e-9)):
            widest = {left[int(place)] for place in need[left].argmax(axis=0)}  # without any other nothing changes
            left.remove(min(widest, key=lambda query: point([q for q in left if q != query]).mean_exit))
        return point(left).config

    return [chosen(keep) for keep in KEEPS]


def _points(scores: ExitLogits, asked: EarlyExitConfig) -> list[RankingPoint]:
    settings = margin_settings(*_arrays(scores), scores.exits, asked, asked.top_k or 10)
    return [evaluate_ranking(scores, config) for config in settings]


def _fastest(points: Sequence[RankingPoint], keep: float) -> EarlyExitConfig:
    enough = min(keep, max(point.score for point in points)) - 1e-12
    return min((point for point in points if point.score >= enough), key=lambda point: point.mean_exit).config


def _margins(point: RankingPoint) -> list[float]:
    return (point.config.parameters or {})["margins"]


def _arrays(scores: ExitLogits) -> tuple[np.ndarray, np.ndarray]:
    return scores.logits[:, :, 0].double().numpy(), scores.groups.numpy()


def spread_out(scores: ExitLogits) -> ExitLogits:
    """Scores of all exits but the last over the root of their deviation within a query, the mean of which stays."""
    values, codes = _arrays(scores)
    spread = np.stack([values[codes == code].std(axis=0) for code in range(int(codes.max()) + 1)])  # [Q, E]
    factors = np.sqrt(np.maximum(spread, 1e-9) / spread.mean(axis=0))[codes]
    values[:, :-1] /= factors[:, :-1]
    return replace(scores, logits=torch.from_numpy(values).float().unsqueeze(-1))


FAMILIES: dict[str, tuple[Choose, bool]] = {
    "one factor": (one_factor, False),
    "one factor on one shape": (one_shape, False),
    "exit by exit": (exit_by_exit, False),
    "in units of the query's spread": (one_factor, True),
}


def compare_families(pools: Sequence[PoolScores], seeds: int, top_k: int, splits: int) -> list[dict[str, Any]]:
    """Each family on random halves of the queries of all pools.

    Returns:
        For each family and share to keep: `kept` and `saved` on the other half, the mean over seeds and splits.
    """
    found = []
    rng = np.random.default_rng(0)
    stored = [_together([pool.of_seed(i) for pool in pools]) for i in range(seeds)]
    queries = int(stored[0].groups.max()) + 1
    halves = [rng.permutation(queries)[: queries // 2] for _ in range(splits)]
    asked = EarlyExitConfig(policy="top_k", top_k=top_k)
    for name, (choose, spread) in FAMILIES.items():
        points: list[list[RankingPoint]] = []
        for scores in map(spread_out, stored) if spread else stored:
            for half in halves:
                inside = torch.from_numpy(np.isin(scores.groups.numpy(), half))
                other = scores.select(~inside)
                points.append([evaluate_ranking(other, config) for config in choose(scores.select(inside), asked)])
        for keep, column in zip(KEEPS, zip(*points, strict=True), strict=True):
            kept, saved = (float(np.mean([getattr(p, key) for p in column])) for key in ("score", "layer_speedup"))
            found.append({"family": name, "keep": keep, "kept": kept, "saved": saved})
            print(f"{name}, {keep}: kept {kept:.3f}, saved {saved:.3f}", flush=True)
    return found


def _together(parts: Sequence[ExitLogits]) -> ExitLogits:
    """The rows of all parts, whose queries are different ones."""
    groups = [f"{i} {code}" for i, part in enumerate(parts) for code in part.groups.tolist()]
    return replace(parts[0], logits=torch.cat([part.logits for part in parts]), labels=None, groups=groups)


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """One line for each family, of what `compare_families` has found."""
    lines = [
        [name, *(f"{row['kept']:.1%}; {row['saved']:.1%}" for row in rows if row["family"] == name)]
        for name in dict.fromkeys(row["family"] for row in rows)
    ]
    return ["margins", *(f"asked for {keep:.0%}" for keep in dict.fromkeys(row["keep"] for row in rows))], lines


def describe(splits: int, top_k: int) -> str:
    """What the table shows."""
    return (
        f"Other ways to choose the margins of a top {top_k}, on the same scores: the share of queries kept and "
        f"the blocks that are saved, on the half of all queries that did not choose, mean over {splits} halves and "
        "seeds. *Exit by exit* gives up the queries that cost most, without a shape for the margins; *in units of "
        "the query's spread* divides the scores of an exit by the root of their deviation within the query."
    )
