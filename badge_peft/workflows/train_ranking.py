"""`train_ranker`: from a cross-encoder and a file of pairs to an adapter that ranks. What `badge-peft train --task
ranking` does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorWithPadding, set_seed

from badge_peft.evaluation import ExitLogits
from badge_peft.ranking.calibration import check_queries
from badge_peft.training import QueryCollator, RankingDistillation, query_batches
from badge_peft.training.arguments import sampling
from badge_peft.tuner.architectures import get_layout, head_pooling
from badge_peft.tuner.exits import EXITS
from badge_peft.utils import distributed
from badge_peft.workflows.base_model import load_base, local_path
from badge_peft.workflows.calibrate import choose
from badge_peft.workflows.encode import encode, load_tokenizer
from badge_peft.workflows.finish import Choose, train_and_save
from badge_peft.workflows.fit import fit
from badge_peft.workflows.ranking_data import read_rankings
from badge_peft.workflows.rankings import with_queries
from badge_peft.workflows.report import measured_table, summary
from badge_peft.workflows.settings import TrainingOptions, TrainSettings
from badge_peft.workflows.train import checks
from badge_peft.workflows.validate import check_output_dir, check_ranking, check_settings, with_output_dir


def train_ranker(model_name: str, data: str, settings: TrainSettings) -> dict[str, Any] | None:
    """Trains exits on the scores that the model itself gives to pairs of a query and a document, saves them as an
    adapter, and chooses margins on queries that did not train. No labels are needed; full depth stays the model's own.

    Args:
        model_name: Folder or Hub repository of a cross-encoder: a model with one output.
        data: Pairs, the candidates of each query as the reranker will see them: see `read_examples`. With
            `settings.columns.corpus` queries alone, whose candidates BM25 finds there.
        settings: As for `train_adapter`.

    Returns:
        What `report.json` holds; None in a process that is not the first.
    """
    start = time.perf_counter()
    exits = replace(settings.exits, keep_head=True, carry=settings.exits.carry or "none")
    exits = replace(exits, exit_type=exits.exit_type or "linear", exit_pooling=exits.exit_pooling or "auto")
    settings = with_output_dir(replace(settings, exits=exits), model_name)
    check_ranking(settings)
    check_settings(settings)
    check_output_dir(settings)
    options = settings.training
    examples, eval_examples = read_rankings(data, settings.columns, options.seed)
    queries = [len(set(part.queries())) for part in (examples, eval_examples)]
    if settings.goal.confidence is not None:
        check_queries(queries[1], settings.goal.ranking_arguments()["keep"], settings.goal.confidence)
    set_seed(options.seed)
    base = load_base(model_name, settings, examples)
    if len(base.labels.names) != 1:
        raise ValueError(
            f"{model_name} has {len(base.labels.names)} outputs, and candidates are ranked by one score: give a "
            "cross-encoder, a model with num_labels=1."
        )
    if EXITS[str(settings.exits.exit_type)].pools_freely and head_pooling(base.model, get_layout(base.model)) == "cls":
        base = replace(base, pooling="mean")  # before the last blocks the first token says little about a pair
    tokenizer = load_tokenizer(local_path(settings.tokenizer or model_name), base.model, settings.max_length)
    rows, eval_rows = encode(examples, tokenizer), encode(eval_examples, tokenizer)
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

    train = partial(_train, rows=rows, queries=examples.queries(), tokenizer=tokenizer, options=options)
    counts = f"{len(rows)} candidates", f"{queries[1]} queries"
    report = train_and_save(
        model_name, data, settings, examples, eval_examples, base, tokenizer, eval_rows, counts, train, chosen, start
    )
    if report is not None:
        print(f"\n{measured_table(report)}\n\n{summary(report)}\n{checks(report)}")
    return report


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
