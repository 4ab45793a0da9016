"""The YAML file: read, checked, and with its defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from paper_grid.methods import METHODS, SINGLE


@dataclass
class Task:
    """One data set, a folder below `--data-dir`, and how it is trained on. The rows that are taken are the same ones
    for every run; `batch_size`, `activation` and `epochs` of None are the grid's."""

    data: str
    metric: str = "accuracy"
    title: str | None = None
    max_train: int | None = None
    max_validation: int | None = None
    max_test: int | None = None
    max_length: int = 128
    batch_size: int | None = None
    activation: str | None = None
    epochs: int | None = None


@dataclass
class Backbone:
    """One pre-trained encoder of `blocks` blocks. It is in a PyPI `package`, in a `folder` below `--model-dir`, or on
    the `hub`: exactly one is given. With `freeze_embeddings` a trained backbone leaves the word embeddings alone: a
    table of 250,000 rows costs more time in the optimizer than the blocks."""

    blocks: int
    title: str | None = None
    package: str | None = None
    folder: str | None = None
    hub: str | None = None
    pooling: str = "auto"
    final_exit: str = "exit"
    freeze_embeddings: bool = False

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.package, self.folder, self.hub)) != 1:
            raise ValueError("a backbone needs exactly one of package, folder and hub.")

    @property
    def source(self) -> str:
        """What it is, wherever the files are."""
        return str(self.package or self.folder or self.hub)


@dataclass
class Search:
    """The search for learning rates, on validation data alone: by backbone mode the rates to try, of which the first
    of the backbone's is used while adapter rates are tried; tasks and methods that take the rates of another."""

    adapter_lr: dict[str, list[float]]
    backbone_lr: dict[str, list[float]] = field(default_factory=dict)
    seed: int = 0
    epochs: int = 1
    max_train: int | None = None
    share: dict[str, str] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)


@dataclass
class Group:
    """A block of the grid: every combination of its lists. A method `{name: fields}` has fields of `BadgeConfig` on
    top of its own, a variant is such fields for each of the methods; `exit_0: true` adds exit 0. Groups of the same
    round are run together, task by task."""

    name: str
    tasks: list[str]
    methods: list[str | dict[str, dict[str, Any]]]
    backbones: list[str]
    modes: list[str]
    seeds: list[int]
    variants: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    round: int | None = None

    @property
    def named_methods(self) -> list[tuple[str, dict[str, Any]]]:
        """The methods, with the fields on top of theirs."""
        return [(m, {}) if isinstance(m, str) else next(iter(m.items())) for m in self.methods]


@dataclass
class Settings:
    """A whole YAML file; `note` is what a reader of its page has to know first, as Markdown."""

    title: str
    tasks: dict[str, Task]
    backbones: dict[str, Backbone]
    groups: list[Group]
    search: Search | None = None
    epochs: int = 25
    patience: int | None = 8  # None: no evaluation before the end, and the last state counts
    batch_size: int = 16
    activation: str = "gelu"
    r: int = 16
    bf16: bool = False
    data_seed: int = 0
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    savings: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.66, 0.75])
    note: str = ""


def load_settings(path: str | Path) -> Settings:
    """Reads and checks a YAML file."""
    raw = yaml.safe_load(Path(path).read_text())
    raw["tasks"] = {k: _make(Task, v, f"tasks.{k}") for k, v in raw.get("tasks", {}).items()}
    raw["backbones"] = {k: _make(Backbone, v, f"backbones.{k}") for k, v in raw.get("backbones", {}).items()}
    raw["groups"] = [_make(Group, v, f"groups[{i}]") for i, v in enumerate(raw.get("groups", []))]
    if raw.get("search") is not None:
        raw["search"] = _make(Search, raw["search"], "search")
    settings = _make(Settings, raw, str(path))
    for group in settings.groups:
        methods = [name for name, _ in group.named_methods]
        used = (group.tasks, settings.tasks), (group.backbones, settings.backbones), (methods, [*METHODS, *SINGLE])
        for name, known in ((name, known) for names, known in used for name in names):
            if name not in known:
                raise ValueError(f"group {group.name!r}: {name!r} is not defined, among {', '.join(known)}.")
    return settings


def _make(cls: type, data: Any, where: str) -> Any:
    names = [f.name for f in fields(cls)]
    if unknown := sorted(set(data) - set(names)):
        raise ValueError(f"{where} has no field {', '.join(unknown)}; its fields are {', '.join(names)}.")
    return cls(**data)
