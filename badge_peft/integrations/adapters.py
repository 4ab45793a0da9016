"""A model that the adapters library (AdapterHub) has prepared: what of it BADGE can be put on.

Its adapters live inside of the blocks, so they belong to the backbone: H_m and H_{m,F} are what they make of them, and
full depth is untouched. What is refused changes the number of rows or positions on the way, or makes one row's answer
depend on another's padding. The library is an optional dependency; nothing here imports it unless a model carries it,
and hooks are registered on such a model alone.

Source: Poth et al., "Adapters: A Unified Library for Parameter-Efficient and Modular Transfer Learning", EMNLP 2023.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.tuner.architectures import base_name
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.context import current_pass
from badge_peft.tuner.extensions import ModelExtension
from badge_peft.tuner.layer import BadgeBlock

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


class AdaptersLibrary(ModelExtension):
    """The library's adapters on a base model."""

    def applies_to(self, model: nn.Module) -> bool:
        """Whether it is a model of the library."""
        return is_prepared(model)

    def check(self, model: nn.Module, config: BadgeConfig) -> None:
        """The active adapters, the way they are composed, and the head; an `AdapterSetup` context counts, too."""
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

    def setup(self, model: nn.Module) -> str | None:
        """The active adapters and how they are composed."""
        setup = _setup(model)
        return None if setup is None else _words(setup)

    def check_saved(self, model: nn.Module, setup: str | None) -> None:
        """The active adapters' names and composition; the sample of weights has their weights."""
        now = self.setup(model)
        if setup != now:
            raise ValueError(
                f"these exits were trained with {setup or 'no adapter'} of the adapters library active, here with "
                f"{now or 'no adapter'}. First load and activate what was active then, under the same names: "
                "adapters.init(model), and model.load_adapter(folder, set_active=True) or "
                "model.set_active_adapters(...)."
            )

    def head_labels(self, model: nn.Module) -> tuple[int | None, str | None]:
        """Those of the active flexible head."""
        head = _head(model)
        return (None, None) if head is None else (int(head["num_labels"]), _HEADS[head["head_type"]])

    def takes_part(self, model: nn.Module) -> Callable[[str], bool]:
        """The library's own parameters where their adapter is active, and all others."""
        active = {None, *active_adapters(model), *_fusions(_setup(model))}
        return lambda name: adapter_of(name) in active

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Checks the active setup before each call, and lets the library see its tensors under their own names."""
        handles = [model.register_forward_pre_hook(_check_call)]
        for block in model.modules():
            if isinstance(block, BadgeBlock):
                block.register_state_dict_post_hook(_as_without_exits)
                block.register_load_state_dict_pre_hook(_as_with_exits)
        return handles

    def check_compilable(self, model: nn.Module) -> None:
        """An active adapter looks for its setup in Python at every call."""
        active = active_adapters(model)
        if active:
            raise ValueError(
                f"blocks with an active adapter of the adapters library ({', '.join(sorted(active))}) cannot be "
                "compiled: it looks for its setup in Python at every call. Run without compile_blocks."
            )

    def check_exportable(self, model: nn.Module) -> None:
        """The library's LoRA or IA3 where query, key and value are one matrix (ModernBERT), into whose result it
        writes through a mask: active and not merged, it has no ONNX form."""
        active = active_adapters(model)
        for module in model.modules():
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


def _check_call(model: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of the base model: what is active now, with the adapters whose exits are read."""
    running = current_pass()
    if not isinstance(running, EarlyExitPass):
        return
    configs: dict[str, BadgeConfig] = model.peft_config  # type: ignore[assignment]  # a module's attributes are untyped
    for name in (reader.exits.adapter for reader in running.readers):
        if name in configs:  # rows may ask for the base model alone
            AdaptersLibrary().check(model, configs[name])


def _as_without_exits(block: BadgeBlock, state_dict: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """A hook on `state_dict`: what belongs to the library is called as it would be without us, since its
    `save_adapter` picks tensors from there, and its files must fit a model without exits."""
    inside = f"{prefix}base_layer."
    for key in [key for key in state_dict if key.startswith(inside) and adapter_of(key) is not None]:
        state_dict[prefix + base_name(key.removeprefix(inside))] = state_dict.pop(key)


def _as_with_exits(block: BadgeBlock, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """A hook on `load_state_dict`: the block's own names, as they were before it was wrapped, are understood, too."""
    plain = [k for k in state_dict if k.startswith(prefix) and k[len(prefix) :].split(".")[0] not in block._modules]
    names = {base_name(name): name for name in block.base_layer.state_dict()} if plain else {}  # inside may be a LoRA
    for key in plain:
        name = key.removeprefix(prefix)
        state_dict[f"{prefix}base_layer.{names.get(name, name)}"] = state_dict.pop(key)


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
            "after its last norm, of which an exit's norm is a copy. Train it with original_ln_after=True."
        )
    second_pass = config.get("output_adapter") if kind is None else config.get("composition_mode") != "add"
    if placement == "mhsa" and second_pass:
        raise ValueError(
            f"placement='mhsa' is not allowed with the active adapter {name!r}: its second pass of the feed-forward "
            "part would go without the adapter. Allowed are block, ffn and none; mhsa with LoRA, and with bottleneck "
            "adapters behind the attention alone (output_adapter=False)."
        )


def _words(block: Any) -> str:
    """An adapter's name, or `Stack[one, two]`, with the weights of an average."""
    if isinstance(block, str):
        return block
    kind, inside = type(block).__name__, ", ".join(map(_words, block))
    if kind == "Stack" and len(block) == 1:  # as the library has a single adapter
        return inside
    weights = getattr(block, "weights", None)
    return f"{kind}[{inside}]" + (f" with weights {[round(w, 6) for w in weights]}" if weights else "")


def _fusions(block: Any) -> set[str]:
    """Names of the fusion layers that take part."""
    if block is None or isinstance(block, str):
        return set()
    own = {block.name} if type(block).__name__ == "Fuse" else set()
    return own.union(*map(_fusions, block))
