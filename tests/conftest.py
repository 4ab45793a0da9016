"""Settings and fixtures that all tests share. Nothing here or in the tests asks the network for anything."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # the models are so small that a second thread only gets in the way
# pytest 9.2 listens to loggers that do not propagate; where anybody listens to this one, torch writes out each graph
# of an export or a compilation, which takes as long as making it
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> None:
    """Leaves what is there (libraries, thousands of collected tests) out of garbage collection from here on. Each
    training of transformers starts with a full collection, which would take longer than the training itself."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # a model is thousands of objects, and none of them is garbage yet


@pytest.fixture(scope="session")
def fresh() -> Iterator[Callable[[str], Any]]:
    """Runs code where torch, transformers and PEFT are imported, and nothing of ours; its last line, as JSON."""
    program, pipe = [sys.executable, "-m", "tests.fresh"], subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).parents[1]) as process:

        def run(code: str) -> Any:
            assert process.stdin is not None and process.stdout is not None
            print(json.dumps(code), file=process.stdin, flush=True)
            fine, said = json.loads(process.stdout.readline())
            assert fine, "the traceback is in the standard error"
            return json.loads(said.splitlines()[-1])

        yield run


@pytest.fixture(scope="session")
def one_translation() -> None:
    """For tests that export: what computes the same in two of them is translated to ONNX once."""
    if find_spec("onnxscript"):
        from tests.export.cuts import share_translations

        share_translations()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
