"""What an adapter saves on the user's own texts, beside what could be run instead. What `badge-peft bench` does.

All that is compared takes turns batch by batch, in changing order, each with the same number of threads, and after a
call on the batch before, as in a service that runs nothing else; times are those of the model's calls alone, without
the tokenizer.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import ExitLogits, collect_exit_logits
from badge_peft.evaluation.collate import SPECIAL, pad_features, tensor_columns
from badge_peft.evaluation.metrics import score
from badge_peft.evaluation.timing import Runner, Timed, take_turns
from badge_peft.model import get_badge_model
from badge_peft.ranking.metrics import top_k_kept
from badge_peft.ranking.segments import CandidatePass, RankedCandidates
from badge_peft.utils.checks import check_int
from badge_peft.utils.problem import NO_LABEL, differs, problem_of
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.base_model import keeps_answers
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import recorded_fields
from badge_peft.workflows.predict import STATE_BYTES, batch_of, pairs_of

Array = np.ndarray
Row = dict[str, Any]
Batch = dict[str, Tensor]
Runners = Callable[[int, Path], dict[str, Runner]]  # from the number of threads, and a folder for files
_WARMUP = 5  # batches, and the longest
_PAUSE = 0.005  # seconds before each call: the threads of the runtime that has just finished spin for a while
_WARMUP_QUERIES = 2


def bench(
    runners: Runners,
    batches: Sequence[Any],
    warmup: Sequence[Any],
    threads: int | None,
    result: Callable[[Timed, list[Timed]], dict[str, Any]],
) -> dict[str, Any]:
    """The number of `threads`, and under `results` one dict per runner: its `name`, the `p50_ms` and `p95_ms` of a
    batch, and what `result` makes of its outputs, beside those of all."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            used = torch.get_num_threads()
            made = runners(used, Path(folder))
            timed = take_turns([*made.values()], batches, warmup=warmup, pause=_PAUSE, settle=True, progress="timing")
    finally:
        torch.set_num_threads(before)
    found = []
    for name, own in zip(made, timed, strict=True):
        p50, p95 = (1e3 * float(np.percentile(own.seconds, percent)) for percent in (50, 95))
        found.append({"name": name, "p50_ms": p50, "p95_ms": p95, **result(own, timed)})
    return {"threads": used, "results": found}


def bench_adapter(
    adapter: Adapter,
    examples: TextDataset,
    config: EarlyExitConfig | None = None,
    limit: int = 200,
    batch_size: int | None = None,
    threads: int | None = None,
    onnx: bool = True,
    metric: str | None = None,
) -> dict[str, Any]:
    """Times the model without exits and with them, in PyTorch and, with `onnx`, in ONNX Runtime (fp32, int8), on the
    same texts: the first `limit` rows; where it ranks, query by query, whole queries. By default a batch is a text,
    and of a ranking 32 candidates in a block at once; the times are those of a batch, and of a query. `threads` are
    those of torch and of each session.

    Returns:
        The settings, and under `results` one dict per runner: `name`, `p50_ms`, `p95_ms`, `examples_per_s`,
        `mean_exit`, `score` (None without labels, and for a base model that the adapter's training left behind; of a
        ranking the share of queries with the first runner's top k) and `answers_as_full_depth`.
    """
    _check(limit, batch_size, threads)
    config = config or adapter.early_exit_config()
    metric = adapter.metric(metric)
    report: dict[str, Any] = {
        "spinning": False,
        "device": str(adapter.device),
        "num_blocks": adapter.badge.num_blocks,
        "rule": recorded_fields(config),
        "metric": metric,
    }
    make = partial(_runners, adapter, config, onnx)
    if adapter.task == "ranking":
        size = batch_size or 32
        queries = _first_queries(adapter, examples, limit)
        report |= {"rows": sum(map(len, queries)), "queries": len(queries), "batch_size": size, "labels": None}
        rankers = partial(_rankers, make, adapter, config, size)
        result = partial(_result_of_queries, config.resolved_top_k)
        return report | bench(rankers, queries, queries[:_WARMUP_QUERIES], threads, result)
    size = batch_size or 1
    encoded = adapter.encode(examples.select(range(min(limit, len(examples)))))
    own = collect_exit_logits(adapter.model, encoded, size)
    base = adapter.model.get_base_model()
    tokens = own.texts is not None
    rows = tensor_columns(base, encoded, tokens)
    for row in rows:
        labels = row.pop("labels", None)
        if tokens and labels is not None:  # who has no label needs no answer
            row[SPECIAL] = [int(label == NO_LABEL) for label in labels]
    batches = [pad_features(rows[start : start + size], base) for start in range(0, len(rows), size)]
    asked = [_asked(batch).numpy() for batch in batches] if tokens else None
    report |= {"rows": len(rows), "batch_size": size, "labels": None if own.labels is None else "given"}
    result = partial(_result, own, metric, keeps_answers(adapter.model), asked)
    return report | bench(make, batches, _warmup(batches), threads, result)


def bench_tasks(
    adapters: dict[str, Adapter],
    examples: TextDataset,
    configs: dict[str, EarlyExitConfig],
    limit: int = 200,
    batch_size: int = 1,
    threads: int | None = None,
) -> dict[str, Any]:
    """Times one pass for all tasks, a call for each of them, and a full model for each, in PyTorch, on the same texts.
    As `bench_adapter`; `blocks` are those that a text goes through on average."""
    _check(limit, batch_size, threads)
    names, first = [*adapters], next(iter(adapters.values()))
    depth = first.badge.num_blocks
    pairs = pairs_of(examples.select(range(min(limit, len(examples)))))
    starts = range(0, len(pairs), batch_size)
    batches = [batch_of([*adapters.values()], pairs[start : start + batch_size])[0] for start in starts]
    stock = stock_model(first)

    def call(tasks: list[str], batch: Batch) -> Any:  # without switching, which would take its time, too
        rules = {task: configs[task] for task in tasks}
        return early_exit_forward(first.model, tasks=tasks, early_exit_config=rules, **batch)

    def full_models(batch: Batch) -> list[Any]:
        given = {name: value for name, value in batch.items() if name != SPECIAL}
        return [stock(**given) for _ in names]

    # of a batch the blocks that its texts went through
    ways: dict[str, tuple[Callable[[Batch], Any], Callable[[Any], float]]] = {
        f"{len(names)} full models": (full_models, lambda outputs: depth * len(names) * len(outputs[0].logits)),
        f"{len(names)} calls": (
            lambda batch: [call([task], batch) for task in names],
            lambda outputs: sum(int(output.blocks_run.sum()) for output in outputs),
        ),
        "one pass": (partial(call, names), lambda output: int(output.blocks_run.sum())),
    }
    move = partial(_moved, first)
    runners = {name: Runner(run, move, read, first.device) for name, (run, read) in ways.items()}

    def result(timed: Timed, _: list[Timed]) -> dict[str, Any]:
        return {"examples_per_s": len(pairs) / sum(timed.seconds), "blocks": sum(timed.outputs) / len(pairs)}

    return {
        "rows": len(pairs),
        "batch_size": batch_size,
        "device": str(first.device),
        "num_blocks": depth,
        "rules": {task: recorded_fields(config) for task, config in configs.items()},
        **bench(lambda *_: runners, batches, _warmup(batches), threads, result),
    }


def _check(limit: int, batch_size: int | None, threads: int | None) -> None:
    for name, value in (("limit", limit), ("batch_size", batch_size), ("threads", threads)):
        check_int(name, value, at_least=1)


def _warmup(batches: list[Batch]) -> list[Batch]:
    return [max(batches, key=lambda batch: batch["input_ids"].numel()), *batches[:_WARMUP]]


def _runners(adapter: Adapter, config: EarlyExitConfig, onnx: bool, threads: int, folder: Path) -> dict[str, Runner]:
    """The model with nothing of the adapter around it, and with early exits, in PyTorch and, on the CPU, in ONNX
    Runtime: in float32 and with weights in 8 bits (dynamic quantization). Sessions pin threads and do not spin."""
    early = partial(early_exit_forward, adapter.model, early_exit_config=config)
    move = partial(_moved, adapter)
    found = {
        name: Runner(partial(_call, model), inputs, _read, adapter.device)
        for name, model, inputs in (
            ("stock PyTorch", stock_model(adapter), lambda batch: _without_special(move(batch))),
            ("BADGE PyTorch", early, move),
        )
    }
    if not onnx:
        return found
    from badge_peft.export.onnx import OnnxExporter
    from badge_peft.export.plain import FullDepthExporter
    from badge_peft.export.runtime import OnnxEarlyExitModel, open_session

    plain = FullDepthExporter(stock_model(adapter).cpu())
    exits = OnnxExporter(adapter.model, config)
    for suffix in ("", " int8"):
        file = folder / f"full depth{suffix}.onnx"
        directory = folder / f"early exits{suffix}"
        plain.write(file, int8=bool(suffix))
        exits.write(directory, int8=bool(suffix))
        session = open_session(file, threads)
        model = OnnxEarlyExitModel.from_pretrained(directory, threads=threads, spinning=False)
        names = [entry.name for entry in session.get_inputs()]
        found[f"ONNX Runtime{suffix}, full depth"] = Runner(
            partial(session.run, ["logits"]), partial(onnx_inputs, names=names), lambda output: (output[0], None)
        )
        found[f"BADGE ONNX{suffix}"] = Runner(
            partial(_call, model),
            partial(_early_inputs, names),
            lambda output: (output.logits, output.exit_layer),
        )
    return found


def _read(output: Any) -> tuple[Array, Array | None]:
    """Logits [B, K] and, where rows left early, their exits [B]."""
    exits = getattr(output, "exit_layer", None)
    return output.logits.float().cpu().numpy(), None if exits is None else exits.cpu().numpy()


def stock_model(adapter: Adapter) -> Any:
    """A copy of the model with the adapter taken off."""
    return get_badge_model(copy.deepcopy(adapter.model)).unload().eval()


def _asked(batch: Batch) -> Tensor:
    """[B, S] bool: the tokens that are to be answered."""
    real = batch["attention_mask"] != 0
    return real & (batch[SPECIAL] == 0) if SPECIAL in batch else real


def _call(model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    return model(**inputs)


def _moved(adapter: Adapter, batch: Batch) -> Batch:
    return {name: value.to(adapter.device) for name, value in batch.items()}


def _without_special(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != SPECIAL}


def onnx_inputs(batch: Batch, names: list[str]) -> dict[str, Array]:
    """The inputs of a graph; not every tokenizer gives the token_type_ids that it asks for."""
    filled = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
    return {name: filled[name].numpy().astype(np.int64) for name in names}


def _early_inputs(names: list[str], batch: Batch) -> dict[str, Array]:
    return onnx_inputs(batch, [*names, *{SPECIAL}.intersection(batch)])


def _result(
    own: ExitLogits, metric: str, stock_counts: bool, asked: list[Array] | None, timed: Timed, _: list[Timed]
) -> dict[str, Any]:
    """Scores of one runner, against the labels and full depth of the adapter's `own` exit logits. The base model
    without exits has a score where `stock_counts`: it could be in service. Of token classification `asked` [B, S] of
    each batch are answered, and a text stops with the last of them."""
    outputs: list[Any] = timed.outputs
    rows = sum(len(each) for each, _ in outputs)
    if asked is not None:
        outputs = [(each[mask], _of_texts(exits, mask)) for (each, exits), mask in zip(outputs, asked, strict=True)]
    logits = torch.from_numpy(np.concatenate([each for each, _ in outputs]))  # [N, K]
    exits = [exits for _, exits in outputs if exits is not None]  # of each batch [B]
    comparable = bool(exits) or stock_counts
    problem, same = problem_of(own.kind), None
    if problem.gives_labels:
        same = 1 - float(own.units.largest(differs(problem.predictions(logits), own.predictions[-1])).mean())
    return {
        "examples_per_s": rows / sum(timed.seconds),
        "mean_exit": float(np.concatenate(exits).mean()) if exits else float(own.depth),
        "score": score(own, logits, metric) if comparable and own.labels is not None else None,
        "answers_as_full_depth": same if comparable else None,
    }


def _of_texts(exits: Array | None, asked: Array) -> Array | None:
    """[B] of the exits of texts, or of their tokens [B, S]."""
    return exits if exits is None or exits.ndim == 1 else np.where(asked, exits, 0).max(axis=1)


def _first_queries(adapter: Adapter, examples: TextDataset, limit: int) -> list[list[Row]]:
    """The encoded candidates of the first queries, until there are `limit`."""
    queries = examples.rows_of_queries()
    counts = np.cumsum([len(rows) for rows in queries.values()])
    chosen = [*queries.values()][: int(np.searchsorted(counts, limit)) + 1]
    encoded = adapter.encode(examples.select([i for rows in chosen for i in rows]))
    rows = iter(tensor_columns(adapter.model.get_base_model(), encoded))
    return [[next(rows) for _ in part] for part in chosen]


def _rankers(
    make: Runners, adapter: Adapter, config: EarlyExitConfig, batch_size: int, threads: int, folder: Path
) -> dict[str, Runner]:
    """The same for the candidates of a query: early exits take them all at once."""
    depth = adapter.badge.num_blocks
    base = adapter.model.get_base_model()
    policy = build_policy(config)

    def rank(runner: Runner, size: int | None, candidates: list[Row]) -> RankedCandidates:
        order = sorted(range(len(candidates)), key=lambda i: -len(candidates[i]["input_ids"]))
        scores = np.empty(len(candidates), dtype=np.float32)
        exits = np.full(len(candidates), depth)
        for start in range(0, len(order), size or len(order)):
            part = order[start : start + (size or len(order))]
            batch = pad_features([candidates[i] for i in part], base)
            logits, left = runner.read(runner.run(runner.prepare(batch)))
            scores[part] = logits[:, 0]
            exits[part] = depth if left is None else left
        return RankedCandidates(scores, exits, {}, ~np.isfinite(scores))

    def early(candidates: list[Row]) -> RankedCandidates:
        return CandidatePass(adapter.badge, candidates, policy, batch_size, STATE_BYTES).run()

    found: dict[str, Callable[[list[Row]], RankedCandidates]] = {
        name: partial(rank, runner, None if name.startswith("BADGE") else batch_size)
        for name, runner in make(threads, folder).items()
    }
    found["BADGE PyTorch"] = early
    return {name: Runner(run, device=adapter.device) for name, run in found.items()}


def _result_of_queries(top_k: int, timed: Timed, every: list[Timed]) -> dict[str, Any]:
    """The share of queries whose top k is that of the first runner, which is at full depth."""
    kept = []
    for found, whole in zip(timed.outputs, every[0].outputs, strict=True):
        ends = found.exit_layer == found.exit_layer.max()
        one = np.zeros(len(ends), dtype=np.int64)
        # the two differ by rounding, so the candidates are compared, and not their scores
        places = np.argsort(np.argsort(-whole.scores, kind="stable"))
        kept.append(top_k_kept(-places.astype(float), found.scores, ends, one, top_k, ordered=False)[0])
    exits = np.concatenate([found.exit_layer for found in timed.outputs])
    return {
        "examples_per_s": len(exits) / sum(timed.seconds),
        "mean_exit": float(exits.mean()),
        "score": float(np.mean(kept)),
        "answers_as_full_depth": None,
    }
