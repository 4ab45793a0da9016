from __future__ import annotations

import pytest
import torch

from badge_peft.tuner.pooling import Pooling
from tests.reference import pool

GENERATOR = torch.Generator().manual_seed(0)
STATES = torch.randn(5, 6, 4, generator=GENERATOR, dtype=torch.float64)
MASKS = {
    "right": [[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 5 + [0], [1, 0, 0, 0, 0, 0], [1] * 4 + [0] * 2],
    "left": [[1] * 6, [0, 0, 0, 1, 1, 1], [0] + [1] * 5, [0, 0, 0, 0, 0, 1], [0] * 2 + [1] * 4],
    "holes": [[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1], [1] * 6, [0, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("kind", ["cls", "mean", "last"])
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_against_row_by_row(kind, side, dtype):
    mask = torch.tensor(MASKS[side])
    pooling = Pooling(kind, mask.to(dtype))
    for _ in range(2):  # what a first call has worked out serves the second
        found = pooling.reduce(pooling.pick(STATES))
        torch.testing.assert_close(found, pool(STATES, mask, kind), rtol=1e-12, atol=1e-12)


def test_pick_takes_one_position_where_one_is_read():
    mask = torch.tensor(MASKS["right"])
    assert [Pooling(kind, mask).pick(STATES).shape for kind in ("cls", "last", "mean")] == [(5, 4), (5, 4), (5, 6, 4)]


def test_row_without_a_real_token_gives_zeros_not_nan():
    pooling = Pooling("mean", torch.zeros(5, 6, dtype=torch.long))
    assert torch.equal(pooling.reduce(STATES), torch.zeros(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["cls", "mean", "last"])
@pytest.mark.parametrize("used_before", [False, True])
def test_rows(kind, used_before):
    mask, index = torch.tensor(MASKS["left"]), torch.tensor([4, 1])
    pooling = Pooling(kind, mask)
    if used_before:
        pooling.reduce(pooling.pick(STATES))
    some = pooling.rows(index)
    torch.testing.assert_close(some.reduce(some.pick(STATES[index])), pool(STATES[index], mask[index], kind))
    without = Pooling(kind, None).rows(index)
    torch.testing.assert_close(
        without.reduce(without.pick(STATES[index])), pool(STATES[index], torch.ones_like(mask[index]), kind)
    )
