"""What ties an adapter's files together: a hash of its weights, and the config inside of the file of the weights.

Config, exit logits, report and exported graph carry the hash of the weights that they were made with, so that what was
measured on others is noticed. PEFT replaces the file of the weights and then that of the config: where a process ends
in between, the config in the weights' own file, which is written with them, says what they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from badge_peft.tuner.architectures import base_name

#: Name of the tensor in an adapter's file that holds the config: JSON in UTF-8, as bytes.
CONFIG_TENSOR = "config.json"
_LENGTH = 16  # hexadecimal digits


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that say which weights these are, names, types and shapes among them."""
    digest = hashlib.sha256()
    named = {base_name(name): value for name, value in tensors.items() if name != CONFIG_TENSOR}
    for name in sorted(named):
        value = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_LENGTH]


def config_tensor(config: dict[str, Any]) -> Tensor:
    """The fields of a config as a tensor, [bytes] uint8."""
    return torch.frombuffer(bytearray(json.dumps(config, sort_keys=True).encode()), dtype=torch.uint8)


def config_in(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The fields of the config inside of a file of weights; None where there is none that can be read."""
    found = tensors.get(CONFIG_TENSOR)
    if found is None or found.dtype is not torch.uint8:
        return None
    try:
        data = json.loads(found.numpy().tobytes())
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
