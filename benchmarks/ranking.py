"""A reranker with exits on real queries: what is kept of the top k, and what is saved, in blocks and on the clock.

    python benchmarks/ranking.py quality --encoder all-MiniLM-L6-v2 --data wikiqa --shift cranfield --work runs/minilm
    python benchmarks/ranking.py clock --work runs/minilm
    python benchmarks/ranking.py page --work runs/minilm --docs docs/results/ranking.md

No cross-encoder is downloaded: the encoder (a folder) is fine-tuned as one on the labeled pairs of DATA/train.jsonl
first, with `query_id`, `query`, `document` and `label` on each line, and then frozen. The candidates of a query are
the best of BM25 over all documents of its split. Exits are distilled on queries of `train` (their labels are not
read), margins are chosen on those of `validation`, and all figures are of `test`. With `--shift`, the same exits rank
another collection, calibrated on half of its queries. What is made stays in `--work`; a second run goes on from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import Results, describe, read_lines, write_page
from ranking_parts import clock, models, pools, quality
from ranking_parts.page import page
from ranking_parts.scores import PoolScores

from badge_peft import load_pretrained

RESULTS = "ranking.json"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "page":
        write_page(page([Results(folder / RESULTS) for folder in options.work], options.note), options.docs)
        return 0
    torch.set_num_threads(options.threads)
    (measure_quality if options.command == "quality" else measure_times)(options)
    return 0


def measure_quality(options: argparse.Namespace) -> None:
    """Models, exits and scores, as far as they are not there, and what they are worth."""
    work, seeds = options.work[0], options.seeds
    work.mkdir(parents=True, exist_ok=True)
    model = work / "cross-encoder"
    if not (model / "config.json").exists():
        models.fine_tune(options.encoder, read_lines(options.data / "train.jsonl"), model, options)
    sizes = {"train": options.train_queries, "validation": options.queries, "test": options.queries}
    made = {
        name: pools.pool_of_pairs(
            options.data / f"{name}.jsonl",
            work / f"{name}.jsonl",
            sizes[name],
            options.pool,
            options.train_candidates if name == "train" else None,
        )
        for name in sizes
    }
    if options.shift is not None:
        out = work / f"{options.shift.name}.jsonl"
        made["shift"] = pools.pool_of_collection(options.shift, out, options.shift_queries, options.pool)
    adapters = {seed: work / f"exits-{seed}" for seed in seeds}
    missing = {seed: out for seed, out in adapters.items() if not (out / "adapter_config.json").exists()}
    if missing:
        models.train_exits(model, made["train"], missing, options)
    scores = {
        name: PoolScores.of(pool, model, [*adapters.values()], work / f"{pool.name}.npz", options.max_length)
        for name, pool in made.items()
        if name != "train"
    }
    chosen = quality.Settings.of(scores["validation"], seeds)
    for seed, adapter in adapters.items():
        exits = load_pretrained(str(adapter))
        exits.set_early_exit_config(chosen.margins[seed, clock.TOP_K])
        exits.save_pretrained(adapter)
    found = {"test": quality.compare(chosen, scores["test"], seeds)}
    if "shift" in scores:
        queries = [*made["shift"].queries()]
        halves = [scores["shift"].select(part) for part in (queries[::2], queries[1::2])]
        found["shift"] = quality.compare(quality.Settings.of(halves[0], seeds), halves[1], seeds)
        found["uncalibrated shift"] = quality.compare(chosen, halves[1], seeds)
    stored = {
        "name": options.name or Path(options.encoder).name,
        "blocks": scores["test"].head.shape[1],
        "settings": {
            name: value if isinstance(value, (int, list, dict)) else str(value)
            for name, value in vars(options).items()
            if name not in ("work", "encoder", "data", "command")
        },
        "train_rows": len(made["train"]),
        "fine_tuning": models.fine_tuning(model),
        "shift": None if options.shift is None else options.shift.name,
        "made": describe(options.threads),
        "found": found,
    }
    Results(work / RESULTS).keep("quality", stored)


def measure_times(options: argparse.Namespace) -> None:
    """The time of a query with the adapter of the first seed."""
    work = options.work[0]
    results = Results(work / RESULTS)
    settings = results["quality"]["settings"]
    model = work / "cross-encoder"
    adapter = work / f"exits-{settings['seeds'][0]}"
    clock.export(model, adapter, work, settings["max_length"])
    if options.rounds:
        ways = clock.runners(model, adapter, work, settings["max_length"], options.threads)
        found = clock.clock(ways, pools.Pool.load(work / "test.jsonl"), options.candidates, options.rounds)
        results.keep("clock", {"made": describe(options.threads), "found": found})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    qualities = commands.add_parser("quality", help="train, calibrate, and measure what is kept and saved")
    qualities.add_argument(
        "--encoder",
        required=True,
        help="folder of a sentence encoder with BERT's architecture",
    )
    qualities.add_argument("--name", help="of the encoder, on the page")
    qualities.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with train, validation and test.jsonl",
    )
    qualities.add_argument("--shift", type=Path, help="folder of a test collection in Cranfield's form")
    qualities.add_argument("--queries", type=int, default=1000, help="of validation and of test, at most")
    qualities.add_argument("--train-queries", type=int, default=200, help="that exits learn from")
    qualities.add_argument("--train-candidates", type=int, default=40, help="of these, drawn from the pool")
    qualities.add_argument("--shift-queries", type=int, default=100)
    qualities.add_argument("--pool", type=int, default=100, help="candidates of each query")
    qualities.add_argument(
        "--max-train",
        type=int,
        default=10**9,
        help="pairs that the cross-encoder learns from",
    )
    qualities.add_argument(
        "--frozen-words",
        action="store_true",
        help="the cross-encoder's word embeddings stay",
    )
    qualities.add_argument(
        "--bf16",
        action="store_true",
        help="the cross-encoder learns with products in bfloat16",
    )
    qualities.add_argument(
        "--listwise",
        type=int,
        default=0,
        help="queries of which it learns the order afterwards",
    )
    qualities.add_argument(
        "--negatives",
        type=int,
        default=4,
        help="pairs that are not relevant, for each that is",
    )
    qualities.add_argument("--epochs", type=int, default=2, help="of the cross-encoder")
    qualities.add_argument("--exit-epochs", type=int, default=5, help="of the exits")
    qualities.add_argument("--exit-batch", type=int, default=40, help="candidates of a step")
    qualities.add_argument("--max-length", type=int, default=128, help="tokens of a pair")
    qualities.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the exits")
    qualities.add_argument(
        "--exits",
        type=json.loads,
        default={"exit_pooling": "mean"},
        help="fields of BadgeConfig, as JSON; exits are at 0 to M where it does not say",
    )
    times = commands.add_parser("clock", help="time queries with what `quality` has made")
    times.add_argument("--candidates", type=int, nargs="+", default=[10, 30, 100], help="of a timed query")
    times.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="queries to time; 0 writes the ONNX files alone",
    )
    pages = commands.add_parser("page", help="write the page of what was measured")
    pages.add_argument("--note", nargs="*", default=[], help="said behind the targets")
    pages.add_argument("--docs", type=Path, help="where to")
    for command in (qualities, times, pages):
        command.add_argument(
            "--work",
            type=Path,
            nargs="+",
            required=True,
            help="folder for all that is made",
        )
        command.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
