"""The base model's own weights: whether an adapter trains them (`backbone="full"`), and which; and a small sample of
them, stored with an adapter, since exits mean nothing on another backbone.

The sample survives a change of precision (it is compared with a tolerance), weights that are stored quantized (they
are left out) and a vocabulary that has grown, and it costs a few microseconds and some two thousand bytes.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from badge_peft.registry import PREFIX
from badge_peft.tuner.architectures import (
    BlockLayout,
    base_name,
    block_names,
    final_norm_name,
    get_layout,
    own_pooler,
)
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.extensions import extension_of
from badge_peft.tuner.lora import is_lora
from badge_peft.tuner.preconditions import is_quantized

VALUES = {2: 4, 1: 2}  # dimensions of a parameter -> values of it
PARAMETERS = 8  # matrices, spread over the depth of the model; and the last of each kind
TOLERANCE = 2**-8  # relative: the rounding of bfloat16. Fine-tuning moves weights further than that.
#: What of the model's config changes what its weights give, where it has such a field.
FIELDS = ("hidden_act", "hidden_activation", "activation", "layer_norm_eps", "norm_eps")
_ROWS = "input_embeddings.rows"
_SETUP = "config.setup"

Sample = dict[str, list[Any]]


def is_own_weight(name: str) -> bool:
    """Whether a parameter, or an entry of a state dict, is the base model's own: no adapter's and no saved head's."""
    others = (f".{PREFIX}", ".modules_to_save.", ".original_module.")
    return not is_lora(name) and not any(part in name for part in others)


def train_for(model: nn.Module, full: BadgeConfig | None) -> None:
    """Trains the model's own weights, as far as the exits of `full` read them; None: freezes them all."""
    unused = () if full is None else _unused_by_exits(model, full)
    for name, parameter in model.named_parameters():
        if is_own_weight(name):
            trained = full is not None and not name.startswith(unused)
            parameter.requires_grad = trained and parameter.is_floating_point()


def is_trained(model: nn.Module, layout: BlockLayout) -> bool:
    """Whether any weight that the blocks' outputs depend on is trained: neither ours nor the model's head."""
    return any(
        p.requires_grad and ".badge_" not in name and name.split(".")[0] not in layout.head
        for name, p in model.named_parameters()
    )


def _unused_by_exits(model: nn.Module, config: BadgeConfig) -> tuple[str, ...]:
    """Prefixes of parameters that no exit reads, when `final_exit="exit"`: the model's own head and pooler, and the
    norm after block M where exit M has its own."""
    if config.final_exit == "base_head":
        return ()
    layout = get_layout(model, config.block_layout)
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] in (*layout.head, "pooler")]
    if config.exit_type == "shared_pooled":  # all exits read the pooler
        pooler = own_pooler(model, layout)
        names = [name for name in names if all(part is not pooler for part in model.get_submodule(name).modules())]
    blocks = block_names(model, layout)
    if config.placement != "none":
        if layout.pre_norm:
            names.append(final_norm_name(model, layout))
        elif blocks.count(blocks[-1]) == 1:  # a shared block (ALBERT) runs before, too
            names.append(f"{blocks[-1]}.base_layer.{layout.last_norm}")
    return tuple(f"{name}." for name in names)


def fingerprint(model: nn.Module, skip: tuple[str, ...] = ()) -> Sample:
    """Sampled values by parameter name, as the base model names it, `FIELDS` of its config, and the setup of the
    library that has prepared it; parameters under `skip` are left out, and those that are not part of a pass."""
    extension = extension_of(model)
    takes_part, setup = extension.takes_part(model), extension.setup(model)
    named = [
        (base_name(name), p)
        for name, p in model.named_parameters()
        if not is_quantized(p)
        and p.dim() in VALUES
        and p.device.type != "meta"
        and ".badge_" not in name
        and not is_lora(name)
        and takes_part(name)
        and ".modules_to_save." not in name
        and not any(part in skip for part in name.split("."))
    ]
    # The last two are always among them: pooler and head, which transformers draws at random where a checkpoint has
    # none.
    matrices = [(name, p) for name, p in named if p.dim() == 2]
    last = len(matrices) - 1
    chosen = {last - 1, *(round(i * last / (PARAMETERS - 2)) for i in range(PARAMETERS - 1))}
    sampled = {matrices[i][0] for i in chosen if 0 <= i <= last}
    # A LoRA that has been merged is in some kinds of matrices and in no other, queries and values as a rule; BitFit
    # trains biases alone.
    sampled |= set({re.sub(r"\.\d+(?=\.)", ".*", name): name for name, _ in named}.values())
    found: Sample = {name: _sample(p, VALUES[p.dim()]) for name, p in named if name in sampled}
    if setup is not None:
        found[_SETUP] = [setup]
    if not found:
        return {}
    config: Any = getattr(model, "config", None)
    found.update({f"config.{name}": [getattr(config, name)] for name in FIELDS if hasattr(config, name)})
    embeddings = _input_embeddings(model)
    return found if embeddings is None else {**found, _ROWS: [embeddings.shape[0]]}


def stored_setup(expected: Sample) -> str | None:
    """The setup, as the extension says it, with which the exits were trained; None: there was none."""
    return expected.get(_SETUP, [None])[0]


def check_fingerprint(model: nn.Module, expected: Sample) -> None:
    """Refuses a `model` that differs from the sample by more than rounding."""
    for name in FIELDS:
        here = getattr(getattr(model, "config", None), name, None)
        for there in expected.get(f"config.{name}", []):
            if here is not None and here != there:
                raise ValueError(
                    f"this adapter was made for another backbone: its config has {name}={here!r} here and {there!r} "
                    "where the adapter was trained. Load the base model that adapter_config.json names "
                    "(base_model_name_or_path), with its own config."
                )
    embeddings, (rows,) = _input_embeddings(model), expected.get(_ROWS, [None])
    parameters = {base_name(name): p for name, p in model.named_parameters() if ".modules_to_save." not in name}
    for name, values in expected.items():
        parameter = parameters.get(name)
        if parameter is None or is_quantized(parameter) or parameter.device.type == "meta":
            continue
        kept = parameter[:rows] if parameter is embeddings else parameter  # tokens may have been added since
        found = _sample(kept, len(values))
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


def _input_embeddings(model: Any) -> torch.Tensor | None:
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):  # a model that does not say
        return None


def _sample(parameter: torch.Tensor, count: int) -> list[float]:
    flat = parameter.detach().flatten()
    last = flat.numel() - 1
    index = [i * last // max(1, count - 1) for i in range(count)]  # a float32 linspace would overshoot beyond 2^24
    return [float(f"{v:.6g}") for v in flat[index].float().tolist()]
