"""ExitHistory: what it derives, and that a row's numbers do not depend on the rows beside it, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import NeverPolicy

from .reference import MULTI, REGRESSION, SINGLE, distributions, divergences, entropy

PROBLEMS = (SINGLE, MULTI, REGRESSION)
KINDS = ("ce", "kl", "js", "label")
EXITS = [0, 2, 3, 5]


def logits_of(problem_type, rows, num_labels=None, seed=0, scale=2.0):
    """[N, E, K]."""
    k = num_labels or (1 if problem_type == REGRESSION else 4)
    return np.random.default_rng(seed).normal(scale=scale, size=(rows, len(EXITS), k)).astype(np.float32)


def everything(history):
    """Every number that a policy can ask for, exit-major, rows in the second place."""
    found = [history.logits[: history.seen, :, 0]]
    for kind in KINDS:
        for j in range(1, history.seen):
            found.append(history.to_earlier(kind, j))
            found.append(history.to_previous(kind, j)[None])
            found += [history.to(kind, j, i)[None] for i in range(j)]
    if history.problem_type != REGRESSION:
        found += [history.entropy(j)[None] for j in range(history.seen)]
    return np.concatenate(found)


@pytest.mark.parametrize("problem_type", PROBLEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_divergence_stands_at_its_place(kind, problem_type):
    logits = logits_of(problem_type, rows=6)
    history = ExitHistory.of(logits, EXITS, problem_type)
    want = [divergences(kind, row, problem_type) for row in logits.tolist()]
    for j in range(1, len(EXITS)):
        table = np.array([s[j] for s in want]).T  # [j, n]
        np.testing.assert_allclose(history.to_earlier(kind, j), table, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(history.to_previous(kind, j), table[-1], rtol=2e-5, atol=2e-6)
        for i in range(j):
            np.testing.assert_allclose(history.to(kind, j, i), table[i], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_entropy_and_log_probs(problem_type):
    logits = logits_of(problem_type, rows=6)
    history = ExitHistory.of(logits, EXITS, problem_type)
    for j in range(len(EXITS)):
        ps = [distributions(row, problem_type) for row in logits[:, j].tolist()]
        np.testing.assert_allclose(history.entropy(j), [sum(map(entropy, p)) for p in ps], rtol=2e-5)
        want = [[q[0] for q in p] if problem_type == MULTI else p[0] for p in ps]
        np.testing.assert_allclose(np.exp(history.log_probs(j)), want, rtol=2e-5)


def test_it_grows_exit_by_exit():
    logits = logits_of(SINGLE, rows=3)
    history = ExitHistory(EXITS, 3, 4, SINGLE)
    assert (history.seen, history.rows, history.num_labels) == (0, 3, 4)
    for j in range(len(EXITS)):
        history.append(logits[:, j], uncertainty=logits[:, j, 0])
        assert history.seen == j + 1
        np.testing.assert_array_equal(history.logits[j], logits[:, j])
        np.testing.assert_array_equal(history.uncertainty[j], logits[:, j, 0])
    np.testing.assert_array_equal(everything(history), everything(ExitHistory.of(logits, EXITS, SINGLE)))


def test_the_callers_logits_are_copied_and_never_changed():
    logits = logits_of(SINGLE, rows=3)
    before = logits.copy()
    history = ExitHistory.of(logits, EXITS, SINGLE)
    everything(history)
    np.testing.assert_array_equal(logits, before)
    logits[:] = 0
    np.testing.assert_array_equal(history.logits, before.transpose(1, 0, 2))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.sampled_from(PROBLEMS),
    st.sampled_from([2, 5, 150]),
    st.integers(0, 2**32 - 1),
    st.integers(1, 17),
    st.data(),
)
def test_rows_that_leave_change_nothing_for_those_that_stay(problem_type, num_labels, seed, rows, data):
    logits = logits_of(problem_type, rows, 1 if problem_type == REGRESSION else num_labels, seed)
    history = ExitHistory(EXITS, rows, logits.shape[2], problem_type)
    left = np.arange(rows)
    for j in range(len(EXITS)):
        history.append(logits[left, j])
        everything(history)  # fills the cache, which must not outlive the rows
        keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(left), max_size=len(left))), dtype=bool)
        history.keep(keep)
        left = left[keep]
        assert history.rows == len(left)
    np.testing.assert_array_equal(
        everything(history), everything(ExitHistory.of(logits, EXITS, problem_type))[:, left]
    )


class TestReplayInput:
    """What `replay` accepts; `never` answers with the last block whatever the logits are."""

    logits = logits_of(SINGLE, rows=5)

    @pytest.mark.parametrize("convert", [lambda x: x, torch.from_numpy, lambda x: x.tolist()])
    def test_arrays_tensors_and_lists(self, convert):
        answer = NeverPolicy().replay(convert(self.logits))
        assert answer.dtype == torch.long and answer.tolist() == [4] * 5

    def test_block_numbers_are_those_given(self):
        assert NeverPolicy().replay(self.logits, exit_layers=EXITS).tolist() == [5] * 5

    def test_a_tensor_of_a_graph(self):
        logits = torch.from_numpy(self.logits).requires_grad_()
        assert NeverPolicy().replay(logits).requires_grad is False

    @pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 4, 4, 1)])
    def test_another_shape_is_refused(self, shape):
        with pytest.raises(ValueError, match=r"must be \[N, E, K\]"):
            NeverPolicy().replay(np.zeros(shape))

    @pytest.mark.parametrize("exits", [[1, 2, 3], [1, 2, 3, 4, 5], [1, 3, 2, 4], [1, 1, 2, 3]])
    def test_block_numbers_that_do_not_match_are_refused(self, exits):
        with pytest.raises(ValueError, match="4 increasing block numbers"):
            NeverPolicy().replay(self.logits, exit_layers=exits)

    @pytest.mark.parametrize("shape", [(1, 4), (5,), (5, 6), (5, 4, 1)])
    def test_uncertainty_of_another_shape_is_refused(self, shape):
        with pytest.raises(ValueError, match=r"uncertainty must be \[5, 4\]"):
            NeverPolicy().replay(self.logits, uncertainty=np.zeros(shape))

    def test_an_unknown_problem_type_is_refused(self):
        with pytest.raises(
            ValueError, match="problem_type='multilabel' is not allowed: .* multi_label_classification"
        ):
            NeverPolicy().replay(self.logits, problem_type="multilabel")
