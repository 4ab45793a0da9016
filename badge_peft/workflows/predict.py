"""`predict`: texts in, answers out, batch by batch, by one process or several."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from itertools import islice
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import policy_class
from badge_peft.evaluation.words import Words, answers_of
from badge_peft.utils import distributed
from badge_peft.utils.checks import check_int
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.rankings import queries_of, rank_queries
from badge_peft.workflows.stream import Pair
from badge_peft.workflows.tasks import TaskStack, batch_of


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
    return answer_in_turn(texts, batch_size, partial(_answer, adapter, config))


def predict_tasks(
    stack: TaskStack, texts: Iterable[Pair], configs: dict[str, EarlyExitConfig], batch_size: int = 32
) -> Generator[dict[str, Any], None, None]:
    """As `predict`, for many tasks in one pass: one dict per text, with `text` (and `text_pair`), `tasks`, with what
    `predict` says of each, and `blocks`, the deepest block that the text went through."""
    return answer_in_turn(texts, batch_size, partial(_answer_tasks, stack, configs))


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
    batch, words = batch_of([adapter], texts)
    output = early_exit_forward(adapter.model, early_exit_config=config, **batch)
    return [
        # a list of tokens is told by the answer
        {**(_asked(text) if isinstance(text[0], str) else {"tokens": text[0]}), **answer}
        for text, answer in zip(texts, _answers(adapter, texts, words, output), strict=True)
    ]


def _answer_tasks(stack: TaskStack, configs: dict[str, EarlyExitConfig], texts: list[Pair]) -> list[dict[str, Any]]:
    batch, words = batch_of([*stack.adapters.values()], texts)
    output = early_exit_forward(stack.shared.model, tasks=stack.names, early_exit_config=configs, **batch)
    found: list[dict[str, Any]] = [{**_asked(text), "tasks": {}} for text in texts]
    for task, own in output.items():
        for line, answer in zip(found, _answers(stack.adapters[task], texts, words, own), strict=True):
            line["tasks"][task] = {name: value for name, value in answer.items() if name != "tags"}
    return [{**line, "blocks": blocks} for line, blocks in zip(found, output.blocks_run.tolist(), strict=True)]


def _asked(text: Pair) -> dict[str, Any]:
    return {"text": text[0], **({} if text[1] is None else {"text_pair": text[1]})}


def _answers(adapter: Adapter, texts: list[Pair], words: list[Words] | None, output: Any) -> list[dict[str, Any]]:
    """What one adapter answers to each text. Where it labels tokens, the first sub-token of a word answers for it, and
    the others hold no text."""
    logits, names = output.logits.float().cpu().numpy(), adapter.labels.names
    answers: list[dict[str, Any]]
    if adapter.tags is not None and words is not None:
        exits = output.token_exit_layer.cpu().numpy()
        found = [answers_of(words[i], logits[i], exits[i], names) for i in range(len(texts))]
        # a text has its entities, a list of tokens its tags, too
        answers = [
            {"entities": answer["entities"]} if isinstance(text[0], str) else answer
            for text, answer in zip(texts, found, strict=True)
        ]
    else:
        problem = problem_of(adapter.labels.problem_type)
        answers = [problem.format_prediction(row, names) for row in logits]
    return [{**answer, "exit": exit_} for answer, exit_ in zip(answers, output.exit_layer.tolist(), strict=True)]
