"""Fills in and checks a `BadgeConfig` against the model it is put on, before anything is changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

from torch import nn

from badge_peft._version import package_version
from badge_peft.tuner.architectures import BlockLayout, block_names, get_layout, head_pooling, hidden_size, own_pooler
from badge_peft.tuner.backbone import check_fingerprint, fingerprint, stored_setup
from badge_peft.tuner.config import CHOICES, BadgeConfig, exit_numbers
from badge_peft.tuner.config_rules import check_label_count
from badge_peft.tuner.extensions import check_saved, extension_of
from badge_peft.tuner.losses import loss_weights
from badge_peft.tuner.pooling import TOKENS
from badge_peft.tuner.preconditions import check_devices, check_name, check_trainable

# PEFT adds these to every SEQ_CLS config, whatever the model calls its head.
_PEFT_HEADS = ("classifier", "score")
# PEFT cannot do with an empty list; no module ends in this name.
NO_HEAD = "no_head_is_saved"
_OWN_BASE = "Load the base model that adapter_config.json names (base_model_name_or_path)."


class _OwnNames(list[str]):
    """The caller's `modules_to_save`: PEFT's model for tokens adds heads when the tuner is in place, and would train
    them, whatever the config says. This list takes none."""

    def extend(self, names: Iterable[str]) -> None:
        """Takes all names but the heads that PEFT adds."""
        super().extend(name for name in names if name not in _PEFT_HEADS)


def prepared_copy(model: nn.Module, config: BadgeConfig, adapter_name: str) -> BadgeConfig:
    """A copy of `config` in which every field that depends on the model is filled in. `config` itself stays as its
    owner made it, free for another model.

    PEFT has added heads to the caller's `modules_to_save`, and reads it once more when the tuner is in place, to train
    them: they are taken out of it, and stand in the copy where they are to be trained."""
    names = config.modules_to_save
    if names is not None and tuple(names[-len(_PEFT_HEADS) :]) == _PEFT_HEADS:
        config.modules_to_save = names[: -len(_PEFT_HEADS)] or None
    caller, config = config, copy.deepcopy(config)
    if config.reads_tokens:
        caller.modules_to_save = _OwnNames(config.modules_to_save or [NO_HEAD])
    check_name(model, adapter_name)
    check_devices(model)
    extension = extension_of(model)
    extension.check(model, config)
    layout = get_layout(model, config.block_layout)
    blocks = block_names(model, layout)
    width = hidden_size(model, layout, blocks[0])
    for name, found in (("num_blocks", len(blocks)), ("hidden_size", width)):
        expected = getattr(config, name)
        if expected not in (None, found):
            raise ValueError(
                f"this adapter was made for a backbone with {name}={expected}, but the model has {name}={found}. "
                f"{_OWN_BASE}"
            )
    _check_head(model, config, layout)
    _check_placement(model, config, layout)
    shares_pooler = config.exit_type == "shared_pooled"
    if shares_pooler and own_pooler(model, layout) is None:
        raise ValueError(
            f"exit_type='shared_pooled' is not allowed on this {type(model).__name__}, which has no pooler "
            "(a dense layer and a tanh before its head): use 'pooled', which gives each exit one, or 'linear'."
        )
    loss_weights(config.exit_weights, exit_numbers(config, len(blocks)))
    others = getattr(model, "peft_config", None) or {}
    num_labels, problem_type = _labels(model, config, beside_others=any(name != adapter_name for name in others))
    check_label_count(config.label_names, num_labels)
    kind = pooling_kind(model, config, layout)
    if kind != TOKENS and kind not in CHOICES["exit_pooling"][1:]:
        raise ValueError(
            f"the model's own pooling {layout.pooling}={kind!r} is not one of {', '.join(CHOICES['exit_pooling'][1:])}"
            ": set exit_pooling in BadgeConfig."
        )
    # one regular expression for all blocks; PEFT matches it against whole module names
    target = "|".join(sorted({re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(name)) for name in blocks}))
    if config.target_modules not in (None, target):
        if config.base_fingerprint is not None:  # read from a file
            raise ValueError(
                f"this adapter was made for another architecture: the blocks of its backbone are called "
                f"{config.target_modules}, and those of this {type(model).__name__} are called {target}. {_OWN_BASE}"
            )
        raise ValueError(
            f"target_modules={config.target_modules!r} is not allowed: BADGE wraps whole blocks. Say which blocks "
            "have an exit with exit_layers, and where the blocks are with block_layout."
        )
    own_head = config.train_head and config.final_exit == "base_head"
    head = tuple(name for name in layout.head if hasattr(model, name) or not config.reads_tokens) if own_head else ()
    if config.base_fingerprint is not None:
        check_saved(model, stored_setup(config.base_fingerprint))
        if config.backbone != "full":
            check_fingerprint(model, config.base_fingerprint)

    ours = {*_PEFT_HEADS, *layout.head, NO_HEAD}
    extra = [name for name in config.modules_to_save or [] if name not in ours]
    _check_no_blocks(model, extra, blocks)
    check_trainable(model, [*extra, *head], config.backbone)
    if config.base_fingerprint is None:
        unread: tuple[str, ...] = () if config.final_exit == "base_head" else (*layout.head, "pooler")
        if shares_pooler:
            unread = tuple(name for name in unread if name not in ("pooler", str(layout.pooler).partition(".")[0]))
        config.base_fingerprint = fingerprint(model, skip=(*unread, *head, *extra))
    config.num_blocks, config.hidden_size, config.target_modules = len(blocks), width, target
    config.num_labels, config.problem_type = num_labels, problem_type
    config.badge_version = config.badge_version or package_version()
    config.modules_to_save = [*extra, *head] or [NO_HEAD]
    return config


def _check_no_blocks(model: nn.Module, modules_to_save: list[str], blocks: list[str]) -> None:
    """PEFT looks into no module that is saved as a whole, so a block in one would be left without its exit."""
    for name, _ in model.named_modules():
        ends = [saved for saved in modules_to_save if name.endswith(saved)]  # as PEFT looks for them
        if ends and any(f"{block}.".startswith(f"{name}.") for block in blocks):
            raise ValueError(
                f"modules_to_save={ends[0]!r} is not allowed: it is {name!r}, which is or holds a block. To train the "
                "blocks set backbone='full' or 'lora'."
            )


def _check_head(model: nn.Module, config: BadgeConfig, layout: BlockLayout) -> None:
    """Exit M needs a head of the right kind, for whole sequences or for tokens, when it is the model's own."""
    if config.final_exit != "base_head" or not layout.head or extension_of(model).head_labels(model)[0] is not None:
        return
    kind = type(model).__name__
    missing = not hasattr(model, layout.head[-1])
    if config.reads_tokens and (missing or not classifies_tokens(model)):
        raise ValueError(
            f"task_type='TOKEN_CLS' is not allowed on {kind}, whose head does not classify tokens: load the model "
            "with AutoModelForTokenClassification, or use final_exit='exit' and num_labels=..., which needs no head."
        )
    if not config.reads_tokens and (missing or classifies_tokens(model) or kind.endswith("ForMultipleChoice")):
        why = f"has no module {layout.head[-1]!r}" if missing else "does not classify sequences"
        raise ValueError(
            f"final_exit='base_head' is not allowed on {kind}, which {why}: load the model with "
            "AutoModelForSequenceClassification, or use final_exit='exit' and num_labels=..., which needs no head. "
            "For a label for each token: task_type='TOKEN_CLS' on AutoModelForTokenClassification."
        )


def classifies_tokens(model: nn.Module) -> bool:
    """Whether the model's own head answers each token."""
    return type(model).__name__.endswith("ForTokenClassification")


def _check_placement(model: nn.Module, config: BadgeConfig, layout: BlockLayout) -> None:
    allowed = ["block", "none"]
    if layout.attention_norm:
        allowed += ["ffn", "mhsa"] if layout.ffn else ["ffn"]
    if config.placement not in allowed:
        raise ValueError(
            f"placement={config.placement!r} is not allowed on {type(model).__name__}, whose blocks do not show what "
            f"it reads: allowed are {', '.join(map(repr, allowed))}."
        )


def pooling_kind(model: nn.Module, config: BadgeConfig, layout: BlockLayout | None = None) -> str:
    """`cls`, `mean`, `last` or `tokens`: what the exits of `config` read on `model`, whose `layout` may be known."""
    if config.reads_tokens:
        return TOKENS
    if config.exit_pooling != "auto":
        return config.exit_pooling
    return head_pooling(model, layout or get_layout(model, config.block_layout))


def _labels(model: nn.Module, config: BadgeConfig, beside_others: bool) -> tuple[int, str | None]:
    head, head_type = extension_of(model).head_labels(model)
    model_labels = head if head is not None else getattr(model.config, "num_labels", None)
    num_labels = config.num_labels if config.num_labels is not None else model_labels
    if num_labels is None:
        raise ValueError("the model's config has no num_labels: pass BadgeConfig(num_labels=...).")
    # beside other tasks, an adapter that trains the head has a copy of it, which can have labels of its own
    fits = num_labels == model_labels or (beside_others and config.train_head)
    if config.final_exit == "base_head" and model_labels is not None and not fits:
        raise ValueError(
            f"the adapter has num_labels={num_labels}, but the model's head has {model_labels}: load the model with "
            f"num_labels={num_labels}, or use final_exit='exit', which does not read the model's head."
        )
    problem_type = config.problem_type or head_type or getattr(model.config, "problem_type", None)
    return num_labels, problem_type
