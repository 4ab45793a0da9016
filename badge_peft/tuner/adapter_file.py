"""The file of an adapter's weights, looked at before a model is changed for it, and who reads it.

PEFT puts an adapter on the model and reads its weights only then: a file that cannot be read would leave an adapter
with random exits behind.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from badge_peft.tuner.config import BadgeConfig

_NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)  # in the order in which PEFT looks for them
_SOURCE = "_source"  # where a config remembers what it was read from


def remember_source(config: BadgeConfig, path: str | Path, needs_weights: bool, hub: dict[str, Any]) -> None:
    """Notes in `config` where it was read.

    Args:
        config: The config.
        path: A folder, or a repository of the Hub.
        needs_weights: Whether the weights are to be read next, so that there must be some.
        hub: Arguments of `hf_hub_download`, `subfolder` among them.
    """
    config.__dict__[_SOURCE] = (str(path), needs_weights, hub)


def check_source(config: BadgeConfig) -> None:
    """Checks the weights beside a config that was read from a file, once; of a safetensors file it reads the header.

    Raises:
        ValueError: the weights cannot be read, or there are none where there must be.
    """
    path, needs_weights, hub = config.__dict__.pop(_SOURCE, (None, False, {}))
    if path is None:
        return
    folder = Path(path, hub.get("subfolder") or "")
    file = next((folder / name for name in _NAMES if (folder / name).exists()), None)
    if file is None and needs_weights:
        file = None if folder.is_dir() else _download(path, hub)
        if file is None:
            raise ValueError(
                f"{folder} holds no weights of an adapter, neither {' nor '.join(_NAMES)}: save the adapter again, or "
                "name the folder that has them."
            )
    if file is not None:
        _check_readable(file)


def is_load_adapter(arguments: dict[str, Any]) -> bool:
    """Whether a config is read for `PeftModel.load_adapter`, by the arguments of the read."""
    return "ephemeral_gpu_offload" in arguments  # nobody else names it


def is_from_pretrained() -> bool:
    """Whether this is inside of `PeftModel.from_pretrained`: then nobody else has the PEFT model yet.

    PEFT gives no sign of it, so the open calls are looked at.
    """
    code = PeftModel.from_pretrained.__code__
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame.f_code is code


def _download(repo: str, hub: dict[str, Any]) -> Path | None:
    """The file in the Hub's cache, where PEFT will look for it again."""
    for name in _NAMES:
        try:
            return Path(hf_hub_download(repo, name, **hub))
        except EntryNotFoundError:
            continue
    return None


def _check_readable(file: Path) -> None:
    try:
        if file.name == SAFETENSORS_WEIGHTS_NAME:
            with safe_open(file, framework="pt"):  # compares the sizes that the header states with the file's
                return
        if zipfile.is_zipfile(file):
            return
        reason = "it is no archive of torch.save"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    raise ValueError(
        f"{file} cannot be read ({reason}): it is damaged or was not copied whole. Copy, download or save the adapter "
        "again."
    )
