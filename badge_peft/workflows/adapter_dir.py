"""An adapter's folder as the commands see it: model, tokenizer, what training recorded, and its policy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.hub import has_tokenizer, load_pretrained
from badge_peft.registry import NAME
from badge_peft.tuner.config import BadgeConfig
from badge_peft.utils import distributed
from badge_peft.utils.files import write_json
from badge_peft.utils.logs import quiet
from badge_peft.utils.paths import is_local
from badge_peft.workflows.encode import limit_length, load_tokenizer
from badge_peft.workflows.labels import LabelSet

CONFIG = "adapter_config.json"
LOGITS = "exit_logits.safetensors"
REPORT = "report.json"


@dataclass
class Adapter:
    """A loaded adapter.

    Args:
        model: In eval mode.
        tokenizer: Of its base model, with its limit set.
        labels: What the model answers with.
        columns: What `train_adapter` recorded of its data's columns.
    """

    model: PeftModel
    tokenizer: Any
    labels: LabelSet
    columns: dict[str, str | None] = field(default_factory=dict)

    @property
    def config(self) -> BadgeConfig:
        """The adapter's config."""
        found = self.model.peft_config["default"]
        assert isinstance(found, BadgeConfig)
        return found


def open_adapter(path: str | Path, base_model: str | None = None, device: str | None = None) -> Adapter:
    """Loads an adapter, its base model and the tokenizer.

    Args:
        path: A folder that `badge-peft train` or `save_pretrained` wrote, or a Hub repository.
        base_model: Folder or repository of the base model; None takes what the adapter names.
        device: `cpu`, `cuda`, ...; None takes a GPU where there is one.

    Raises:
        OSError: there is no such adapter or base model.
        ValueError: it is no BADGE adapter, or there is no tokenizer.
    """
    check_adapter(path)
    where = _device(device)
    with quiet():
        model = load_pretrained(str(path), base_model=base_model).to(where)
    config = model.peft_config["default"]
    assert isinstance(config, BadgeConfig)
    base: Any = model.get_base_model()
    local = Path(path)
    tokenizer = load_tokenizer(path if has_tokenizer(path) else str(base_model or config.base_model_name_or_path))
    limit_length(tokenizer, base, None)
    if base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id
    names = [str(base.config.id2label[i]) for i in range(config.resolved_labels)]
    labels = LabelSet(names, config.resolved_problem_type)
    return Adapter(model, tokenizer, labels, read_report(local).get("columns") or {})


def check_adapter(path: str | Path) -> None:
    """Refuses what cannot be an adapter, without loading anything.

    Raises:
        FileNotFoundError: it looks like a path and there is nothing.
        ValueError: a folder without an adapter, or a file.
    """
    local = Path(path)
    if local.is_dir():
        if not (local / CONFIG).exists():
            raise ValueError(
                f"{path} holds no adapter: it has no {CONFIG}. Give the folder that `badge-peft train` or "
                "save_pretrained wrote."
            )
    elif local.exists():
        raise ValueError(f"{path} is a file: give the folder of an adapter.")
    elif is_local(path):
        raise FileNotFoundError(f"there is no folder {path}.")


def stored_logits(path: str | Path) -> ExitLogits:
    """The exit logits in a file, or those that `badge-peft train` left in an adapter's folder.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file holds something else.
    """
    local = Path(path)
    if not local.is_dir():
        if not local.exists():
            raise FileNotFoundError(f"there is no file or folder {path}.")
        return _load_logits(local)
    check_adapter(path)
    file = local / LOGITS
    if not file.exists():
        raise FileNotFoundError(
            f"{path} has no {LOGITS}: give the data to run through the adapter, or write the file with "
            "`badge-peft evaluate --save-logits`."
        )
    return _load_logits(file)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The fields of `adapter_config.json`.

    Raises:
        ValueError: the file is no JSON object, or not of a BADGE adapter.
    """
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(data, dict) or data.get("peft_type") != NAME:
        raise ValueError(f"{path} is not of a BADGE adapter: its peft_type must be {NAME!r}.")
    return data


def read_report(folder: str | Path) -> dict[str, Any]:
    """What `train_adapter` wrote into `report.json`; empty where there is none that can be read."""
    try:
        found = json.loads((Path(folder) / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_fit(folder: str | Path, exit_logits: ExitLogits) -> None:
    """Refuses stored logits that are not of this adapter.

    Raises:
        ValueError: they have another number of blocks or of outputs.
    """
    config = read_config(folder)
    blocks, labels = config.get("num_blocks"), config.get("num_labels")
    found = (exit_logits.depth, exit_logits.logits.shape[-1])
    if (blocks is not None and blocks != found[0]) or (labels is not None and labels != found[1]):
        raise ValueError(
            f"the exit logits are of a model with {found[0]} blocks and {found[1]} outputs, but the adapter in "
            f"{folder} has {blocks} and {labels}: give the data to run through the adapter."
        )


def write_early_exit(folder: str | Path, config: EarlyExitConfig) -> None:
    """Puts `config` into `adapter_config.json`; all else in the file stays, and a reader sees the old file or the new.

    Raises:
        ValueError: `folder` is no local adapter.
    """
    check_adapter(folder)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no local folder, so its policy cannot be changed: download it first.")
    data = read_config(folder)
    data["early_exit"] = json.loads(json.dumps(config.to_dict(), sort_keys=True))  # sorted, as PEFT has it
    write_json(Path(folder) / CONFIG, data)


def _load_logits(path: Path) -> ExitLogits:
    try:
        return ExitLogits.load(path)
    except SafetensorError as error:
        raise ValueError(f"{path} holds no exit logits: {error}.") from error


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and not distributed.on_cpu() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
