"""`BadgeModel`: the tuner that PEFT calls to put BADGE on a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from badge_peft.early_exit.mixin import EarlyExitMixin, early_exit_model, validate_policy
from badge_peft.model_card import write_card_of_adapter
from badge_peft.outputs import ignore_exit_logits, restore_output_keys
from badge_peft.registry import PREFIX
from badge_peft.tuner import backbone, checkpoint, lora
from badge_peft.tuner.adapter_file import CONFIG_TENSOR, weights_hash
from badge_peft.tuner.architectures import BlockLayout, block_names, exit_norm, final_norm_name, get_layout, own_pooler
from badge_peft.tuner.config import BadgeConfig, exit_numbers, own_exits
from badge_peft.tuner.exits import AdapterExits
from badge_peft.tuner.extensions import extension_of
from badge_peft.tuner.layer import MERGE_ERROR, BadgeBlock
from badge_peft.tuner.preconditions import BadgeConfigs, check_no_other_tuner
from badge_peft.tuner.prepare import pooling_kind, prepared_copy
from badge_peft.tuner.saved_modules import has_own_labels, resized, saved_names, watch_saved_modules


class BadgeModel(EarlyExitMixin, BaseTuner):
    """Block-wise bypasses and early exits on a Hugging Face encoder; `get_peft_model` makes it.

    The blocks are wrapped in place and the model's own layer loop stays in control, so masks, rotary tables and
    attention implementations need no copy of modeling code.
    """

    prefix = PREFIX
    tuner_layer_cls = BadgeBlock
    target_module_mapping: dict[str, Any] = {}
    layout: BlockLayout
    block_names: list[str]  # in the order of a pass, a shared block once for each time it runs
    # refuses inject_adapter_in_model, which would drop this class and with it every exit's loss
    uses_shared_state = True

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_no_other_tuner(model)  # PEFT would put our config among those of another tuner, and fail later
        super().__init__(model, *args, **kwargs)
        self._own_labels: dict[str, Any] = {}  # of the model's config, before `name_labels`
        self.peft_config = BadgeConfigs(self.peft_config)
        self.model.peft_config = self.peft_config  # where a tuner on top would look

    # ------------------------------------------------------------------------------------------- what others may ask

    def exit_layers(self, adapter_name: str | None = None) -> list[int]:
        """Block numbers of the exits of `adapter_name` (None: the active adapter), shallow to deep; the last is M."""
        return exit_numbers(self.config_of(adapter_name), self.num_blocks)

    def adapter_exits(self, adapter_name: str) -> AdapterExits:
        """What a call has to know of the exits of `adapter_name`."""
        config = self.config_of(adapter_name)
        if config.source is not None and config.inference_mode:
            raise ValueError(
                f"the weights of adapter {adapter_name!r} have never been loaded: "
                f"model.load_adapter({config.source.path!r}, {adapter_name!r}) loads them. To train an adapter anew "
                "with the config of a saved one, set config.source=None before it is put on a model."
            )
        numbers = self.exit_layers(adapter_name)
        past_future: list[nn.Module] = []
        if config.exit_type == "past_future":
            blocks = {m: block for block in self.wrapped for m in numbers if block.has_exit(adapter_name, m)}
            past_future = [blocks[m].own_exit(adapter_name, m) for m in numbers]
        return AdapterExits(
            adapter_name,
            numbers,
            pooling_kind(self.model, config, self.layout),
            config.resolved_labels,
            config.resolved_problem_type,
            config.final_exit == "exit",
            self.model.get_submodule(final_norm_name(self.model, self.layout)) if self.layout.final_norm else None,
            past_future,
            self.wrapped[0].badge_doubt[adapter_name] if config.learn_to_exit else None,
            config.carry,
            own_pooler(self.model, self.layout, adapter_name) if config.exit_type == "shared_pooled" else None,
        )

    @property
    def wrapped(self) -> list[BadgeBlock]:
        """The blocks, each once."""
        blocks = map(self.block_at, range(1, self.num_blocks + 1))
        return list(dict.fromkeys(block for block in blocks if isinstance(block, BadgeBlock)))

    def block_at(self, number: int) -> BadgeBlock:
        """The block that has exit `number`; the first one has exit 0, too."""
        module: Any = self.model
        for part in self._paths[max(number, 1) - 1]:  # as `get_submodule`, in a tenth of its time
            module = module._modules[part]
        return module

    @property
    def num_blocks(self) -> int:
        """M."""
        return len(self.block_names)

    @property
    def adapters_enabled(self) -> bool:
        """False inside `disable_adapter()`, and when no adapter is left."""
        return bool(self.active_adapters) and not self.block_at(1).disable_adapters

    def config_of(self, adapter_name: str | None = None) -> BadgeConfig:
        """The config of `adapter_name` (None: the active adapter).

        Raises:
            ValueError: there is no such adapter.
        """
        name = adapter_name if adapter_name is not None else self.single_active_adapter()
        if name not in self.peft_config:
            raise ValueError(f"there is no adapter {name!r}; the model has {', '.join(map(repr, self.peft_config))}.")
        return cast(BadgeConfig, self.peft_config[name])

    def label_names(self, adapter_name: str | None = None) -> list[str]:
        """Names of the labels of `adapter_name` (None: the active adapter): its own, else those of the base model
        where it has as many, else transformers' `LABEL_0`, ..."""
        config = self.config_of(adapter_name)
        base = self._own_labels.get("id2label") or getattr(self.model.config, "id2label", None) or {}
        count = config.resolved_labels
        named = {**base} if len(base) == count else {}
        return list(config.label_names or (str(named.get(i, f"LABEL_{i}")) for i in range(count)))

    def weights_hash(self, adapter_name: str | None = None) -> str:
        """Of the weights of `adapter_name` (None: the active adapter) as they are now, as `save_pretrained` records it
        in `adapter_config.json`."""
        name = self.single_active_adapter() if adapter_name is None else adapter_name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about embeddings that are resized, or whose first size cannot be told
            tensors = get_peft_model_state_dict(self, adapter_name=name)
        # as the PEFT model around this one names them
        return weights_hash({f"base_model.{name}": value for name, value in tensors.items() if name != CONFIG_TENSOR})

    def single_active_adapter(self) -> str:
        """The active adapter.

        Raises:
            ValueError: none is active, or several: a pass has one set of exits.
        """
        active = self.active_adapters
        if len(active) != 1:
            raise ValueError(f"BADGE needs one active adapter, got {active!r}: call set_adapter with one name.")
        return active[0]

    # ------------------------------------------------------------------------------------------ injection, by PEFT
    # PEFT types its hooks for any config and hands a tuner those of its own kind alone: hence `ignore[override]`.

    def _check_new_adapter_config(self, config: BadgeConfig) -> None:  # type: ignore[override]  # typed for any
        name = self._name_of(config)
        if len(self.peft_config) > 1 and self._owner(self.peft_config) is not None:
            raise ValueError(
                "backbone='full' trains the base model itself, so such an adapter is alone on its model: put "
                f"{name!r} on another copy of the base model."
            )

    def _prepare_adapter_config(  # type: ignore[override]  # PEFT types it for any config
        self, peft_config: BadgeConfig, model_config: dict[str, Any]
    ) -> BadgeConfig:
        name = self._name_of(peft_config)
        own = prepared_copy(self.model, peft_config, name)
        try:
            validate_policy(own.early_exit, own, cast(int, own.num_blocks))
        except ValueError as error:
            if own.source is None:
                raise
            raise ValueError(
                f"{error} This is early_exit in the adapter_config.json of {own.source.path}: set it to null there, "
                "and calibrate the adapter again."
            ) from error
        layout = get_layout(self.model, own.block_layout)
        checkpoint.check_file(self.model, own, layout)
        own.after_saving = write_card_of_adapter  # the one place where PEFT gives a tuner the folder
        self.peft_config[name] = own
        self.layout, self.block_names = layout, block_names(self.model, layout)
        self._paths = [name.split(".") for name in self.block_names]
        return own

    def _prepare_model(self, peft_config: BadgeConfig, model: nn.Module) -> None:  # type: ignore[override]  # typed for any
        if peft_config.backbone == "lora":
            wanted = lora.lora_config(peft_config.lora, self.layout)
            lora.inject(model, self._name_of(peft_config), wanted, self.block_names, peft_config.inference_mode)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter on the model; PEFT calls it for the first and for those that are added."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.config_of(adapter_name)
        if has_own_labels(self.model, config, self.layout):
            copies = getattr(self.model, self.layout.head[-1]).modules_to_save
            std = getattr(self.model.config, "initializer_range", 0.02)
            copies[adapter_name] = resized(copies[adapter_name], config.resolved_labels, std)
        watch_saved_modules(model)

    def _name_of(self, config: BadgeConfig) -> str:
        return next(name for name, known in self.peft_config.items() if known is config)

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        ignore_exit_logits(model)
        self.extension_hooks = extension_of(model).attach(model)

    def _create_and_replace(  # type: ignore[override]  # PEFT types it for any config
        self,
        peft_config: BadgeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, BadgeBlock):
            numbers = [m for m, name in enumerate(self.block_names, start=1) if name == current_key]
            block = BadgeBlock(target, numbers, self.layout)
            self._replace_module(parent, target_name, block, target)
            target = block
        norm = exit_norm(self.model, current_key, self.layout)
        exits = own_exits(peft_config, self.num_blocks)
        target.update_layer(adapter_name, peft_config, exits, norm, own_pooler(self.model, self.layout))
        if adapter_name not in self.active_adapters:
            target.set_requires_grad(adapter_name, requires_grad=False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own also rebinds .weight, which a block does not have

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        full = self._owner(self.active_adapters)
        backbone.train_for(self.model, None if full is None or full.inference_mode else full)

    def _owner(self, adapter_names: Iterable[str]) -> BadgeConfig | None:
        """The config among those of these adapters that has the backbone to itself."""
        return next((config for name in adapter_names if (config := self.config_of(name)).backbone == "full"), None)

    def disable_adapter_layers(self) -> None:
        """The model answers as the base model, until `enable_adapter_layers`."""
        self._enable_adapter_layers(enabled=False)  # PEFT's own reads our `bias` as if it were LoRA's

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes `adapter_name` the active adapter, with the LoRA that belongs to it."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        full = self._owner(self.active_adapters)
        if full is not None:
            backbone.train_for(self.model, None if inference_mode else full)
        lora.set_active(self.model, self.active_adapters, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Trains or freezes adapters, and with `backbone="full"` the backbone that belongs to one."""
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        full = self._owner(name for name in names if name in self.peft_config)
        if full is not None:
            backbone.train_for(self.model, full if requires_grad else None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter, with the LoRA that belongs to it. Where it was active, another one becomes it."""
        was_active = adapter_name in self.active_adapters
        trained_backbone = adapter_name in self.peft_config and self._owner([adapter_name]) is not None
        super().delete_adapter(adapter_name)
        for layer in lora.lora_layers(self.model):
            layer.delete_adapter(adapter_name)
        if trained_backbone:
            backbone.train_for(self.model, None)
        if was_active and self.active_adapters:  # PEFT leaves its head out where the deleted one had none
            self.set_adapter(self.active_adapters, inference_mode=self.config_of().inference_mode)

    # ------------------------------------------------------------------------------------------------------- leaving

    def name_labels(self, names: list[str]) -> None:
        """Makes `names` the labels in the model's config, until `unload`, where the base model has as many."""
        config: Any = self.model.config
        if len(names) != config.num_labels:  # which transformers counts by these names
            return
        self._own_labels = self._own_labels or {"id2label": config.id2label, "label2id": config.label2id}
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}

    def unload(self) -> nn.Module:
        """The base model without bypasses and exits, working as before; the trained one after `backbone="full"`."""
        full = self._owner(self.peft_config) is not None
        for module in self.model.modules():
            if isinstance(module, BadgeBlock):
                module.remove_hooks()
            elif isinstance(module, AuxiliaryTrainingWrapper) and not full:
                module.set_adapter([])  # PEFT would leave the adapter's trained head in the base model
        restore_output_keys(self.model)
        if not full:
            for name, value in self._own_labels.items():
                setattr(self.model.config, name, value)
        for handle in self.extension_hooks:
            handle.remove()
        super().unload()
        return super().unload()  # PEFT does not look inside of tuner layers, where a LoRA of ours is

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_ERROR)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not possible: an exit is not linear in its weights."""
        raise NotImplementedError(
            "BADGE adapters cannot be added up: an activation, a LayerNorm and a softmax follow their weights, "
            "so the exits of a mean are not the mean of the exits. Keep the adapters and choose one with "
            "set_adapter(name), or train one adapter on the data of all."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names is not supported at full depth: call model.early_exit_forward(**batch, adapter_names="
                "[...]), or set_adapter(name) and run the rows of each adapter apart."
            )
        yield

    # ------------------------------------------------------------------------------------------ saving, called by PEFT

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]  # PEFT types it for any config
        cls, model: nn.Module, config: BadgeConfig, adapter_name: str, state_dict: dict[str, Tensor], **others: Any
    ) -> dict[str, Tensor]:
        base: Any = early_exit_model(model)
        return checkpoint.saved_state_dict(config, adapter_name, state_dict, base.model.__dict__.get("name_or_path"))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"(\.(?:{PREFIX}|lora_)\w+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]  # PEFT types it for any config
        cls, model: nn.Module, config: BadgeConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        names = saved_names(model, adapter_name)
        named = {names.get(name, name): value for name, value in state_dict.items() if name != CONFIG_TENSOR}
        checkpoint.keep_unread(model, config, adapter_name, named)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)
        checkpoint.check_weights(model, config, adapter_name, mapped)
        if config.source is None:  # it has weights already
            _warn_of_others(get_badge_model(model), adapter_name, state_dict)
        checkpoint.materialize(model, mapped)
        config.source = None
        return mapped


def _warn_of_others(badge: BadgeModel, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Warns where an adapter is about to get the weights of another one of the model."""
    others = [name for name in badge.peft_config if name != adapter_name]
    loaded = weights_hash(state_dict) if others else None
    other = next((name for name in others if badge.weights_hash(name) == loaded), None)
    if other is not None:
        warnings.warn(
            f"the adapter {adapter_name!r} gets the weights of {other!r}: the folder that is loaded holds these, and "
            f"those of {adapter_name!r}, if any, in a folder of its name. transformers' Trainer loads so with "
            "load_best_model_at_end=True: call the adapter that is trained 'default', or load the folder of its name "
            "in the checkpoint with load_adapter.",
            stacklevel=2,
        )


def get_badge_model(model: nn.Module) -> BadgeModel:
    """The `BadgeModel` inside a PEFT model.

    Raises:
        ValueError: there is none.
    """
    return cast(BadgeModel, early_exit_model(model))
