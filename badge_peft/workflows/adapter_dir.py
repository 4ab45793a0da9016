"""An adapter's folder as the commands see it: model, tokenizer, what training recorded, and its policy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import validate_policy
from badge_peft.early_exit.policies import build_policy, policy_class
from badge_peft.hub import has_tokenizer, load_pretrained
from badge_peft.model import BadgeModel, get_badge_model
from badge_peft.model_card import CONFIG, read_report
from badge_peft.registry import NAME
from badge_peft.utils import distributed
from badge_peft.utils.files import write_json
from badge_peft.utils.logs import quiet
from badge_peft.utils.paths import is_local
from badge_peft.workflows.columns import Names
from badge_peft.workflows.data import TextDataset, read_examples
from badge_peft.workflows.encode import encode, load_tokenizer
from badge_peft.workflows.encode_tokens import encode_tokens
from badge_peft.workflows.kinds import check_kind
from badge_peft.workflows.labels import LabelSet
from badge_peft.workflows.settings import Columns


@dataclass
class Adapter:
    """A loaded adapter.

    Args:
        model: In eval mode.
        tokenizer: Of its base model, with its limit set.
        labels: What the model answers with.
        columns: What is known of its training data's columns.
        task: `classification`, `ranking` or `tokens`.
    """

    model: PeftModel
    tokenizer: Any
    labels: LabelSet
    columns: Names = field(default_factory=dict)
    task: str = "classification"

    @property
    def badge(self) -> BadgeModel:
        """The tuner."""
        return get_badge_model(self.model)

    @property
    def tags(self) -> list[str] | None:
        """Its labels, where it labels tokens; else None."""
        return self.labels.names if self.task == "tokens" else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def read(self, data: str | Path, columns: Columns = Columns()) -> TextDataset:
        """Rows of a data set, in which a column that is not named is found as it was in training.

        Raises:
            ValueError: the rows are for another kind of task.
        """
        found = read_examples(data, columns, recorded=self.columns)
        check_kind(found, self.task == "tokens", "the adapter", data)
        return found

    def encode(self, examples: TextDataset) -> Dataset:
        """Token columns, and `labels` where the rows have some; candidates have their relevance elsewhere."""
        if self.task == "tokens":
            return encode_tokens(examples, self.tokenizer, self.labels.names)
        if self.task == "ranking":
            return encode(examples, self.tokenizer)
        return encode(examples, self.tokenizer, self.labels.targets(examples, scored=True))

    def early_exit_config(self, **overrides: Any) -> EarlyExitConfig:
        """The adapter's own config with `overrides`, of which None leaves a field alone. Another policy starts from
        its own defaults: a threshold of one policy means nothing to another.

        Raises:
            ValueError: a field has a value that is not allowed, or that the policy does not read, or the policy does
                not suit the model.
        """
        config = self._overridden(overrides)
        validate_policy(config, self.badge.config_of(), self.badge.num_blocks)
        for name in self.unread(**overrides):
            raise ValueError(
                f"{name}={overrides[name]!r} changes nothing, as policy={config.policy!r} does not read it: leave it "
                "out, or name another policy with --policy."
            )
        return config

    def unread(self, **overrides: Any) -> list[str]:
        """Those of the `overrides` of `early_exit_config` that the policy in force does not read."""
        policy = build_policy(self._overridden(overrides))
        reads = {
            "threshold": policy.uses_threshold(self.labels.problem_type),
            "patience": policy.counts_exits,
            "depth": policy.takes_depth,
        }
        return [name for name, is_read in reads.items() if not is_read and overrides.get(name) is not None]

    def _overridden(self, overrides: dict[str, Any]) -> EarlyExitConfig:
        given = {name: value for name, value in overrides.items() if value is not None}
        return EarlyExitConfig.of(self.badge.get_early_exit_config(), **given)


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
    where = choose_device(device)
    with quiet():
        model = load_pretrained(str(path), base_model=base_model).to(where)
    config = get_badge_model(model).config_of()
    base: Any = model.get_base_model()
    named = path if has_tokenizer(path) else base_model or config.base_model_name_or_path
    names = [str(base.config.id2label[i]) for i in range(config.resolved_labels)]
    return Adapter(
        model,
        load_tokenizer(str(named), base),
        LabelSet(names, config.resolved_problem_type),
        config.data_columns or recorded_columns(path),
        "tokens" if config.reads_tokens else recorded_task(path, config.early_exit),
    )


def check_adapter(path: str | Path) -> None:
    """Refuses what cannot be an adapter, without loading anything.

    Raises:
        FileNotFoundError: it looks like a path and there is nothing.
        ValueError: a folder without an adapter, or a file.
    """
    local = Path(path)
    if local.is_file():
        raise ValueError(f"{path} is a file: give the folder of an adapter.")
    if local.is_dir() and not (local / CONFIG).exists():
        raise ValueError(
            f"{path} holds no adapter: it has no {CONFIG}. Give the folder that `badge-peft train` or save_pretrained "
            "wrote."
        )
    if is_local(path) and not local.exists():
        raise FileNotFoundError(f"there is no folder {path}.")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The fields of `adapter_config.json`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no local adapter, or not one of BADGE.
    """
    check_adapter(folder)
    path = Path(folder) / CONFIG
    if not path.exists():
        raise ValueError(f"{folder} is no local folder, so its policy cannot be changed: download it first.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(data, dict) or data.get("peft_type") != NAME:
        raise ValueError(f"{path} is not of a BADGE adapter: its peft_type must be {NAME!r}.")
    return data


def recorded_columns(folder: str | Path) -> Names:
    """The columns that a report names, of an adapter whose config does not; empty where it does not either, or was
    edited."""
    found = read_report(folder).get("columns")
    if not isinstance(found, dict) or not all(isinstance(name, str | None) for name in found.values()):
        return {}
    return found


def recorded_task(folder: str | Path, policy: Any = None) -> str:
    """`ranking` where the training says so, or a `policy` that is for queries; else `classification`."""
    by_query = policy is not None and policy_class(EarlyExitConfig.of(policy)).by_group
    return "ranking" if by_query or read_report(folder).get("task") == "ranking" else "classification"


def write_early_exit(folder: str | Path, config: EarlyExitConfig) -> None:
    """Puts `config` into `adapter_config.json`; all else in the file stays, and a reader sees the old file or the new.

    Raises:
        ValueError: `folder` is no local adapter.
    """
    data = read_config(folder)
    data["early_exit"] = json.loads(json.dumps(config.to_dict(), sort_keys=True))  # sorted, as PEFT has it
    write_json(Path(folder) / CONFIG, data)


def choose_device(name: str | None) -> torch.device:
    """The device of this name; None: a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and not distributed.on_cpu() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
