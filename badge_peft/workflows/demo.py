"""`run_demo`: the whole way of an adapter, from labeled texts to answers before the last block, timed on test rows."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.text import describe
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import score
from badge_peft.model import get_badge_model
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.calibrate import calibrate_adapter
from badge_peft.workflows.data import TextDataset, read_source, to_examples
from badge_peft.workflows.evaluate import evaluate_adapter
from badge_peft.workflows.packaged import DATA_PACKAGE, MODEL_PACKAGE, packaged_model, packaged_reviews
from badge_peft.workflows.plots import PICTURE, draw
from badge_peft.workflows.report import show, text_table
from badge_peft.workflows.settings import Columns, DemoSettings, ExitOptions, Goal, TrainingOptions, TrainSettings
from badge_peft.workflows.splits import split_in_three
from badge_peft.workflows.train import train_on


def run_demo(settings: DemoSettings = DemoSettings(), echo: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains an adapter as `train_adapter` does, loads it onto a fresh base model, and measures what early exits save.

    Threshold and patience are calibrated on the validation split; every reported number but those under `validation`
    is of the test split.

    Args:
        settings: The default runs on 6-block MiniLM and film reviews.
        echo: Takes a line of text, to tell how far the demo is.

    Returns:
        What `report.json` holds.

    Raises:
        ModuleNotFoundError: a package with the demo's model or data is not installed.
        ValueError: the data set cannot be read, or the model is of no architecture that badge_peft knows.
        OSError: there is no such file, model or data set.
    """
    start = time.perf_counter()
    out, folder = settings.output_dir, settings.output_dir / "adapter"
    model, data = settings.model or MODEL_PACKAGE, settings.dataset or f"{DATA_PACKAGE}: film reviews"
    splits = split_in_three(_read(settings), settings.seed, settings.max_train, settings.max_eval)
    train = TrainSettings(
        output_dir=folder,
        overwrite=True,
        max_length=settings.max_length,
        latency=0,
        # a sentence encoder has no head for these labels, and its first token says little
        exits=ExitOptions(exit_layers="0-", exit_pooling="mean", final_exit="exit"),
        training=TrainingOptions(epochs=settings.epochs, adapter_lr=settings.learning_rate, seed=settings.seed),
        goal=Goal(policy="divergence", max_score_drop=settings.max_score_drop),
    )
    path = settings.model or str(packaged_model())
    trained = train_on(path, splits["train"], splits["validation"], train, echo, data=data, new_head=True)
    assert trained is not None  # there is one process
    if trained["early_exit"]["config"]["policy"] == "fixed_depth":
        # the drop is wide enough for one depth for all rows to be the fastest: the fastest that loses nothing, then
        calibrate_adapter(str(folder), goal=Goal(policy="divergence", max_score_drop=0.0))
    adapter = open_adapter(folder, path)
    measured, test = evaluate_adapter(adapter, splits["test"], latency=len(splits["test"]))
    config = get_badge_model(adapter.model).get_early_exit_config()
    draw(test, config, measured["metric"], out / PICTURE, f"{model}, test split")
    report = {
        "model": model,
        "dataset": data,
        **{f"num_{name}": len(part) for name, part in splits.items()},
        "labels": adapter.labels.names,
        "num_blocks": measured["num_blocks"],
        "trainable_parameters": trained["trainable_parameters"],
        "adapter_bytes": trained["adapter_bytes"],
        "exit_layers": measured["exit_layers"],
        "per_exit_accuracy": measured["per_exit"],
        "s_avg": measured["s_avg"],
        "s_best": measured["s_best"],
        "full_depth_accuracy": measured["full_depth_score"],
        "early_exit": _early_exit(config, measured),
        "max_score_drop": settings.max_score_drop,
        "epochs": settings.epochs,
        "seed": settings.seed,
        "threads": measured["latency"]["threads"],
        "device": measured["latency"]["device"],
        "versions": trained["versions"],
        "peak_memory_mb": peak_memory_mb(),
        "seconds": time.perf_counter() - start,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    echo(f"\n{exit_table(test, config, measured)}\n\n{summary_table(report, measured['metric'])}\n")
    echo(f"policy: {describe(config)}")
    echo(f"wrote {folder}, {out / PICTURE} and {out / 'report.json'} in {report['seconds']:.0f} s")
    return report


def _read(settings: DemoSettings) -> dict[str, TextDataset]:
    if settings.dataset is None:
        return {"train": packaged_reviews()}
    columns = Columns(text_column=settings.text_column, label_column=settings.label_column)
    splits = read_source(settings.dataset, settings.dataset_config)
    found = {name: to_examples(data, name, columns, source=settings.dataset) for name, data in splits.items()}
    labeled = {name: part.labeled() for name, part in found.items()}
    return {name: part for name, part in labeled.items() if len(part)} or found  # of which training says what is wrong


def _early_exit(config: EarlyExitConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """The entry `early_exit` of the report: times are those of one text at a time."""
    early, latency, calibration = measured["early_exit"], measured["latency"], config.calibration or {}
    times = ("p50_ms", "p95_ms", "full_depth_p50_ms", "full_depth_p95_ms", "speedup_ratio")
    return {
        **{name: getattr(config, name) for name in ("policy", "divergence", "threshold", "patience", "depth")},
        "accuracy": early["score"],
        "mean_exit": early["mean_exit"],
        "layer_speedup": early["layer_speedup"],
        "wall_clock_speedup": latency["speedup_paper"],
        **{name: latency[name] for name in times},
        "validation": {name: calibration.get(name) for name in ("rows", "score", "full_depth_score", "layer_speedup")},
    }


def exit_table(test: ExitLogits, config: EarlyExitConfig, measured: dict[str, Any]) -> str:
    """One line per exit: how good it is for all rows, how many rows it answered, and how well."""
    stops, metric = build_policy(config).replay(test), measured["metric"]
    answers = test.answers(stops)
    lines = []
    for number, value in zip(measured["exit_layers"], measured["per_exit"], strict=True):
        here = stops == number
        right = show(score(test.select(here), answers[here], metric), metric) if here.any() else "-"
        lines.append([str(number), show(value, metric), f"{here.float().mean():.1%}", right])
    name = metric.replace("_", " ")
    return text_table(["exit", f"{name}, all rows", "rows answered here", f"{name}, these rows"], lines)


def summary_table(report: dict[str, Any], metric: str = "accuracy") -> str:
    """Full depth beside early exits."""
    early = report["early_exit"]
    return text_table(
        ["test split, batch size 1", "full depth", "early exits", "saved"],
        [
            [metric, show(report["full_depth_accuracy"], metric), show(early["accuracy"], metric), ""],
            [
                "blocks per row",
                str(report["num_blocks"]),
                f"{early['mean_exit']:.2f}",
                f"{early['layer_speedup']:.1%}",
            ],
            [
                "time, all rows",
                "1.00",
                f"{1 - early['wall_clock_speedup']:.2f}",
                f"{early['wall_clock_speedup']:.1%}",
            ],
            ["time, p50 (ms)", f"{early['full_depth_p50_ms']:.2f}", f"{early['p50_ms']:.2f}", ""],
            ["time, p95 (ms)", f"{early['full_depth_p95_ms']:.2f}", f"{early['p95_ms']:.2f}", ""],
        ],
    )


def peak_memory_mb() -> float | None:
    """The most memory that this process has held; None where the system does not say (Windows)."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
