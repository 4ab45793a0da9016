"""`RaggedRows`: what was put is found, padded, in memory and in a file, of which nothing is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.utils.ragged import RaggedRows


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    channels=st.integers(1, 3),
    width=st.integers(1, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    data=st.data(),
)
def test_a_batch_is_its_rows_with_zeros_behind_them(counts, channels, width, dtype, data):
    rows = [torch.randn(channels, count, width) for count in counts]
    stored = RaggedRows(counts, channels, width, dtype)
    stored.allocate()
    for i in data.draw(st.permutations(range(len(rows)))):
        stored.put(i, rows[i])
    assert stored.nbytes == sum(counts) * channels * width * dtype.itemsize
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    length = max(counts[i] for i in wanted) + data.draw(st.integers(0, 2))
    expected = torch.zeros(channels, len(wanted), length, width)
    for b, i in enumerate(wanted):
        expected[:, b, : counts[i]] = rows[i].to(dtype).float()
    assert torch.equal(stored.batch(wanted, length, torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_file_has_no_name(dtype, tmp_path):
    folder = tmp_path / "new"
    stored = RaggedRows([2, 3], 2, 4, dtype)
    stored.allocate(folder)
    assert stored.is_mapped and list(folder.iterdir()) == []
    rows = [torch.randn(2, 2, 4), torch.randn(2, 3, 4)]
    for i, row in enumerate(rows):
        stored.put(i, row)
    found = stored.batch([1, 0], 3, torch.float32)
    assert torch.equal(found[:, 0], rows[1].to(dtype).float())
    assert torch.equal(found[:, 1, :2], rows[0].to(dtype).float()) and not found[:, 1, 2:].any()
    stored.close()
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing can be asked for in advance")
def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    stored = RaggedRows([2], 1, 4, torch.float32)
    with pytest.raises(OSError, match="No space left"):
        stored.allocate(tmp_path)
    assert list(tmp_path.iterdir()) == []
