"""`from_adapterhub`: a parallel bottleneck adapter of AdapterHub as the bypasses of `placement="ffn"`.

A parallel adapter (`ParBnConfig`) makes of a block LN( s B(H_{m,MHA}) + H_{m,F} ), where s is its scaling. That is
H'_m of `placement="ffn"`, with the norm as LN' and s in W_up. What differs is where it goes: there to the next block,
here to exit m alone, so that block m + 1 reads the backbone's own H_m.

Source: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR 2022.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from badge_peft.integrations.adapterhub_source import AdapterSource, read_folder, read_model
from badge_peft.integrations.adapters import active_adapters
from badge_peft.model import get_badge_model
from badge_peft.tuner.architectures import BlockLayout, backbone_name, block_names, get_layout, hidden_size
from badge_peft.tuner.bypass import Bypass
from badge_peft.tuner.config import BadgeConfig

_GIVEN = ("placement", "r", "activation", "bias")  # by the adapter
_PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
_SCALING = "scaling"


def from_adapterhub(
    model_or_adapter_dir: Any,
    base_model: nn.Module,
    *,
    name: str | None = None,
    adapter_name: str = "default",
    **fields: Any,
) -> PeftModel:
    """Puts BADGE on `base_model` with the bypasses of a parallel bottleneck adapter of the adapters library.

    Given the same H_{m-1}, exit m reads what the adapter made of block m, to rounding. The exits themselves are new:
    train them. A block that the adapter left out (`leave_out`) starts with a bypass that adds nothing, and bypasses of
    blocks without an exit of ours are not made (block M, unless `final_exit="exit"`).

    Args:
        model_or_adapter_dir: A folder that `save_adapter(..., use_safetensors=True)` wrote, for which the library need
            not be installed, or a model of the library that has the adapter.
        base_model: The plain model, of the architecture that the adapter was trained on.
        name: Which adapter of a model; None: its only one.
        adapter_name: What the BADGE adapter is called.
        **fields: Of `BadgeConfig`, except for `placement`, `r`, `activation` and `bias`, which the adapter says.

    Returns:
        The PEFT model, in the mode of `base_model`.

    Raises:
        ValueError: the adapter is none of these, is damaged, or does not fit; `base_model` is unchanged then.
    """
    for field in _GIVEN:
        if field in fields:
            raise ValueError(f"{field}={fields[field]!r} is not allowed here: the adapter says it. Leave it out.")
    if isinstance(model_or_adapter_dir, nn.Module):
        source = read_model(model_or_adapter_dir, name)
    else:
        source = read_folder(Path(model_or_adapter_dir))
    active = active_adapters(base_model)
    if active:
        raise ValueError(
            f"base_model has the active adapter {', '.join(map(repr, sorted(active)))}, and would run it a second "
            "time: give a plain model, or call base_model.set_active_adapters(None)."
        )
    layout = get_layout(base_model, fields.get("block_layout"))
    weights = _by_block(source, base_model, layout)
    r = _width(source, weights)
    config = BadgeConfig(placement="ffn", r=r, activation=source.activation, bias=True, **fields)
    training = base_model.training
    model = get_peft_model(cast(Any, base_model), config, adapter_name=adapter_name)
    for block in get_badge_model(model).wrapped:
        if adapter_name not in block.badge_bypass:
            continue  # no exit of ours here
        for number, bypass in cast(nn.ModuleDict, block.badge_bypass[adapter_name]).items():
            if int(number) in weights:
                _fill(cast(Bypass, bypass), weights[int(number)], source.scaling)
    return cast(PeftModel, model.train(training))


def _by_block(source: AdapterSource, model: nn.Module, layout: BlockLayout) -> dict[int, dict[str, Tensor]]:
    """The adapter's tensors by block number and by their names inside of the adapter, checked against `model`."""
    model_type = str(getattr(model.config, "model_type", None))
    if source.model_type != model_type or layout.pre_norm:
        raise ValueError(
            f"the adapter {source.name!r} is of model_type={source.model_type!r}, and base_model of {model_type!r}: "
            "it must be the same, and one whose blocks end in a norm (all in the table but modernbert)."
        )
    names = block_names(model, layout)
    # a file of a model with a head has it, and the base may be without one, or the other way round
    prefix = f"{backbone_name(model) or getattr(model, 'base_model_prefix', '')}."
    left = set(source.tensors)
    found: dict[int, dict[str, Tensor]] = {}
    for number, block in enumerate(names, start=1):
        inside = f"{block.removeprefix(prefix)}."
        mine = {key for key in source.tensors if key.removeprefix(prefix).startswith(inside)}
        left -= mine
        if mine:
            tensors = {key.partition(f".adapters.{source.name}.")[2]: source.tensors[key] for key in mine}
            found[number] = _checked(source, number, tensors, hidden_size(model, layout, block))
    if left:
        raise ValueError(f"the adapter {source.name!r} has {min(left)}, which is in no block of base_model.")
    if not found:
        raise ValueError(f"the adapter {source.name!r} holds no tensor of a bottleneck in a block.")
    missing = [m for m in range(1, len(names) + 1) if m not in found and m - 1 not in source.leave_out]
    if missing:
        raise ValueError(
            f"the adapter {source.name!r} has no tensors for block {missing[0]}, which its leave_out="
            f"{sorted(source.leave_out)} (counted from 0) does not name: the file is damaged."
        )
    return found


def _checked(source: AdapterSource, number: int, tensors: dict[str, Tensor], d: int) -> dict[str, Tensor]:
    wanted = {*_PARTS, *([_SCALING] if isinstance(source.scaling, str) else [])}
    if set(tensors) != wanted:
        raise ValueError(
            f"the adapter {source.name!r} has {sorted(tensors)} in block {number}, not {sorted(wanted)}: the file is "
            "damaged, or adapter_config.json belongs to another one."
        )
    down_weight, down_bias, up_weight, up_bias = (tensors[part] for part in _PARTS)
    r = down_weight.shape[0]
    shapes = [tuple(t.shape) for t in (down_weight, down_bias, up_weight, up_bias)]
    if shapes != [(r, d), (r,), (d, r), (d,)] or _SCALING in tensors and tensors[_SCALING].shape not in ((1,), (d,)):
        raise ValueError(
            f"the adapter {source.name!r} has tensors of shapes {shapes} in block {number}, and base_model has "
            f"hidden_size={d}: give the model that the adapter was trained on."
        )
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"the adapter {source.name!r} has weights that are NaN or infinite in block {number}.")
    return tensors


def _width(source: AdapterSource, weights: dict[int, dict[str, Tensor]]) -> int:
    widths = {number: tensors[_PARTS[0]].shape[0] for number, tensors in weights.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"reduction_factor={source.reduction_factor!r} of the adapter {source.name!r} is not allowed: it gives "
            f"its blocks bottlenecks of {sorted(set(widths.values()))}, and BADGE has one r for all. Train it with "
            "one reduction_factor."
        )
    return next(iter(widths.values()))


@torch.no_grad()
def _fill(bypass: Bypass, tensors: dict[str, Tensor], scaling: float | str) -> None:
    """Copies an adapter; its scaling, one number or one a channel, goes into W_up and its bias."""
    down_weight, down_bias, up_weight, up_bias = (tensors[part].float() for part in _PARTS)
    scale = tensors[_SCALING].float() if isinstance(scaling, str) else torch.tensor([float(scaling)])
    bypass.down.weight.copy_(down_weight)
    bypass.down.bias.copy_(down_bias)
    bypass.up.weight.copy_(up_weight * scale.to(up_weight.device)[:, None])
    bypass.up.bias.copy_(up_bias * scale.to(up_bias.device))
