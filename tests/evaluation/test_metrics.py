"""Scores: against numbers worked out by hand and against scikit-learn and scipy."""

from __future__ import annotations

import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from badge_peft import ExitLogits, calibrate, exit_scores, sweep
from badge_peft.evaluation.metrics import METRICS, Metric, score
from badge_peft.utils.problem import UNKNOWN_LABEL, problem_of
from tests.evaluation.logits import plausible


def by_hand() -> ExitLogits:
    """Three exits, four rows of two classes; the exits are right 2, 4 and 3 times."""
    labels = torch.tensor([0, 0, 1, 1])
    said = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0]])  # [N, E]
    return ExitLogits(torch.nn.functional.one_hot(said, 2).float(), labels, [1, 2, 4], num_blocks=4)


def regression(values: torch.Tensor) -> ExitLogits:
    return ExitLogits(torch.stack([values, -values], dim=1)[..., None], torch.arange(len(values)).float())


def test_score_of_each_exit_and_the_two_summaries() -> None:
    scores = exit_scores(by_hand())
    assert scores.per_exit == [0.5, 1.0, 0.75]
    assert scores.exit_layers == [1, 2, 4]
    assert scores.avg == pytest.approx(0.75)
    assert (scores.best, scores.best_exit, scores.metric) == (1.0, 2, "accuracy")


def test_the_shallowest_of_equal_exits_is_the_best_one() -> None:
    logits = by_hand()
    same = ExitLogits(logits.logits[:, [0, 1, 1]], logits.labels, [2, 3, 4])
    assert exit_scores(same).best_exit == 3


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
def test_metrics_of_classes_are_those_of_scikit_learn(rows: int, classes: int, seed: int, unknown: bool) -> None:
    """Classes that nobody says, that nobody is, and that the model lacks among them."""
    draw = np.random.default_rng(seed)
    said, truth = draw.integers(0, classes, rows), draw.integers(0, classes, rows)
    truth[: rows // 3] = UNKNOWN_LABEL if unknown else truth[: rows // 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that classes are few
        assert METRICS["matthews"](said, truth) == pytest.approx(matthews_corrcoef(truth, said), abs=1e-12)
        assert METRICS["macro_f1"](said, truth) == pytest.approx(
            f1_score(truth, said, average="macro", zero_division=0)
        )
        accuracy = accuracy_score(truth, said)
        assert METRICS["accuracy"](said, truth) == pytest.approx(accuracy)
        if classes < 3:
            expected = f1_score(truth == 1, said == 1, zero_division=0)
            assert METRICS["f1"](said, truth) == pytest.approx(expected)
            assert METRICS["acc_and_f1"](said, truth) == pytest.approx((accuracy + expected) / 2)
        said, truth = (draw.random((2, rows, classes)) < draw.random()).astype(np.int64)
        for name, average in (("f1", "micro"), ("macro_f1", "macro")):
            if classes > 1:  # a single column is no multi-label to scikit-learn
                expected = f1_score(truth, said, average=average, zero_division=0)
                assert METRICS[name](said, truth) == pytest.approx(expected)


def test_correlations_are_those_of_scipy() -> None:
    values = torch.tensor([0.1, 0.9, 0.7, 2.5, 3.1])
    data, truth = regression(values), np.arange(5)
    expected = pearsonr(values, truth)[0], spearmanr(values, truth)[0]
    assert exit_scores(data, "pearson").per_exit == pytest.approx([expected[0], -expected[0]])
    assert exit_scores(data, "spearman").per_exit == pytest.approx([expected[1], -expected[1]])
    assert exit_scores(data, "pearson_and_spearman").per_exit[0] == pytest.approx(sum(expected) / 2)
    assert exit_scores(data, "neg_mse").per_exit[0] == pytest.approx(-float(((values - torch.arange(5)) ** 2).mean()))


def test_a_constant_answer_has_correlation_zero_and_no_nan() -> None:
    assert exit_scores(regression(torch.ones(4)), "pearson").per_exit == [0.0, 0.0]


def test_multi_label_answers_are_decisions_per_label() -> None:
    logits = torch.tensor([[[1.0, -1.0]], [[2.0, 3.0]], [[-1.0, 1.0]]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    data = ExitLogits(logits, labels, problem_type="multi_label_classification")
    assert problem_of("multi_label_classification").predictions(logits[:, 0]).tolist() == [[1, 0], [1, 1], [0, 1]]
    assert exit_scores(data).per_exit == [pytest.approx(2 / 3)]  # a row counts when all of its labels are right
    assert exit_scores(data, "f1").per_exit == [pytest.approx(2 * 4 / (2 * 4 + 1))]  # 4 hits, 1 miss


def test_a_metric_that_gives_nan_is_refused() -> None:
    """NaN is neither within a drop nor beyond it: the exit that it was given for would be chosen."""
    found = by_hand()
    found.logits[:, 0] = torch.tensor([1.0, 0.0])  # a constant answer
    with pytest.raises(ValueError, match="metric='undefined' gives nan on 4 rows"):
        calibrate(found, "max_prob", max_score_drop=0.1, metric=undefined)


def undefined(predictions: np.ndarray, labels: np.ndarray) -> float:
    """As scipy's correlations are of constants."""
    return float("nan") if np.ptp(predictions) == 0 else float((predictions == labels).mean())


def test_score_takes_answers_that_no_single_exit_gave() -> None:
    data = by_hand()
    assert score(data, data.answers(torch.tensor([1, 2, 4, 2]))) == 1.0


def test_refusals() -> None:
    data = plausible(rows=20)
    with pytest.raises(ValueError, match="no labels"):
        exit_scores(ExitLogits(data.logits))
    with pytest.raises(ValueError, match="metric='acuracy' is not allowed.*accuracy, f1"):
        exit_scores(data, "acuracy")
    with pytest.raises(ValueError, match="metric='pearson' does not suit single_label_classification.*macro_f1"):
        exit_scores(data, "pearson")
    with pytest.raises(ValueError, match="metric='accuracy' does not suit regression.*spearman"):
        exit_scores(regression(torch.arange(3.0)), "accuracy")
    with pytest.raises(ValueError, match="two classes.*macro_f1"):
        exit_scores(data, "f1")


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_is_finite_on_a_single_row(name: str) -> None:
    answers, labels = np.array([1]), np.array([1])
    if name == "matthews":
        answers, labels = np.array([1, 0]), np.array([1, 0])
    assert np.isfinite(METRICS[name](answers, labels))


class Rate:
    def __call__(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        return np.float32((predictions == labels).mean())  # type: ignore[return-value]


def rate(predictions: np.ndarray, labels: np.ndarray, scale: float = 1.0) -> float:
    return scale * float((predictions == labels).mean())


@pytest.mark.parametrize(
    ("metric", "name"),
    [(rate, "rate"), (partial(partial(rate), scale=1.0), "rate"), (Rate(), "Rate")],
    ids=["function", "partial", "object"],
)
def test_any_callable_has_a_name(metric: Metric, name: str) -> None:
    data = by_hand()
    assert exit_scores(data, metric).metric == name
    assert exit_scores(data, metric).per_exit == [0.5, 1.0, 0.75]
    assert sweep(data, ["entropy"], metric=metric).metric == name
    config = calibrate(data, "auto", max_score_drop=1.0, metric=metric)
    assert json.loads(json.dumps(config.to_dict()))["calibration"]["metric"] == name


def test_a_label_that_the_model_lacks_is_wrong_whatever_is_answered() -> None:
    said = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0]])  # of 4 rows, by 2 exits
    labels = torch.tensor([0, 1, UNKNOWN_LABEL, UNKNOWN_LABEL])
    data = ExitLogits(torch.nn.functional.one_hot(said, 2).float(), labels)
    assert exit_scores(data).per_exit == [0.5, 0.0]
    assert exit_scores(data, "f1").per_exit == [pytest.approx(2 / 3), 0.0]
    for metric in ("macro_f1", "matthews"):
        assert exit_scores(data, metric).per_exit[0] < exit_scores(data.select(torch.arange(2)), metric).per_exit[0]


def test_several_values_per_row_have_the_mean_correlation() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 2, 3), torch.randn(9, 3)
    data = ExitLogits(logits, labels, problem_type="regression")
    for name, function in (("pearson", pearsonr), ("spearman", spearmanr)):
        expected = [np.mean([function(logits[:, j, k], labels[:, k])[0] for k in range(3)]) for j in (0, 1)]
        assert exit_scores(data, name).per_exit == pytest.approx(expected)
    assert exit_scores(data, "neg_mse").per_exit[0] == pytest.approx(-float(((logits[:, 0] - labels) ** 2).mean()))


def test_labels_between_0_and_1_are_decisions_by_the_larger_half() -> None:
    logits = torch.tensor([[[2.0, -2.0]], [[2.0, -2.0]], [[-2.0, 2.0]]])
    soft, hard = torch.tensor([[0.9, 0.1], [0.6, 0.6], [0.2, 1.0]]), torch.tensor([[1.0, 0], [1, 1], [0, 1]])
    for metric in ("accuracy", "f1", "macro_f1", lambda p, y: float((p == y).mean())):
        found, wanted = (
            exit_scores(ExitLogits(logits, labels, problem_type="multi_label_classification"), metric).per_exit
            for labels in (soft, hard)
        )
        assert found == wanted and found[0] > 0.5
