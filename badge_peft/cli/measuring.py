"""Commands that measure an adapter: `evaluate`, `sweep`, `bench`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from cyclopts.validators import Number

from badge_peft.cli import options as shared
from badge_peft.workflows.settings import Columns, PolicyOverrides


def evaluate(
    adapter: shared.AdapterOrTasks = None,
    data: Annotated[str | None, Parameter(help=shared.DATA)] = None,
    /,
    *,
    task: shared.Task = None,
    columns: Columns = Columns(),
    metric: shared.Metric = None,
    batch_size: shared.BatchSize = 32,
    latency: NonNegativeInt = 0,
    json_file: shared.JsonFile = None,
    save_logits: Path | None = None,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Measure an adapter: how good each exit is, and what its policy costs and saves.

    With labels the scores are against them; without, against full depth's answers. With --task each task's labels are
    in the column of its name.

    Several processes, started with accelerate launch or torchrun, share the rows among them.

    Args:
        latency: Also time this many rows, one by one, with early exits and without.
        save_logits: Write the logits of all exits to this safetensors file, for sweep and calibrate.
    """
    from badge_peft.utils.distributed import is_main
    from badge_peft.workflows.adapter_dir import open_tasks
    from badge_peft.workflows.evaluate import evaluate_adapter, evaluate_tasks
    from badge_peft.workflows.report import latency_line, measured_table, summary, tasks_summary, tasks_table

    places, (data,) = shared.adapters_and(("DATA",), task, adapter, data)
    if None not in places and (latency or save_logits is not None):
        raise ValueError("--latency and --save-logits are for one adapter: badge-peft bench times many tasks.")
    opened = open_tasks(places, base_model, device)
    if None not in opened:
        shared.prepare_folder(json_file)
        found = {"adapters": places, "data": data, **evaluate_tasks(opened, data, columns, metric, batch_size)}
        if is_main():
            print(f"\n{tasks_table(found)}\n\n{tasks_summary(found)}")
            shared.write(found, json_file)
        return
    rows = opened[None].read(data, columns)
    shared.prepare_folder(json_file, save_logits)
    report, exit_logits = evaluate_adapter(opened[None], rows, metric, batch_size, latency)
    if not is_main():
        return
    report = {"adapter": adapter, "data": data, **report}
    print(f"\n{measured_table(report)}\n\n{summary(report)}")
    if "latency" in report:
        print(latency_line(report["latency"]))
    shared.write(report, json_file)
    if save_logits is not None:
        exit_logits.save(save_logits)


def sweep(
    adapter_or_logits: str,
    data: shared.OtherData = None,
    /,
    *,
    policies: str | None = None,
    points: Annotated[int, Parameter(validator=Number(gte=2))] = 20,
    top_k: PositiveInt | None = None,
    metric: shared.Metric = None,
    plot: Path | None = None,
    json_file: shared.JsonFile = None,
    columns: Columns = Columns(),
    batch_size: shared.BatchSize = 32,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Show the trade-off between score and blocks saved of every policy, without choosing one.

    The fixed depths, where every text stops at the same block, are always shown beside the policies: a policy is worth
    having where it beats them.

    Args:
        adapter_or_logits: An adapter's folder (or repository), or a file of exit logits.
        policies: Policies to compare, with commas. Default: divergence,patience,entropy,max_prob.
        points: Settings of each policy.
        top_k: For ranking: how many candidates of a query count. Default: those of the adapter's own policy, else 10.
        plot: Draw the curves into this file (png, svg or pdf).
    """
    from badge_peft import evaluation
    from badge_peft.early_exit.policies import POLICIES
    from badge_peft.evaluation.plots import check_picture, plot_tradeoff
    from badge_peft.ranking import sweep_ranking
    from badge_peft.utils.checks import check_choice
    from badge_peft.workflows.evaluate import logits_of, metric_of, own_top_k
    from badge_peft.workflows.report import tradeoff_table

    names = None if policies is None else [name.strip() for name in policies.split(",") if name.strip()]
    for name in names or []:
        check_choice("policies", name, tuple(POLICIES))
    if names == []:
        raise ValueError(
            f"policies={policies!r} names no policy: name some of {', '.join(POLICIES)}, or leave it out."
        )
    if plot is not None:
        check_picture(plot)
    shared.prepare_folder(plot, json_file)
    exit_logits = logits_of(adapter_or_logits, data, columns, base_model, batch_size, device)
    if exit_logits.groups is not None:
        metric_of(exit_logits, metric)
        if names is not None:
            raise ValueError(f"policies={policies!r} is not for ranking, whose policy is top_k: leave it out.")
        found = sweep_ranking(exit_logits, top_k or own_top_k(adapter_or_logits), points)
        print(tradeoff_table(found, against_full_depth=True))
    else:
        if top_k is not None:
            raise ValueError(f"--top-k {top_k} is for ranking, and these exits rank nothing: leave it out.")
        scored = exit_logits.labeled()
        found = evaluation.sweep(scored, names, points, metric_of(scored, metric))
        print(tradeoff_table(found, against_full_depth=exit_logits.labels is None))
    if json_file is not None:
        found.save(json_file)
    if plot is not None:
        plot_tradeoff(found, plot)


def bench(
    adapter: shared.AdapterOrTasks = None,
    data: Annotated[str | None, Parameter(help=shared.DATA)] = None,
    /,
    *,
    task: shared.Task = None,
    columns: Columns = Columns(),
    metric: shared.Metric = None,
    rows: PositiveInt = 200,
    batch_size: PositiveInt | None = None,
    threads: PositiveInt | None = None,
    onnx: Annotated[bool, Parameter(negative="--no-onnx")] = True,
    overrides: PolicyOverrides = PolicyOverrides(),
    json_file: shared.JsonFile = None,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Compare the speed of an adapter on your texts with stock PyTorch and ONNX Runtime.

    Stock PyTorch, early exits in PyTorch, ONNX Runtime at full depth, early exits in ONNX Runtime, and both in int8,
    in turn: milliseconds, texts per second, mean exit, and the score where the data has labels. With --task: one pass
    for all tasks, a call for each, and a full model for each, in PyTorch. Of an adapter that ranks: times of a query,
    and the share of queries with full depth's top k.

    Args:
        rows: How many texts to time: the first of the data.
        batch_size: Batch size: texts per call; times are then those of a batch. Default: 1. For ranking, candidates in
            a block at once; default 32.
        threads: Of torch and of each ONNX Runtime session. Default: torch's own number.
        onnx: Also export to ONNX and time ONNX Runtime, fp32 and int8.
    """
    from badge_peft.utils.extras import require_onnx_exporter
    from badge_peft.workflows.adapter_dir import early_exit_configs, open_tasks
    from badge_peft.workflows.bench import bench_adapter, bench_tasks
    from badge_peft.workflows.report import bench_summary, bench_table

    places, (data,) = shared.adapters_and(("DATA",), task, adapter, data)
    if onnx and None in places:
        try:
            require_onnx_exporter()
        except ImportError as error:
            raise ImportError(f"{error} Or leave ONNX Runtime out with --no-onnx.") from error
    several = open_tasks(places, base_model, device)
    opened = next(iter(several.values()))
    configs = early_exit_configs(several, **vars(overrides))
    if None not in several:
        texts = opened.read(data, replace(columns, label_column=None, unlabeled=True))
        shared.prepare_folder(json_file)
        measured = bench_tasks(several, texts, configs, rows, batch_size or 1, threads)
        found = {"adapters": places, "data": data, "split": texts.split, **measured}
        print(f"\n{bench_table(found)}")
        shared.write(found, json_file)
        return
    examples = opened.read(data, columns)
    opened.metric(metric)
    shared.prepare_folder(json_file)
    measured = bench_adapter(opened, examples, configs[None], rows, batch_size, threads, onnx, metric)
    report = {"adapter": adapter, "data": data, "split": examples.split, **measured}
    print(f"\n{bench_table(report)}\n\n{bench_summary(report)}")
    shared.write(report, json_file)
