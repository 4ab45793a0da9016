"""An adapter's folder as the commands see it, or those of many tasks on one model: model, tokenizer, what training
recorded, and policies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from badge_peft.bundle import find_tasks
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import validate_policy
from badge_peft.early_exit.policies import build_policy, policy_class
from badge_peft.hub import has_tokenizer, load_pretrained
from badge_peft.model import BadgeModel, get_badge_model
from badge_peft.model_card import CONFIG, read_report
from badge_peft.ranking.calibration import METRIC
from badge_peft.registry import NAME
from badge_peft.utils.files import is_local, write_json
from badge_peft.utils.logs import quiet
from badge_peft.workflows.base_model import choose_device
from badge_peft.workflows.columns import Names
from badge_peft.workflows.data import TextDataset, read_examples
from badge_peft.workflows.encode import check_kind, load_tokenizer
from badge_peft.workflows.labels import LabelSet
from badge_peft.workflows.settings import Columns


@dataclass
class Adapter:
    """A loaded adapter."""

    model: PeftModel  # in eval mode
    tokenizer: Any  # of its base model, with its limit set
    labels: LabelSet  # what the model answers with
    columns: Names = field(default_factory=dict)  # what is known of its training data's columns
    task: str = "classification"  # `classification`, `ranking` or `tokens`
    name: str | None = None  # in the model, where that has adapters of many tasks; None: the active one

    @property
    def badge(self) -> BadgeModel:
        """The tuner."""
        return get_badge_model(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def read(self, data: str | Path, columns: Columns = Columns()) -> TextDataset:
        """Rows of a data set, in which a column that is not named is found as it was in training."""
        found = read_examples(data, columns, recorded=self.columns)
        check_kind(found, self.labels.tokens, "the adapter", data)
        return found

    def encode(self, examples: TextDataset) -> Dataset:
        """Token columns, and `labels` where the rows have some; candidates have their relevance elsewhere."""
        return self.labels.encode(examples, self.tokenizer, labeled=self.task != "ranking", scored=True)

    def metric(self, metric: str | None) -> str:
        """As `LabelSet.metric`; rankings have one of their own."""
        return check_ranking_metric(metric) if self.task == "ranking" else self.labels.metric(metric)

    def early_exit_config(self, **overrides: Any) -> EarlyExitConfig:
        """The adapter's own config with `overrides`, of which None leaves a field alone. Another policy starts from
        its own defaults: a threshold of one policy means nothing to another."""
        return early_exit_configs({None: self}, **overrides)[None]

    def _overridden(self, overrides: Mapping[str, Any]) -> tuple[EarlyExitConfig, set[str]]:
        """The config, and those of the overrides that its policy does not read."""
        given = {name: value for name, value in overrides.items() if value is not None}
        config = EarlyExitConfig.of(self.badge.get_early_exit_config(self.name), **given)
        policy = build_policy(config)
        reads = {
            "threshold": policy.uses_threshold(self.labels.problem_type),
            "patience": policy.counts_exits,
            "depth": policy.takes_depth,
        }
        return config, {name for name, is_read in reads.items() if not is_read and name in given}


def early_exit_configs(adapters: Mapping[Any, Adapter], **overrides: Any) -> dict[Any, EarlyExitConfig]:
    """How each task stops; `overrides`, as for `Adapter.early_exit_config`, hold for all whose policy reads them."""
    unread = {task: adapter._overridden(overrides)[1] for task, adapter in adapters.items()}
    by_none = set.intersection(*unread.values())
    found = {}
    for task, adapter in adapters.items():
        others = unread[task] - by_none
        config, _ = adapter._overridden({name: value for name, value in overrides.items() if name not in others})
        validate_policy(config, adapter.badge.config_of(adapter.name), adapter.badge.num_blocks)
        if by_none:
            name = min(by_none)
            raise ValueError(
                f"{name}={overrides[name]!r} changes nothing, as policy={config.policy!r} does not read it: leave it "
                "out, or name another policy with --policy."
            )
        found[task] = config
    return found


def open_adapter(path: str | Path, base_model: str | None = None, device: str | None = None) -> Adapter:
    """Loads an adapter, in a folder that `badge-peft train` or `save_pretrained` wrote or a Hub repository, its base
    model (None: the one that it names) and the tokenizer, on a `device` (None: a GPU where there is one)."""
    return open_tasks({None: str(path)}, base_model, device)[None]


def open_tasks(
    tasks: Mapping[Any, str], base_model: str | None = None, device: str | None = None
) -> dict[Any, Adapter]:
    """The adapters of many tasks on one base model by their names (None: there is one alone), with one model and
    tokenizer; otherwise as `open_adapter`."""
    for place in tasks.values():
        check_adapter(place)
    where = choose_device(device)
    with quiet():
        model = load_pretrained(tasks.get(None, tasks), base_model=base_model).to(where)
    badge = get_badge_model(model)
    named = next((place for place in tasks.values() if has_tokenizer(place)), None)
    named = named or base_model or badge.config_of().base_model_name_or_path
    tokenizer = load_tokenizer(str(named), model.get_base_model())
    found = {}
    for task, place in tasks.items():
        config = badge.config_of(task)
        kind = recorded_task(place, config.early_exit) if task is None else "classification"
        tokens = config.reads_tokens
        labels = LabelSet(badge.label_names(task), config.resolved_problem_type, tokens)
        columns = config.data_columns or recorded_columns(place)
        found[task] = Adapter(model, tokenizer, labels, columns, "tokens" if tokens else kind, task)
    return found


def check_adapter(path: str | Path) -> None:
    """Refuses what cannot be an adapter, without loading anything."""
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
    """The fields of `adapter_config.json`."""
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
    """Puts `config` into `adapter_config.json`, of which all else stays; a reader sees the old file or the new."""
    data = read_config(folder)
    data["early_exit"] = json.loads(json.dumps(config.to_dict(), sort_keys=True))  # sorted, as PEFT has it
    write_json(Path(folder) / CONFIG, data)


def check_ranking_metric(metric: str | None) -> str:
    """The metric of rankings, in whose place no other can be asked for."""
    if metric is not None:
        raise ValueError(
            f"metric={metric!r} is not for ranking, which is measured by the top k that it keeps: leave it out."
        )
    return METRIC


def check_texts_only(task: str, command: str) -> None:
    """Refuses a token adapter where a command answers whole texts, and one that ranks where texts are answered."""
    if task == "ranking":
        raise ValueError(
            f"`badge-peft {command}` answers texts one by one, and this adapter ranks the candidates of a query: use "
            "evaluate, sweep, calibrate, predict, bench, export or serve."
        )
    if task == "tokens":
        raise ValueError(
            f"`badge-peft {command}` is for adapters that classify texts, and this one labels tokens: use train, "
            "evaluate, sweep, calibrate, predict, bench or export."
        )


def is_named(value: str) -> bool:
    """Whether it is NAME=ADAPTER, and not a place whose path has an equals sign in it."""
    return "=" in value and "/" not in value.partition("=")[0] and not Path(value).exists()


def parse_tasks(values: Sequence[str]) -> dict[str, str]:
    """`["intent=DIR", "pii=user/repo"]` as a dict."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, place = value.partition("=")
        if not (name and equals and place):
            raise ValueError(f"--task {value} is not allowed: it must be NAME=ADAPTER, a folder or a repository.")
        if name in found:
            raise ValueError(f"--task has {name!r} more than once: name each task once.")
        found[name] = place
    return found


def tasks_of(values: Sequence[str], adapter: str | None) -> dict[str, str] | None:
    """The tasks that a command is given, with `--task` or as a bundle's folder; None: it is given one adapter."""
    if values:
        return parse_tasks(values)
    return None if adapter is None else find_tasks(adapter)
