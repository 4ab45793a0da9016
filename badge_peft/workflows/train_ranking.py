"""What is another way where exits rank: what is asked for, the candidates of queries, and how they are trained."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorWithPadding

from badge_peft.evaluation import ExitLogits
from badge_peft.integrations.bm25 import retrieve
from badge_peft.ranking.calibration import check_queries
from badge_peft.training import QueryCollator, RankingDistillation, query_batches
from badge_peft.training.arguments import sampling
from badge_peft.tuner.architectures import get_layout, head_pooling
from badge_peft.tuner.exits import EXITS
from badge_peft.utils import distributed
from badge_peft.workflows.base_model import Base
from badge_peft.workflows.calibrate import choose
from badge_peft.workflows.columns import find_columns
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import encode
from badge_peft.workflows.fit import Choose, Plan, fit
from badge_peft.workflows.rankings import with_queries
from badge_peft.workflows.settings import TextColumns, TrainColumns, TrainingOptions, TrainSettings
from badge_peft.workflows.sources import read_source
from badge_peft.workflows.splits import EVAL_SHARE, read_parts
from badge_peft.workflows.validate import check_ranking


def for_ranking(settings: TrainSettings) -> TrainSettings:
    """The settings with the form of exits that rank."""
    exits = replace(settings.exits, keep_head=True, carry=settings.exits.carry or "none")
    exits = replace(exits, exit_type=exits.exit_type or "linear", exit_pooling=exits.exit_pooling or "auto")
    check_ranking(replace(settings, exits=exits))
    return replace(settings, exits=exits)


def plan_ranking(
    model_name: str,
    base: Base,
    tokenizer: Any,
    examples: TextDataset,
    eval_examples: TextDataset,
    settings: TrainSettings,
) -> Plan:
    """Of exits that follow the scores of a cross-encoder."""
    queries = [len(set(part.queries())) for part in (examples, eval_examples)]
    if settings.goal.confidence is not None:
        check_queries(queries[1], settings.goal.ranking_arguments()["keep"], settings.goal.confidence)
    if len(base.labels.names) != 1:
        raise ValueError(
            f"{model_name} has {len(base.labels.names)} outputs, and candidates are ranked by one score: give a "
            "cross-encoder, a model with num_labels=1."
        )
    if EXITS[str(settings.exits.exit_type)].pools_freely and head_pooling(base.model, get_layout(base.model)) == "cls":
        base = replace(base, pooling="mean")  # before the last blocks the first token says little about a pair
    rows = encode(examples, tokenizer)
    eval_rows = encode(eval_examples, tokenizer)
    print(
        f"1. data: {len(rows)} candidates of {queries[0]} queries to train on, {len(eval_rows)} of {queries[1]} to "
        "evaluate and calibrate on; learning from the model's scores"
    )

    def chosen(model: PeftModel, found: ExitLogits) -> tuple[ExitLogits, dict[str, Any], Choose]:
        facts = {
            "task": "ranking",
            "train_rows": len(rows),
            "train_queries": queries[0],
            "learned_from": "the model's own scores",
            "corpus": settings.columns.corpus,
            "constant_answer": None,
        }
        ranked = with_queries(found, eval_examples)
        return ranked, facts, partial(choose, ranked, settings.goal)

    train = partial(
        _train,
        rows=rows,
        queries=examples.queries(),
        tokenizer=tokenizer,
        options=settings.training,
    )
    return Plan(
        base,
        settings,
        eval_rows,
        (f"{len(rows)} candidates", f"{queries[1]} queries"),
        train,
        chosen,
    )


def _train(
    model: PeftModel, rows: Dataset, queries: Sequence[str], tokenizer: Any, options: TrainingOptions
) -> dict[str, Any]:
    """Trains in batches of whole queries as far as they fit. Returns as `fit`."""
    numbers = {query: number for number, query in enumerate(dict.fromkeys(queries))}
    items = [
        [{**rows[i], "groups": numbers[queries[i]]} for i in batch]
        for batch in query_batches(queries, distributed.rows_per_device(options.batch_size), options.seed)
    ]
    return fit(
        model,
        items,
        QueryCollator(DataCollatorWithPadding(tokenizer)),
        options,
        trainer={"objective": RankingDistillation()},
        per_device_train_batch_size=1,  # an item is a batch
        logging_steps=max(1, options.epochs * len(items) // 50),
        remove_unused_columns=False,
        **sampling(by_length=False),
    )


def read_rankings(data: str, columns: TrainColumns, seed: int) -> tuple[TextDataset, TextDataset]:
    """Candidates that train and candidates that do not, with no query in both."""
    find = _pairs if columns.corpus is None else Retrieval(columns.corpus, columns.corpus_column, columns.candidates)
    examples, held_out = read_parts(data, columns)
    if held_out is None:
        examples = find(_fewer(examples, columns, seed), data)
        return _hold_out(examples, columns.eval_share or EVAL_SHARE, random.Random(seed))
    known = {" ".join(query.split()).casefold() for query in held_out.texts}
    kept = [i for i, query in enumerate(examples.texts) if " ".join(query.split()).casefold() not in known]
    if not kept:
        raise ValueError(f"every query of {data} is among the evaluation queries too: nothing is left to train.")
    return find(_fewer(examples.select(kept), columns, seed), data), find(held_out, columns.eval_data or data)


class Retrieval:
    """The candidates of queries, by BM25 over the documents of a file."""

    def __init__(self, corpus: str, column: str | None, candidates: int | None) -> None:
        documents = next(iter(read_source(corpus).values()))
        self.name = _documents_of(documents.features, column, corpus)
        texts = (str(text) for text in documents[self.name] if text is not None)
        self.documents = [text for text in dict.fromkeys(texts) if text.strip()]
        if not self.documents:
            raise ValueError(f"no row of {corpus} has a text in column {self.name!r}.")
        self.candidates = 100 if candidates is None else candidates

    def __call__(self, queries: TextDataset, source: str) -> TextDataset:
        """The pairs of each query, each text once, with its candidates, best first; without labels."""
        if queries.pairs is not None:
            raise ValueError(
                f"{source} has pairs already, with {queries.columns['text_pair']!r} as documents: leave out the "
                "corpus, or give a file with the queries alone."
            )
        texts = list(dict.fromkeys(queries.texts))
        found = retrieve(texts, self.documents, self.candidates)
        rows = [(text, self.documents[place]) for text, places in zip(texts, found, strict=True) for place in places]
        columns = {"text": queries.columns["text"], "text_pair": self.name, "label": None}
        return TextDataset(
            [q for q, _ in rows],
            [d for _, d in rows],
            columns=columns,
            split=queries.split,
        )


def _documents_of(features: Mapping[str, Any], column: str | None, corpus: str) -> str:
    """The column of a corpus that holds the documents."""
    there = f"the columns of {corpus} are {', '.join(features)}"
    if column is not None:
        if column not in features:
            raise ValueError(f"there is no column {column!r}: say which with --corpus-column; {there}.")
        return column
    strings = {name for name, kind in features.items() if str(getattr(kind, "dtype", "")).endswith("string")}
    try:
        names = find_columns([*features], TextColumns(), None, strings.__contains__)
    except ValueError:
        raise ValueError(
            f"cannot tell which column holds the documents: say which with --corpus-column; {there}."
        ) from None
    found = names["text_pair"] or names["text"]
    assert found is not None
    return found


def _pairs(examples: TextDataset, source: str) -> TextDataset:
    """`examples` as they are, where they are pairs."""
    if examples.pairs is None:
        raise ValueError(
            f"ranking takes pairs of a query and a document, and {source} has one text per row: name the documents "
            "with --text-pair-column, or a file of documents, in which candidates are looked for, with --corpus."
        )
    return examples


def _hold_out(examples: TextDataset, share: float, draw: random.Random) -> tuple[TextDataset, TextDataset]:
    """All but a share of the queries, and these."""
    queries = sorted(set(examples.queries()))
    draw.shuffle(queries)
    held = set(queries[: max(1, round(share * len(queries)))])
    parts = [[i for i, q in enumerate(examples.queries()) if (q in held) == wanted] for wanted in (False, True)]
    if not parts[0]:
        raise ValueError(
            f"there are too few queries to hold some out: {len(queries)}. Give more, or a separate file for "
            "the calibration with --eval-data."
        )
    return examples.select(parts[0]), examples.select(parts[1])


def _fewer(examples: TextDataset, columns: TrainColumns, seed: int) -> TextDataset:
    """At most `max_rows` rows: whole queries, drawn at random, as long as their rows fit."""
    if columns.max_rows is None or len(examples) <= columns.max_rows:
        return examples
    queries = examples.queries()
    order = sorted(set(queries))
    random.Random(seed).shuffle(order)
    rows: dict[str, list[int]] = {}
    for i, query in enumerate(queries):
        rows.setdefault(query, []).append(i)
    chosen: list[int] = []
    for query in order:
        if len(chosen) + len(rows[query]) <= columns.max_rows or not chosen:
            chosen += rows[query]
    return examples.select(sorted(chosen))
