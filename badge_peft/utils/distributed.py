"""Several processes that do one job, as `accelerate launch`, `torchrun` and `mpirun` start them.

Only `launched` and `is_main` may be asked before `join`; with one process all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")

# what torchrun, Intel MPI, Open MPI and MVAPICH call them; accelerate reads the same
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# the others wait while the main process times an adapter, say; a process that fails ends all of them anyway
_PATIENCE = timedelta(days=1)


def launched() -> tuple[int, int]:
    """(rank, number of processes) that a launcher has put into the environment; (0, 1) without one."""
    ranks = [int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdecimal()]
    sizes = [int(os.environ[name]) for name in _SIZES if os.environ.get(name, "").isdecimal()]
    if not ranks or not sizes or max(sizes) < 2:
        return 0, 1
    return ranks[0], max(sizes)


def together() -> tuple[int, int]:
    """(rank, number of processes) of those that have joined; (0, 1) where none have."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks: the first, or the only one."""
    rank, size = together()
    return (rank if size > 1 else launched()[0]) == 0


def on_cpu() -> bool:
    """Whether several processes have to share the work on CPUs, which accelerate and Trainer must be told."""
    if launched()[1] == 1:
        return False
    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return wanted or not _has_accelerator()


def join() -> None:
    """Meets the other processes; a second call does nothing.

    Raises:
        RuntimeError: they could not be met.
    """
    size = launched()[1]
    if size == 1 or together()[1] > 1:
        return
    from accelerate import PartialState

    found = PartialState(cpu=on_cpu(), timeout=_PATIENCE).num_processes
    if found != size:
        raise RuntimeError(f"{size} processes were started, and accelerate found {found}: start them with torchrun.")


def part() -> None:
    """Waits until every process is here, and lets them go."""
    if together()[1] > 1:
        dist.barrier()
        dist.destroy_process_group()


def wait() -> None:
    """Goes on once every process is here."""
    if together()[1] > 1:
        dist.barrier()


def in_main(work: Callable[[], T]) -> T:
    """Runs `work` in the main process alone; its result, or its error, is everybody's."""
    rank, size = together()
    if size == 1:
        return work()
    told: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank == 0:
        try:
            told = [(work(), None)]
        except Exception as error:
            told = [(None, error)]
    dist.broadcast_object_list(told, src=0)
    result, failure = told[0]
    if failure is not None:
        raise failure
    return cast(T, result)  # what `work` gave, which may be None


def gather(items: list[T]) -> list[T]:
    """The items of all processes, those of the first process first; the same list in each."""
    size = together()[1]
    if size == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(size)]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def _has_accelerator() -> bool:
    found = getattr(torch, "accelerator", None)  # since torch 2.6
    if found is None:
        return torch.cuda.is_available()
    return found.is_available() and found.current_accelerator().type != "mps"  # which processes cannot share
