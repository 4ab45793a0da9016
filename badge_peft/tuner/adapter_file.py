"""`AdapterSource`: the file beside a config that was read, looked at before a model is changed for it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

_NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)  # in the order in which PEFT looks for them
#: dtypes of the weights that an adapter is trained in. Others (float8, integers, complex) would be cast in silence.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AdapterSource:
    """Where a config was read.

    Args:
        path: A folder, or a repository of the Hub.
        needs_weights: Whether the config was saved with an adapter, so that there must be weights beside it.
        hub: Arguments of `hf_hub_download`, `subfolder` among them.
    """

    path: str
    needs_weights: bool
    hub: dict[str, Any] = field(default_factory=dict, repr=False)  # may hold a token

    def read_tensors(self) -> dict[str, Tensor] | None:
        """Names, shapes and dtypes of the tensors in the file, as tensors on "meta"; None without a file.

        Raises:
            ValueError: the file cannot be read, holds values that are not finite, or is not there and must be.
        """
        folder = Path(self.path, self.hub.get("subfolder") or "")
        file = next((folder / name for name in _NAMES if (folder / name).exists()), None)
        if file is None and self.needs_weights:
            file = None if folder.is_dir() else self._download()
            if file is None:
                raise ValueError(
                    f"{folder} holds no weights of an adapter, neither {' nor '.join(_NAMES)}: save the adapter "
                    "again, or name the folder that has them. To start anew from its config, set config.source=None."
                )
        return None if file is None else _read(file)

    def _download(self) -> Path | None:
        """The file in the Hub's cache, where PEFT looks for it again."""
        for name in _NAMES:
            try:
                return Path(hf_hub_download(self.path, name, **self.hub))
            except EntryNotFoundError:
                continue
        return None


def check_finite(name: str, value: Tensor) -> None:
    """Refuses weights with which every answer would be NaN.

    Raises:
        ValueError: `value` has an element that is infinite or not a number.
    """
    if value.dtype in FLOATS and not value.is_meta and not bool(value.isfinite().all()):
        raise ValueError(
            f"{name} in the adapter file has values that are not finite numbers: its training has failed. Train "
            "again, with a smaller learning rate, or take an earlier checkpoint."
        )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.name == SAFETENSORS_WEIGHTS_NAME:
            with safe_open(file, framework="pt") as opened:  # compares the sizes in the header with the file's
                return {name: _outline(name, opened.get_tensor(name)) for name in opened.keys()}
        # reads tensors alone; memory-mapped, so the file must be an archive of torch.save, as PEFT writes it
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {name: _outline(name, value) for name, value in weights.items()}
    except (OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): it is damaged or was not copied whole. Copy, download or save the "
            "adapter again."
        ) from error


def _outline(name: str, value: Tensor) -> Tensor:
    """`value` without its elements, which are looked at once."""
    check_finite(name, value)
    return torch.empty_like(value, device="meta")
