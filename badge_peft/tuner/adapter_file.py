"""An adapter's files: the weights of one whose config was read, and what ties the two together, a hash of the weights
and the config inside of their file.

Config, exit logits, report and exported graph carry the hash of the weights that they were made with, so that what was
measured on others is noticed. PEFT replaces the file of the weights and then that of the config: where a process ends
in between, the config in the weights' own file, which is written with them, says what they are.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
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


@dataclass(frozen=True)
class AdapterSource:
    """Where a config was read."""

    path: str  # a folder, or a repository of the Hub
    needs_weights: bool  # whether the config was saved with an adapter
    hub: dict[str, Any] = field(default_factory=dict, repr=False)  # of `hf_hub_download`; may hold a token

    def read_tensors(self) -> dict[str, Tensor] | None:
        """The tensors in the file; None without a file, unless it must be there."""
        folder, names = self.folder, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        file = next((folder / name for name in names if (folder / name).exists()), None)
        if file is None and not self.needs_weights:
            return None
        try:
            if file is not None or not folder.is_dir():
                with suppress(EntryNotFoundError):
                    return dict(load_peft_weights(self.path, device="cpu", **self.hub))
        except (OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError, SafetensorError) as error:
            if isinstance(error, HfHubHTTPError):
                raise
            raise ValueError(
                f"{file or self.path} cannot be read as an adapter's weights: it is damaged or was not copied whole. "
                f"Copy, download or save the adapter again. ({error})"
            ) from error
        raise ValueError(
            f"{folder} holds no weights of an adapter, neither {' nor '.join(names)}: save the adapter again, or name "
            "the folder that has them. To start anew from its config, set config.source=None."
        )

    def config_of_other_weights(self, expected: str | None) -> dict[str, Any] | None:
        """The config inside of the weights in a local folder, its `weights_hash` filled in, where their hash is not
        the one `expected`; None where it is, where there is no such config, or where nothing is expected."""
        if expected is None or not self.folder.is_dir():
            return None
        tensors = self.readable_tensors()
        found, config = weights_hash(tensors), config_in(tensors)
        return None if found == expected or config is None else {**config, "weights_hash": found}

    def readable_tensors(self) -> dict[str, Tensor]:
        """As `read_tensors`, but none where they cannot be read, which is said when they are loaded."""
        try:
            return self.read_tensors() or {}
        except ValueError:
            return {}

    @property
    def folder(self) -> Path:
        """Where the files are, if they are local."""
        return Path(self.path, self.hub.get("subfolder") or "")


def check_latest(folder: Path) -> None:
    """Refuses a folder in which PEFT would read the weights of an earlier saving."""
    read, other = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if read.exists() and other.exists() and read.stat().st_mtime_ns < other.stat().st_mtime_ns:
        raise ValueError(
            f"{read} is of an earlier saving, and PEFT would read it in the place of {other.name}: take it away, and "
            "save the adapter again."
        )


def hash_in(folder: Path) -> str | None:
    """The hash of the weights in `folder`; None where there are none that can be read."""
    tensors = AdapterSource(str(folder), needs_weights=False).readable_tensors()
    return weights_hash(tensors) if tensors else None
