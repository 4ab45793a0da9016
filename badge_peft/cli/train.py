"""`badge-peft train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from badge_peft.cli import options as shared
from badge_peft.cli.errors import told_plainly

_EXITS = "Exits"
_TRAINING = "Training"
_MODEL = "Your model: a folder, or a repository of the Hub. A fine-tuned classifier, or an encoder to make one of."


def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Texts to learn from. {shared.DATA_HELP}")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the adapter and all that is measured.")],
    eval_data: Annotated[
        str | None,
        typer.Option(help="Other texts, to choose the exit rule on. Default: a part of DATA.", rich_help_panel="Data"),
    ] = None,
    eval_share: Annotated[float, typer.Option(help="How large that part is.", rich_help_panel="Data")] = 0.2,
    text_column: shared.TextColumn = None,
    text_pair_column: shared.TextPairColumn = None,
    label_column: shared.LabelColumn = None,
    unlabelled: shared.Unlabelled = False,
    split: shared.Split = None,
    eval_split: Annotated[
        str | None,
        typer.Option(help="Split to choose the exit rule on, of EVAL_DATA or of DATA.", rich_help_panel="Data"),
    ] = None,
    dataset_config: shared.DatasetConfig = None,
    max_rows: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many rows of DATA, drawn at random.", rich_help_panel="Data"),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=4, help="Tokens per text; longer texts are cut. Default: all that the model can read."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where the tokenizer is, if not with the model: a folder or a repository.")
    ] = None,
    problem_type: Annotated[
        str | None,
        typer.Option(
            help="For an encoder without a head: regression takes whole numbers as values, not classes.",
        ),
    ] = None,
    backbone: Annotated[
        str,
        typer.Option(
            help="frozen: train the exits alone. lora: and a LoRA in the blocks. full: everything.",
            rich_help_panel=_EXITS,
        ),
    ] = "frozen",
    keep_head: Annotated[
        bool,
        typer.Option(
            "--keep-head",
            help="Leave the model's own head as it is. With a frozen backbone, inputs that go all the way then get "
            "the answer that they get today, bit for bit, and no labels are needed.",
            rich_help_panel=_EXITS,
        ),
    ] = False,
    placement: Annotated[
        str, typer.Option(help="Where a bypass reads: block, ffn, mhsa, or none.", rich_help_panel=_EXITS)
    ] = "block",
    r: Annotated[int, typer.Option("--r", min=1, help="Width of the bypasses.", rich_help_panel=_EXITS)] = 16,
    activation: Annotated[
        str,
        typer.Option(help="Of the bypasses: gelu, relu, leaky_relu, silu, tanh, identity.", rich_help_panel=_EXITS),
    ] = "gelu",
    exit_type: Annotated[
        str, typer.Option(help="linear, pooled, mha, or past_future.", rich_help_panel=_EXITS)
    ] = "linear",
    exit_pooling: Annotated[
        str,
        typer.Option(
            help="What an exit reads: cls, mean, last; auto does as the model's head, on a sentence encoder as its "
            "embedding.",
            rich_help_panel=_EXITS,
        ),
    ] = "auto",
    exit_layers: Annotated[
        str | None,
        typer.Option(
            help="Blocks with an exit, such as 2,4,6 or 0-12; 0 is an exit before block 1. Default: all blocks.",
            rich_help_panel=_EXITS,
        ),
    ] = None,
    final_exit: Annotated[
        str | None,
        typer.Option(
            help="What answers at the last block: base_head (the model's own head) or exit. Default: base_head where "
            "the model has a trained head.",
            rich_help_panel=_EXITS,
        ),
    ] = None,
    learn_to_exit: Annotated[
        bool,
        typer.Option(
            "--learn-to-exit", help="Also learn when an exit is wrong, for policy learned.", rich_help_panel=_EXITS
        ),
    ] = False,
    objective: Annotated[
        str,
        typer.Option(
            help="joint, two_stage, alternating, gradient_equilibrium, past_future, or single_exit.",
            rich_help_panel=_TRAINING,
        ),
    ] = "joint",
    depth: Annotated[
        int | None, typer.Option(help="The exit of objective single_exit.", rich_help_panel=_TRAINING)
    ] = None,
    distillation: Annotated[
        float | None,
        typer.Option(
            help="Share of the loss that follows the model's own answers, 0 to 1. Default: 0 with labels, 1 without.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the texts.", rich_help_panel=_TRAINING)] = 3,
    adapter_lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of bypasses and exits. Default: 0.01.", rich_help_panel=_TRAINING),
    ] = None,
    backbone_lr: Annotated[
        float | None,
        typer.Option(help="Of the backbone (default 5e-5) or its LoRA (default 1e-3).", rich_help_panel=_TRAINING),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Texts at once; several processes share them.", rich_help_panel=_TRAINING),
    ] = 32,
    seed: Annotated[
        int,
        typer.Option(min=0, help="The same seed gives the same run on the same machine.", rich_help_panel=_TRAINING),
    ] = 0,
    metric: shared.MetricOption = None,
    policy: shared.Policy = "auto",
    max_score_drop: shared.MaxScoreDrop = None,
    target_speedup: shared.TargetSpeedup = None,
    confidence: shared.Confidence = None,
    latency: Annotated[int, typer.Option(min=0, help="How many rows to time, one by one; 0 for none.")] = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Put early exits on a model: train them, choose when to stop, and say what it costs.

    The usual case: a classifier that is in service, and a file of texts like
    those that it sees, labelled or not:

    badge-peft train my-model texts.csv --output-dir my-exits --keep-head

    The model itself is not changed. The folder gets the adapter, with the exit
    rule in adapter_config.json and the tokenizer beside it; report.json and
    tradeoff.png, with what was measured; and exit_logits.safetensors, from which
    badge-peft sweep and badge-peft calibrate can run again. Then badge-peft
    predict answers with it.

    Several processes, started with accelerate launch or torchrun, share each batch
    among them.
    """
    with told_plainly():
        from badge_peft.workflows import TrainSettings, train_adapter

        badge: dict[str, Any] = {
            "placement": placement,
            "r": r,
            "activation": activation,
            "exit_type": exit_type,
            "exit_pooling": exit_pooling,
            "exit_layers": parse_blocks(exit_layers),
            "learn_to_exit": learn_to_exit,
        }
        settings = TrainSettings(
            model=model,
            data=data,
            output_dir=output_dir,
            eval_data=eval_data,
            eval_share=eval_share,
            text_column=text_column,
            text_pair_column=text_pair_column,
            label_column=label_column,
            unlabelled=unlabelled,
            split=split,
            eval_split=eval_split,
            dataset_config=dataset_config,
            max_rows=max_rows,
            tokenizer=tokenizer,
            max_length=max_length,
            problem_type=problem_type,
            backbone=backbone,
            keep_head=keep_head,
            final_exit=final_exit,
            badge=badge,
            objective=objective,
            depth=depth,
            distillation=distillation,
            epochs=epochs,
            adapter_lr=adapter_lr,
            backbone_lr=backbone_lr,
            batch_size=batch_size,
            seed=seed,
            metric=metric,
            policy=policy,
            max_score_drop=max_score_drop,
            target_speedup=target_speedup,
            confidence=confidence,
            latency=latency,
            overwrite=overwrite,
        )
        train_adapter(settings, typer.echo)


def parse_blocks(value: str | None) -> list[int] | None:
    """`0,2-4` to [0, 2, 3, 4]; None and `all` to None.

    Raises:
        ValueError: it is no list of block numbers.
    """
    if value is None or value.strip() == "all":
        return None
    blocks: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last) <= 1000)):
            raise ValueError(
                f"exit_layers={value!r} is not allowed: give block numbers and ranges, such as 2,4,6 or 0-12."
            )
        blocks += range(int(first), int(last if dash else first) + 1)
    return blocks
