"""The model to put exits on: loaded, checked for a trained head, and sized for the labels."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from badge_peft.model import get_badge_model
from badge_peft.tuner.architectures import block_names, get_layout
from badge_peft.tuner.config import BadgeConfig
from badge_peft.utils import distributed
from badge_peft.utils.files import is_local
from badge_peft.utils.logs import quiet
from badge_peft.workflows.columns import Names
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import check_kind
from badge_peft.workflows.labels import LabelSet
from badge_peft.workflows.settings import ExitOptions, TrainSettings

# as sentence-transformers writes it beside the weights; transformers does not read it
POOLING_FILE = "1_Pooling/config.json"
_KINDS = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean", "lasttoken": "last"}
_FLAG = "pooling_mode_"  # before version 6 there was one flag for each way, now there is one name or a list of them
_CLASSIFIER, _TAGGER = "ForSequenceClassification", "ForTokenClassification"  # how names of architectures end


@dataclass
class Base:
    """A loaded model."""

    model: Any  # with a head for `labels`
    labels: LabelSet  # what it answers with
    fresh: list[str]  # weights of the head that the checkpoint lacks; drawn at random
    # what its sentence embedding reads, where it is a sentence encoder without a head; else None
    pooling: str | None = None
    columns: Names | None = None  # what the data that it is trained on calls its columns

    @property
    def has_head(self) -> bool:
        """Whether the head was in the checkpoint, so that full depth can answer already."""
        return not self.fresh


def load_base(name: str, settings: TrainSettings, examples: TextDataset) -> Base:
    """The model, with its own labels where it has a trained head, else with those of `examples`."""
    path = local_path(name)
    if Path(path, "adapter_config.json").exists():
        raise ValueError(f"{path} holds an adapter, not a model: give the model that it was made for.")
    head = head_of(path)
    tokens = examples.tagged or examples.words is not None or (not examples.labels and head == _TAGGER)
    check_kind(examples, tokens if head is None else head == _TAGGER, f"the model in {path}", "the data")
    auto = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    model, fresh = _load(path, auto)
    if not fresh:
        labels = LabelSet.of_model(model.config, tokens)
        if settings.problem_type not in (None, labels.problem_type):
            raise ValueError(
                f"problem_type={settings.problem_type!r} is not allowed: the model in {path} does "
                f"{labels.problem_type}, with the labels {', '.join(labels.names[:20])}."
            )
        model.config.problem_type = None if tokens else labels.problem_type
        return Base(model, labels, [], columns=examples.columns)
    if settings.exits.keep_head:
        other = (
            "exits for ranking follow the scores of a cross-encoder, so give one"
            if settings.task == "ranking"
            else "leave --keep-head out to train a new one from labeled rows, or give a fine-tuned model"
        )
        raise ValueError(
            f"{path} has no trained classification head to keep ({fresh[0]} is missing from it): {other}."
        )
    labels = LabelSet.of_tags(examples) if tokens else LabelSet.of_data(examples, settings.problem_type)
    if model.config.num_labels != len(labels.names):
        model, _ = _load(path, auto, num_labels=len(labels.names))
    model.config.id2label = dict(enumerate(labels.names))
    model.config.label2id = {name: i for i, name in enumerate(labels.names)}
    model.config.problem_type = None if tokens else labels.problem_type
    return Base(model, labels, fresh, None if tokens else sentence_pooling(path), examples.columns)


def _load(path: str, auto: Any, **fields: Any) -> tuple[Any, list[str]]:
    """The model, and the weights of its head that the checkpoint lacks."""
    with quiet():
        model, info = auto.from_pretrained(path, output_loading_info=True, **fields)
    head = get_layout(model).head
    return model, [n for n in info["missing_keys"] if n.split(".")[0] in head or "pooler" in n.split(".")]


def head_of(path: str) -> str | None:
    """The kind of head that a checkpoint says it has, for texts or for tokens; None: another, or none."""
    names = AutoConfig.from_pretrained(path).architectures or []
    return next((kind for kind in (_CLASSIFIER, _TAGGER) if any(name.endswith(kind) for name in names)), None)


def add_exits(base: Base, options: ExitOptions) -> PeftModel:
    """The model with an untrained adapter on it."""
    with quiet():
        return get_peft_model(base.model, badge_config_of(base, options))


def badge_config_of(base: Base, options: ExitOptions) -> BadgeConfig:
    """The config of an adapter for a model."""
    layout = get_layout(base.model)
    config = badge_config(
        options,
        base.has_head,
        len(block_names(base.model, layout)),
        task_type="TOKEN_CLS" if base.labels.tokens else "SEQ_CLS",
        problem_type=base.labels.problem_type,
        label_names=None if base.has_head else base.labels.names,
        data_columns=base.columns,
    )
    lost = [name for name in base.fresh if name.split(".")[0] not in layout.head]
    if config.final_exit == "base_head" and lost:
        raise ValueError(
            f"final_exit='base_head' is not possible here: the checkpoint lacks {lost[0]}, which no adapter saves. "
            "Use final_exit='exit'."
        )
    if base.pooling is not None and config.exit_pooling == "auto":
        config.exit_pooling = base.pooling
    return config


def badge_config(options: ExitOptions, has_head: bool = True, num_blocks: int = 1000, **others: Any) -> BadgeConfig:
    """The adapter's config, with `others` as more fields of it."""
    fields = asdict(options)
    fields["exit_layers"] = parse_blocks(options.exit_layers, num_blocks)
    fields["final_exit"] = options.final_exit or ("base_head" if has_head else "exit")
    if options.exit_type == "past_future":
        fields["final_exit"] = "exit"
    fields["carry"] = _carry(options, others.get("task_type"))
    for name, default in (("exit_pooling", "auto"), ("exit_type", "linear")):
        fields[name] = fields[name] or default
    keeps = keeps_head(options, has_head)
    del fields["keep_head"]
    return BadgeConfig(**{"task_type": "SEQ_CLS", "train_head": not keeps, **fields, **others})


def keeps_head(options: ExitOptions, has_head: bool) -> bool:
    """Whether the model's own head stays as it is: where nothing is said, that of a classifier whose backbone stays as
    it is, so that full depth answers as before."""
    own = options.final_exit in (None, "base_head") and options.exit_type != "past_future"
    return has_head and own and options.backbone == "frozen" if options.keep_head is None else options.keep_head


def _carry(options: ExitOptions, task_type: str | None) -> str | None:
    """What exits add of those before them: where nothing is asked for, logits, if that is what has been shown to win
    (docs/decisions/linked-exits.md)."""
    if options.carry is not None:
        return None if options.carry == "none" else options.carry
    shown = options.backbone == "frozen" and options.placement != "none" and options.exit_type != "past_future"
    return "logits" if shown and task_type != "TOKEN_CLS" else None


def parse_blocks(value: str | None, num_blocks: int = 1000) -> list[int] | None:
    """`0,2-4` to [0, 2, 3, 4], `4-` to all blocks from 4 on; None and `all` to None."""
    if value is None or value.strip() == "all":
        return None
    blocks: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        last = last or (str(num_blocks) if dash else first)
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) <= 1000):
            raise ValueError(
                f"exit_layers={value!r} is not allowed: give block numbers and ranges, such as 2,4,6 or 0-12."
            )
        blocks += range(int(first), int(last) + 1)
    return blocks


def keeps_answers(model: nn.Module) -> bool:
    """Whether full depth is promised to answer as the base model, bit for bit."""
    config = get_badge_model(model).config_of()
    return config.backbone == "frozen" and not config.train_head and config.final_exit == "base_head"


def choose_device(name: str | None) -> torch.device:
    """The device of this name; None: a GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and not distributed.on_cpu() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def local_path(name: str) -> str:
    """A folder by its whole path, so that an adapter finds its base model from anywhere; a Hub name as it is."""
    path = Path(name)
    if path.is_dir():
        return str(path.resolve())
    if is_local(name):
        raise FileNotFoundError(f"there is no model folder {name}.")
    return name


def sentence_pooling(model: str) -> str | None:
    """`cls`, `mean` or `last`: what the sentence embedding of an encoder, in a folder or on the Hub, reads; None where
    nothing says so, or exits cannot read the same. Exits that read the first token of an encoder trained on the mean
    of all tokens stay at chance."""
    config = _read_pooling(model)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [key.removeprefix(_FLAG) for key, value in config.items() if key.startswith(_FLAG) and value is True]
    if isinstance(modes, list) and len(modes) == 1:
        modes = modes[0]
    return _KINDS.get(modes) if isinstance(modes, str) else None


def _read_pooling(model: str) -> dict[str, Any]:
    try:
        path = Path(model, POOLING_FILE) if Path(model).is_dir() else Path(hf_hub_download(model, POOLING_FILE))
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError, EntryNotFoundError):  # mostly no such file; none is worth a failure
        return {}
    return found if isinstance(found, dict) else {}
