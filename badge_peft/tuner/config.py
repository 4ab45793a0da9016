"""`BadgeConfig`: what is put on a model. One field per choice of the paper and of its ablations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftConfig, PeftType, TaskType
from peft.utils import CONFIG_NAME

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.registry import NAME, add_peft_type
from badge_peft.tuner.adapter_file import AdapterSource, check_latest, hash_in
from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.bypass import ACTIVATION_MODULES
from badge_peft.tuner.config_rules import REMOVED, check_fields, lora_fields
from badge_peft.tuner.exits import EXITS
from badge_peft.tuner.losses import check_weights
from badge_peft.utils.checks import check_choice, check_int, option, require, without_removed
from badge_peft.utils.files import write_text
from badge_peft.utils.problem import PROBLEM_TYPES, Problem, infer_problem_type

CHOICES: dict[str, tuple[str, ...]] = {
    "placement": ("block", "ffn", "mhsa", "none"),
    "activation": tuple(ACTIVATION_MODULES),
    "exit_type": tuple(EXITS),
    "exit_pooling": ("auto", "cls", "mean", "last"),
    "final_exit": ("base_head", "exit"),
    "backbone": ("frozen", "lora", "full"),
}
_AT_RUN_TIME: dict[str, Any] = {"init": False, "repr": False, "compare": False}


@dataclass
class BadgeConfig(PeftConfig):
    """Configuration of BADGE: block-wise bypasses and early exits on an encoder.

    Source: "BADGE: Speeding Up BERT Inference after Deployment via Block-wise Bypasses and Divergence-Based Early
    Exiting", ACL 2023 industry track. `task_type` is `SEQ_CLS`, also when it is not given, or `TOKEN_CLS`.

    A model gets a copy, in which the fields that depend on it are filled in: `model.peft_config[name]`. One config may
    be put on any number of models.

    Raises:
        ValueError: a field has a value that is not allowed; the message names field, value and what is allowed.

    Example:

    ```python
    from peft import get_peft_model
    from badge_peft import BadgeConfig

    model = get_peft_model(model, BadgeConfig(r=16, early_exit={"threshold": 0.2, "patience": 1}))
    ```
    """

    r: int = option(16, "Bottleneck dimension of the bypasses.")
    placement: str = option("block", "Where the bypass reads: `block` (Eq. 2), `ffn`, `mhsa`, or `none`.")
    activation: str = option("gelu", f"g1 of Eq. 1: {', '.join(ACTIVATION_MODULES)}.")
    bias: bool = option(False, "Biases in the two projections of a bypass (Eq. 1 has none).")
    exit_type: str = option(
        "linear",
        "`linear`, `pooled` (dense + tanh + linear), `shared_pooled` (the model's pooler), `mha`, "
        "`residual_mha` (added to the pooled state) or `past_future`.",
    )
    exit_pooling: str = option("auto", "What an exit reads: `cls`, `mean`, `last`; `auto` follows the model's head.")
    exit_dropout: float = option(0.1, "Dropout before each exit's linear layer, in training.")
    exit_layers: list[int] | None = option(
        None, "1-based blocks with an exit; None = all. 0 is an exit on the embeddings. Block M always is."
    )
    final_exit: str = option("base_head", "Exit M: the model's own head, `base_head`, or an `exit` like the others.")
    carry: str | None = option(
        None, "What an exit adds of the one before it: its `logits`, times a learned number; None: nothing."
    )
    train_head: bool = option(True, "Train the model's own head and save it. False keeps full depth bit for bit.")
    backbone: str = option("frozen", "`frozen`, `lora` or `full` (the paper).")
    lora: Any = option(None, "LoraConfig or dict for backbone='lora'.")
    exit_weights: Any = option(
        "uniform", "Weights of the exits' losses: `uniform` (Eq. 8), `linear` (m, PABEE), or a list."
    )
    learn_to_exit: bool = option(
        False, "A layer, shared by all exits, that learns when an exit is wrong (LTE), for policy `learned`."
    )
    early_exit: Any = option(None, "EarlyExitConfig or dict: how this adapter stops when the call does not say.")
    num_labels: int | None = option(None, "Outputs of an exit; None = the model's.")
    problem_type: str | None = option(None, "As transformers has it; None = the model's.")
    label_names: list[str] | None = option(None, "Names of the labels by number; None = the base model's own.")
    data_columns: dict[str, str | None] | None = option(
        None,
        "What its training data called `text`, `text_pair`, `label` and `query_id`. With a `text_pair` it answers "
        "pairs of texts alone. None: not known.",
    )
    block_layout: Any = option(None, "BlockLayout or dict for a backbone not in the table.")
    target_modules: str | None = option(None, "Filled in: the blocks of the model, as a regular expression.")
    exclude_modules: list[str] | str | None = option(None, "Not used by BADGE.")
    modules_to_save: list[str] | None = option(None, "More modules to train and save, as everywhere in PEFT.")
    hidden_size: int | None = option(None, "Filled in: d, checked when an adapter is loaded.")
    num_blocks: int | None = option(None, "Filled in: M, checked when an adapter is loaded.")
    base_fingerprint: dict[str, list[Any]] | None = option(
        None, "Filled in: a sample of the base weights, checked when an adapter is loaded."
    )
    badge_version: str | None = option(None, "Filled in: the badge_peft that made this.")
    weights_hash: str | None = option(
        None, "Filled in: of the weights that this was saved with, checked when an adapter is loaded. None: no check."
    )
    source: AdapterSource | None = option(
        None, "At run time: where this was read, until its weights are loaded. None: a new adapter.", **_AT_RUN_TIME
    )
    after_saving: Callable[[str], None] | None = option(
        None,
        "At run time: called with the folder once this is written into it, which PEFT does last when it saves an "
        "adapter. A model puts the writing of the card here; None: nothing is called.",
        **_AT_RUN_TIME,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(NAME)
        if self.task_type is None:
            self.task_type = TaskType.SEQ_CLS
        if self.task_type not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            raise ValueError(
                f"task_type={self.task_type!r} is not allowed: BADGE classifies sequences, 'SEQ_CLS', and tokens, "
                "'TOKEN_CLS'."
            )
        check_int("r", self.r, at_least=1, optional=False)
        require(self.r < 2**31, "r", self.r, "it must be below 2**31")  # else torch fails with an error of its own
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for name in ("num_labels", "num_blocks", "hidden_size"):
            check_int(name, getattr(self, name), at_least=1)
        if self.problem_type is not None:
            check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        check_fields(self)
        self.exit_layers = None if self.exit_layers is None else sorted(self.exit_layers)
        self.exit_weights = check_weights(self.exit_weights)
        if self.backbone == "lora":
            self.lora = lora_fields(self.lora)
        if self.early_exit is not None:
            self.early_exit = EarlyExitConfig.of(self.early_exit)
        if self.block_layout is not None:
            self.block_layout = BlockLayout.of(self.block_layout)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        at_run_time = ("source", "after_saving")
        return {name: value for name, value in super().to_dict().items() if name not in at_run_time}

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The fields of a file as this version has them; PEFT asks while it reads one."""
        return super().check_kwargs(**without_removed(kwargs, REMOVED))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Reads `adapter_config.json`, as every config of PEFT. Its weights are compared with the config
        when it is put on a model, before that is changed.

        Where a folder has other weights than those that its config was saved with, as an interrupted saving leaves
        it, the config inside of the weights is taken, with a warning.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, BadgeConfig):
            hub, _, _ = cls._split_kwargs(kwargs)
            path, saved_with_weights = str(pretrained_model_name_or_path), config.inference_mode
            source = AdapterSource(path, saved_with_weights, {**hub, "subfolder": subfolder})
            of_weights = source.config_of_other_weights(config.weights_hash)
            if of_weights is not None:
                warnings.warn(
                    f"{pretrained_model_name_or_path}/{CONFIG_NAME} belongs to other weights than those there, as "
                    "where saving was interrupted: the config inside of the weights is taken. Save the adapter again.",
                    stacklevel=2,
                )
                config = cls.from_peft_type(**without_removed(of_weights, REMOVED))
            config.source = source
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, whole or not at all, and calls `after_saving` where this is the config of an
        adapter on a model.

        Raises:
            ValueError: the weights in its folder are of two savings, and PEFT would read those of the earlier one.
        """
        folder = Path(save_directory)
        check_latest(folder)
        self.weights_hash = hash_in(folder)
        if self.early_exit is not None:
            self.early_exit = self.early_exit.measured_on(self.weights_hash)
        with TemporaryDirectory() as temporary:
            super().save_pretrained(temporary, **kwargs)
            text = Path(temporary, CONFIG_NAME).read_text(encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG_NAME, text)
        if self.after_saving is not None:
            self.after_saving(save_directory)

    @property
    def reads_tokens(self) -> bool:
        """Whether the exits answer each token."""
        return self.task_type == TaskType.TOKEN_CLS

    @property
    def reads_pairs(self) -> bool:
        """Whether the exits were trained on pairs of texts, as far as is known."""
        return (self.data_columns or {}).get("text_pair") is not None

    @property
    def resolved_labels(self) -> int:
        """K, once the config is on a model."""
        assert self.num_labels is not None
        return self.num_labels

    @property
    def resolved_problem_type(self) -> str:
        """The problem type; a model that was never given labels has one output per row or per class."""
        if self.reads_tokens:
            return Problem.name
        return self.problem_type or infer_problem_type(self.num_labels or 0)


def exit_numbers(config: BadgeConfig, num_blocks: int) -> list[int]:
    """Block numbers that have an exit, in order; the last is always M."""
    if config.exit_layers is None:
        return list(range(1, num_blocks + 1))
    if config.exit_layers[-1] > num_blocks:
        raise ValueError(
            f"exit_layers={config.exit_layers} names block {config.exit_layers[-1]}, but the model has {num_blocks}."
        )
    return sorted({*config.exit_layers, num_blocks})


def own_exits(config: BadgeConfig, num_blocks: int) -> list[int]:
    """Block numbers at which the adapter has an exit of its own: all of `exit_numbers`, but for the model's head."""
    exits = exit_numbers(config, num_blocks)
    return exits[:-1] if config.final_exit == "base_head" else exits


def is_badge(config: PeftConfig) -> bool:
    """Whether a PEFT config is one of ours."""
    return config.peft_type == PeftType[NAME]
