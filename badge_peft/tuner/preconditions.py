"""What must hold of a base model before BADGE is put on it: nothing has been changed when one of these refuses.

Two tuners on one model share PEFT's switches (`set_adapter`, `disable_adapter`, `unload`), its list of configs and its
names of saved tensors. A LoRA below ours would be switched off with our adapter, taken out with it, or left out of
every file, and nothing would say so. Merged into the weights it is safe, costs nothing per call, and answers the same.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from badge_peft.registry import PREFIX
from badge_peft.tuner.config import is_badge

# Names inside of our modules and of PEFT's wrappers, but for the block numbers.
_NAMES = frozenset(
    "down up activation norm linear dropout dense query key value output imitate gate balance "
    "carry lora_A lora_B lora_dropout lora_embedding_A lora_embedding_B lora_magnitude_vector "
    "base_model model base_layer modules_to_save original_module".split()
)
_MERGE = (
    "merge it into the weights first, `model = model.merge_and_unload()`, and put BADGE on the result (save that, so "
    "that both can be loaded again); or train a LoRA together with the exits, BadgeConfig(backbone='lora')"
)
_VECTORS = (
    "vectors before the sequence or the keys can neither be merged nor be cut with the rows that leave. Put it on the "
    "model without them, model.get_base_model()"
)
_MERGE_LAYERS = (
    "load it as a PeftModel, PeftModel.from_pretrained(base_model, folder), or make it with get_peft_model, and "
)
_ON_TOP = "model.add_adapter(name, BadgeConfig(...)) adds another adapter, model.unload() takes it off"


def check_no_other_tuner(model: nn.Module) -> None:
    """Refuses `model` when an adapter of PEFT's is on it, BADGE's own among them. One that has been merged or unloaded
    leaves nothing on the model."""
    configs = getattr(model, "peft_config", None) or {}
    kinds = {name: _kind(config) for name, config in configs.items() if isinstance(config, PeftConfig)}
    if any(isinstance(config, PeftConfig) and is_badge(config) for config in configs.values()):
        raise ValueError(f"the model already carries a BADGE adapter ({_names(kinds)}): {_ON_TOP}.")
    if isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        has_layers = isinstance(model, BaseTuner) or isinstance(getattr(model, "base_model", None), BaseTuner)
        found = f"a {type(model).__name__} with the adapter {_names(kinds)}"
        raise ValueError(f"BADGE cannot be put on {found}: {_MERGE if has_layers else _VECTORS}.")
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            of = f" of the adapter {_names(kinds)}" if kinds else ""
            raise ValueError(
                f"BADGE cannot be put on a model with a live {type(module).__module__}.{type(module).__name__}{of} at "
                f"{name!r}: {_MERGE_LAYERS}{_MERGE}."
            )
    if configs:
        raise ValueError(
            f"the model has no layer of the adapter {_names(kinds)} any more, but still its config: "
            "`del model.peft_config` before BADGE is put on it."
        )


class BadgeConfigs(dict[str, PeftConfig]):
    """The configs of a model's adapters by name, BADGE's alone. PEFT lets a tuner that is put on top write its config
    into the dict that it finds, over ours."""

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        if not is_badge(config):
            raise ValueError(
                f"{_names({name: _kind(config)})} cannot be put on a model that carries a BADGE adapter "
                f"({_names({known: _kind(self[known]) for known in self})}): PEFT has one method per model, and would "
                "lose the exits. Train a LoRA together with the exits, BadgeConfig(backbone='lora'); or take BADGE "
                "off, model.unload(), train the other adapter, merge it, and put BADGE on the result."
            )
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As a dict's, entry by entry."""
        for name, config in dict(*args, **kwargs).items():
            self[name] = config


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _names(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items()) or "of PEFT"


def check_name(model: nn.Module, adapter_name: str) -> None:
    """PEFT tells the tensors of adapters apart by `.name.` in their keys: no key may hold that for another reason."""
    named = [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
    taken = _NAMES.union(part for name, _ in named if ".badge_" not in name for part in name.split("."))
    ours = adapter_name.startswith(PREFIX)  # by which parameters of exits are known, for a learning rate of their own
    if ours or adapter_name in taken or adapter_name.isdigit():
        raise ValueError(
            f"an adapter cannot be called {adapter_name!r}: a module of the model or of the adapter has that name or "
            "starts with it, and the two would be confused. Choose another name: get_peft_model and load_adapter "
            "take it as adapter_name='exits', say."
        )
    if "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"an adapter cannot be called {adapter_name!r}: torch cannot store a module under that name. Choose "
            "another name, without a dot."
        )


def check_devices(model: nn.Module) -> None:
    """PEFT puts new modules where the weights of their block are, and on a disk there is nothing to read them back."""
    away = [name for name, device in (getattr(model, "hf_device_map", None) or {}).items() if device == "disk"]
    if away:
        raise ValueError(
            f"device_map puts {', '.join(away)} on 'disk', and an adapter cannot be put there: load the model with "
            "device_map='cpu' or a GPU's number, and call accelerate.disk_offload on the PEFT model."
        )


def is_quantized(weight: Tensor) -> bool:
    """Whether `weight` holds integers: it is a tensor of them (bitsandbytes), or shows floats and has them inside
    (torchao)."""
    if not weight.is_floating_point():
        return True
    if not is_traceable_wrapper_subclass(weight):
        return False
    names, _ = weight.__tensor_flatten__()
    return any(not getattr(weight, name).is_floating_point() for name in names)


def check_trainable(model: nn.Module, modules_to_save: list[str], backbone: str) -> None:
    """Refuses to train what is quantized; `modules_to_save` are ends of names."""
    for name, parameter in model.named_parameters():
        if ".badge_" in name or not is_quantized(parameter):
            continue
        quantized = f"{name} is quantized ({type(parameter).__name__} of {parameter.dtype})"
        if backbone == "full":
            raise ValueError(
                f"backbone='full' is not allowed on this model: {quantized} and cannot be trained. Use "
                "backbone='frozen' or 'lora', or load the model without quantization."
            )
        parts = name.split(".")[:-1]
        for module in modules_to_save:
            if any(part.endswith(module) for part in parts):  # as PEFT looks for them
                raise ValueError(
                    f"{module!r} cannot be trained on this model: {quantized}. Leave the head out of the quantization "
                    "(llm_int8_skip_modules, modules_to_not_convert: the name of the module), or keep it: "
                    "train_head=False, and no such name in modules_to_save."
                )
