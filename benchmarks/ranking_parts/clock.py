"""The time of a query, from texts to an ordered list: stock libraries, and early exits in each of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from badge_peft import load_pretrained
from badge_peft.evaluation.collate import pad_features
from badge_peft.evaluation.timing import Runner, take_turns
from badge_peft.export import OnnxReranker, export_full_depth, export_onnx
from badge_peft.export.runtime import open_session
from badge_peft.ranking import EarlyExitReranker
from ranking_parts.pools import Pool

TOP_K = 10
BATCH = 32
PAUSE = 0.005  # seconds before each call: threads of the library before it may spin for a while

#: The numbers of the best `TOP_K`, and the share of blocks saved where it is known.
Ranked = tuple[list[int], float | None]
Rank = Callable[[str, list[str]], Ranked]


def export(model: Path, adapter: Path, work: Path, max_length: int) -> None:
    """The ONNX files that `runners` opens; those that are there stay."""
    stock = AutoModelForSequenceClassification.from_pretrained(model).eval()
    for int8 in (False, True):
        plain, early = _files(work, int8)
        if not plain.exists():
            export_full_depth(stock, plain, int8=int8)
        if not early.exists():
            tokenizer = AutoTokenizer.from_pretrained(model)
            tokenizer.model_max_length = max_length
            export_onnx(load_pretrained(str(adapter)), early, tokenizer=tokenizer, int8=int8)


def _files(work: Path, int8: bool) -> tuple[Path, Path]:
    suffix = "-int8" if int8 else ""
    return work / f"full-depth{suffix}.onnx", work / f"early-exits{suffix}"


def runners(model: Path, adapter: Path, work: Path, max_length: int, threads: int) -> dict[str, Rank]:
    """By name: ranks the documents of a query."""
    from sentence_transformers import CrossEncoder

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = max_length
    stock = AutoModelForSequenceClassification.from_pretrained(model).eval()
    theirs = CrossEncoder(str(model), max_length=max_length, device="cpu")
    ours = EarlyExitReranker.from_pretrained(adapter, max_length=max_length)

    def in_batches(logits: Callable[[dict[str, torch.Tensor]], np.ndarray]) -> Rank:
        return lambda query, documents: _full_depth(logits, stock, tokenizer, query, documents)

    def of(session: Any) -> Rank:
        names = [entry.name for entry in session.get_inputs()]
        return in_batches(lambda batch: session.run(["logits"], {name: batch[name].numpy() for name in names})[0])

    def early(query: str, documents: list[str]) -> Ranked:
        answers, report = ours.rank(query, documents, TOP_K, return_report=True)
        return _numbers(answers, report.blocks_saved)

    found: dict[str, Rank] = {
        "PyTorch, stock": in_batches(lambda batch: stock(**batch).logits.numpy()),
        "sentence-transformers `rank`": lambda q, documents: _numbers(theirs.rank(q, documents, top_k=TOP_K)),
        "PyTorch, early exits": early,
    }
    for int8 in (False, True):
        plain, exits = _files(work, int8)
        graph = OnnxReranker.from_pretrained(exits, threads=threads)
        name = f"ONNX Runtime{' int8' if int8 else ''}"
        found[f"{name}, stock"] = of(open_session(plain, threads))
        found[f"{name}, early exits"] = lambda q, d, graph=graph: _numbers(graph.rank(q, d, TOP_K))  # type: ignore[misc]
    return found


def _numbers(answers: list[dict[str, Any]], saved: float | None = None) -> Ranked:
    return [int(answer["corpus_id"]) for answer in answers], saved


def _full_depth(logits: Any, model: Any, tokenizer: Any, query: str, documents: list[str]) -> Ranked:
    """As a cross-encoder is usually run: batches of similar length."""
    which = "token_type_ids" in inspect.signature(model.forward).parameters  # not every tokenizer gives them by itself
    columns = tokenizer(
        [query] * len(documents),
        documents,
        truncation=True,
        return_token_type_ids=which,
    )
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    scores = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        scores[part] = logits(pad_features([rows[i] for i in part], model))[:, 0]
    return np.argsort(-scores, kind="stable")[:TOP_K].tolist(), None


@torch.inference_mode()
def clock(ways: dict[str, Rank], pool: Pool, counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Times `rounds` queries with their first candidates, as many as each of `counts` says; the ways take turns. For
    each count and way: the `seconds` of each query, `kept`, whether its top k is that of the first way, and the shares
    of blocks `saved`."""
    queries = [*pool.queries().values()][: rounds + 1]
    found: list[dict[str, Any]] = []
    for count in counts:
        calls = [(rows[0]["query"], [row["document"] for row in rows[:count]]) for rows in queries]
        turns = [Runner(lambda call, rank=rank: rank(*call)) for rank in ways.values()]  # type: ignore[misc]
        timed = take_turns(turns, calls[1:], warmup=calls[:1], pause=PAUSE)
        for name, each in zip(ways, timed, strict=True):
            pairs = zip(each.outputs, timed[0].outputs, strict=True)
            kept = [set(best) == set(first) for (best, _), (first, _) in pairs]
            saved = [share for _, share in each.outputs if share is not None]
            row = {
                "candidates": count,
                "way": name,
                "seconds": each.seconds,
                "kept": kept,
                "saved": saved,
            }
            found.append(row)
            print(f"{count} candidates, {name}: {1e3 * np.median(each.seconds):.1f} ms", flush=True)
    return found
