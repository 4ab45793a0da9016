"""A model that the adapters library (AdapterHub) has prepared: what of it BADGE can be put on.

Its adapters live inside of the blocks, so they belong to the backbone: H_m and H_{m,F} are what they make of them, and
full depth is untouched. What is refused changes the number of rows or positions on the way, or makes one row's answer
depend on another's padding. The library is an optional dependency; nothing here imports it unless a model carries it.

Source: Poth et al., "Adapters: A Unified Library for Parameter-Efficient and Modular Transfer Learning", EMNLP 2023.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from badge_peft.tuner.config import BadgeConfig

_COMPOSITIONS = ("Stack", "Fuse", "Average")
_HEADS = {"classification": None, "multilabel_classification": "multi_label_classification"}
_NAMED = re.compile(
    r"\.(?:adapters|invertible_adapters|loras|refts|prefix_tunings|prefix_gates|prompt_tunings|shared_parameters|"
    r"adapter_fusion_layer)\.([^.]+)\."
)


def is_prepared(model: nn.Module) -> bool:
    """Whether `adapters.init(model)` has been called, or `model` is one of its `AutoAdapterModel`s."""
    return getattr(model, "adapters_config", None) is not None


def adapter_of(name: str) -> str | None:
    """The library's adapter to which a parameter or a tensor of a state dict belongs; None: to none."""
    found = _NAMED.search(f".{name}.")
    return found[1] if found else None


def active_adapters(model: nn.Module) -> set[str]:
    """Names of the library's adapters that take part in a pass."""
    setup = _setup(model)
    return set() if setup is None else set(setup.flatten())


def check_adapters(model: nn.Module, config: BadgeConfig) -> None:
    """Refuses what BADGE cannot be put on, or called with: an `AdapterSetup` context counts, too.

    Args:
        model: The base model, prepared by the library or not.
        config: What is to be put on it, or is.

    Raises:
        ValueError: the active adapters, the way they are composed, or the head; with what to do.
    """
    if not is_prepared(model):
        return
    if config.train_head and config.final_exit == "base_head":
        raise ValueError(
            "train_head=True is not allowed on a model of the adapters library, which saves the head with its own "
            "adapter (save_adapter, save_head): use train_head=False, or final_exit='exit', an exit M of our own."
        )
    _head(model)
    setup = _setup(model)
    if setup is None:
        return
    _check_composition(setup)
    adapters_config: Any = model.adapters_config
    for name in sorted(setup.flatten()):
        for part in _parts(adapters_config.get(name)):
            _check_config(name, part, config.placement)
    chunk = getattr(model.config, "chunk_size_feed_forward", 0)
    if chunk:
        raise ValueError(
            f"chunk_size_feed_forward={chunk} is not allowed with an active adapter of "
            "the adapters library, which may run a block's norm twice a chunk: set it to 0 in the model's config."
        )


def check_same_adapters(model: nn.Module, fingerprint: dict[str, Any]) -> None:
    """Refuses to load exits that were trained with other adapters active.

    Raises:
        ValueError: the names of the active adapters differ from those in the stored sample.
    """
    then = {found for found in map(adapter_of, fingerprint) if found}
    now = active_adapters(model)
    if then != now:
        raise ValueError(
            f"these exits were trained with {_list(then)} of the adapters library active, here with {_list(now)}. "
            "First load and activate what was active then, under the same names: adapters.init(model), and "
            "model.load_adapter(folder, set_active=True) or model.set_active_adapters(...)."
        )


def check_exportable(model: nn.Module) -> None:
    """Refuses what has no ONNX form: the library's LoRA or IA3 where query, key and value are one matrix (ModernBERT),
    into whose result it writes through a mask.

    Raises:
        ValueError: such an adapter is active and not merged.
    """
    active = active_adapters(model)
    for module in model.modules() if active else ():
        loras: Any = {} if getattr(module, "merged", None) else getattr(module, "loras", {})
        for name in sorted(active & set(loras)):
            if not hasattr(loras[name], "lora_ind"):
                continue
            remedy = (
                f"Merge it into a model loaded for the export, model.get_base_model().merge_adapter({name!r})."
                if loras[name].composition_mode == "add"
                else "Merging it in adapters 1.3 changes the answers: serve this model with PyTorch."
            )
            raise ValueError(
                f"the active adapter {name!r} has no ONNX form: it writes through a mask into the one matrix that "
                f"query, key and value are here. {remedy}"
            )


def head_labels(model: nn.Module) -> tuple[int | None, str | None]:
    """Labels and problem type of the active flexible head; (None, None) where the model's config has them."""
    head = _head(model) if is_prepared(model) else None
    return (None, None) if head is None else (int(head["num_labels"]), _HEADS[head["head_type"]])


def _setup(model: nn.Module) -> Any:
    if not is_prepared(model):
        return None
    from adapters.context import AdapterSetup

    adapters_config: Any = model.adapters_config
    return AdapterSetup.get_context_adapter_setup() or adapters_config.active_setup


def _head(model: nn.Module) -> dict[str, Any] | None:
    """The config of the active flexible head; None: the model has a head of transformers."""
    if not hasattr(model, "active_head") or not hasattr(model, "heads"):
        return None
    from adapters.context import AdapterSetup

    active = AdapterSetup.get_context_head_setup() or model.active_head
    heads: Any = model.heads
    head = heads[active] if isinstance(active, str) and active in heads else None
    if head is None or head.config.get("head_type") not in _HEADS:
        kind = f" ({head.config.get('head_type')})" if head is not None else ""
        raise ValueError(
            f"the active head {active!r}{kind} is not allowed: BADGE needs one active head of type "
            f"{' or '.join(_HEADS)}. Give the model one with add_classification_head(name, num_labels=...), or say "
            "which with model.active_head = name."
        )
    return head.config


def _check_composition(block: Any) -> None:
    if isinstance(block, str):
        return
    kind = type(block).__name__
    if kind not in _COMPOSITIONS:
        raise ValueError(
            f"the active setup {kind} is not allowed: it gives a block other rows or positions than the batch has, so "
            f"exits could not be read row by row. Allowed are a single adapter, {', '.join(_COMPOSITIONS)}: call "
            "model.set_active_adapters(...) with one of these, and once for each task."
        )
    for child in block:
        _check_composition(child)


def _parts(config: Any) -> Iterator[Any]:
    """A config, or those of which a union is made."""
    if config is not None and config.get("architecture") == "union":
        for part in config.configs:
            yield from _parts(part)
    elif config is not None:
        yield config


def _check_config(name: str, config: Any, placement: str) -> None:
    """Refuses an adapter whose forward depends on more than one position's states, or goes around a block's norm."""
    kind = config.get("architecture")
    if kind not in (None, "lora"):
        raise ValueError(
            f"the active adapter {name!r} is of type {kind}, which is not allowed: it adds or picks positions. "
            "Allowed are bottleneck adapters (SeqBn, DoubleSeqBn, ParBn, ...) and LoRA (DoRA, IA3): train one of "
            "these, or deactivate this one, model.set_active_adapters(None)."
        )
    if config.get("use_gating"):
        raise ValueError(
            f"the active adapter {name!r} has use_gating=True, which is not allowed: the gate is a mean over all "
            "positions, padding too, so an answer would depend on the rest of the batch. Train it with "
            "use_gating=False."
        )
    if kind is None and not config.get("original_ln_after", True):
        raise ValueError(
            f"the active adapter {name!r} has original_ln_after=False, which is not allowed: the block then ends "
            "behind its last norm, of which an exit's norm is a copy. Train it with original_ln_after=True."
        )
    second_pass = config.get("output_adapter") if kind is None else config.get("composition_mode") != "add"
    if placement == "mhsa" and second_pass:
        raise ValueError(
            f"placement='mhsa' is not allowed with the active adapter {name!r}: its second pass of the feed-forward "
            "part would go without the adapter. Allowed are block, ffn and none; mhsa with LoRA, and with bottleneck "
            "adapters behind the attention alone (output_adapter=False)."
        )


def _list(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "no adapter"
