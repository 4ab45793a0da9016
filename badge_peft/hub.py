"""From a folder or the Hub in one call, base model and adapter, and to the Hub with a card."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification

from badge_peft.model_card import CARD, CONFIG, hub_id, write_model_card
from badge_peft.tuner.config import BadgeConfig, is_badge

_TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")  # what their names start with
_NOT_PUSHED = ["checkpoint-*/**", "stage[12]/**", "training_args.bin", ".*"]  # what a Trainer leaves behind


def load_pretrained(
    path_or_repo: str,
    *,
    revision: str | None = None,
    base_model: Any = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Loads an adapter on its base model, ready for `early_exit_forward`.

    Args:
        path_or_repo: A folder that `save_pretrained` wrote, or a Hub repository.
        revision: Of the adapter's repository.
        base_model: A loaded model, or the path or repository of one; None takes what the adapter's config names.
        adapter_name: What the adapter is called in the model.
        is_trainable: Load it for more training.
        **kwargs: For `AutoModelForSequenceClassification.from_pretrained` (`dtype`, `device_map`, `token`, ...).

    Returns:
        The PEFT model, in eval mode unless `is_trainable`.

    Raises:
        ValueError: there is no adapter, it is not BADGE's, or it does not fit the base model.
    """
    hub = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
    config = PeftConfig.from_pretrained(path_or_repo, revision=revision, **hub)
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
    if isinstance(base_model, str):
        if config.num_labels is not None:
            kwargs.setdefault("num_labels", config.num_labels)
        if config.final_exit == "exit":  # the base model's own head is not read, whatever its size
            kwargs.setdefault("ignore_mismatched_sizes", True)
        base_model = AutoModelForSequenceClassification.from_pretrained(base_model, **kwargs)
    model = PeftModel.from_pretrained(
        base_model, path_or_repo, adapter_name=adapter_name, is_trainable=is_trainable, revision=revision, **hub
    )
    if config.label_names is not None:
        base_model.config.id2label = dict(enumerate(config.label_names))
        base_model.config.label2id = {name: i for i, name in enumerate(config.label_names)}
    return model if is_trainable else model.eval()


def has_tokenizer(path: str | Path) -> bool:
    """Whether a local folder holds a tokenizer; a repository may."""
    folder = Path(path)
    return not folder.is_dir() or any(file.name.startswith(_TOKENIZER_FILES) for file in folder.iterdir())


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
    """Uploads an adapter with its card. (`model.push_to_hub` works, too, but transformers puts a card of its own over
    the one that is saved.)

    Args:
        adapter: A PEFT model, or the folder of a saved adapter, which goes up with all that lies in it.
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
        ValueError: `adapter` is no BADGE adapter; nothing has been uploaded then.
    """
    with TemporaryDirectory() as temporary:
        if isinstance(adapter, (str, Path)):
            folder = Path(adapter)
            if not (folder / CONFIG).exists():
                raise ValueError(f"{folder} holds no adapter: it has no {CONFIG}.")
        else:
            folder = _save(adapter, Path(temporary), adapter_name, tokenizer)
        config = PeftConfig.from_pretrained(str(folder))
        if not is_badge(config):
            raise ValueError(f"{folder} holds a {config.peft_type} adapter, not a BADGE one: push it with PEFT.")
        if dry_run:
            return _pushed_files(folder)
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not isinstance(adapter, (str, Path)):
            # the repository's card, where there is one: what somebody wrote there is kept
            with suppress(EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError):
                hf_hub_download(repo, CARD, revision=revision, token=token, local_dir=folder, force_download=True)
        write_model_card(folder, repo, _remote_license(api, config))
        return api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=_NOT_PUSHED,
        )


def _pushed_files(folder: Path) -> list[str]:
    """What of `folder` goes up, and the card, which is written where there is none."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(filter_repo_objects({*names, CARD}, ignore_patterns=[*_NOT_PUSHED, *DEFAULT_IGNORE_PATTERNS]))


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
