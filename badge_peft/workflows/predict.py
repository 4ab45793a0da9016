"""`predict`: texts in, answers out, batch by batch, by one process or several."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from itertools import islice
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import policy_class
from badge_peft.evaluation.collate import pad_features
from badge_peft.evaluation.words import Words, answers_of, tokenize_words
from badge_peft.utils import distributed
from badge_peft.utils.checks import check_int
from badge_peft.utils.problem import problem_of
from badge_peft.utils.texts import length_limit
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.encode import encode_texts
from badge_peft.workflows.kinds import check_one_text
from badge_peft.workflows.rankings import queries_of, rank_queries

Pair = tuple[Any, ...]


def predict(
    adapter: Adapter, texts: Iterable[Pair], config: EarlyExitConfig | None = None, batch_size: int = 32
) -> Generator[dict[str, Any], None, None]:
    """Answers each text at the exit that the policy chooses, in order, with as many batches at a time as there are
    processes.

    Each process has to make the call. The first reads the texts and gets all answers; the others read nothing and get
    none. The batches are those of one process, and so are the answers.

    Args:
        adapter: From `open_adapter`.
        texts: Texts with their second text, or None; from `read_texts`.
        config: How to stop; None takes the adapter's own.
        batch_size: Texts per pass, in each process.

    Returns:
        One dict per text: `text` (and `text_pair`), `label`, `exit` (the block that answered), and `confidence` (the
        label's probability). Regression gives `value` in the place of label and confidence; a model that gives several
        labels gives `labels`, and the confidence of the least sure decision. A policy of queries takes rows of one
        query, which must follow one another, for its candidates, and gives their `rank`: see `rank_queries`.
        Of token classification `text` and `entities`, or `tokens`, `tags` and `entities`, as `answers_of` has them;
        `exit` is where the text left.
    """
    config = config or adapter.early_exit_config()
    if policy_class(config).by_group:
        return answer_in_turn(queries_of(texts), 1, partial(rank_queries, adapter, config, batch_size))
    answer = _tag if adapter.task == "tokens" else _answer
    return answer_in_turn(texts, batch_size, partial(answer, adapter, config))


def answer_in_turn(
    texts: Iterable[Any], batch_size: int, answer: Callable[[list[Any]], list[dict[str, Any]]]
) -> Generator[dict[str, Any], None, None]:
    """What `answer` makes of the texts, batch by batch, as many at a time as there are processes; see `predict`."""
    check_int("batch_size", batch_size, at_least=1)
    rank, size = distributed.rank_world()
    source = iter(texts)
    while chunk := distributed.on_main(lambda: list(islice(source, size * batch_size))):
        mine = chunk[rank * batch_size : (rank + 1) * batch_size]
        found = distributed.gather(answer(mine) if mine else [])
        if rank == 0:
            try:
                yield from found
            except GeneratorExit:  # nobody wants more, and the others wait for the next texts
                distributed.on_main(list)
                raise


def _answer(adapter: Adapter, config: EarlyExitConfig, texts: list[Pair]) -> list[dict[str, Any]]:
    """The answers of one batch."""
    pairs = [pair for _, pair in texts if pair is not None]
    encoded = encode_texts([text for text, _ in texts], pairs or None, adapter.tokenizer)
    rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]
    batch = pad_features(rows, adapter.model.get_base_model())
    batch = {name: value.to(adapter.device) for name, value in batch.items()}
    output = early_exit_forward(adapter.model, early_exit_config=config, **batch)
    assert output.logits is not None and output.exit_layer is not None
    logits, exits = output.logits.float().cpu().numpy(), output.exit_layer.tolist()
    problem, names = problem_of(adapter.labels.problem_type), adapter.labels.names
    return [
        {
            "text": text,
            **({} if pair is None else {"text_pair": pair}),
            **problem.format_prediction(row, names),
            "exit": number,
        }
        for (text, pair), row, number in zip(texts, logits, exits, strict=True)
    ]


def _tag(adapter: Adapter, config: EarlyExitConfig, texts: list[Pair]) -> list[dict[str, Any]]:
    """The tags of one batch. The first sub-token of a word answers for it, and the others hold no text."""
    check_one_text(pair for _, pair in texts)
    rows, words = tokenize_words([text for text, _ in texts], adapter.tokenizer, length_limit(adapter.tokenizer))
    batch = pad_features(rows, adapter.model.get_base_model(), tokens=True)
    batch = {name: value.to(adapter.device) for name, value in batch.items()}
    output = early_exit_forward(adapter.model, early_exit_config=config, **batch)
    assert output.exit_layer is not None
    return [
        {**found, "exit": number}
        for found, number in zip(
            tagged(texts, words, output, adapter.labels.names), output.exit_layer.tolist(), strict=True
        )
    ]


def tagged(texts: list[Pair], words: list[Words], output: Any, names: list[str]) -> list[dict[str, Any]]:
    """What was found in each text, with the text."""
    logits, exits = output.logits.float().cpu().numpy(), output.token_exit_layer.cpu().numpy()
    found = []
    for i, (text, _) in enumerate(texts):
        answers = answers_of(words[i], logits[i], exits[i], names)
        if isinstance(text, str):
            found.append({"text": text, "entities": answers["entities"]})
        else:
            found.append({"tokens": text, **answers})
    return found
