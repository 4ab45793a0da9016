"""`badge-peft predict`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from typing import Annotated

from cyclopts import Parameter

from badge_peft.cli import options as shared
from badge_peft.workflows.settings import PolicyOverrides, TextColumns

_FILE = (
    "Texts to answer: a txt file (one text per line), or a csv, tsv, jsonl or parquet file; - is the standard input."
)


def _check_file(_: type, value: str) -> None:
    if value.startswith("-") and value != "-":
        raise ValueError("There is no such option.")


def predict(
    adapter: shared.Adapter,
    file: Annotated[str, Parameter(help=_FILE, allow_leading_hyphen=True, validator=_check_file)] = "-",
    /,
    *,
    format: Annotated[
        str | None,
        Parameter(help="text, csv, tsv, jsonl or parquet. Default: by the file's name; text for standard input."),
    ] = None,
    columns: shared.TextColumns = TextColumns(),
    batch_size: Annotated[
        int,
        Parameter(
            validator=shared.AT_LEAST_1,
            help="Batch size: texts per pass, in each process; 1 answers each line as soon as it is there.",
        ),
    ] = 32,
    overrides: shared.Overrides = PolicyOverrides(),
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Answer texts with early exits: one line of JSON per text, in the order of the texts.

    Each line has the text, its label, the confidence (the label's probability), and the exit: the block that answered.

    Several processes, started with accelerate launch or torchrun, share the texts among them; the output is that of
    one.
    """
    from badge_peft.workflows.adapter_dir import open_adapter
    from badge_peft.workflows.predict import predict_shared, resolve_policy_config
    from badge_peft.workflows.stream import read_texts

    opened = open_adapter(adapter, base_model, device)
    config = resolve_policy_config(opened, **vars(overrides))
    texts = read_texts(file, format, columns, opened.columns)
    try:
        with closing(predict_shared(opened, texts, config, batch_size)) as answers:
            for answer in answers:
                sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
                sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
