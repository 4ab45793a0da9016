"""From a folder or the Hub in one call, base model and adapter, and to the Hub with a card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from json import JSONDecodeError
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from badge_peft.bundle import download_bundle, find_tasks, read_configs
from badge_peft.model import get_badge_model
from badge_peft.model_card import CARD, CONFIG, PICTURE, REPORT, hub_id, read_report, write_model_card
from badge_peft.tuner.config import BadgeConfig, is_badge
from badge_peft.utils.files import is_local
from badge_peft.utils.logs import quiet

_NO_CONFIG = (AttributeError, JSONDecodeError, KeyError, RecursionError, TypeError, UnicodeDecodeError)
_TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")  # what their names start with
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # of JSON
LOGITS = "exit_logits.safetensors"
#: What goes up: all that `save_pretrained` of models and tokenizers, and `badge-peft` write, and nothing else.
PUSHED = (
    *(CARD, CONFIG, SAFETENSORS_WEIGHTS_NAME, REPORT, PICTURE, LOGITS),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "tokenizer.model"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model"),
)


def load_pretrained(
    path_or_repo: str | PathLike[str] | Mapping[str, str],
    *,
    revision: str | None = None,
    base_model: Any = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Loads an adapter on its base model, or those of many tasks, ready for `early_exit_forward`.

    Args:
        path_or_repo: A folder that `save_pretrained` wrote, or a Hub repository. For many tasks a bundle, which
            `save_tasks` wrote, or a dict from tasks to folders or repositories; the first is then the active one.
        revision: Of the adapter's repository.
        base_model: A loaded model, or the path or repository of one; None takes what the adapter's config names.
        adapter_name: What the adapter is called in the model; those of many tasks are called as their tasks.
        is_trainable: Load it for more training.
        **kwargs: For `AutoModelForSequenceClassification.from_pretrained`, for tokens that of
            `AutoModelForTokenClassification` (`dtype`, `device_map`, `token`, ...).

    Returns:
        The PEFT model, in eval mode unless `is_trainable`.

    Raises:
        ValueError: there is no adapter, it is not BADGE's, or it does not fit the base model; tasks that cannot share
            a pass.
    """
    if isinstance(path_or_repo, Mapping) and revision is not None:
        raise ValueError(
            f"revision={revision!r} is not allowed with the repositories of many tasks, which have one each: give the "
            "folder of huggingface_hub.snapshot_download(repo, revision=...) in the place of a repository."
        )
    hub: Any = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
    tasks = path_or_repo if isinstance(path_or_repo, Mapping) else find_tasks(Path(path_or_repo))
    if tasks is not None:
        return _load_tasks(dict(tasks), base_model, is_trainable, hub, kwargs)
    path_or_repo = str(path_or_repo)
    try:
        config = BadgeConfig.from_pretrained(path_or_repo, revision=revision, **hub)
    except _NO_CONFIG as error:  # PEFT takes for granted that the file is a config
        raise ValueError(
            f"{path_or_repo}/{CONFIG} is no config of an adapter ({type(error).__name__}: {error}): it is damaged. "
            "Copy, download or save the adapter again."
        ) from error
    except ValueError:  # no adapter: a bundle on the Hub?
        downloaded = None if is_local(path_or_repo) else download_bundle(path_or_repo, revision, **hub)
        tasks = find_tasks(downloaded) if downloaded else None
        if tasks is None:
            raise
        return _load_tasks(tasks, base_model, is_trainable, hub, kwargs)
    if not is_badge(config):
        raise ValueError(
            f"{path_or_repo} holds a {config.peft_type} adapter, not a BADGE one: load it with PeftModel."
        )
    assert isinstance(config, BadgeConfig)
    if base_model is None:
        base_model = config.base_model_name_or_path
        if not base_model:
            raise ValueError(f"{path_or_repo} does not name its base model: pass base_model=...")
        if config.revision:
            kwargs.setdefault("revision", config.revision)
    if isinstance(base_model, (str, PathLike)):
        base_model = _load_base(str(base_model), config, kwargs)
    model = PeftModel.from_pretrained(
        base_model, path_or_repo, adapter_name=adapter_name, is_trainable=is_trainable, revision=revision, **hub
    )
    if config.label_names is not None:
        get_badge_model(model).name_labels(config.label_names)
    return model if is_trainable else model.eval()


def _load_base(name: str, config: BadgeConfig, kwargs: dict[str, Any]) -> Any:
    """The base model, sized for an adapter."""
    if config.num_labels is not None:
        kwargs.setdefault("num_labels", config.num_labels)
    auto: Any = AutoModelForTokenClassification if config.reads_tokens else AutoModelForSequenceClassification
    if config.final_exit == "base_head" and not config.train_head:
        return auto.from_pretrained(name, **kwargs)
    kwargs.setdefault("ignore_mismatched_sizes", True)
    with quiet():  # its head is not read, whatever its size, so a report that it is new would mislead
        return auto.from_pretrained(name, **kwargs)


def _load_tasks(
    tasks: dict[str, str], base_model: Any, is_trainable: bool, hub: dict[str, Any], kwargs: dict[str, Any]
) -> PeftModel:
    """The adapters of these tasks on one base model."""
    configs = read_configs(tasks, own_base=base_model is None, **hub)
    # the base model's own head, where a task reads it, says how many labels the base model has
    order = sorted(tasks, key=lambda name: (configs[name].final_exit == "exit", configs[name].train_head))
    first = order[0]
    model = load_pretrained(
        tasks[first], base_model=base_model, adapter_name=first, is_trainable=is_trainable, **kwargs
    )
    for name in order[1:]:
        model.load_adapter(tasks[name], adapter_name=name, is_trainable=is_trainable, **hub)
    for name in tasks:  # in their own order from now on
        model.peft_config[name] = model.peft_config.pop(name)
    model.set_adapter(next(iter(tasks)), inference_mode=not is_trainable)
    return model if is_trainable else model.eval()


def has_tokenizer(path: str | Path) -> bool:
    """Whether a local folder holds a tokenizer; a repository may."""
    folder = Path(path)
    return not folder.is_dir() or any(file.name.startswith(_TOKENIZER_FILES) for file in folder.iterdir())


def load_tokenizer(places: Sequence[str | None], revision: str | None = None) -> Any:
    """The tokenizer in the first of `places` that has one; `revision` is of the first."""
    known = [place for place in places if place]
    for place in filter(has_tokenizer, known):
        try:
            return AutoTokenizer.from_pretrained(place, revision=(revision if place == known[0] else None) or "main")
        except (OSError, ValueError, KeyError):  # a repository without one
            continue
    raise ValueError(
        f"there is no tokenizer in {' or in '.join(known) or 'any place that the adapter names'}: pass "
        "tokenizer=..., or save it beside the adapter with tokenizer.save_pretrained."
    )


def push_to_hub(
    adapter: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload BADGE adapter",
    create_pr: bool = False,
    dry_run: bool = False,
) -> CommitInfo | list[str]:
    """Uploads an adapter with its card. (`model.push_to_hub` works, too, but transformers puts its own card over
    the one that is saved.)

    Args:
        adapter: A PEFT model, or the folder of a saved adapter. Of a folder the files in `PUSHED` go up, which a
            saving, a tokenizer and `badge-peft` write, `report.json` without local paths; all else stays here.
        repo_id: The repository; it is made where there is none.
        tokenizer: Goes up with a model, so that one name loads both.
        adapter_name: Which adapter of the model; None is the active one.
        private: Of a new repository; None is the account's default.
        token: As everywhere in huggingface_hub.
        revision: The branch.
        commit_message: Of the commit.
        create_pr: Propose the commit, and do not make it.
        dry_run: Upload nothing and ask the Hub nothing.

    Returns:
        The commit; with `dry_run` the names of the files that would go up.

    Raises:
        ValueError: `adapter` is no BADGE adapter, or a file of its folder is a link; nothing has been uploaded then.
    """
    with TemporaryDirectory() as temporary:
        if isinstance(adapter, (str, Path)):
            folder = Path(adapter)
            if not (folder / CONFIG).exists():
                raise ValueError(f"{folder} holds no adapter: it has no {CONFIG}.")
        else:
            folder = _save(adapter, Path(temporary), adapter_name, tokenizer)
        config = BadgeConfig.from_pretrained(str(folder))
        if not is_badge(config):
            raise ValueError(f"{folder} holds a {config.peft_type} adapter, not a BADGE one: push it with PEFT.")
        names = _pushed_files(folder)
        if dry_run:
            return names
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not isinstance(adapter, (str, Path)):
            # what somebody wrote there is kept; a Hub that cannot say whether there is such a card ends this
            if api.file_exists(repo, CARD, revision=revision):
                hf_hub_download(repo, CARD, revision=revision, token=token, local_dir=folder, force_download=True)
        write_model_card(folder, repo, _remote_license(api, config))
        return api.create_commit(
            repo_id=repo,
            operations=[CommitOperationAdd(name, _content(folder / name)) for name in names],
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def _pushed_files(folder: Path) -> list[str]:
    """What of `folder` goes up, and the card, which is written where there is none."""
    links = [name for name in PUSHED if (folder / name).is_symlink()]
    if links:
        raise ValueError(
            f"{folder / links[0]} is a link, which could lead anywhere: push a folder that holds the files themselves "
            "(cp -rL makes one)."
        )
    return sorted({CARD, *(name for name in PUSHED if (folder / name).is_file())})


def _content(file: Path) -> str | bytes:
    """What goes up of a file: the path of it, but the report with every absolute path in it, also inside of longer
    texts, cut to its last name."""
    if file.name != REPORT:
        return str(file)
    text = json.dumps(read_report(file.parent), indent=2) + "\n"
    for quoted in sorted(set(_STRING.findall(text)), key=len, reverse=True):
        value, name = json.loads(quoted), PureWindowsPath(json.loads(quoted)).name  # which takes both kinds of slashes
        if name and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):  # a label may be "/"
            text = text.replace(quoted[1:-1], json.dumps(name)[1:-1])
    return text.encode()


def _save(model: PeftModel, folder: Path, adapter_name: str | None, tokenizer: Any) -> Path:
    """Where the files of one adapter lie, once they are saved."""
    name = adapter_name or str(getattr(model, "active_adapter", ""))
    if name not in getattr(model, "peft_config", {}):
        raise ValueError(f"{type(model).__name__} has no adapter {name!r}: give a PEFT model, or an adapter's folder.")
    model.save_pretrained(str(folder), selected_adapters=[name])
    folder = folder if name == "default" else folder / name
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    return folder


def _remote_license(api: HfApi, config: PeftConfig) -> str | None:
    """What the base model's card on the Hub states; None where it cannot be asked."""
    base = hub_id(config.base_model_name_or_path)
    if base is None:
        return None
    try:
        card = api.model_info(base, revision=config.revision).card_data
    except (HfHubHTTPError, OSError):
        return None
    found = card.get("license") if card is not None else None
    return found if isinstance(found, str) else None
