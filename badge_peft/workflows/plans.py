"""What a command trains: the rows as the model reads them, the form of the exits, and the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import set_seed

from badge_peft.ranking.calibration import check_queries
from badge_peft.training.choose import ExitForm, choose_exits
from badge_peft.tuner.architectures import get_layout, head_pooling
from badge_peft.tuner.exits import EXITS
from badge_peft.utils import distributed
from badge_peft.workflows.base_model import Base, badge_config_of, choose_device, keeps_head
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import encode
from badge_peft.workflows.fit import collator, train_exits, train_rankings
from badge_peft.workflows.report import data_line, describe_form
from badge_peft.workflows.search import Search
from badge_peft.workflows.settings import ExitOptions, TrainSettings
from badge_peft.workflows.validate import check_training

FEWEST = 200  # rows to train on, and a quarter of that to choose by
_EVERY, _OF_EMBEDDINGS = "1-", "0-"


@dataclass
class Plan:
    """What exits are trained with."""

    base: Base  # the model
    settings: TrainSettings  # with what was found out of model and rows
    eval_rows: Dataset  # encoded rows to evaluate and calibrate on
    counts: tuple[str, str]  # what is trained and calibrated on, in words
    facts: dict[str, Any]  # what the report says of it
    train: Callable[[PeftModel], dict[str, Any]]  # trains a model; what the report says of that


def plan_exits(
    model_name: str,
    base: Base,
    tokenizer: Any,
    examples: TextDataset,
    eval_examples: TextDataset,
    settings: TrainSettings,
) -> Plan:
    """Of exits that classify: the form that is chosen, and the best settings where they are searched for."""
    training = settings.training
    if training.objective != "joint" and settings.exits.keep_head is None:  # which may train the head
        settings = replace(settings, exits=replace(settings.exits, keep_head=False))
    settings = replace(settings, exits=replace(settings.exits, keep_head=keeps_head(settings.exits, base.has_head)))
    eval_rows = base.labels.encode(eval_examples, tokenizer, scored=True)
    learns_labels = check_training(settings, base, bool(examples.labels), len(eval_rows))
    rows = base.labels.encode(examples, tokenizer, labeled=learns_labels)
    print(f"1. data: {data_line(len(rows), len(eval_rows), base.labels, examples.columns, learns_labels)}")
    base.model.to(choose_device(None))  # states are computed before Trainer takes the model there
    choosing = partial(choose_form, base, rows, eval_rows, tokenizer, settings, learns_labels)
    states, search = None, None
    if settings.search.trials:
        wanted = Search(base, rows, tokenizer, settings, learns_labels, model_name)
        settings, forms = wanted.choose_form(choosing)
        set_seed(training.seed)
        print(f"   search: {settings.search.trials} trials for {settings.search.search_for}")
        settings, states, search = wanted.run(lambda line: print(f"   {line}", flush=True))
    else:
        settings, forms = choosing()
    set_seed(training.seed)

    def train(model: PeftModel) -> dict[str, Any]:
        found = train_exits(model, rows, tokenizer, settings.training, learns_labels, states)
        if states is not None:
            states.close()
        return found

    facts = {
        **({"task": "tokens"} if base.labels.tokens else {}),
        "train_rows": len(rows),
        "learned_from": "labels" if learns_labels else "the model's own answers",
        "forms": forms,
        "search": search,
    }
    counts = f"{len(rows)} rows", f"{len(eval_rows)} evaluation rows"
    return Plan(base, settings, eval_rows, counts, facts, train)


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
    facts = {
        "task": "ranking",
        "train_rows": len(rows),
        "train_queries": queries[0],
        "learned_from": "the model's own scores",
        "corpus": settings.columns.corpus,
    }
    train = partial(
        train_rankings, rows=rows, tokenizer=tokenizer, options=settings.training, queries=examples.queries()
    )
    return Plan(base, settings, eval_rows, (f"{len(rows)} candidates", f"{queries[1]} queries"), facts, train)


def exit_forms(settings: TrainSettings, base: Base) -> list[ExitOptions]:
    """The forms that are tried; one where everything that matters is named, or nothing can be chosen."""
    exits = settings.exits
    training = settings.training
    plain = training.objective == "joint" and exits.placement != "none"
    if not plain or exits.backbone == "full" or distributed.rank_world()[1] > 1:
        return [with_defaults(exits, base)]
    own = head_pooling(base.model, get_layout(base.model))
    poolings = [exits.exit_pooling or base.pooling] if exits.exit_pooling or base.pooling else ["mean", own or "cls"]
    types = [exits.exit_type or "linear"]
    if exits.exit_type is None and exits.backbone == "frozen" and not base.labels.tokens:
        types.append("residual_mha")
    found: dict[ExitOptions, None] = {}
    for pooling in ["auto"] if base.labels.tokens else dict.fromkeys(poolings):
        for kind in types:
            form = replace(exits, exit_pooling=pooling, exit_type=kind, carry=exits.carry or "none")
            form = replace(form, exit_layers=exits.exit_layers or (_EVERY if pooling == "cls" else _OF_EMBEDDINGS))
            found[form] = None
            links = exits.carry is None and exits.backbone == "frozen" and not base.labels.tokens
            if links and kind == "linear" and pooling != "cls":
                found[replace(form, carry="logits")] = None
    return list(found)


def with_defaults(exits: ExitOptions, base: Base) -> ExitOptions:
    """The form that is taken where none is tried: docs/decisions/form-of-exits.md."""
    pooling = exits.exit_pooling or base.pooling or "auto"
    frozen = exits.backbone == "frozen" and not base.labels.tokens
    if pooling == "auto" and frozen and head_pooling(base.model, get_layout(base.model)) == "cls":
        pooling = "mean"
    return replace(exits, exit_pooling=pooling, exit_type=exits.exit_type or "linear")


def choose_form(
    base: Base,
    rows: Dataset,
    eval_rows: Dataset,
    tokenizer: Any,
    settings: TrainSettings,
    learns_labels: bool,
) -> tuple[TrainSettings, list[dict[str, Any]]]:
    """The settings with the best form in them, and what was measured of each."""
    forms = exit_forms(settings, base)
    few = len(rows) < FEWEST or len(eval_rows) < FEWEST // 4
    if len(forms) == 1 or few:
        return replace(settings, exits=with_defaults(settings.exits, base) if few else forms[0]), []
    configs = [badge_config_of(base, form) for form in forms]
    arguments = settings.goal.arguments()
    training = settings.training
    distillation = training.distillation if training.distillation is not None else float(not learns_labels)
    tried = choose_exits(
        base.model,
        rows,
        configs,
        eval_dataset=eval_rows,
        data_collator=collator(base.labels.tokens, tokenizer),
        goal={name: value for name, value in arguments.items() if name not in ("confidence", "per_exit")},
        policy=settings.goal.policy,
        metric=base.labels.metric(settings.metric),
        seed=training.seed,
        distillation=distillation,
        adapter_learning_rate=training.adapter_lr,
        per_device_train_batch_size=distributed.rows_per_device(training.batch_size),
        tell=lambda form: print(
            f"   tried {describe_form(record_of(form))}: {form.time_saved:.0%} of the time saved", flush=True
        ),
    )
    best = forms[[config is tried[0].config for config in configs].index(True)]
    return replace(settings, exits=best), [record_of(form) for form in tried]


def record_of(form: ExitForm) -> dict[str, Any]:
    """A form for the report, JSON-able."""
    names = ("exit_pooling", "exit_type", "exit_layers", "carry")
    measured = ("per_exit", "score", "full_depth_score", "blocks_saved", "time_saved", "seconds", "reached")
    return {
        **{name: getattr(form.config, name) for name in names},
        "policy": form.early_exit.policy,
        **{name: getattr(form, name) for name in measured},
    }
