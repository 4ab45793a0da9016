"""`badge-peft train`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from badge_peft.cli.options import DATA
from badge_peft.workflows.settings import TrainSettings

_MODEL = "Your model: a folder, or a repository of the Hub. A fine-tuned classifier, or an encoder to make one of."


def train(
    model: Annotated[str, Parameter(help=_MODEL)],
    data: Annotated[str, Parameter(help=f"Texts to learn from. {DATA}")],
    /,
    settings: Annotated[TrainSettings, Parameter("*")],
) -> None:
    """Put early exits on a model: train them, choose when to stop, and say what it costs.

    The usual case: a classifier that is in service, and a file of texts like those that it sees, labeled or not:

        badge-peft train my-model texts.csv --output-dir my-exits --keep-head

    The model itself is not changed. The folder gets the adapter, with its early-exit policy in adapter_config.json and
    the tokenizer beside it; report.json and tradeoff.png, with what was measured; and exit_logits.safetensors, from
    which badge-peft sweep and badge-peft calibrate can run again. Then badge-peft predict answers with it.

    Several processes, started with accelerate launch or torchrun, share each batch among them.
    """
    from badge_peft.workflows.train import train_adapter

    train_adapter(model, data, settings)
