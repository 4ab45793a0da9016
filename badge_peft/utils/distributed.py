"""Several processes that do one job, as `accelerate launch`, `torchrun` and `mpirun` start them, by accelerate's
`PartialState`. Only `env_rank_world` and `is_main` may be asked before `init_process_group`; with one process all of
this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, get_int_from_env, str_to_bool

T = TypeVar("T")

# what torchrun, Intel MPI, Open MPI and MVAPICH call them; PartialState reads the same
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# the others wait while the main process times an adapter, say; a process that fails ends all of them anyway
_TIMEOUT = timedelta(days=1)
_FAILED = "badge_peft: the main process has told its error"


def env_rank_world() -> tuple[int, int]:
    """(rank, number of processes) that a launcher has put into the environment; (0, 1) without one."""
    rank, size = get_int_from_env(_RANKS, -1), get_int_from_env(_SIZES, 1)
    return (rank, size) if rank >= 0 and size > 1 else (0, 1)


def rank_world() -> tuple[int, int]:
    """(rank, number of processes) of the process group; (0, 1) where there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks: the first, or the only one."""
    rank, size = rank_world()
    return (rank if size > 1 else env_rank_world()[0]) == 0


def on_cpu() -> bool:
    """Whether several processes have to share the work on CPUs, which accelerate and Trainer must be told."""
    if env_rank_world()[1] == 1:
        return False
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU") or "false")) or not _has_accelerator()


def rows_per_device(batch_size: int) -> int:
    """Of a batch that the processes share or, where there is one, the GPUs that it sees, as Trainer has it."""
    size = rank_world()[1]
    return max(1, batch_size // (size if size > 1 or on_cpu() else max(1, torch.cuda.device_count())))


def init_process_group() -> None:
    """Meets the other processes; a second call does nothing.

    Raises:
        RuntimeError: they could not be met.
    """
    size = env_rank_world()[1]
    if size == 1 or rank_world()[1] > 1:
        return
    found = PartialState(cpu=on_cpu(), timeout=_TIMEOUT).num_processes
    if found != size:
        raise RuntimeError(f"{size} processes were started, and accelerate found {found}: start them with torchrun.")


def shutdown() -> None:
    """Waits until every process is here, and ends the process group."""
    if rank_world()[1] > 1:
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


def tell_failure() -> None:
    """In the main process: the others may know that it has told its error."""
    if rank_world()[1] > 1:
        _store().set(_FAILED, "")


def main_fails(seconds: float = 10) -> bool:
    """In another process: whether the main one, too, tells an error, or is gone, within this time."""
    if rank_world()[1] == 1:
        return True  # all have read the same command line, and not met yet
    try:
        _store().wait([_FAILED], timedelta(seconds=seconds))
    except dist.DistNetworkError:
        return True
    except dist.DistError:
        return False
    return True


def on_main(work: Callable[[], T]) -> T:
    """Runs `work` in the main process alone; every process has its result, or its error."""
    rank, size = rank_world()
    if size == 1:
        return work()
    shared: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank == 0:
        try:
            shared = [(work(), None)]
        except Exception as error:
            shared = [(None, error)]
    result, failure = broadcast_object_list(shared)[0]
    if failure is not None:
        raise failure
    return cast(T, result)  # what `work` gave, which may be None


def gather(items: list[T]) -> list[T]:
    """The items of all processes, those of the first process first; the same list in each."""
    return items if rank_world()[1] == 1 else gather_object(items)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _has_accelerator() -> bool:
    found = getattr(torch, "accelerator", None)  # since torch 2.6
    if found is None:
        return torch.cuda.is_available()
    return found.is_available() and found.current_accelerator().type != "mps"  # which processes cannot share
