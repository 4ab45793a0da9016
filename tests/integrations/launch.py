"""Starts programs as several processes, on the CPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from torch.multiprocessing import start_processes

ROOT = Path(__file__).parents[2]


def launch(program: str, *arguments: Any, by: str, processes: int = 2, input: str | None = None) -> None:
    """Runs the module `program` as several processes, by `torchrun` or `accelerate`, with `input` for their standard
    input, and shows all that they said where they end badly."""
    launchers: dict[str, Sequence[Any]] = {
        "torchrun": ("torch.distributed.run", "--nproc_per_node", processes, "--master_port", _free_port(), "-m"),
        "accelerate": (
            *("accelerate.commands.launch", "--multi_gpu", "--num_processes", processes),
            *("--main_process_port", _free_port(), "--module"),
        ),
    }
    command = [sys.executable, "-m", *map(str, (*launchers[by], program, *arguments))]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **_environment()},
        start_new_session=True,  # so that a launcher that hangs takes its processes with it
    )
    try:
        stdout, stderr = process.communicate(input, timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(_told(command, "hangs", stdout, stderr)) from None
    assert process.returncode == 0, _told(command, f"ended with {process.returncode}", stdout, stderr)


def fork(work: Callable[..., object], *arguments: Any, processes: int = 2, input: str = "") -> None:
    """Runs `work` in forks of this process, which have what `torchrun` puts into the environment and share `input` as
    the processes of a launcher do: each saves the seconds of its imports. Shows the error of one that ends badly."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": processes}
    end = time.monotonic() + 300
    with tempfile.TemporaryFile() as stdin:
        stdin.write(input.encode())
        stdin.seek(0)
        given = work, arguments, where, stdin.fileno()
        started = start_processes(_forked, given, nprocs=processes, join=False, daemon=True, start_method="fork")
        while not started.join(timeout=1):
            assert time.monotonic() < end, f"{work} hangs"


def _forked(
    rank: int, work: Callable[..., object], arguments: Sequence[Any], where: dict[str, Any], stdin: int
) -> None:
    os.dup2(stdin, 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    where = {**where, "LOCAL_WORLD_SIZE": where["WORLD_SIZE"], "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({**_environment(), **{name: str(value) for name, value in where.items()}})
    AcceleratorState._reset_state(reset_partial_state=True)  # what trainings of the process have left
    GradientState._reset_state()
    work(*arguments)


def _environment() -> dict[str, str]:
    # without a GPU even where there are some: what is tested are processes that share CPUs
    return {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _told(command: list[str], how: str, stdout: str, stderr: str) -> str:
    return f"{' '.join(command)} {how}.\n--- stdout\n{stdout[-5000:]}\n--- stderr\n{stderr[-10000:]}"
