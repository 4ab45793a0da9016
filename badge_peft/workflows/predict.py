"""`predict`: texts in, answers out, batch by batch."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.collate import pad_features
from badge_peft.model import get_badge_model
from badge_peft.utils.checks import whole
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.adapter import Adapter
from badge_peft.workflows.encode import encode_texts


def exit_rule(adapter: Adapter, **overrides: Any) -> EarlyExitConfig:
    """The adapter's own rule with `overrides`; another policy starts from its own defaults, as a threshold of one
    policy means nothing to another.

    Args:
        adapter: From `open_adapter`.
        **overrides: Fields of `EarlyExitConfig`; None leaves a field alone.

    Raises:
        ValueError: a field has a value that is not allowed, or the rule does not suit the model.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    badge = get_badge_model(adapter.model)
    own = badge.get_early_exit_config()
    same = given.get("policy", own.policy) == own.policy
    config = EarlyExitConfig.of(own if same else None, **given)
    build_policy(config).check(badge.exit_layers(), len(adapter.labels.names), adapter.labels.problem_type)
    return config


def predict(
    adapter: Adapter,
    texts: Iterable[tuple[str, str | None]],
    rule: EarlyExitConfig | None = None,
    batch_size: int = 32,
) -> Generator[dict[str, Any], None, None]:
    """Answers each text at the exit that the rule chooses, in order; one batch at a time is in memory.

    Args:
        adapter: From `open_adapter`.
        texts: Texts with their second text, or None; from `read_texts`.
        rule: None takes the adapter's own.
        batch_size: Texts per pass.

    Returns:
        One dict per text: `text` (and `text_pair`), `label`, `exit` (the block that answered), and `confidence` (the
        label's probability). Regression gives `value` in the place of label and confidence; a model that gives several
        labels gives `labels`, and the confidence of the least sure decision.
    """
    whole("batch_size", batch_size, at_least=1)
    rule = rule or exit_rule(adapter)
    device = next(adapter.model.parameters()).device
    source = iter(texts)
    while chunk := list(islice(source, batch_size)):
        firsts = [text for text, _ in chunk]
        seconds = [pair for _, pair in chunk if pair is not None]
        encoded = encode_texts(firsts, seconds or None, adapter.tokenizer)
        rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(chunk))]
        batch = pad_features(rows, adapter.model.get_base_model())
        batch = {name: value.to(device) for name, value in batch.items()}
        output = early_exit_forward(adapter.model, early_exit_config=rule, **batch)
        assert output.logits is not None and output.exit_layer is not None
        logits, exits = output.logits.float().cpu().numpy(), output.exit_layer.tolist()
        for (text, pair), row, number in zip(chunk, logits, exits, strict=True):
            said = {"text": text} if pair is None else {"text": text, "text_pair": pair}
            answer = problem_of(adapter.labels.problem_type).format_prediction(row, adapter.labels.names)
            yield {**said, **answer, "exit": number}
