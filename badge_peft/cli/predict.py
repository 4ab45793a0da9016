"""`badge-peft predict`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from typing import Annotated

import typer

from badge_peft.cli import options as shared
from badge_peft.cli.errors import told_plainly

_SOURCE = (
    "Texts to answer: a txt file (one text per line), or a csv, tsv, jsonl or parquet file; - is the standard input."
)


def predict(
    adapter: shared.AdapterArgument,
    source: Annotated[str, typer.Argument(metavar="FILE", help=_SOURCE)] = "-",
    format: Annotated[
        str | None,
        typer.Option(help="text, csv, tsv, jsonl or parquet. Default: by the file's name; text for standard input."),
    ] = None,
    text_column: shared.TextColumn = None,
    text_pair_column: shared.TextPairColumn = None,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Texts at once, in each process; 1 answers each line as soon as it is there."),
    ] = 32,
    policy: shared.OwnPolicy = None,
    threshold: shared.OwnThreshold = None,
    patience: shared.OwnPatience = None,
    depth: shared.OwnDepth = None,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Answer texts with early exits: one line of JSON per text, in the order of the texts.

    Each line has the text, its label, the confidence (the label's probability),
    and the exit: the block that answered.

    Several processes, started with accelerate launch or torchrun, share the texts
    among them; the output is that of one.
    """
    with told_plainly():
        from badge_peft.workflows import exit_rule, open_adapter, predict_shared, read_texts

        opened = open_adapter(adapter, base_model, device)
        rule = exit_rule(opened, policy=policy, threshold=threshold, patience=patience, depth=depth)
        texts = read_texts(source, format, text_column, text_pair_column, opened.columns)
        try:
            with closing(predict_shared(opened, texts, rule, batch_size)) as answers:
                for answer in answers:
                    sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
                    sys.stdout.flush()
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
