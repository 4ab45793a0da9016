"""`calibrate_ranking`: the margins of `top_k` with the fewest blocks that leave the top k of queries as it was; and
`sweep_ranking`: what margins cost and save, from none to wide ones.

With `confidence` it is Learn-then-Test, as in `evaluation.calibration`: settings come from one half of the queries and
are ordered from slow to fast; on the other half each is tested in turn by the exact binomial test of "more than
1 - keep of the queries change", and the first that cannot be rejected ends the walk.

Source: Angelopoulos et al., "Learn then Test", 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import binom

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.tradeoff import TradeOff, TradeOffPoint, pareto
from badge_peft.ranking.margins import margin_settings
from badge_peft.ranking.metrics import ranking_scores, top_k_kept
from badge_peft.utils.checks import check_int, check_number

METRIC = "top_k_kept"  # what `score` of a ranking is: the share of queries with full depth's top k
FOLDS = 5

Array = np.ndarray


@dataclass(frozen=True)
class RankingPoint(TradeOffPoint):
    """One configuration on some queries; `score` is the share of them with full depth's top k, `kept` [Q] bool which
    these are, and `exit_layer` [N] the block at which each candidate stopped."""

    kept: Array
    exit_layer: Array


def calibrate_ranking(
    exit_scores: Any,
    query_ids: Any = None,
    top_k: int = 10,
    keep: float = 0.95,
    confidence: float | None = None,
    ordered: bool = False,
    labels: Any = None,
    **fields: Any,
) -> EarlyExitConfig:
    """Finds the margins of `policy="top_k"`. No relevance labels are needed.

    Args:
        exit_scores: [N, E], what every exit says about every candidate, full depth last: a tensor, an array, or an
            `ExitLogits`, which knows the numbers of the exits. The exits of an array are those of blocks 1 to E.
        query_ids: [N], an id for each candidate; may be left out where the `ExitLogits` have `groups`.
        top_k: k.
        keep: Share of these queries whose top k is to be that of full depth.
        confidence: For example 0.95: with this probability at least `keep` of new queries of the same kind keep their
            top k. Half of the queries find the margins, half test them.
        ordered: The top k has to be in full depth's order as well. Scores of what is left are full depth's own, so
            this asks for more only together with `max_exit`.
        labels: [N], relevance (0 for none): nDCG@k and MRR@k before and after are recorded as well. None takes those
            of the `ExitLogits`.
        **fields: Of `EarlyExitConfig`: `min_exit`, `max_exit` and `decide_every` hold for what is searched.

    Returns:
        The config with the fewest blocks run; its `calibration` records what was measured: `score`, the share of these
        queries that is kept, and `held_out`, that of queries which did not choose the margins.

    Raises:
        ValueError: shapes that do not match, more than one output, k below 1, numbers out of range, or a share that
            these queries cannot reach below `max_exit` or show with this confidence.
    """
    check_int("top_k", top_k, at_least=1, optional=False)
    check_number("keep", keep, lambda share: 0 < share <= 1, "it is a share of the queries, in (0, 1]")
    check_number("confidence", confidence, lambda p: 0 < p < 1, "it is a probability, for example 0.95")
    unknown = sorted(set(fields) - {"min_exit", "max_exit", "decide_every"})
    if unknown:
        raise ValueError(
            f"calibrate_ranking has no {unknown[0]}: of the config it takes min_exit, max_exit, decide_every."
        )
    stored = as_exit_scores(exit_scores, query_ids)
    relevance = stored.labels if labels is None else labels
    if labels is None and relevance is not None and not relevance.any():
        relevance = None  # no row of the data is relevant: there is nothing to record
    if relevance is not None:
        full = ranking_scores(stored.logits[:, -1, 0], relevance, stored.groups, top_k)
    asked = EarlyExitConfig(policy="top_k", top_k=top_k, **fields)
    queries = _count(stored)
    bound: dict[str, Any] = {}
    if confidence is None:
        best = _fastest(_points(stored, asked, ordered), keep)
        if best.score < keep - 1e-12:
            raise ValueError(
                f"keep={keep} cannot be reached below max_exit={asked.max_exit}: {best.score:.4f} of the queries is "
                "the most there. Ask for less, or allow a deeper max_exit."
            )
        if queries > 1:
            share, saved = _held_out(stored, asked, keep, ordered)
            bound = {"held_out": share, "held_out_speedup": saved}
    else:
        chosen, tested = _certified(stored, asked, keep, confidence, ordered)
        best = evaluate_ranking(stored, chosen, ordered)
        bound = {"confidence": confidence, "test_queries": tested}
    record = {
        "policy_asked_for": "top_k",
        "metric": METRIC,
        "labels": "full depth's own answers",
        "rows": len(stored),
        "queries": queries,
        "keep": keep,
        "ordered": ordered,
        "weights_hash": stored.weights_hash,
        "score": best.score,
        "full_depth_score": 1.0,
        "mean_exit": best.mean_exit,
        "blocks_saved": best.blocks_saved,
        **bound,
    }
    if relevance is not None:
        after = ranking_scores(final_ranks(stored, best.exit_layer), relevance, stored.groups, top_k)
        record |= {"full_depth_ndcg": full.ndcg, "ndcg": after.ndcg, "full_depth_mrr": full.mrr, "mrr": after.mrr}
    return replace(best.config, calibration=record)


def as_exit_scores(exit_scores: Any, query_ids: Any) -> ExitLogits:
    """Whatever `calibrate_ranking` takes as `ExitLogits` that have `groups`."""
    if isinstance(exit_scores, ExitLogits):
        stored = exit_scores if query_ids is None else replace(exit_scores, groups=query_ids)
        if stored.logits.shape[2] != 1:
            raise ValueError(
                f"the model has {stored.logits.shape[2]} outputs, and candidates are ranked by one score: load it "
                "with num_labels=1."
            )
    else:
        scores = torch.as_tensor(exit_scores)
        if scores.dim() != 2:
            raise ValueError(
                f"exit_scores must be [N, E], a score of each candidate at each exit, got shape {list(scores.shape)}."
            )
        stored = ExitLogits(scores.unsqueeze(-1), groups=query_ids)
    if stored.groups is None:
        raise ValueError("query_ids is missing: give one id for each row of exit_scores.")
    return stored


def evaluate_ranking(exit_logits: ExitLogits, config: EarlyExitConfig, ordered: bool = False) -> RankingPoint:
    """What a config of `top_k` keeps and saves on stored scores that have `groups`, by replay."""
    stops = build_policy(config).replay_history(exit_logits.history())
    answers = exit_logits.answers(torch.from_numpy(stops))[:, 0].numpy()
    k = config.resolved_top_k
    full, codes = exit_logits.logits[:, -1, 0].numpy(), exit_logits.groups.numpy()
    kept = top_k_kept(full, answers, stops == stops.max(), codes, k, ordered)
    mean = float(stops.mean())
    return RankingPoint("top_k", config, mean, 1 - mean / exit_logits.depth, float(kept.mean()), kept, stops)


def final_ranks(exit_logits: ExitLogits, exit_layer: Array) -> Array:
    """[N]: numbers that order candidates as a ranking does: those that went deeper first, then by their scores."""
    answers = exit_logits.answers(torch.from_numpy(exit_layer))[:, 0].double().numpy()
    return answers + exit_layer * (float(np.ptp(answers)) + 1)


def _count(stored: ExitLogits) -> int:
    return int(stored.groups.max()) + 1


def _points(stored: ExitLogits, asked: EarlyExitConfig, ordered: bool) -> list[RankingPoint]:
    """Every setting that is considered."""
    scores, codes = stored.logits[:, :, 0].double().numpy(), stored.groups.numpy()
    k = asked.resolved_top_k
    settings = margin_settings(scores, codes, stored.exits, asked, k)
    return [evaluate_ranking(stored, config, ordered) for config in settings]


def ranking_front(stored: ExitLogits, asked: EarlyExitConfig, ordered: bool = False) -> list[TradeOffPoint]:
    """The settings that no other beats in both queries kept and blocks saved, from slow to fast."""
    return pareto([*_points(stored, asked, ordered)])


def sweep_ranking(exit_logits: ExitLogits, top_k: int = 10, points: int = 20) -> TradeOff:
    """The trade-off of `top_k` on stored scores that have `groups`, and of the fixed depths, where all
    candidates stop at one block.

    Args:
        exit_logits: Of the candidates of some queries.
        top_k: k.
        points: Of the policy's curve, spread over its speed-ups.

    Returns:
        The points, with the fixed depths first; the score is the share of queries with full depth's top k.
    """
    depths = [EarlyExitConfig(policy="fixed_depth", depth=m, top_k=top_k) for m in reversed(exit_logits.exits)]
    fixed = [replace(evaluate_ranking(exit_logits, config), name="fixed_depth") for config in depths]
    front = ranking_front(exit_logits, EarlyExitConfig(policy="top_k", top_k=top_k))
    steps = {round(i * (len(front) - 1) / max(points - 1, 1)) for i in range(points)}
    return TradeOff([*fixed, *(front[i] for i in sorted(steps))], METRIC, exit_logits.depth)


def _fastest(points: list[RankingPoint], keep: float) -> RankingPoint:
    """The fewest blocks among the points that keep enough queries; where none does, among those that keep most."""
    enough = min(keep, max(point.score for point in points)) - 1e-12
    return min((p for p in points if p.score >= enough), key=lambda p: (p.mean_exit, -p.score))


def _held_out(stored: ExitLogits, asked: EarlyExitConfig, keep: float, ordered: bool) -> tuple[float, float]:
    """Share of queries kept, and of blocks saved, by margins that the other queries chose."""
    codes = stored.groups.numpy()
    kept, stops = [], np.zeros(len(stored), dtype=np.int64)
    for held in np.array_split(np.random.default_rng(0).permutation(_count(stored)), min(FOLDS, _count(stored))):
        inside = np.isin(codes, held)
        chosen = _fastest(_points(stored.select(torch.from_numpy(~inside)), asked, ordered), keep).config
        point = evaluate_ranking(stored.select(torch.from_numpy(inside)), chosen, ordered)
        kept += point.kept.tolist()
        stops[inside] = point.exit_layer
    return float(np.mean(kept)), float(1 - stops.mean() / stored.depth)


def _certified(
    stored: ExitLogits, asked: EarlyExitConfig, keep: float, confidence: float, ordered: bool
) -> tuple[EarlyExitConfig, int]:
    """The fastest setting of one half that passes its test on the other, and the number of queries that tested it."""
    order = np.random.default_rng(0).permutation(_count(stored))
    tested = check_queries(len(order), keep, confidence)
    search = np.isin(stored.groups.numpy(), order[: len(order) // 2])
    halves = [stored.select(torch.from_numpy(rows)) for rows in (search, ~search)]
    best = None
    for point in ranking_front(halves[0], asked, ordered):
        losses = int((~evaluate_ranking(halves[1], point.config, ordered).kept).sum())
        if binom.cdf(losses, tested, 1 - keep) > 1 - confidence:  # as few, where a loss has a probability of 1 - keep
            break
        best = point.config
    if best is None:
        raise ValueError(
            f"no margins could be shown to keep the top k of {keep} of new queries with confidence {confidence} on "
            f"{tested} queries: give more queries, or ask for less."
        )
    return best, tested


def check_queries(queries: int, keep: float, confidence: float) -> int:
    """How many of these queries test the margins; refuses too few for the confidence."""
    tested, needed = queries - queries // 2, queries_needed(keep, confidence)
    if tested < needed:
        raise ValueError(
            f"there are {queries} queries: to show with confidence {confidence} that {keep} of new ones keep their "
            f"top k takes at least {2 * needed}, even where none changes. Give more queries, or ask for less."
        )
    return tested


def queries_needed(keep: float, confidence: float) -> int:
    """Test queries below which not even margins that change nothing can be shown to keep this share of new ones."""
    if keep == 1:
        raise ValueError("keep=1.0 is not allowed with confidence: no data shows that no query changes. Try 0.99.")
    return math.ceil(math.log(1 - confidence) / math.log(keep))
