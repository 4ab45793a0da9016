"""A cross-encoder made of a sentence encoder, and exits on it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import fit
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from badge_peft import BadgeConfig, cache_states
from badge_peft.integrations.bm25 import retrieve
from badge_peft.training import QueryCollator, RankingDistillation, query_batches
from badge_peft.training.sampling import sampling
from ranking_parts.pools import Pool, Row

BATCH = 32
PEAK = 5e-5  # learning rate of the cross-encoder
FINE_TUNING = "fine-tuning.json"
POOL, LIST = 100, 8  # candidates of BM25, and documents of a list, one of which is relevant


def fine_tune(encoder: str, rows: list[Row], out: Path, options: Any) -> None:
    """A cross-encoder with one output, trained to tell relevant pairs from others of the same query and from documents
    at random, and then to put them first (`learn_order`). Beside it, in `fine-tuning.json`, lies how many pairs it has
    seen. The options are those of the command `quality`."""
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
    steps = options.epochs * -(-len(chosen) // BATCH)
    if options.frozen_words:
        model.get_input_embeddings().requires_grad_(False)
    step = _optimizer(model, lambda i: min((i + 1) / (0.1 * steps), (steps - i) / steps))
    model.train()
    start = time.perf_counter()
    for epoch in range(options.epochs):
        for part in batches_of(chosen, draw):
            scores = _scores(model, tokenizer, [(r["query"], r["document"]) for r in part], options)
            loss = F.binary_cross_entropy_with_logits(scores, torch.tensor([float(r["label"] > 0) for r in part]))
            step(loss)
        seconds = time.perf_counter() - start
        print(f"cross-encoder: epoch {epoch + 1}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    if options.listwise:
        learn_order(model, tokenizer, rows, options)
    tokenizer.save_pretrained(out)
    (out / FINE_TUNING).write_text(json.dumps({"pairs": len(chosen), "seconds": seconds}) + "\n", encoding="utf-8")
    model.save_pretrained(out)


def learn_order(model: Any, tokenizer: Any, rows: list[Row], options: Any) -> None:
    """One pass over queries with an answer: a relevant document before seven others of those that BM25 finds, by the
    cross-entropy of a softmax over the eight scores. Source: Gao et al., "Rethink Training of BERT Rerankers in
    Multi-Stage Retrieval Pipeline", ECIR 2021. What of the cross-encoder is trained stays so."""
    draw = random.Random(0)
    corpus = list(dict.fromkeys(row["document"] for row in rows))
    good: dict[str, list[str]] = {}
    for row in rows:
        if row["label"]:
            good.setdefault(row["query"], []).append(row["document"])
    queries = draw.sample(sorted(good), min(len(good), options.listwise))
    lists = []
    for query, places in zip(queries, retrieve(queries, corpus, POOL), strict=True):
        others = [corpus[place] for place in places if corpus[place] not in good[query]]
        lists.append([(query, document) for document in (draw.choice(good[query]), *draw.sample(others, LIST - 1))])
    lists.sort(key=lambda pairs: sum(len(document) for _, document in pairs))
    batches = [lists[first : first + BATCH // LIST] for first in range(0, len(lists), BATCH // LIST)]
    draw.shuffle(batches)
    step = _optimizer(model, lambda i: 1 - i / len(batches))
    start = time.perf_counter()
    for batch in batches:
        scores = _scores(model, tokenizer, [pair for several in batch for pair in several], options)
        loss = F.cross_entropy(scores.view(-1, LIST), torch.zeros(len(batch), dtype=torch.long))
        step(loss)
    print(f"cross-encoder: order, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def _optimizer(model: Any, rate: Callable[[int], float]) -> Callable[[Tensor], None]:
    """A step of AdamW down a loss; `rate` of the step's number is times `PEAK`."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=PEAK, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()

    return step


def _scores(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], options: Any) -> Tensor:
    """[B] float32."""
    texts = map(list, zip(*pairs, strict=True))
    size = {"max_length": options.max_length, "truncation": True}
    batch = tokenizer(*texts, padding=True, return_tensors="pt", **size)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
        return model(**batch).logits[:, 0].float()


def fine_tuning(folder: Path) -> dict[str, float] | None:
    """The pairs that a cross-encoder has learned from, and the seconds that took; None where it was made elsewhere."""
    file = folder / FINE_TUNING
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def batches_of(rows: list[Row], draw: random.Random) -> list[list[Row]]:
    """The rows in batches at random, each of documents of similar length, as padding is most of the work otherwise."""
    order = sorted(draw.sample(rows, len(rows)), key=lambda row: len(row["query"]) + len(row["document"]))
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    draw.shuffle(batches)
    return batches


def encode(pool: Pool, tokenizer: Any, max_length: int, **options: Any) -> list[dict[str, Any]]:
    """The rows of tokens of a pool."""
    texts = [row["query"] for row in pool.rows], [row["document"] for row in pool.rows]
    columns = tokenizer(*texts, truncation=True, max_length=max_length, **options)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def train_exits(folder: Path, pool: Pool, outs: dict[int, Path], options: Any) -> None:
    """Exits that follow full depth's own scores of a pool's candidates, whose labels are not read: an adapter for each
    seed, all on the same states, computed once."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = encode(pool, tokenizer, options.max_length)
    ids = pool.groups
    codes = {query: number for number, query in enumerate(dict.fromkeys(ids))}
    batches = query_batches(ids, options.exit_batch)
    items = [[{**rows[i], "groups": codes[ids[i]]} for i in batch] for batch in batches]
    states = None
    for seed, out in outs.items():
        set_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(folder)
        fields = {"exit_layers": [*range(base.config.num_hidden_layers + 1)], **options.exits}
        model = get_peft_model(base, BadgeConfig(train_head=False, **fields)).eval()
        if states is None:
            states = cache_states(model, [rows[i] for batch in batches for i in batch], progress=True)
        fit(
            model,
            items,
            QueryCollator(DataCollatorWithPadding(tokenizer)),
            RankingDistillation(),
            states,
            num_train_epochs=options.exit_epochs,
            per_device_train_batch_size=1,  # an item is a batch
            remove_unused_columns=False,
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
            **sampling(by_length=False),
        )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        print(f"exits, seed {seed}", flush=True)
    if states is not None:
        states.close()
