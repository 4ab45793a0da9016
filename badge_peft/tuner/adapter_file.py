"""`AdapterSource`: the weights of an adapter whose config was read, checked before a model is changed for them."""

from __future__ import annotations

import pickle
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor

from badge_peft.tuner.identity import config_in, weights_hash


@dataclass(frozen=True)
class AdapterSource:
    """Where a config was read.

    Args:
        path: A folder, or a repository of the Hub.
        needs_weights: Whether the config was saved with an adapter, so that its weights must be there.
        hub: Arguments of `hf_hub_download`, `subfolder` among them.
    """

    path: str
    needs_weights: bool
    hub: dict[str, Any] = field(default_factory=dict, repr=False)  # may hold a token

    def read_tensors(self) -> dict[str, Tensor] | None:
        """The tensors in the file; None without a file, unless it must be there."""
        folder = Path(self.path, self.hub.get("subfolder") or "")
        names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
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
        if expected is None or not Path(self.path, self.hub.get("subfolder") or "").is_dir():
            return None
        try:
            tensors = self.read_tensors() or {}
        except ValueError:  # said when they are loaded
            return None
        found, config = weights_hash(tensors), config_in(tensors)
        return None if found == expected or config is None else {**config, "weights_hash": found}


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
    try:
        tensors = AdapterSource(str(folder), needs_weights=False).read_tensors()
    except ValueError:
        return None
    return None if tensors is None else weights_hash(tensors)
