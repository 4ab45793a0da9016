"""Stored logits of tokens: blocks are those of texts, scores those of tokens or of entities."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score

from badge_peft import (
    EarlyExitConfig,
    ExitLogits,
    calibrate,
    collect_exit_logits,
    evaluate_policy,
    exit_scores,
    measure_latency,
    sweep,
)
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.curve import ExitPromise
from badge_peft.evaluation.drops import Drops
from tests.early_exit.test_tokens import make, make_base, rows_of
from tests.models import make_batch

TAGS = ["O", "B-x", "I-x", "B-y"]


def random_logits(texts: int = 120, exits: int = 3, seed: int = 0, labels: bool = True) -> ExitLogits:
    """Exits that know more and more of random tags."""
    draw = np.random.default_rng(seed)
    owner = np.repeat(np.arange(texts), draw.integers(1, 9, texts))
    truth = draw.choice(4, size=len(owner), p=[0.6, 0.15, 0.15, 0.1])
    signal = np.eye(4)[truth][:, None] * (1 + np.arange(exits))[:, None]
    logits = torch.from_numpy(signal + draw.normal(size=signal.shape))
    return ExitLogits(logits, torch.from_numpy(truth) if labels else None, texts=owner, label_names=TAGS)


def by_text(stored: ExitLogits, values: Any) -> list[list[Any]]:
    texts = stored.texts.tolist()
    return [[v for v, t in zip(values, texts, strict=True) if t == text] for text in dict.fromkeys(texts)]


def seqeval_score(stored: ExitLogits, answers: torch.Tensor) -> float:
    said = [TAGS[i] for i in answers.argmax(-1).tolist()]
    given = [TAGS[i] for i in stored.labels.tolist()]
    return float(f1_score(by_text(stored, given), by_text(stored, said), zero_division=0))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["entropy", "max_prob", "divergence", "patience"]))
def test_blocks_are_those_of_texts_and_scores_seqevals(seed: int, policy: str) -> None:
    stored = random_logits(texts=20, seed=seed)
    for point in sweep(stored, [policy], points=6, metric="entity_f1").points:
        stops = build_policy(point.config).replay(stored)
        depth = np.mean([max(text) for text in by_text(stored, stops.tolist())])
        assert point.mean_exit == pytest.approx(depth)
        assert point.score == pytest.approx(seqeval_score(stored, stored.answers(stops)))
        promise = ExitPromise.of(stored, point.config)
        assert promise.rows == 20 and np.dot(promise.rows_stopped, stored.exits) / 20 == pytest.approx(depth)
        early, full = (x.argmax(-1).tolist() for x in (stored.answers(stops), stored.logits[:, -1]))
        changed = [a != b for a, b in zip(by_text(stored, early), by_text(stored, full), strict=True)]
        assert promise.disagreements == sum(changed)


def test_live_is_replay() -> None:
    """A call that asks for the tokens with a label, and a replay of these."""
    model, rows = make(base=make_base(id2label=dict(enumerate(TAGS)))), rows_of()
    stored = collect_exit_logits(model, rows, batch_size=4)
    assert stored.label_names == TAGS and len(stored.units) == len(rows)
    batch, labels = make_batch(6, 9), torch.full((6, 9), -100)
    for i, row in enumerate(rows):
        labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
    table = sweep(stored, ["entropy", "divergence"], points=8, metric="entity_f1")
    assert len({point.mean_exit for point in table.points}) > 3
    for point in table.points:
        out = model.early_exit_forward(
            **batch, special_tokens_mask=(labels == -100).long(), early_exit_config=point.config
        )
        assert out.token_exit_layer[labels != -100].tolist() == build_policy(point.config).replay(stored).tolist()
        assert point.mean_exit == pytest.approx(out.exit_layer.float().mean().item())
        assert point.score == pytest.approx(seqeval_score(stored, out.logits[labels != -100]))
    timed = measure_latency(model, rows, table.points[-1].config, warmup=0)
    assert timed.exit_layer == out.exit_layer.tolist()


def test_which_tokens_need_an_answer() -> None:
    model = make()
    rows = rows_of(labels=False)
    special = [{**row, "special_tokens_mask": [1, *[0] * (len(row["input_ids"]) - 1)]} for row in rows]
    stored = collect_exit_logits(model, special, batch_size=4)
    whole = collect_exit_logits(model, rows, batch_size=4)
    assert len(stored) == len(whole) - len(special)
    assert torch.equal(stored.logits, whole.logits[~torch.from_numpy(whole.units.first)])


def test_saved_and_loaded(tmp_path: Path) -> None:
    stored = random_logits(texts=4)
    stored.save(tmp_path / "x.safetensors")
    again = ExitLogits.load(tmp_path / "x.safetensors")
    assert torch.equal(again.texts, stored.texts) and again.label_names == TAGS
    assert exit_scores(again, "entity_f1") == exit_scores(stored, "entity_f1")


@pytest.mark.parametrize("metric", ["entity_f1", "accuracy"])
@pytest.mark.parametrize("labels", [True, False])
def test_calibrate(metric: str, labels: bool) -> None:
    stored = random_logits(labels=labels)
    quick = calibrate(stored, "entropy", target_blocks_saved=0.2, metric=metric)
    record: Any = quick.calibration
    assert record["rows"] == 120 and record["tokens"] == len(stored) and record["metric"] == metric
    point = evaluate_policy(stored.labeled(), EarlyExitConfig.of(quick, calibration=None), metric)
    assert record["score"] == point.score and record["blocks_saved"] == point.blocks_saved >= 0.2
    assert record["drop_interval"][0] <= record["drop_interval"][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = calibrate(stored, "auto", max_score_drop=0.2, metric=metric)
    assert kept.calibration["blocks_saved"] > 0


def test_the_error_of_a_drop_is_one_of_texts() -> None:
    """Against 2,000 resamples of whole texts."""
    stored, draw = random_logits(texts=60), np.random.default_rng(0)
    units, last = stored.units, stored.exits[-1]
    stops = np.full((1, len(stored)), stored.exits[0])
    for metric in ("accuracy", "entity_f1"):
        (drop,), (error,), (counted,) = Drops(stored, last, metric).of(stops)
        points = [
            evaluate_policy(stored, {"policy": "fixed_depth", "depth": m}, metric).score for m in (last, stops[0, 0])
        ]
        assert counted == pytest.approx(points[0] - points[1])
        if metric == "accuracy":  # the estimate is nearer to what full depth's probabilities expect
            assert abs(drop - counted) < 0.1
            continue
        samples = []
        for _ in range(300):
            part = stored.select(torch.from_numpy(units.rows_of(np.sort(draw.permutation(60)[:30]))))
            scores = [
                evaluate_policy(part, {"policy": "fixed_depth", "depth": int(m)}, metric).score
                for m in (last, stops[0, 0])
            ]
            samples.append(scores[0] - scores[1])
        # the deviation of halves drawn without replacement is that of the whole
        assert error == pytest.approx(np.sqrt(np.var(samples) + 1 / 60**2), rel=0.25)


def test_a_bound_is_one_of_texts() -> None:
    stored = random_logits(texts=1200, exits=4)
    safe = calibrate(stored, "max_prob", max_score_drop=0.05, confidence=0.9)
    assert safe.calibration["test_rows"] == 600
    with pytest.raises(ValueError, match="there are 30"):
        calibrate(random_logits(texts=30), "max_prob", max_score_drop=0.05, confidence=0.9)
    with pytest.raises(ValueError, match="confidence needs .* metric='accuracy'"):
        calibrate(stored, "max_prob", max_score_drop=0.05, confidence=0.9, metric="entity_f1")
