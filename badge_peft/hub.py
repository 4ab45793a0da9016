"""`load_pretrained`: base model and adapter in one call, from a folder or the Hub."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification

from badge_peft.config import BadgeConfig, is_badge


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
    if config.label_names is not None:
        base_model.config.id2label = dict(enumerate(config.label_names))
        base_model.config.label2id = {name: i for i, name in enumerate(config.label_names)}
    model = PeftModel.from_pretrained(
        base_model, path_or_repo, adapter_name=adapter_name, is_trainable=is_trainable, revision=revision, **hub
    )
    return model if is_trainable else model.eval()
