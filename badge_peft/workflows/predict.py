"""`predict`: texts in, answers out, batch by batch; `predict_shared`: by several processes."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.collate import pad_features
from badge_peft.model import get_badge_model
from badge_peft.utils import distributed
from badge_peft.utils.checks import check_int
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.encode import encode_texts


def resolve_policy_config(adapter: Adapter, **overrides: Any) -> EarlyExitConfig:
    """The adapter's own early-exit config with `overrides`. Another policy starts from its own defaults: a threshold
    of one policy means nothing to another.

    Args:
        adapter: From `open_adapter`.
        **overrides: Fields of `EarlyExitConfig`; None leaves a field alone.

    Raises:
        ValueError: a field has a value that is not allowed, or the policy does not suit the model.
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
    config: EarlyExitConfig | None = None,
    batch_size: int = 32,
) -> Generator[dict[str, Any], None, None]:
    """Answers each text at the exit that the policy chooses, in order; one batch at a time is in memory.

    Args:
        adapter: From `open_adapter`.
        texts: Texts with their second text, or None; from `read_texts`.
        config: How to stop; None takes the adapter's own.
        batch_size: Texts per pass.

    Returns:
        One dict per text: `text` (and `text_pair`), `label`, `exit` (the block that answered), and `confidence` (the
        label's probability). Regression gives `value` in the place of label and confidence; a model that gives several
        labels gives `labels`, and the confidence of the least sure decision.
    """
    check_int("batch_size", batch_size, at_least=1)
    config = config or resolve_policy_config(adapter)
    device = next(adapter.model.parameters()).device
    source = iter(texts)
    while chunk := list(islice(source, batch_size)):
        firsts = [text for text, _ in chunk]
        seconds = [pair for _, pair in chunk if pair is not None]
        encoded = encode_texts(firsts, seconds or None, adapter.tokenizer)
        rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(chunk))]
        batch = pad_features(rows, adapter.model.get_base_model())
        batch = {name: value.to(device) for name, value in batch.items()}
        output = early_exit_forward(adapter.model, early_exit_config=config, **batch)
        assert output.logits is not None and output.exit_layer is not None
        logits, exits = output.logits.float().cpu().numpy(), output.exit_layer.tolist()
        for (text, pair), row, number in zip(chunk, logits, exits, strict=True):
            said = {"text": text} if pair is None else {"text": text, "text_pair": pair}
            answer = problem_of(adapter.labels.problem_type).format_prediction(row, adapter.labels.names)
            yield {**said, **answer, "exit": number}


def predict_shared(
    adapter: Adapter,
    texts: Iterable[tuple[str, str | None]],
    config: EarlyExitConfig | None = None,
    batch_size: int = 32,
) -> Generator[dict[str, Any], None, None]:
    """As `predict`, with as many batches at a time as there are processes; each has to make the call.

    The first process reads the texts and gets all answers, in the order of the texts; the others read nothing and get
    none. The batches are those of one process, and so are the answers. With one process it is `predict`.

    Args:
        adapter: From `open_adapter`.
        texts: As for `predict`.
        config: How to stop; None takes the adapter's own.
        batch_size: Texts per pass, in each process.

    Returns:
        As `predict`, in the first process.

    Raises:
        Exception: whatever reading the texts raises, in every process.
    """
    check_int("batch_size", batch_size, at_least=1)
    distributed.init_process_group()
    rank, size = distributed.rank_world()
    config = config or resolve_policy_config(adapter)
    if size == 1:
        return predict(adapter, texts, config, batch_size)
    return _predict_by_turns(adapter, texts, config, batch_size, rank, size)


def _predict_by_turns(
    adapter: Adapter,
    texts: Iterable[tuple[str, str | None]],
    config: EarlyExitConfig,
    batch_size: int,
    rank: int,
    size: int,
) -> Generator[dict[str, Any], None, None]:
    source = iter(texts)
    while chunk := distributed.on_main(lambda: list(islice(source, size * batch_size))):
        mine = chunk[rank * batch_size : (rank + 1) * batch_size]
        found = distributed.gather(list(predict(adapter, mine, config, batch_size)))
        if rank == 0:
            try:
                yield from found
            except GeneratorExit:  # nobody wants more, and the others wait for the next texts
                distributed.on_main(list)
                raise
