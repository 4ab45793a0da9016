"""What `from_adapterhub` reads: the config and tensors of one adapter, from a folder or a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from badge_peft.integrations.adapters import adapter_of, is_prepared
from badge_peft.utils.checks import is_number

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
# their names -> ours
_ACTIVATIONS = {name: name for name in ("relu", "gelu", "leaky_relu", "silu", "tanh")}
_ACTIVATIONS |= {"leakyrelu": "leaky_relu", "swish": "silu", "linear": "identity"}
_SCALINGS = ("learned", "channel")
# field -> the only value that a bypass can be, the library's default where a file has none, and what else it would be
_FIELDS: dict[str, tuple[Any, Any, str]] = {
    "is_parallel": (True, False, "a sequential adapter reads the output of the feed-forward part, not its input"),
    "output_adapter": (True, False, "a bypass is parallel to the feed-forward part"),
    "mh_adapter": (False, False, "a bypass is parallel to the feed-forward part, not after the attention"),
    "cross_adapter": (False, False, "an encoder has no cross-attention"),
    "ln_before": (False, False, "a bypass has no norm inside"),
    "ln_after": (False, False, "a bypass has no norm inside"),
    "use_gating": (False, False, "a bypass has no gate"),
    "phm_layer": (False, False, "a bypass has plain matrices (no Compacter)"),
    "inv_adapter": (None, None, "a bypass leaves the embeddings alone"),
    "original_ln_after": (True, True, "exit m reads the sum after the block's last norm"),
}
_REMEDY = (
    "Train a parallel adapter, model.add_adapter(name, config='par_bn'), or start from new bypasses, BadgeConfig()"
)


@dataclass(frozen=True)
class AdapterSource:
    """One adapter, and the type of the model that it was trained on."""

    name: str
    model_type: str
    activation: str
    scaling: float | str  # or `learned` or `channel`, which are tensors
    reduction_factor: Any
    leave_out: frozenset[int]  # blocks without it, counted from 0
    tensors: dict[str, Tensor]  # by their names in the model


def read_folder(folder: Path) -> AdapterSource:
    """The adapter that the library's `save_adapter` wrote."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no adapter of the adapters library: it has no {CONFIG}.")
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON file: {error}.") from error
    if not isinstance(stored, dict) or "name" not in stored or "model_type" not in stored:
        raise ValueError(
            f"{folder / CONFIG} is not of the adapters library, whose files name the adapter (name) and the model "
            "(model_type). An adapter of PEFT's is loaded with PeftModel.from_pretrained."
        )
    if not (folder / WEIGHTS).is_file():
        kind = f"pickled weights ({PICKLED})" if (folder / PICKLED).is_file() else f"no {WEIGHTS}"
        raise ValueError(
            f"{folder} has {kind}, and pickled files are not read: they can run code. Where you trust it, load it "
            f"with the adapters library, and save it again with model.save_adapter(folder, {stored['name']!r}, "
            "use_safetensors=True)."
        )
    if "version" not in stored:
        raise ValueError(
            f"{folder / CONFIG} has no version: it is of adapter-transformers, whose activations had other names. "
            f"Load it with the adapters library, and save it again with model.save_adapter(folder, "
            f"{stored['name']!r}, use_safetensors=True)."
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}.") from error
    return _source(str(stored["name"]), str(stored["model_type"]), stored.get("config"), tensors)


def read_model(model: nn.Module, name: str | None) -> AdapterSource:
    """An adapter that a model of the library has; None: its only one."""
    if not is_prepared(model):
        raise ValueError(
            f"{type(model).__name__} is no model of the adapters library: give one that adapters.init(model) has "
            "prepared, or the folder of a saved adapter."
        )
    known: Any = model.adapters_config
    names = list(known.adapters)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise ValueError(f"name={name!r} is not allowed: the model has {', '.join(map(repr, names)) or 'no adapter'}.")
    assert name is not None
    config: Any = known.get(name)
    tensors = {key: t for key, t in model.state_dict().items() if adapter_of(key) == name}
    return _source(name, str(getattr(model.config, "model_type", None)), config, tensors)


def _source(name: str, model_type: str, config: Any, tensors: dict[str, Tensor]) -> AdapterSource:
    if not isinstance(config, Mapping) or config.get("architecture") is not None:
        kind = config.get("architecture") if isinstance(config, Mapping) else config
        raise ValueError(
            f"the adapter {name!r} has architecture={kind!r}, which is not allowed: only a bottleneck adapter can "
            f"become bypasses. {_REMEDY}."
        )
    for field, (only, default, why) in _FIELDS.items():
        value = config.get(field, default)
        if value != only:
            raise ValueError(
                f"{field}={value!r} of the adapter {name!r} is not allowed, it must be {only!r}: {why}. {_REMEDY}."
            )
    activation = str(config.get("non_linearity")).lower()
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"non_linearity={activation!r} of the adapter {name!r} is not allowed: it must be one of "
            f"{', '.join(_ACTIVATIONS)}. {_REMEDY}."
        )
    scaling = config.get("scaling", 1.0)
    if scaling not in _SCALINGS and not is_number(scaling):
        raise ValueError(
            f"scaling={scaling!r} of the adapter {name!r} is not allowed: it must be a number, {', '.join(_SCALINGS)}."
        )
    return AdapterSource(
        name,
        model_type,
        _ACTIVATIONS[activation],
        scaling,
        config.get("reduction_factor"),
        frozenset(int(i) for i in config.get("leave_out") or ()),
        {key: tensor for key, tensor in tensors.items() if adapter_of(key) == name},
    )
