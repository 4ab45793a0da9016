"""Weights that are stored as integers: a base model in int8 or int4 serves and is frozen, but cannot be trained."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_quantised(weight: Tensor) -> bool:
    """Whether `weight` holds integers: it is a tensor of them (bitsandbytes), or shows floats and has them inside
    (torchao)."""
    if not weight.is_floating_point():
        return True
    if not is_traceable_wrapper_subclass(weight):
        return False
    names, _ = weight.__tensor_flatten__()
    return any(not getattr(weight, name).is_floating_point() for name in names)


def check_trainable(model: nn.Module, modules_to_save: list[str], backbone: str) -> None:
    """Refuses to train what is quantised, before anything is changed.

    Args:
        model: The base model.
        modules_to_save: Ends of the names of the modules that are trained beside the exits.
        backbone: As in `BadgeConfig`.

    Raises:
        ValueError: a weight that would be trained is quantised.
    """
    for name, parameter in model.named_parameters():
        if ".badge_" in name or not is_quantised(parameter):
            continue
        if backbone == "full":
            raise ValueError(
                f"backbone='full' is not allowed on this model: {name} is quantised ({_kind(parameter)}) and cannot "
                "be trained. Use backbone='frozen' or 'lora', or load the model without quantisation."
            )
        parts = name.split(".")[:-1]
        for module in modules_to_save:
            if any(part.endswith(module) for part in parts):  # as PEFT looks for them
                raise ValueError(
                    f"{module!r} cannot be trained on this model: {name} is quantised ({_kind(parameter)}). Leave the "
                    "head out of the quantisation (llm_int8_skip_modules or modules_to_not_convert, with the name of "
                    "the module), or keep it as it is: train_head=False, and no such name in modules_to_save."
                )


def _kind(parameter: Tensor) -> str:
    return f"{type(parameter).__name__} of {parameter.dtype}"
