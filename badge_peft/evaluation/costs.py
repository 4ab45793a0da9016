"""`CostModel`: what a call costs in milliseconds, by the block at which a row stops and the exits that are read.

    t(stop at block m) = call + m * block + (exits read up to m) * exit

Blocks are not time: reading an exit and deciding at it take a tenth to a third of a small model's block, and what lies
outside of the blocks (embeddings, head, the call) no exit saves. `measure_costs` fits these numbers to calls that
are forced to stop at known blocks, and to the model without exits.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.base import schedule_of
from badge_peft.evaluation.collate import SPECIAL, evaluating, pad_features, tensor_columns
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.latency import device_name, without_adapter
from badge_peft.evaluation.timing import Runner, take_turns
from badge_peft.model import get_badge_model
from badge_peft.tuner.config import BadgeConfig
from badge_peft.utils.checks import check_int, check_number

Array = np.ndarray
WORTH = 0.10  # the smallest share of the time worth an early exit
_LEAST_ROUNDS = 5  # of a few a busy machine spoils all; of long calls fewer batches are timed
_FEW = 8  # batches that are timed, of lengths spread over those of the rows
_READ = 2000  # rows among which these are picked
_NEVER = 2.0  # a probability that no exit reaches


@dataclass(frozen=True)
class CostModel:
    """What the parts of a call cost.

    Args:
        full_ms: The model without exits, for each row of a call.
        call_ms: Of a call that may exit early, for each row, the part that exits cannot save.
        block_ms: A block.
        exit_ms: Reading an exit and deciding at it.
        linked: Whether an exit is computed for later ones even where nothing is decided at it.
        batch_size: Rows of a call.
        threads: Of torch.
        device: Where the model was.
        machine: Which machine it was.
    """

    full_ms: float
    call_ms: float
    block_ms: float
    exit_ms: float
    linked: bool = False
    batch_size: int = 1
    threads: int = 0
    device: str = ""
    machine: str = ""

    @classmethod
    def of_blocks(cls, num_blocks: int) -> CostModel:
        """M blocks alone: the time saved is the share of blocks saved."""
        return cls(float(num_blocks), 0.0, 1.0, 0.0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostModel:
        """What `to_dict` gave."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def milliseconds(self, config: EarlyExitConfig, exits: Sequence[int], num_blocks: int) -> Array:
        """[E]: what a row costs that stops at each exit.

        Args:
            config: Says which exits are read.
            exits: Block numbers of the exits.
            num_blocks: M.
        """
        if config.policy == "never" and config.max_exit is None:
            return np.full(len(exits), self.full_ms)
        schedule = schedule_of(build_policy(config), exits)
        read = np.array(schedule.needed, dtype=np.float64)
        if self.linked:
            last = max((j for j in range(len(exits)) if schedule.needed[j]), default=-1)
            read[: last + 1] = 1
        if exits[-1] == num_blocks:
            read[-1] = 0  # the model's own head, which `call_ms` has
        return self.call_ms + self.block_ms * np.array(exits) + self.exit_ms * np.cumsum(read)

    def time_saved(self, config: EarlyExitConfig, exit_logits: ExitLogits, stops: Array) -> Array:
        """1 - expected time / time of the model without exits.

        Args:
            config: As for `milliseconds`.
            exit_logits: The rows.
            stops: [..., N], block numbers at which rows stop; of token classification, a text stops with its last
                token.

        Returns:
            [...], a share.
        """
        each = self.milliseconds(config, exit_logits.exits, exit_logits.depth)
        where = np.searchsorted(exit_logits.exits, exit_logits.units.largest(stops))
        return 1 - each[where].mean(axis=-1) / self.full_ms


def measure_costs(model: nn.Module, rows: Any, batch_size: int = 1, seconds: float = 4.0) -> CostModel:
    """Times calls that are forced to stop at known blocks, next to the model without exits, in turn.

    Args:
        model: A PEFT model with an active BADGE adapter.
        rows: Tokenized rows, as for `measure_latency`; a few, of lengths like those of all, are timed.
        batch_size: Rows of a call.
        seconds: About how long it may take.

    Raises:
        ValueError: there are no rows, or a number is out of range.
    """
    check_int("batch_size", batch_size, at_least=1)
    check_number("seconds", seconds, lambda s: s > 0, "it must be positive")
    badge = get_badge_model(model)
    config, exits = badge.config_of(), badge.exit_layers()
    if not len(rows):
        raise ValueError("there are no rows: pass at least one tokenized row.")
    device = next(badge.model.parameters()).device
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in _batches(badge, rows, batch_size)]
    designs, known = _designs(exits, config, badge.num_blocks)

    def full_depth(batch: dict[str, Any]) -> Any:
        return badge(**{name: value for name, value in batch.items() if name != SPECIAL})

    def early(design: EarlyExitConfig, batch: dict[str, Any]) -> Any:
        return early_exit_forward(badge, early_exit_config=design, **batch)

    runners = [Runner(full_depth, device=device, around=partial(without_adapter, badge))]
    runners += [Runner(partial(early, design), device=device) for design in designs]
    with evaluating(badge), torch.inference_mode():
        start = time.perf_counter()
        take_turns(runners, batches[:1], warmup=batches[:1])
        once = (time.perf_counter() - start) / 2  # of a batch
        most = int(np.clip(seconds / (_LEAST_ROUNDS * max(once, 1e-6)), min(2, len(batches)), len(batches)))
        batches = [batches[int((i + 0.5) * len(batches) / most)] for i in range(most)]
        rounds = int(np.clip(seconds / (most * max(once, 1e-6)), _LEAST_ROUNDS, 15))
        timed = take_turns(runners, batches, rounds)
    size = np.mean([len(batch["input_ids"]) for batch in batches])
    # the least of the rounds, as `timeit` has it: what else the machine does only ever adds to a time
    times = 1e3 * np.array([np.min(np.reshape(t.seconds, (most, rounds)), axis=1).mean() for t in timed])
    outside, block, exit_, more = fit_parts(known, times / size)
    return CostModel(
        outside + badge.num_blocks * block,
        outside + more,
        block,
        exit_,
        config.carry is not None,
        batch_size,
        torch.get_num_threads(),
        device_name(device),
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
    )


def fit_parts(known: Array, times: Array) -> list[float]:
    """What is outside of the blocks, a block, an exit, and what a call that may exit early takes more.

    Args:
        known: [D, 4], how many of each a call has.
        times: [D], of the calls. Their errors are taken to be a share of each.
    """
    return [float(x) for x in nnls(known / times[:, None], np.ones(len(times)))[0]]


def _batches(badge: Any, rows: Any, batch_size: int) -> list[dict[str, Any]]:
    """A few batches, each of rows of one length, with lengths spread evenly over those of the rows."""
    read = rows.select(range(min(len(rows), _READ))) if hasattr(rows, "select") else rows
    rows = tensor_columns(badge.model, read)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    middles = [order[int((i + 0.5) * len(order) / _FEW)] for i in range(_FEW)] if len(order) > _FEW else order
    picked = [{k: v for k, v in rows[i].items() if k != "labels"} for i in middles]
    return [pad_features([row] * batch_size, badge.model) for row in picked]


def _designs(exits: list[int], adapter: BadgeConfig, num_blocks: int) -> tuple[list[EarlyExitConfig], Array]:
    """Configs that stop every row at a known block, reading one exit or all of them; and what `fit_parts` takes of the
    model without exits and of each [D + 1, 4]."""
    linked = adapter.carry is not None
    undecided = EarlyExitConfig(policy="max_prob", threshold=_NEVER)
    if adapter.resolved_problem_type == "regression":
        undecided = EarlyExitConfig(policy="divergence", threshold=0.0)
    designs, known = [], [[1, num_blocks, 0, 0]]
    for m in sorted({exits[0], exits[len(exits) // 2], exits[-1]}):
        upto, own_head = exits.index(m) + 1, m == num_blocks
        if not own_head:  # else full depth, which reads no exit
            designs.append(EarlyExitConfig(policy="fixed_depth", depth=m))
            known.append([1, m, upto if linked else 1, 1])
        designs.append(replace(undecided, max_exit=m))
        known.append([1, m, upto - own_head, 1])
    return designs, np.array(known, dtype=np.float64)
