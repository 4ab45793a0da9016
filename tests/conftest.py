"""Settings and fixtures that all tests share. Nothing here or in the tests asks the network for anything."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the models are so small that a second thread only gets in the way


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
