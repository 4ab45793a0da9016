"""`run_demo`: the whole way of an adapter, from labelled texts to an answer before the last block."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from transformers import AutoTokenizer, set_seed

from badge_peft._version import package_version
from badge_peft.data import load_text_dataset, split_texts, tokenise
from badge_peft.demo.packaged import DATA_PACKAGE, MODEL_PACKAGE, packaged_model, packaged_reviews
from badge_peft.demo.report import early_exit_entry, exit_table, peak_memory_mb, summary_table
from badge_peft.demo.settings import DemoSettings
from badge_peft.demo.train import make_model, train
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation import ExitLogits, calibrate, collect_exit_logits, evaluate_policy, exit_scores, sweep
from badge_peft.evaluation.latency import measure_latency
from badge_peft.evaluation.plots import plot_tradeoff
from badge_peft.hub import load_pretrained
from badge_peft.utils.logs import quiet
from badge_peft.workflows.adapter import LOGITS

POLICIES: list[dict[str, Any]] = [
    {"policy": "divergence", "patience": 1},
    {"policy": "divergence", "patience": 2},
    {"policy": "patience"},
]


def run_demo(settings: DemoSettings | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains an adapter, saves it, loads it onto a fresh base model, and measures what early exits save.

    Whatever is chosen (threshold and patience) is chosen on the validation split; every reported number but those
    under `validation` is of the test split.

    Args:
        settings: None takes the defaults: 6-block MiniLM on film reviews.
        say: Takes a line of text, to tell how far the demo is.

    Returns:
        What `report.json` holds.

    Raises:
        ModuleNotFoundError: a package with the demo's model or data, or matplotlib, is not installed.
        ValueError: the data set cannot be read, or the model is of no architecture that badge_peft knows.
        OSError: there is no such file, model or data set.
    """
    settings = settings or DemoSettings()
    start = time.perf_counter()
    out = Path(settings.output_dir)
    set_seed(settings.seed)

    splits = split_texts(_read(settings), settings.seed, settings.max_train, settings.max_eval)
    label_names = splits["train"].features["label"].names
    say(
        f"1. data: {', '.join(f'{len(rows)} {split}' for split, rows in splits.items())} rows, "
        f"{len(label_names)} labels ({', '.join(label_names[:5])}{', ...' if len(label_names) > 5 else ''})"
    )

    path = settings.model or str(packaged_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = {split: tokenise(data, tokenizer, settings.max_length) for split, data in splits.items()}
    model = make_model(path, label_names)
    blocks = model.base_model.num_blocks
    trainable, total = model.get_nb_trainable_parameters()
    say(f"2. model: {blocks} blocks, frozen; bypasses and exits have {trainable:,} of {total:,} parameters")

    say(f"3. training, {settings.epochs} epochs")
    train(model, rows["train"], tokenizer, settings)

    validation = collect_exit_logits(model, rows["validation"], progress=True)
    chosen = _choose(validation, settings.max_score_drop)
    model.set_early_exit_config(chosen)
    say(f"4. exit rule, chosen on the validation split: {_describe(chosen.to_dict())}")

    adapter = out / "adapter"
    model.save_pretrained(str(adapter))
    size = sum(file.stat().st_size for file in adapter.iterdir() if file.is_file())
    validation.save(adapter / LOGITS)  # for `badge-peft sweep`, `calibrate` and `app`, as `badge-peft train` does
    with quiet():
        loaded = load_pretrained(str(adapter))
    same = _same_answers(model, loaded, rows["validation"])
    del model
    say(f"5. saved to {adapter} ({size / 1e3:,.0f} kB) and loaded onto a fresh base: answers {_same_word(same)}")

    test = collect_exit_logits(loaded, rows["test"], progress=True)
    scores = exit_scores(test)
    latency = measure_latency(loaded, rows["test"], progress=True)
    assert test.labels is not None
    accuracy = float(np.mean(np.array(latency.predictions) == test.labels.numpy()))
    plot_tradeoff(
        sweep(test, POLICIES),
        out / "tradeoff.png",
        title=f"{Path(path).name if settings.model else MODEL_PACKAGE}, test split",
        chosen=evaluate_policy(test, chosen),
    )
    report = {
        "model": settings.model or MODEL_PACKAGE,
        "dataset": settings.dataset or f"{DATA_PACKAGE}: film reviews",
        "num_train": len(rows["train"]),
        "num_validation": len(rows["validation"]),
        "num_test": len(rows["test"]),
        "labels": label_names,
        "num_blocks": blocks,
        "trainable_parameters": trainable,
        "adapter_bytes": size,
        "reloaded_bit_for_bit": same,
        "exit_layers": scores.exit_layers,
        "per_exit_accuracy": scores.per_exit,
        "s_avg": scores.avg,
        "s_best": scores.best,
        "full_depth_accuracy": scores.per_exit[-1],
        "early_exit": early_exit_entry(chosen, latency, accuracy),
        "max_score_drop": settings.max_score_drop,
        "epochs": settings.epochs,
        "seed": settings.seed,
        "threads": latency.threads,
        "device": latency.device,
        "versions": {"badge_peft": package_version(), "torch": torch.__version__},
        "peak_memory_mb": peak_memory_mb(),
        "seconds": time.perf_counter() - start,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(f"\n{exit_table(scores, test, latency)}\n\n{summary_table(report)}\n")
    say(f"wrote {adapter}, {out / 'tradeoff.png'} and {out / 'report.json'} in {report['seconds']:.0f} s")
    return report


def _read(settings: DemoSettings) -> DatasetDict:
    if settings.dataset is None:
        return packaged_reviews()
    return load_text_dataset(
        settings.dataset, settings.text_column, settings.label_column, name=settings.dataset_config
    )


def _choose(validation: ExitLogits, max_score_drop: float) -> EarlyExitConfig:
    """tau and t within the loss allowed. Where that is wide enough for one depth for all rows to be the fastest, the
    fastest setting that loses nothing is asked for instead; if a fixed depth wins there, too, it is what we take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for drop in (max_score_drop, 0.0):
            chosen = calibrate(validation, "divergence", max_score_drop=drop)
            if chosen.policy != "fixed_depth":
                break
    return chosen


def _describe(config: dict[str, Any]) -> str:
    measured = config["calibration"]
    what = [f"{name}={config[name]:.4g}" for name in ("threshold", "patience", "depth") if config[name] is not None]
    return (
        f"{config['policy']}, {', '.join(what)} (accuracy {measured['score']:.1%}, full depth "
        f"{measured['full_depth_score']:.1%}; {measured['layer_speedup']:.1%} of the blocks saved)"
    )


def _same_answers(before: Any, after: Any, rows: Any) -> bool:
    """Whether the logits of all exits are the same to the last bit, on a sample."""
    sample = rows.select(range(min(len(rows), 64)))
    return torch.equal(collect_exit_logits(before, sample).logits, collect_exit_logits(after, sample).logits)


def _same_word(same: bool) -> str:
    return "are the same bit for bit" if same else "DIFFER from those before"
