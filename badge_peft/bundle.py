"""A bundle: the adapters of many tasks on one base model as one folder, and what must hold of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME

from badge_peft.model import get_badge_model
from badge_peft.tuner.config import BadgeConfig, is_badge
from badge_peft.utils.files import is_local, write_json

#: `{"tasks": {"intent": "intent", "pii": "user/repo"}}`: folders below that of the file, or others, or repositories.
TASKS = "tasks.json"
_SAME_TEXT = ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")  # of `tokenizer.json`


def save_tasks(
    model: PeftModel, folder: str | Path, tasks: Sequence[str] | None = None, tokenizer: Any = None
) -> Path:
    """Saves adapters of a model as a bundle, which `load_pretrained`, `pipeline` and the commands take.

    Args:
        model: A PEFT model with BADGE adapters.
        folder: Is made. Each adapter is saved in a folder of its name inside, and `tasks.json` names them.
        tasks: Names of the adapters, in the order of the answers; None takes all.
        tokenizer: Saved in the same folder.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown name, the same one twice, or adapters that cannot share a pass. Nothing is saved then.
    """
    badge = get_badge_model(model)
    names = list(badge.peft_config) if tasks is None else list(tasks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks={tasks!r} is not allowed: give names of adapters, each once.")
    check_together({name: badge.config_of(name) for name in names})
    folder = Path(folder)
    for name in names:
        # PEFT saves the adapter that is called default in the folder itself, all others in one of their names
        model.save_pretrained(str(folder / name if name == "default" else folder), selected_adapters=[name])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_json(folder / TASKS, {"tasks": {name: name for name in names}})
    return folder


def download_bundle(repo: str, revision: str | None = None, **hub: Any) -> str | None:
    """The folder into which a bundle on the Hub has been downloaded; None where the repository holds none."""
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=TASKS, **hub)
        return snapshot_download(repo, revision=revision, **hub) if Path(folder, TASKS).is_file() else None
    except (HfHubHTTPError, HFValidationError, OSError):  # there is no such repository, or no way to it
        return None


def is_bundle(place: str, revision: str | None = None, cache_dir: Any = None) -> bool:
    """Whether what has just been loaded from a folder or the Hub is a bundle, of whatever number of tasks."""
    if find_tasks(place) is not None or is_local(place):
        return find_tasks(place) is not None
    kept = [
        isinstance(try_to_load_from_cache(place, name, cache_dir=cache_dir, revision=revision), str)
        for name in (TASKS, CONFIG_NAME)
    ]
    return kept == [True, False]


def find_tasks(folder: str | Path) -> dict[str, str] | None:
    """The tasks of a bundle with where each adapter is; None where the folder holds none."""
    folder = Path(folder)
    if not (folder / TASKS).is_file():
        return None
    try:
        tasks = json.loads((folder / TASKS).read_text(encoding="utf-8"))["tasks"]
        found = {str(name): str(place) for name, place in tasks.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{folder / TASKS} cannot be read ({error}): it must be like {{"tasks": {{"intent": "folder", "pii": '
            '"user/repo"}}, names with folders or repositories of adapters.'
        ) from error
    return {name: str(folder / place) if (folder / place).is_dir() else place for name, place in found.items()}


def read_configs(tasks: Mapping[str, str], own_base: bool = True, **hub: Any) -> dict[str, BadgeConfig]:
    """The config of each task's adapter, checked by `check_together`; their tokenizers are compared, too."""
    if not tasks:
        raise ValueError("there are no tasks: give names with the folders or repositories of their adapters.")
    configs: dict[str, Any] = {name: PeftConfig.from_pretrained(str(place), **hub) for name, place in tasks.items()}
    for name, config in configs.items():
        if not is_badge(config):
            raise ValueError(f"the adapter of task {name!r} is a {config.peft_type} adapter, not a BADGE one.")
    check_together(configs, own_base)
    _check_tokenizers(tasks)
    return configs


def check_together(configs: Mapping[str, BadgeConfig], own_base: bool = True) -> None:
    """Refuses adapters that cannot share a pass."""
    for name, config in configs.items():
        if config.backbone != "frozen":
            raise ValueError(
                f"task {name!r} has backbone={config.backbone!r}, so its blocks compute something else than those of "
                "the other tasks: train it with backbone='frozen', or run it in a separate call."
            )
    heads = {config.reads_tokens: name for name, config in configs.items() if config.final_exit == "base_head"}
    if len(heads) > 1:
        raise ValueError(
            f"task {heads[True]!r} ends in a head for tokens and {heads[False]!r} in one for texts, and a base model "
            "has one head: train one of them with final_exit='exit'."
        )
    paired = {config.reads_pairs: name for name, config in configs.items() if config.data_columns is not None}
    if len(paired) > 1:
        raise ValueError(
            f"task {paired[True]!r} was trained on pairs of texts and {paired[False]!r} on single ones, so no text "
            "suits both: run each in a separate call."
        )
    first, *others = configs
    for name in others:
        here, there = (_base(configs[task]) for task in (first, name))
        if own_base and None not in (here, there) and here != there:
            raise ValueError(
                f"task {first!r} is for the base model {here}, and {name!r} for {there}: tasks share one base model. "
                "Train them on the same one; if it is the same under two names, give base_model=..."
            )


def _base(config: BadgeConfig) -> str | None:
    name = config.base_model_name_or_path
    return (str(Path(name).resolve()) if Path(name).is_dir() else name) if name else None


def _check_tokenizers(tasks: Mapping[str, str]) -> None:
    """Compares the tokenizers that lie beside local adapters."""
    found: dict[str, Any] = {}
    for name, place in tasks.items():
        file = Path(place) / "tokenizer.json"
        if file.is_file():
            data = json.loads(file.read_text(encoding="utf-8"))
            found[name] = [data.get(part) for part in _SAME_TEXT]
    names = list(found)
    for name in names[1:]:
        if found[name] != found[names[0]]:
            raise ValueError(
                f"the tasks {names[0]!r} and {name!r} have different tokenizers in their folders, so one text "
                "would be other tokens for each: train them on one base model with its tokenizer."
            )
