"""A small sample of the base model's weights, stored with an adapter: exits mean nothing on another backbone.

The sample survives a change of precision (it is compared with a tolerance) and weights that are stored quantized (they
are left out), and it costs a few microseconds and a few hundred bytes.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from badge_peft.tuner.architectures import base_name
from badge_peft.tuner.extensions import extension_of
from badge_peft.tuner.lora import is_lora
from badge_peft.tuner.preconditions import is_quantized

VALUES = 4  # values per parameter
PARAMETERS = 8  # parameters, spread over the depth of the model; and the last of each kind
TOLERANCE = 2**-8  # relative: the rounding of bfloat16. Fine-tuning moves weights further than that.


def fingerprint(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """Sampled values by parameter name, as the base model names it; parameters under `skip` are left out, and those
    that are not part of a pass."""
    takes_part = extension_of(model).takes_part(model)
    named = [
        (base_name(name), p)
        for name, p in model.named_parameters()
        if not is_quantized(p)
        and p.dim() == 2
        and p.device.type != "meta"
        and ".badge_" not in name
        and not is_lora(name)
        and takes_part(name)
        and ".modules_to_save." not in name
        and not any(part in skip for part in name.split("."))
    ]
    # The last two are always among them: pooler and head, which transformers draws at random where a checkpoint has
    # none.
    last = len(named) - 1
    chosen = {last - 1, *(round(i * last / (PARAMETERS - 2)) for i in range(PARAMETERS - 1))}
    # A LoRA that has been merged is in some kinds of matrices and in no other, queries and values as a rule.
    chosen |= set({re.sub(r"\.\d+(?=\.)", ".*", name): i for i, (name, _) in enumerate(named)}.values())
    return {named[i][0]: _sample(named[i][1]) for i in sorted(chosen) if 0 <= i <= last}


def check_fingerprint(model: nn.Module, expected: dict[str, list[float]]) -> None:
    """Compares `model` with the sample stored with an adapter.

    Raises:
        ValueError: a sampled weight differs by more than rounding.
    """
    parameters = {base_name(name): p for name, p in model.named_parameters() if ".modules_to_save." not in name}
    for name, values in expected.items():
        parameter = parameters.get(name)
        if parameter is None or is_quantized(parameter) or parameter.device.type == "meta":
            continue
        found = _sample(parameter)
        if len(found) != len(values) or not all(
            math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-6) for a, b in zip(found, values, strict=True)
        ):
            raise ValueError(
                f"this adapter was made for another backbone: the weight {name} starts with "
                f"{[round(v, 6) for v in found]} here and with {[round(v, 6) for v in values]} where the adapter was "
                "trained. Load the base model that adapter_config.json names (base_model_name_or_path). If that is "
                "what you did, either a LoRA had been merged into it before the exits were trained: merge it again, "
                "or save the merged model and load that one. Or its checkpoint lacks this weight and transformers "
                "drew it at random: train with final_exit='exit', or save the base model with the adapter."
            )


def _sample(parameter: torch.Tensor) -> list[float]:
    flat = parameter.detach().flatten()
    last = flat.numel() - 1
    index = [i * last // (VALUES - 1) for i in range(VALUES)]  # a float32 linspace would overshoot beyond 2^24
    return [float(f"{v:.6g}") for v in flat[index].float().tolist()]
