"""Starts programs as several processes, on the CPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def launch(
    program: str, *arguments: Any, processes: int = 2, by: str = "torchrun", fails: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the module `program` as several processes, and shows all that they said where they end badly.

    Args:
        program: A module.
        *arguments: Its arguments.
        processes: How many.
        by: `torchrun` or `accelerate`.
        fails: The program should end with an error.
        **options: `input` (for its standard input) and `cwd`.
    """
    launchers: dict[str, Sequence[Any]] = {
        "torchrun": ("torch.distributed.run", "--nproc_per_node", processes, "--master_port", _free_port(), "-m"),
        "accelerate": (
            *("accelerate.commands.launch", "--multi_gpu", "--num_processes", processes),
            *("--main_process_port", _free_port(), "--module"),
        ),
    }
    command = [sys.executable, "-m", *map(str, (*launchers[by], program, *arguments))]
    given = options.get("input")
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=options.get("cwd"),
        env={**os.environ, **_environment()},
        start_new_session=True,  # so that a launcher that hangs takes its processes with it
    )
    try:
        stdout, stderr = process.communicate(given, timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(_told(command, "hangs", stdout, stderr)) from None
    assert (process.returncode != 0) == fails, _told(command, f"ended with {process.returncode}", stdout, stderr)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


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
