"""`measure_latency`: what early exits save on the clock, one example at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation.collate import SPECIAL, evaluating, pad_features, tensor_columns
from badge_peft.evaluation.timing import Runner, take_turns
from badge_peft.model import BadgeModel, get_badge_model
from badge_peft.utils.checks import check_choice, check_int
from badge_peft.utils.problem import NO_LABEL, problem_of

REFERENCES = ("full_depth", "all_exits")


@dataclass
class LatencyReport:
    """Wall-clock times per example at batch size 1. `t` is a time with early exits, `T` one of the reference.

    Args:
        times_ms: [N] t, milliseconds.
        full_depth_times_ms: [N] T, milliseconds.
        exit_layer: [N] number of the block that answered.
        predictions: [N] class numbers or values, or [N, K] 0 / 1 decisions, of the early exits; of tokens a list
            of class numbers for each text.
        num_blocks: M.
        reference: What `T` is: `full_depth` or `all_exits`.
        early_exit: The fields of the config that was measured.
        threads: Threads that torch computed with.
        device: Where the model was, with the name of the card.
        torch_version: Of torch.

    Attributes:
        mean_ms: Mean time with early exits.
        p50_ms: Median time with early exits.
        p95_ms: 95th percentile of the time with early exits.
        full_depth_mean_ms: Mean time of the reference.
        full_depth_p50_ms: Median time of the reference.
        full_depth_p95_ms: 95th percentile of the time of the reference.
        time_saved: 1 - sum t / sum T: the share of the time saved, as the paper counts it.
        speedup_ratio: sum T / sum t: how many times as fast.
        mean_exit: Mean number of the block that answered.
        blocks_saved: 1 - mean_exit / M: the share of the blocks saved; `time_saved` falls short of it by what
            exits cost.
    """

    mean_ms: float = field(init=False)
    p50_ms: float = field(init=False)
    p95_ms: float = field(init=False)
    full_depth_mean_ms: float = field(init=False)
    full_depth_p50_ms: float = field(init=False)
    full_depth_p95_ms: float = field(init=False)
    time_saved: float = field(init=False)
    speedup_ratio: float = field(init=False)
    mean_exit: float = field(init=False)
    blocks_saved: float = field(init=False)
    times_ms: list[float]
    full_depth_times_ms: list[float]
    exit_layer: list[int]
    predictions: list[Any]
    num_blocks: int
    reference: str
    early_exit: dict[str, Any]
    threads: int
    device: str
    torch_version: str

    def __len__(self) -> int:
        return len(self.times_ms)

    def __post_init__(self) -> None:
        self.mean_ms, self.p50_ms, self.p95_ms = _mean_p50_p95(self.times_ms)
        self.full_depth_mean_ms, self.full_depth_p50_ms, self.full_depth_p95_ms = _mean_p50_p95(
            self.full_depth_times_ms
        )
        self.speedup_ratio = sum(self.full_depth_times_ms) / sum(self.times_ms)
        self.time_saved = 1 - sum(self.times_ms) / sum(self.full_depth_times_ms)
        self.mean_exit = float(np.mean(self.exit_layer))
        self.blocks_saved = 1 - self.mean_exit / self.num_blocks

    def to_dict(self) -> dict[str, Any]:
        """Summary and raw numbers as JSON-able values."""
        return asdict(self)


def measure_latency(
    model: nn.Module,
    examples: Any,
    early_exit_config: EarlyExitConfig | dict[str, Any] | None = None,
    repeats: int = 1,
    warmup: int = 10,
    reference: str = "full_depth",
    progress: bool = False,
) -> LatencyReport:
    """Times every example alone, with early exits and without.

    The two take turns example by example, in changing order, so that a machine that slows down slows both. The model
    is in eval mode under `torch.inference_mode`; inputs are on its device before the clock starts; on CUDA the clock
    waits for the device. Mode and trainable parameters are as before afterwards.

    Args:
        model: A PEFT model with an active BADGE adapter.
        examples: Tokenized rows: a `datasets.Dataset` or any sequence of dicts. Labels and text are left out; of
            token classification tokens without a label (or by `special_tokens_mask`) need no answer.
        early_exit_config: None takes the active adapter's own.
        repeats: How often each example is timed; its median counts.
        warmup: Passes of each kind before the first that counts.
        reference: `full_depth`: the base model's plain forward, adapter disabled, which is what is in service today.
            `all_exits`: full depth with every exit computed, which is what the exits cost.
        progress: Show a progress bar.

    Raises:
        ValueError: no examples, no BADGE adapter, or a wrong argument.

    Example:

    ```python
    report = measure_latency(model, test_rows, {"threshold": 0.2, "patience": 1})
    print(report.speedup_ratio, report.p95_ms, report.full_depth_p95_ms)
    ```
    """
    badge = get_badge_model(model)
    check_choice("reference", reference, REFERENCES)
    check_int("repeats", repeats, at_least=1)
    check_int("warmup", warmup, at_least=0)
    if not len(examples):
        raise ValueError("there are no examples: pass at least one tokenized row.")
    config = badge.get_early_exit_config() if early_exit_config is None else EarlyExitConfig.of(early_exit_config)
    device, tokens = next(badge.model.parameters()).device, badge.config_of().reads_tokens
    batches = []
    for row in tensor_columns(badge.model, examples, tokens):
        labels = row.pop("labels", None)
        if tokens and labels is not None:
            row.setdefault(SPECIAL, [int(label == NO_LABEL) for label in labels])  # who has no label needs no answer
        batches.append({name: value.to(device) for name, value in pad_features([row], badge.model).items()})
    early = Runner(
        lambda batch: early_exit_forward(badge, early_exit_config=config, **batch),
        read=lambda output: (output.logits.float().cpu(), int(output.exit_layer)),
        device=device,
    )
    full_depth = Runner(
        lambda batch: badge(**{name: value for name, value in batch.items() if name != SPECIAL}),
        read=lambda _: None,
        device=device,
        around=partial(without_adapter, badge) if reference == "full_depth" else nullcontext,
    )
    with evaluating(badge), torch.inference_mode():
        timed, full = take_turns(
            [early, full_depth],
            batches,
            repeats,
            warmup=[batches[i % len(batches)] for i in range(warmup)],
            progress="timing at batch size 1" if progress else "",
        )
    times, full_times = (
        np.median(1e3 * np.reshape(found.seconds, (len(batches), repeats)), axis=1).tolist() for found in (timed, full)
    )
    logits, exits = zip(*timed.outputs, strict=True)
    problem = problem_of(badge.config_of().resolved_problem_type)
    return LatencyReport(
        times,
        full_times,
        list(exits),
        [problem.predictions(of_row)[0].tolist() for of_row in logits],
        badge.num_blocks,
        reference,
        config.to_dict(),
        torch.get_num_threads(),
        device_name(device),
        torch.__version__,
    )


def _mean_p50_p95(times: list[float]) -> tuple[float, float, float]:
    return float(np.mean(times)), float(np.percentile(times, 50)), float(np.percentile(times, 95))


def device_name(device: torch.device) -> str:
    """With the name of the card."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


@contextmanager
def without_adapter(badge: BadgeModel) -> Iterator[None]:
    """Disables the adapter, outside of the time that counts."""
    badge.disable_adapter_layers()
    try:
        yield
    finally:
        badge.enable_adapter_layers()
