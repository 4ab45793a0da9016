"""Commands that make an adapter: `train`, `calibrate`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from badge_peft.cli import options as shared
from badge_peft.cli.errors import warn
from badge_peft.workflows.settings import Columns, DemoSettings, Goal, TrainSettings


def train(
    model: str,
    data: Annotated[str, Parameter(help=f"Texts to learn from. {shared.DATA}")],
    /,
    settings: TrainSettings = TrainSettings(),
) -> None:
    """Put early exits on a model: train them, choose a policy, and report what it costs.

    The usual case: a classifier that is in service, and a file of texts like those that it sees, labeled or not:

        badge-peft train my-model texts.csv

    A trial on a part of the texts chooses the form of the exits (what they read, linear or with attention) that saves
    most time on this machine within a point of the score; a form that you name is kept. The model itself is not
    changed. The folder, my-model-exits, gets the adapter, with its early-exit policy in adapter_config.json and
    the tokenizer beside it; report.json and tradeoff.png, with what was measured; and exit_logits.safetensors, from
    which badge-peft sweep and badge-peft calibrate can run again. Then badge-peft predict answers with it.

    Where the rows have tokens and tags, or a text and its entities [{start, end, label}], exits label tokens:

        badge-peft train my-encoder rows.jsonl --output-dir my-tagger

    With --task ranking the model is a cross-encoder and the data pairs of a query and a document, the candidates of
    each query as they will come; labels are not needed, and full depth stays as it is:

        badge-peft train my-cross-encoder pairs.jsonl --task ranking --output-dir my-reranker --top-k 10

    Where there are queries alone, --corpus names a file of documents, in which BM25 finds their candidates.

    Several processes, started with accelerate launch or torchrun, share each batch among them.

    Args:
        model: Your model: a folder, or a repository of the Hub. A fine-tuned classifier, or an encoder to make one of.
    """
    from badge_peft.workflows.train import train_adapter

    train_adapter(model, data, settings)


def calibrate(
    adapter: str,
    data: shared.OtherData = None,
    /,
    *,
    goal: Goal = Goal(),
    metric: shared.Metric = None,
    columns: Columns = Columns(),
    batch_size: shared.BatchSize = 32,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Choose the policy of an adapter, and write it into its adapter_config.json.

    Nothing else in the folder changes but the numbers of its card, and nothing is trained: an adapter can be
    calibrated again, in seconds, whenever another speed is wanted.

    Args:
        adapter: Folder of the adapter.
    """
    from badge_peft.model_card import CONFIG
    from badge_peft.workflows.calibrate import calibrate_adapter
    from badge_peft.workflows.report import summary

    _, report, notes = calibrate_adapter(adapter, data, columns, goal, metric, base_model, batch_size, device)
    print(f"{summary(report)}\nwritten to {Path(adapter) / CONFIG}")
    for note in notes:
        warn(f"note: {note}")


def demo(settings: DemoSettings = DemoSettings()) -> None:
    """See what early exits do to a fine-tuned classifier, in a few minutes on a CPU.

    Fine-tunes an encoder by plain transformers.Trainer (or takes --model, where that is a classifier), runs
    `badge-peft train` on it without options, and shows score and time before and after, in PyTorch and in ONNX
    Runtime, on test data, one text at a time.
    """
    from badge_peft.workflows.demo import run_demo

    run_demo(settings)
