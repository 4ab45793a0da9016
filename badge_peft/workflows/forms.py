"""Which forms of exits `badge-peft train` tries: what is named is kept, the rest is chosen by measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from datasets import Dataset

from badge_peft.training.choose import ExitForm, choose_exits
from badge_peft.tuner.architectures import get_layout, head_pooling
from badge_peft.utils import distributed
from badge_peft.workflows.base_model import Base, badge_config_of
from badge_peft.workflows.fit import collator
from badge_peft.workflows.report import show, text_table
from badge_peft.workflows.settings import ExitOptions, TrainSettings

FEWEST = 200  # rows to train on, and a quarter of that to choose by
_EVERY, _OF_EMBEDDINGS = "1-", "0-"


def exit_forms(settings: TrainSettings, base: Base) -> list[ExitOptions]:
    """The forms that are tried; one where everything that matters is named, or nothing can be chosen.

    Args:
        settings: What was asked for.
        base: The model.
    """
    exits, training = settings.exits, settings.training
    plain = training.objective == "joint" and exits.placement != "none"
    if not plain or exits.backbone == "full" or distributed.rank_world()[1] > 1:
        return [with_defaults(exits, base)]
    own = head_pooling(base.model, get_layout(base.model))
    poolings = [exits.exit_pooling or base.pooling] if exits.exit_pooling or base.pooling else ["mean", own or "cls"]
    types = [exits.exit_type or "linear"]
    if exits.exit_type is None and exits.backbone == "frozen" and not base.reads_tokens:
        types.append("residual_mha")
    found: dict[ExitOptions, None] = {}
    for pooling in ["auto"] if base.reads_tokens else dict.fromkeys(poolings):
        for kind in types:
            form = replace(exits, exit_pooling=pooling, exit_type=kind, carry=exits.carry or "none")
            form = replace(form, exit_layers=exits.exit_layers or (_EVERY if pooling == "cls" else _OF_EMBEDDINGS))
            found[form] = None
            links = exits.carry is None and exits.backbone == "frozen" and not base.reads_tokens
            if links and kind == "linear" and pooling != "cls":
                found[replace(form, carry="logits")] = None
    return list(found)


def with_defaults(exits: ExitOptions, base: Base) -> ExitOptions:
    """The form that is taken where none is tried: docs/decisions/form-of-exits.md."""
    pooling = exits.exit_pooling or base.pooling or "auto"
    frozen = exits.backbone == "frozen" and not base.reads_tokens
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
    metric: str,
) -> tuple[TrainSettings, list[dict[str, Any]]]:
    """The settings with the best form in them, and what was measured of each.

    Args:
        base: The model, without an adapter, as it is afterwards.
        rows: To train on.
        eval_rows: To choose by.
        tokenizer: Pads.
        settings: What was asked for.
        learns_labels: Whether the exits learn from labels.
        metric: Of the exits.
    """
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
        data_collator=collator(base.reads_tokens, tokenizer),
        goal={name: value for name, value in arguments.items() if name not in ("confidence", "per_exit")},
        policy=settings.goal.policy,
        metric=metric,
        seed=training.seed,
        distillation=distillation,
        adapter_learning_rate=training.adapter_lr,
        per_device_train_batch_size=distributed.rows_per_device(training.batch_size),
        tell=lambda form: print(f"   tried {_name(form)}: {form.time_saved:.0%} of the time saved", flush=True),
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


def form_table(forms: Iterable[dict[str, Any]], metric: str) -> str:
    """One line for each form, the best first."""
    lines = [
        [
            describe_form(form),
            f"{show(form['per_exit'][0], metric)} ... {show(form['per_exit'][-2], metric)}",
            show(form["score"], metric),
            f"{form['blocks_saved']:.1%}",
            f"{form['time_saved']:.1%}",
            "" if i else "kept",
        ]
        for i, form in enumerate(forms)
    ]
    return text_table(
        ["exits tried", "first ... last exit", "early " + metric, "blocks saved", "time saved", ""], lines
    )


def describe_form(form: dict[str, Any]) -> str:
    """`mean, linear, exit 0, logits carried`."""
    layers = form["exit_layers"]
    parts = [form["exit_pooling"], form["exit_type"]]
    parts += ["from exit 0"] if layers and layers[0] == 0 else []
    parts += [f"{form['carry']} carried"] if form["carry"] else []
    return ", ".join(parts)


def _name(form: ExitForm) -> str:
    return describe_form(record_of(form))
