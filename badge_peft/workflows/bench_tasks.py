"""`bench_tasks`: what one pass for many tasks takes on the user's own texts, beside what could be run instead."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation.collate import SPECIAL
from badge_peft.evaluation.timing import Runner, take_turns
from badge_peft.utils.checks import check_int
from badge_peft.workflows.bench import PAUSE, WARMUP, pinned_threads, stock_model, times
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import recorded_fields
from badge_peft.workflows.tasks import TaskStack, batch_of


def bench_tasks(
    stack: TaskStack,
    examples: TextDataset,
    configs: dict[str, EarlyExitConfig],
    limit: int = 200,
    batch_size: int = 1,
    threads: int | None = None,
) -> dict[str, Any]:
    """Times one pass for all tasks, a call for each of them, and a full model for each, in PyTorch, on the same texts.

    All take turns batch by batch, in changing order, each with the same number of threads; times are those of the
    model's calls alone, without the tokenizer."""
    for name, value in (("limit", limit), ("batch_size", batch_size), ("threads", threads)):
        check_int(name, value, at_least=1)
    shared, names = stack.shared, stack.names
    rows = examples.select(range(min(limit, len(examples))))
    parts = [
        rows.select(range(start, min(len(rows), start + batch_size))) for start in range(0, len(rows), batch_size)
    ]
    batches = [batch_of(stack, part.words or part.texts, part.pairs)[0] for part in parts]
    longest = max(batches, key=lambda batch: batch["input_ids"].numel())
    stock = stock_model(shared)
    model = shared.model

    def one_pass(batch: dict[str, torch.Tensor]) -> Any:
        return early_exit_forward(model, tasks=names, early_exit_config=configs, **batch)

    def a_call_each(batch: dict[str, torch.Tensor]) -> list[Any]:  # without switching, which would take its time, too
        return [early_exit_forward(model, tasks=[t], early_exit_config={t: configs[t]}, **batch)[t] for t in names]

    def full_models(batch: dict[str, torch.Tensor]) -> list[Any]:
        given = {name: value for name, value in batch.items() if name != SPECIAL}
        return [stock(**given) for _ in names]

    def move(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(shared.device) for name, value in batch.items()}

    depth = float(shared.badge.num_blocks)
    ways: dict[str, Runner] = {
        f"{len(names)} full models": Runner(full_models, move, partial(_full, depth), shared.device),
        f"{len(names)} calls": Runner(a_call_each, move, _summed, shared.device),
        "one pass": Runner(one_pass, move, _deepest, shared.device),
    }
    with pinned_threads(threads) as used, torch.inference_mode():
        warmup = [longest, *batches[:WARMUP]]
        timed = take_turns([*ways.values()], batches, warmup=warmup, pause=PAUSE, progress="timing")
    return {
        "rows": len(rows),
        "batch_size": batch_size,
        "threads": used,
        "device": str(shared.device),
        "num_blocks": int(depth),
        "rules": {task: recorded_fields(config) for task, config in configs.items()},
        "results": [
            {"name": name, **times(each, len(rows)), "blocks": sum(sum(found) for found in each.outputs) / len(rows)}
            for name, each in zip(ways, timed, strict=True)
        ],
    }


def _full(depth: float, outputs: list[Any]) -> list[float]:
    """[B], the blocks that each text went through."""
    return [depth * len(outputs)] * len(outputs[0].logits)


def _summed(outputs: list[Any]) -> list[float]:
    return torch.stack([output.exit_layer for output in outputs]).sum(dim=0).tolist()


def _deepest(output: Any) -> list[float]:
    return output.blocks_run.tolist()
