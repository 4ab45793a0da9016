"""`train_ranker`: from a cross-encoder and a file of pairs to an adapter that ranks. What `badge-peft train --task
ranking` does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import DataCollatorWithPadding, set_seed

from badge_peft.early_exit.policies.text import describe
from badge_peft.evaluation import collect_exit_logits
from badge_peft.model import get_badge_model
from badge_peft.model_card import REPORT, write_model_card
from badge_peft.ranking.calibration import check_queries
from badge_peft.training import (
    MultiExitTrainer,
    QueryCollator,
    RankingDistillation,
    multi_exit_arguments,
    query_batches,
)
from badge_peft.training.arguments import sampling
from badge_peft.tuner.architectures import get_layout, head_pooling
from badge_peft.tuner.exits import EXITS
from badge_peft.utils import distributed
from badge_peft.utils.files import write_json
from badge_peft.workflows.base_model import add_exits, load_base, local_path
from badge_peft.workflows.calibrate import choose
from badge_peft.workflows.encode import encode, load_tokenizer
from badge_peft.workflows.evaluate import compare_with_checkpoint
from badge_peft.workflows.finish import finish, report_of_training
from badge_peft.workflows.fit import run
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

    Raises:
        ValueError: settings, model and data do not fit one another; nothing has been written then.
        OSError: there is no such model or data.
    """
    start = time.perf_counter()
    exits = replace(settings.exits, keep_head=True, carry=settings.exits.carry or "none")
    exits = replace(exits, exit_type=exits.exit_type or "linear", exit_pooling=exits.exit_pooling or "auto")
    settings = with_output_dir(replace(settings, exits=exits), model_name)
    check_ranking(settings)
    check_settings(settings)
    out, options = check_output_dir(settings), settings.training
    examples, eval_examples = read_rankings(data, settings.columns, options.seed)
    counts = [len(set(part.queries())) for part in (examples, eval_examples)]
    if settings.goal.confidence is not None:
        check_queries(counts[1], settings.goal.ranking_arguments()["keep"], settings.goal.confidence)
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
        f"1. data: {len(rows)} candidates of {counts[0]} queries to train on, {len(eval_rows)} of {counts[1]} to "
        "evaluate and calibrate on; learning from the model's scores"
    )
    model = add_exits(base, settings.exits)
    badge = get_badge_model(model)
    trainable, total = model.get_nb_trainable_parameters()
    print(f"2. model: {badge.num_blocks} blocks; {trainable:,} of {total:,} parameters are trained")
    print(f"3. training over {len(rows)} candidates, epochs: {options.epochs}")
    measured_training = _train(model, rows, examples.queries(), tokenizer, options)
    exit_logits = collect_exit_logits(
        model, eval_rows, options.batch_size, progress=True, split_between_processes=True
    )
    exit_logits = with_queries(exit_logits, eval_examples)

    def save() -> dict[str, Any]:
        report = {
            "task": "ranking",
            **report_of_training(
                model_name, data, settings, examples, eval_examples, base, tokenizer, model, exit_logits
            ),
            "train_rows": len(rows),
            "train_queries": counts[0],
            "learned_from": "the model's own scores",
            "corpus": settings.columns.corpus,
            **measured_training,
            "constant_answer": None,
        }
        return finish(model, tokenizer, exit_logits, lambda: choose(exit_logits, settings.goal), report, out)

    report = distributed.on_main(save)
    if not distributed.is_main():
        return None
    print(f"4. saved to {out}; policy, calibrated on {counts[1]} queries: {describe(badge.get_early_exit_config())}")
    report |= {
        "full_depth_is_checkpoint": compare_with_checkpoint(
            model, local_path(model_name), eval_rows, options.batch_size
        ),
        "latency": None,
        "adapter_bytes": (out / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        "seconds": time.perf_counter() - start,
    }
    write_json(Path(out) / REPORT, report)
    write_model_card(out)
    print(f"\n{measured_table(report)}\n\n{summary(report)}\n{checks(report)}")
    return report


def _train(
    model: PeftModel, rows: Dataset, queries: Sequence[str], tokenizer: Any, options: TrainingOptions
) -> dict[str, Any]:
    """Trains for `options.epochs`, in batches of whole queries as far as they fit. Returns as `train_exits`."""
    start = time.perf_counter()
    numbers = {query: number for number, query in enumerate(dict.fromkeys(queries))}
    items = [
        [{**rows[i], "groups": numbers[queries[i]]} for i in batch]
        for batch in query_batches(queries, distributed.rows_per_device(options.batch_size), options.seed)
    ]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = multi_exit_arguments(
            model,
            folder,
            adapter_learning_rate=options.adapter_lr,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=1,
            seed=options.seed,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            logging_steps=max(1, options.epochs * len(items) // 50),
            remove_unused_columns=False,
            **sampling(by_length=False),
        )
        trainer = MultiExitTrainer(
            model=model,
            args=arguments,
            objective=RankingDistillation(),
            train_dataset=items,
            data_collator=QueryCollator(DataCollatorWithPadding(tokenizer)),
            cache_states=False if options.no_cache_states else "auto",
        )
        run(trainer)
    model.eval()
    kept = {name: value for name, value in trainer.state_cache.items() if name != "where"}
    return {"training_seconds": time.perf_counter() - start, "states": kept}
