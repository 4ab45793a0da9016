"""Settings and fixtures that all tests share. Nothing here or in the tests asks the network for anything."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the models are so small that a second thread only gets in the way


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> None:
    """Leaves what is there (libraries, thousands of collected tests) out of garbage collection from here on. Each
    training of transformers starts with a full collection, which would take longer than the training itself."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
