"""Makes a cross-encoder that is in service faster: exits, margins, and a ranking that leaves most candidates early.

    python examples/rerank.py --model my-cross-encoder --pairs pairs.jsonl --output-dir my-reranker

`my-cross-encoder` is a model with one output, a folder or a Hub name. `pairs.jsonl` has the candidates of some hundred
queries as they come from the first stage: `query` and `document` on each line. Labels are not needed: the exits learn
the scores that the model gives. `badge-peft train --task ranking` does the same with more options; this is how it is
done in Python.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

import badge_peft
from badge_peft.ranking import EarlyExitReranker, calibrate_ranking
from badge_peft.training import QueryCollator, RankingDistillation, query_batches


@dataclass
class Arguments:
    """The cross-encoder, candidates of its queries, and what has to stay."""

    model: str = field(metadata={"help": "The cross-encoder: a folder or a Hub name."})
    pairs: str = field(metadata={"help": "jsonl file with query and document on each line."})
    output_dir: str = field(metadata={"help": "Folder for the adapter."})
    top_k: int = field(default=10, metadata={"help": "How many documents of a query count."})
    keep: float = field(default=0.95, metadata={"help": "Share of the queries whose top k must be full depth's."})
    exit_pooling: str = field(default="mean", metadata={"help": "What an exit reads: auto, cls, mean or last."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over the pairs."})
    batch_size: int = field(default=32, metadata={"help": "Candidates at once."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a pair, as in service."})
    seed: int = field(default=0, metadata={"help": "Of the new weights and the order of the queries."})


def main() -> None:
    """Trains exits, finds the margins on other queries, and ranks one query with exits and without."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    set_seed(args.seed)
    lines = [json.loads(line) for line in Path(args.pairs).read_text(encoding="utf-8").splitlines()]
    candidates: dict[str, list[str]] = {}
    for line in lines:
        candidates.setdefault(line["query"], []).append(line["document"])
    queries = list(candidates)
    random.Random(args.seed).shuffle(queries)
    held_out = queries[: max(2, len(queries) // 4)]

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    cross_encoder = AutoModelForSequenceClassification.from_pretrained(args.model)
    config = badge_peft.BadgeConfig(train_head=False, exit_pooling=args.exit_pooling)
    model = get_peft_model(cross_encoder, config)
    model.print_trainable_parameters()

    def encode(chosen: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
        """Rows of tokens, and the number of each row's query."""
        pairs = [(query, document) for query in chosen for document in candidates[query]]
        columns = tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=args.max_length)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return rows, [number for number, query in enumerate(chosen) for _ in candidates[query]]

    rows, ids = encode(queries[len(held_out) :])
    batches = [[{**rows[i], "groups": ids[i]} for i in batch] for batch in query_batches(ids, args.batch_size)]
    trainer = badge_peft.MultiExitTrainer(
        model=model,
        args=badge_peft.MultiExitTrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=1,  # an item is a batch of candidates
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        objective=RankingDistillation(),
        train_dataset=batches,
        data_collator=QueryCollator(DataCollatorWithPadding(tokenizer)),
    )
    trainer.train()

    rows, ids = encode(held_out)
    scores = badge_peft.collect_exit_logits(model, rows)
    model.set_early_exit_config(calibrate_ranking(scores, ids, args.top_k, args.keep))
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    found = model.get_early_exit_config().calibration
    print(f"{found['score']:.1%} of {found['queries']} queries keep their top {args.top_k}", end="; ")
    print(f"{found['blocks_saved']:.1%} of the blocks saved; on queries left out {found['held_out']:.1%}")

    reranker = EarlyExitReranker.from_pretrained(args.output_dir, max_length=args.max_length)
    query = held_out[0]
    for full_depth in (True, False):
        start = time.perf_counter()
        best, report = reranker.rank(
            query, candidates[query], args.top_k, True, full_depth=full_depth, return_report=True
        )
        milliseconds = 1e3 * (time.perf_counter() - start)
        print(
            f"\n{query}\n{milliseconds:.0f} ms, {report.blocks_saved:.1%} of the blocks saved, behind each exit:",
            end=" ",
        )
        print(report.left)
        for answer in best[:3]:
            print(f"{answer['score']:8.3f}  {answer['text'][:90]}")


if __name__ == "__main__":
    main()
