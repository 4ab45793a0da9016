"""What a multi-exit model returns, as transformers' `ModelOutput`s, and what Trainer makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

_OUTPUT_KEYS = ["exit_logits", "exit_uncertainty", "imitation_loss"]


@dataclass
class MultiExitOutput(ModelOutput):
    """Full depth with every exit.

    Args:
        loss: Scalar, when labels were given: the weighted sum of the losses of all exits (Eq. 8).
        logits: [B, K], of exit M.
        exit_logits: [B, E, K], of all exits, shallow to deep; the last is `logits`. Of token classification
            [B, E, S, K], and `logits` is [B, S, K].
        exit_uncertainty: [B, E], what learning to exit (LTE) predicts and `policy="learned"` reads, where there is it.
        imitation_loss: [B], what Global Past-Future adds to the loss, where its objective asks for it.
        hidden_states: As the base model gives them, when asked for.
        attentions: As the base model gives them, when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: Tensor | None = None
    exit_uncertainty: Tensor | None = None
    imitation_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class EarlyExitOutput(ModelOutput):
    """Each row's answer and where it was given.

    Args:
        logits: [B, K], of the exit at which the row stopped.
        exit_layer: [B], the number of the block that answered, 1 to M; 0 for the exit on the embeddings.
        non_finite: [B] bool, the rows that had NaN or infinite logits at an exit. They did not stop there, unless it
            was the last that could answer: then `logits` are what it gave.
        token_exit_layer: [B, S], of token classification: the block that answered each token; 0 also for padding and
            for special tokens, which are ignored. `logits` is [B, S, K] then, zeros for these, and `exit_layer`
            is where the row stopped, with its last token.
        num_labels: [B], with `adapter_names`: the K of each row's adapter. Its logits behind that are -inf, so that a
            softmax or an argmax needs no knowledge of it.
    """

    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    non_finite: Tensor | None = None
    token_exit_layer: Tensor | None = None
    num_labels: Tensor | None = None


@dataclass(eq=False)
class MultiTaskOutput(Mapping[str, EarlyExitOutput]):
    """The answers of many tasks on the same rows: a mapping from adapter name to its `EarlyExitOutput`, each as a call
    with that adapter alone gives it.

    Args:
        answers: By task, in the order of the call.
        blocks_run: [B], the deepest block that each row went through: as deep as its slowest task. 0: none.
    """

    answers: dict[str, EarlyExitOutput]
    blocks_run: Tensor

    def __getitem__(self, task: str) -> EarlyExitOutput:
        return self.answers[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.answers)

    def __len__(self) -> int:
        return len(self.answers)


def ignore_exit_logits(model: nn.Module) -> None:
    """Tells Trainer that `exit_logits` is no prediction: `compute_metrics` then gets the logits alone, as ever."""
    config: Any = model.config
    if config is not None:
        keys = [key for key in _output_keys(model) if key not in _OUTPUT_KEYS]
        config.keys_to_ignore_at_inference = [*keys, *_OUTPUT_KEYS]


def restore_output_keys(model: nn.Module) -> None:
    """Undoes `ignore_exit_logits`."""
    config: Any = model.config
    keys = [key for key in _output_keys(model) if key not in _OUTPUT_KEYS]
    if keys == list(getattr(type(config), "keys_to_ignore_at_inference", [])):
        config.__dict__.pop("keys_to_ignore_at_inference", None)
    else:
        config.keys_to_ignore_at_inference = keys


def _output_keys(model: nn.Module) -> list[str]:
    return list(getattr(model.config, "keys_to_ignore_at_inference", None) or [])
