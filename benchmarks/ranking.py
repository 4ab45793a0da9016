"""A reranker with exits on real queries: what is kept of the top k, and what is saved, in blocks and on the clock.

    python benchmarks/ranking.py --encoder all-MiniLM-L6-v2 --data wikiqa --docs docs/results/ranking.md

No cross-encoder is downloaded: the encoder (a folder) is fine-tuned as one on the labeled pairs of DATA/train.jsonl
first, with `query_id`, `query`, `document` and `label` on each line, and then frozen. The candidates of a query are
the best of BM25 over all documents of its split. Exits are distilled on queries of `train`, margins are chosen on
those of `validation`, and all figures are of `test`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import torch.nn.functional as F
from latency_parts.environment import describe
from latency_parts.tables import markdown
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from badge_peft import EarlyExitConfig, ExitLogits, collect_exit_logits
from badge_peft.evaluation.collate import pad_features
from badge_peft.integrations.bm25 import retrieve
from badge_peft.ranking import EarlyExitReranker, calibrate_ranking, ranking_scores
from badge_peft.ranking.calibration import evaluate_ranking, final_ranks
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.rankings import with_queries
from badge_peft.workflows.settings import ExitOptions, Goal, TrainColumns, TrainingOptions, TrainSettings
from badge_peft.workflows.train_ranking import train_ranker

SPLITS = ("train", "validation", "test")
KS = (1, 3, 10)
KEEP = 0.95


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    model = work / "cross-encoder"
    if not (model / "config.json").exists():
        fine_tune(options.encoder, read(Path(options.data, "train.jsonl")), model, options)
    pools = {split: write_pool(Path(options.data, f"{split}.jsonl"), work, options) for split in SPLITS}
    quality, times = [], []
    for seed in options.seeds:
        out = work / f"exits-{seed}"
        if not (out / "adapter_config.json").exists():
            train_exits(model, pools, out, options, seed)
        quality += [[str(seed), *row] for row in measure(out, pools["test"], options)]
        print(*quality[-len(KS) :], sep="\n", flush=True)
    if options.rounds:
        times = clock(work / f"exits-{options.seeds[0]}", model, pools["test"], options)
    text = page(quality, times, options)
    if options.docs:
        Path(options.docs).write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fine_tune(encoder: str, rows: list[dict[str, Any]], out: Path, options: argparse.Namespace) -> None:
    """A cross-encoder with one output, trained to tell relevant pairs from others, `negatives` of them for each."""
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1)
    good = [row for row in rows if row["label"]]
    answered = {row["query_id"] for row in good}
    bad = [row for row in rows if not row["label"] and row["query_id"] in answered]
    others = [{**row, "document": draw.choice(rows)["document"], "label": 0} for row in good]
    chosen = [*good, *draw.sample(bad, min(len(bad), options.negatives * len(good))), *others]
    draw.shuffle(chosen)
    chosen = chosen[: options.max_train]
    steps = options.epochs * -(-len(chosen) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (0.1 * steps), (steps - i) / steps)
    )
    model.train()
    start = time.perf_counter()
    for epoch in range(options.epochs):
        draw.shuffle(chosen)
        for first in range(0, len(chosen), 32):
            part = chosen[first : first + 32]
            pairs = [r["query"] for r in part], [r["document"] for r in part]
            batch = tokenizer(
                *pairs, padding=True, truncation=True, max_length=options.max_length, return_tensors="pt"
            )
            loss = F.binary_cross_entropy_with_logits(
                model(**batch).logits[:, 0], torch.tensor([float(r["label"]) for r in part])
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(
            f"cross-encoder: epoch {epoch + 1}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_pool(path: Path, work: Path, options: argparse.Namespace) -> Path:
    """The candidates of some queries of a split, those with a relevant document first: a jsonl file of pairs."""
    out = work / f"{path.stem}.jsonl"
    if out.exists():
        return out
    rows = read(path)
    corpus = list(dict.fromkeys(row["document"] for row in rows))
    relevant: dict[str, set[str]] = {}
    for row in rows:
        if row["label"]:
            relevant.setdefault(row["query"], set()).add(row["document"])
    queries = random.Random(0).sample(sorted(relevant), min(len(relevant), options.queries))
    with out.open("w", encoding="utf-8") as file:
        for query, places in zip(queries, retrieve(queries, corpus, options.pool), strict=True):
            for place in places:
                document = corpus[place]
                label = int(document in relevant[query])
                file.write(json.dumps({"query": query, "document": document, "label": label}) + "\n")
    return out


def train_exits(model: Path, pools: dict[str, Path], out: Path, options: argparse.Namespace, seed: int) -> None:
    """An adapter of `badge-peft train --task ranking`."""
    settings = TrainSettings(
        output_dir=out,
        task="ranking",
        max_length=options.max_length,
        latency=0,
        columns=TrainColumns(eval_data=str(pools["validation"])),
        exits=ExitOptions(exit_layers="0-", exit_pooling="mean"),
        training=TrainingOptions(epochs=options.exit_epochs, seed=seed),
        goal=Goal(top_k=10, keep=KEEP),
    )
    train_ranker(str(model), str(pools["train"]), settings)


def exit_scores_of(adapter: Path, pool: Path) -> ExitLogits:
    """The scores of all exits on a pool, kept beside the adapter."""
    stored = adapter / f"{pool.stem}.safetensors"
    if not stored.exists():
        opened = open_adapter(adapter)
        examples = opened.read(pool)
        with_queries(collect_exit_logits(opened.model, opened.encode(examples), progress=True), examples).save(stored)
    return ExitLogits.load(stored)


def measure(adapter: Path, pool: Path, options: argparse.Namespace) -> list[list[str]]:
    """One row for each k: what margins of the validation queries keep and save on test queries."""
    validation = ExitLogits.load(adapter / "exit_logits.safetensors")
    test = exit_scores_of(adapter, pool)
    assert test.labels is not None and test.groups is not None
    full = ranking_scores(test.logits[:, -1, 0], test.labels, test.groups)
    rows = []
    for k in KS:
        config = calibrate_ranking(validation, top_k=k, keep=KEEP)
        point = evaluate_ranking(test, config)
        early = ranking_scores(final_ranks(test, point.exit_layer), test.labels, test.groups)
        fixed = round(point.mean_exit)
        same_cost = evaluate_ranking(test, EarlyExitConfig(policy="fixed_depth", depth=fixed, top_k=k))
        held = (config.calibration or {})["held_out"]
        rows.append(
            [
                str(k),
                f"{held:.1%}",
                f"{point.score:.1%}",
                f"{point.layer_speedup:.1%}",
                f"{early.ndcg:.3f} / {full.ndcg:.3f}",
                f"{early.mrr:.3f} / {full.mrr:.3f}",
                f"{same_cost.score:.1%} (block {fixed})",
            ]
        )
    return rows


def clock(adapter: Path, model: Path, pool: Path, options: argparse.Namespace) -> list[list[str]]:
    """One row for each number of candidates: the median time of a query, in turn, tokens in and scores out."""
    reranker = EarlyExitReranker.from_pretrained(adapter, max_length=options.max_length)
    stock = AutoModelForSequenceClassification.from_pretrained(model).eval()
    pairs: dict[str, list[str]] = {}
    for row in read(pool):
        pairs.setdefault(row["query"], []).append(row["document"])
    queries = [*pairs.items()][: options.rounds]
    rows = []
    for count in options.candidates:
        seconds: dict[str, list[float]] = {"stock": [], "early": []}
        saved = []
        for query, documents in queries:
            start = time.perf_counter()
            full_depth(stock, reranker.tokenizer, query, documents[:count], options.max_length)
            middle = time.perf_counter()
            _, report = reranker.rank(query, documents[:count], top_k=10, return_report=True)
            seconds["early"].append(time.perf_counter() - middle)
            seconds["stock"].append(middle - start)
            saved.append(report.blocks_saved)
        before, after = (1e3 * float(np.median(seconds[name])) for name in ("stock", "early"))
        rows.append(
            [
                str(count),
                f"{before:.1f}",
                f"{after:.1f}",
                f"{before / after:.2f}",
                f"{1 - after / before:.1%}",
                f"{np.mean(saved):.1%}",
            ]
        )
        print(*rows[-1], flush=True)
    return rows


@torch.inference_mode()
def full_depth(model: Any, tokenizer: Any, query: str, documents: list[str], max_length: int) -> np.ndarray:
    """[N]: as a cross-encoder is usually run, in batches of 32 of similar length."""
    columns = tokenizer([query] * len(documents), documents, truncation=True, max_length=max_length)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    scores = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(order), 32):
        part = order[start : start + 32]
        scores[part] = model(**pad_features([rows[i] for i in part], model)).logits[:, 0].numpy()
    return scores


def page(quality: list[list[str]], times: list[list[str]], options: argparse.Namespace) -> str:
    """The page of results."""
    head = [
        "seed",
        "k",
        "held out",
        "top k kept",
        "blocks saved",
        "nDCG@10 / full",
        "MRR@10 / full",
        "kept by one depth",
    ]
    parts = [
        "# Ranking",
        f"`python benchmarks/ranking.py`, encoder {Path(options.encoder).name}, {options.queries} queries at most of "
        f"each split, the top {options.pool} of BM25; keep = {KEEP}. {describe(options.threads, 'cpu')}",
        markdown(head, quality),
    ]
    if times:
        columns = ["candidates", "stock ms", "early ms", "times faster", "time saved", "blocks saved"]
        parts.append(markdown(columns, times))
    return "\n\n".join(parts) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder of a sentence encoder")
    parser.add_argument("--data", required=True, help="folder with train.jsonl, validation.jsonl and test.jsonl")
    parser.add_argument("--work", default="runs/ranking", help="folder for models and stored scores")
    parser.add_argument("--docs", help="write the page of results here")
    parser.add_argument("--queries", type=int, default=1000, help="of each split, at most")
    parser.add_argument("--pool", type=int, default=100, help="candidates of each query")
    parser.add_argument("--max-train", type=int, default=10**9, help="pairs that the cross-encoder learns from")
    parser.add_argument("--negatives", type=int, default=4, help="pairs that are not relevant, for each that is")
    parser.add_argument("--epochs", type=int, default=2, help="of the cross-encoder")
    parser.add_argument("--exit-epochs", type=int, default=3, help="of the exits")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a pair")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the exits")
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 30, 100], help="of a timed query")
    parser.add_argument("--rounds", type=int, default=30, help="queries to time; 0 for none")
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
