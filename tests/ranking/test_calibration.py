"""calibrate_ranking: against counting by loops, its goals, its bound, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft import EarlyExitConfig, ExitLogits
from badge_peft.early_exit.policies import build_policy
from badge_peft.ranking import calibrate_ranking
from badge_peft.ranking.calibration import evaluate_ranking, queries_needed
from badge_peft.ranking.margins import needed_margins

from .scores import EXITS, make_scores


@pytest.fixture(autouse=True, scope="module")
def _few_settings():
    """A third of the margins that are tried, times each shape, is enough to see which are taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("badge_peft.ranking.margins.FACTORS", 20)
        yield


def kept_by_loops(scores, ids, config):
    """[Q]: whether the best k of the candidates that go all the way are full depth's best k."""
    cap = scores.shape[1] if config.max_exit is None else config.max_exit
    stops = build_policy(config).replay(torch.from_numpy(scores)[:, :, None], groups=ids).tolist()
    kept = []
    for query in sorted(set(ids.tolist())):
        rows = [n for n in range(len(ids)) if ids[n] == query]
        full = sorted(rows, key=lambda n: -scores[n, -1])[: config.top_k]
        found = sorted((n for n in rows if stops[n] == cap), key=lambda n: -scores[n, cap - 1])[: config.top_k]
        kept.append((set(found) == set(full), found == full))
    return np.array(kept), np.array(stops)


@pytest.mark.parametrize(("top_k", "keep"), [(1, 0.7), (1, 1.0), (3, 0.9), (3, 0.95), (10, 0.7), (10, 0.95)])
def test_enough_queries_keep_their_top_k(top_k, keep):
    scores, ids, _ = make_scores()
    config = calibrate_ranking(scores, ids, top_k=top_k, keep=keep)
    kept, stops = kept_by_loops(scores, ids, config)
    record = config.calibration
    assert kept[:, 0].mean() == pytest.approx(record["score"]) and record["score"] >= keep
    assert record["mean_exit"] == pytest.approx(stops.mean())
    assert record["blocks_saved"] == pytest.approx(1 - stops.mean() / EXITS)
    assert (record["queries"], record["rows"], record["keep"]) == (40, 1000, keep)
    assert config.policy == "top_k" and config.top_k == top_k and len(config.parameters["margins"]) == EXITS
    assert 0.1 < record["blocks_saved"] < 0.8 and 0.5 < record["held_out"] <= 1
    assert EarlyExitConfig.of(config.to_dict()) == config


def test_less_is_faster():
    scores, ids, _ = make_scores()
    saved = [calibrate_ranking(scores, ids, 10, keep).calibration["blocks_saved"] for keep in (0.5, 0.8, 1)]
    assert saved == sorted(saved, reverse=True) and saved[0] > saved[-1] + 0.02
    smaller = [calibrate_ranking(scores, ids, k).calibration["blocks_saved"] for k in (1, 10)]
    assert smaller == sorted(smaller, reverse=True)
    everything = calibrate_ranking(scores, ids, 25)
    assert everything.calibration["blocks_saved"] == 0.0 and everything.calibration["score"] == 1.0


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.booleans())
def test_margins_that_queries_need_lose_nothing(seed, top_k, ties):
    scores, ids, _ = make_scores(6, 9, 4, seed)
    scores = scores.round(1) if ties else scores
    need = needed_margins(scores.astype(np.float64), ids, top_k).max(axis=0)
    config = EarlyExitConfig(policy="top_k", top_k=top_k, parameters={"margins": [*(need + 1e-4).tolist(), 0.0]})
    point = evaluate_ranking(ExitLogits(torch.from_numpy(scores)[:, :, None], groups=ids), config)
    assert point.score == 1.0


def test_order_counts_where_candidates_stop_before_the_last_exit():
    scores, ids, _ = make_scores(exits=3)
    scores[:, 1] = scores[:, 2] + 0.05 * np.random.default_rng(1).normal(size=len(scores))
    free, strict = (calibrate_ranking(scores, ids, 3, 0.5, max_exit=2, ordered=o) for o in (False, True))
    kept, _ = kept_by_loops(scores, ids, strict)
    assert strict.calibration["score"] == pytest.approx(kept[:, 1].mean()) and strict.max_exit == 2
    assert free.calibration["score"] >= strict.calibration["score"] >= 0.5
    assert strict.calibration["blocks_saved"] <= free.calibration["blocks_saved"]
    with pytest.raises(ValueError, match=r"keep=1\.0 cannot be reached below max_exit=1"):
        calibrate_ranking(scores, ids, 3, 1.0, max_exit=1)
    whole = [calibrate_ranking(scores, ids, 3, 0.9, ordered=o).parameters for o in (False, True)]
    assert whole[0] == whole[1]  # full depth's scores have full depth's order


def test_exits_where_nothing_is_decided_ask_for_no_margin():
    scores, ids, _ = make_scores()
    scores[:, 0] = np.random.default_rng(0).normal(size=len(scores)) * 100
    late = calibrate_ranking(scores, ids, 5, min_exit=2)
    assert late.calibration["blocks_saved"] > 0.2
    assert calibrate_ranking(scores, ids, 5).calibration["blocks_saved"] > 0.2  # the shape makes room for it
    single = calibrate_ranking(scores[:, -1:], ids, 5)
    assert single.parameters == {"margins": [0.0]} and single.calibration["blocks_saved"] == 0.0


def test_stored_exit_logits_know_exits_queries_and_labels():
    scores, ids, labels = make_scores()
    stored = ExitLogits(torch.from_numpy(scores)[:, :, None], torch.from_numpy(labels), [0, 1, 2, 4, 6], groups=ids)
    stored.weights_hash = "abc"
    config = calibrate_ranking(stored, top_k=5)
    record = config.calibration
    stops = build_policy(config).replay(stored)
    assert set(stops.tolist()) <= {0, 1, 2, 4, 6} and record["weights_hash"] == "abc"
    assert record["blocks_saved"] == pytest.approx(1 - stops.double().mean().item() / 6)
    assert record["ndcg"] == pytest.approx(record["full_depth_ndcg"], abs=0.02) and record["full_depth_mrr"] > 0.5
    given_ = calibrate_ranking(scores, ids, 5, labels=labels.tolist()).calibration
    assert given_["full_depth_ndcg"] == record["full_depth_ndcg"]
    assert "ndcg" not in calibrate_ranking(scores, ids, 5).calibration


def test_names_and_order_of_queries_do_not_matter():
    scores, ids, _ = make_scores()
    config = calibrate_ranking(scores, ids, 5)
    named = calibrate_ranking(torch.from_numpy(scores), [f"q{i:03}" for i in ids], 5)
    assert named.parameters == config.parameters


def test_a_bound_is_slower_and_holds_on_new_queries():
    scores, ids, _ = make_scores(200, 20)
    plain, bound = (calibrate_ranking(scores, ids, 5, 0.9, confidence=c) for c in (None, 0.95))
    assert bound.calibration["blocks_saved"] <= plain.calibration["blocks_saved"]
    assert bound.calibration["confidence"] == 0.95 and bound.calibration["test_queries"] == 100
    new, new_ids, _ = make_scores(1000, 20, seed=9)
    fresh = ExitLogits(torch.from_numpy(new)[:, :, None], groups=new_ids)
    assert evaluate_ranking(fresh, bound).score >= 0.9
    with pytest.raises(ValueError, match=r"there are 40 queries.*takes at least 118"):
        calibrate_ranking(*make_scores()[:2], 5, 0.95, confidence=0.95)
    with pytest.raises(ValueError, match=r"no margins could be shown to keep the top k of 0.9"):
        calibrate_ranking(scores, ids, 5, 0.9, confidence=0.95, max_exit=1)
    with pytest.raises(ValueError, match=r"keep=1\.0 is not allowed with confidence"):
        calibrate_ranking(scores, ids, 5, 1.0, confidence=0.95)


def test_the_fewest_queries_are_those_with_which_no_loss_at_all_is_enough():
    assert queries_needed(0.95, 0.95) == 59 and 0.95**59 <= 0.05 < 0.95**58


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k=0 is not allowed"),
        ({"top_k": None}, "top_k=None is not allowed"),
        ({"keep": 0.0}, r"keep=0\.0 is not allowed: it is a share of the queries"),
        ({"keep": 1.5}, r"keep=1\.5 is not allowed"),
        ({"confidence": 1.0}, r"confidence=1\.0 is not allowed"),
        ({"depth": 3}, "calibrate_ranking has no depth"),
        ({"query_ids": None}, "query_ids is missing"),
        ({"query_ids": [1, 2]}, r"groups has shape \[2\] for 1000 rows"),
        ({"exit_scores": torch.zeros(1000)}, r"exit_scores must be \[N, E\].*\[1000\]"),
        ({"exit_scores": ExitLogits(torch.zeros(1000, 2, 3))}, "the model has 3 outputs"),
        ({"labels": [1.0]}, "1 labels for 1000 scores"),
        ({"labels": [-1.0] * 1000}, "labels of candidates must be finite numbers, 0"),
    ],
)
def test_what_is_refused(arguments, message):
    scores, ids, _ = make_scores()
    with pytest.raises(ValueError, match=message):
        calibrate_ranking(**{"exit_scores": scores, "query_ids": ids, **arguments})


def test_data_in_which_nothing_is_relevant_is_data_without_labels():
    scores, ids, labels = make_scores()
    stored = ExitLogits(torch.from_numpy(scores)[..., None], torch.zeros(len(ids)), groups=ids)
    record = calibrate_ranking(stored, keep=0.5).calibration
    assert "ndcg" not in record and record["queries"] == 40
    with pytest.raises(ValueError, match="no query has a candidate"):  # labels that are given by name
        calibrate_ranking(stored, keep=0.5, labels=0 * labels)
