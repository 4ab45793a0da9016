from __future__ import annotations

import pytest
import torch

from badge_peft import BadgeConfig, MultiExitHead
from badge_peft.tuner.config import EXIT_TYPES
from badge_peft.tuner.exits import EXITS
from badge_peft.tuner.pooling import Pooling

STATES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_every_exit_type_of_the_config_exists():
    assert tuple(EXITS) == EXIT_TYPES
    assert BadgeConfig().exit_type in EXITS


@pytest.mark.parametrize(
    ("exit_type", "size"), [("linear", 3 * 9), ("pooled", 8 * 8 + 8 + 3 * 9), ("mha", 4 * 32 * 8 + 3 * 9)]
)
def test_shape_and_size(exit_type, size):
    exit_ = EXITS[exit_type](8, 3, 0.0)
    assert sum(p.numel() for p in exit_.parameters()) == size
    pooling = Pooling("cls", MASK)
    states = STATES if exit_.reads_sequence else pooling.pick(STATES)
    vector = exit_.represent(states, pooling)
    assert vector.shape == (2, 8) and exit_(vector).shape == (2, 3)


@pytest.mark.parametrize("exit_type", ["linear", "pooled", "mha"])
def test_dropout_only_in_training(exit_type):
    exit_ = EXITS[exit_type](8, 3, 0.5)
    vector = torch.ones(64, 8)
    assert len(exit_.train()(vector).unique(dim=0)) > 1
    torch.testing.assert_close(exit_.eval()(vector), exit_.linear(vector), rtol=0, atol=0)
    torch.manual_seed(1)
    first = exit_.train()(vector)
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(vector, 0.5)
    torch.testing.assert_close(first, exit_.linear(kept), rtol=0, atol=0)


@pytest.mark.parametrize("exit_type", EXIT_TYPES)
def test_one_exit_for_each_number(exit_type):
    head = MultiExitHead([0, 1, 5], exit_type, 8, 3, 0.1)
    assert list(head) == ["0", "1", "5"]
    assert len({id(p) for p in head.parameters()}) == 3 * len(list(head.exit(5).parameters()))
    assert head.exit(5) is head["5"] and type(head.exit(5)) is EXITS[exit_type]
    assert head.exit(0).dropout.p == 0.1
    with pytest.raises(KeyError):
        head.exit(2)


@pytest.mark.parametrize("kind", ["cls", "mean", "last"])
def test_attention_exit_never_reads_padding(kind):
    exit_ = EXITS["mha"](8, 3, 0.0).eval()
    pooling = Pooling(kind, MASK)
    before = exit_.represent(STATES, pooling)
    after = exit_.represent(STATES.masked_fill(MASK[..., None] == 0, 9.0), pooling)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    short = exit_.represent(STATES[1:, :3], Pooling(kind, None))
    torch.testing.assert_close(before[1:], short)


def test_attention_exit_needs_a_mask_of_two_dimensions():
    exit_ = EXITS["mha"](8, 3, 0.0)
    with pytest.raises(ValueError, match=r"exit_type='mha' needs .* \[batch, sequence\], got \[2, 1, 1, 5\]"):
        exit_.represent(STATES, Pooling("cls", MASK[:, None, None, :]))
