"""`predict`: texts in, answers out, batch by batch, by one process or several."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import policy_class
from badge_peft.evaluation.collate import pad_features
from badge_peft.evaluation.words import Words, answers_of, tokenize_words
from badge_peft.utils import distributed
from badge_peft.utils.checks import check_int
from badge_peft.utils.problem import problem_of
from badge_peft.utils.texts import length_limit
from badge_peft.workflows.adapter_dir import Adapter, TaskStack, open_adapter, open_tasks
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import check_one_text, encode_texts
from badge_peft.workflows.rankings import rank_queries
from badge_peft.workflows.settings import PolicyOverrides
from badge_peft.workflows.stream import Pair, queries_of

_WHOLE = ("exit_layer", "rank", "blocks", "start", "end")  # what `predict` gives as a whole number
_OF_TOKENS = (
    "text",
    "tokens",
    "tags",
    "entities",
    "exit_layer",
)  # of texts and of lists of tokens, which may be mixed
_ENTITY = ("label", "start", "end", "text", "score", "exit_layer")


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
        One dict per text: `text` (and `text_pair`), `label`, `exit_layer` (the block that answered), and `score` (the
        label's probability). Regression gives `value` in the place of label and score; a model that gives several
        labels gives `labels`, and the score of the least sure decision. A policy of queries takes rows of one
        query, which must follow one another, for its candidates, and gives their `rank`: see `rank_queries`.
        Of token classification `text` and `entities`, or `tokens`, `tags` and `entities`, as `answers_of` has them;
        `exit_layer` is where the text left.
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
    logits = output.logits.float().cpu().numpy()
    names = adapter.labels.names
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
    return [{**answer, "exit_layer": exit_} for answer, exit_ in zip(answers, output.exit_layer.tolist(), strict=True)]


def batch_of(
    adapters: Sequence[Adapter], texts: Sequence[Sequence[Any]]
) -> tuple[dict[str, torch.Tensor], list[Words] | None]:
    """Texts with their second text, or None, as a padded batch of adapters that share a model, and the words of each
    where one labels tokens."""
    first = adapters[0]
    seconds = [text[1] for text in texts if text[1] is not None]
    base = first.model.get_base_model()
    words = None
    if any(adapter.tags is not None for adapter in adapters):
        check_one_text(seconds)
        rows, words = tokenize_words([text[0] for text in texts], first.tokenizer, length_limit(first.tokenizer))
    else:
        encoded = encode_texts([text[0] for text in texts], seconds or None, first.tokenizer)
        rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    batch = pad_features(rows, base, tokens=words is not None)
    return {name: value.to(first.device) for name, value in batch.items()}, words


def pairs_of(rows: TextDataset) -> list[tuple[Any, str | None]]:
    """What `batch_of` takes."""
    seconds: Sequence[str | None] = rows.pairs or [None] * len(rows)
    return [*zip(rows.words or rows.texts, seconds, strict=True)]


@dataclass(frozen=True)
class Answering:
    """How texts are answered, by one adapter or, given as a dict, by one for each task, as for `open_adapter`; plain
    data, so that other processes can open the same."""

    adapter: str | dict[str, str]
    overrides: PolicyOverrides = PolicyOverrides()
    batch_size: int = 32
    base_model: str | None = None
    device: str | None = None


class Answerer:
    """Opened adapters; a call answers texts as `predict` or `predict_tasks` does.

    Attributes:
        columns: What training recorded of its data's columns.
        tokens: Whether a text may be a list of tokens.
        by_query: Whether the rows of a query belong together.
        identity: Weights and settings as JSON: equal ones give equal answers.
    """

    def __init__(self, answering: Answering) -> None:
        place = answering.adapter
        rest = (answering.base_model, answering.device)
        overrides = vars(answering.overrides)
        self.identity: dict[str, Any]
        if isinstance(place, str):
            opened = open_adapter(place, *rest)
            config = opened.early_exit_config(**overrides)
            self._answer: Any = partial(predict, opened, config=config, batch_size=answering.batch_size)
            self.columns = opened.columns
            self.by_query = policy_class(config).by_group
            self.tokens = opened.task == "tokens"
            self.identity = _identity(opened.badge.weights_hash(), config)
            return
        stack = open_tasks(place, *rest)
        configs = stack.early_exit_configs(**overrides)
        self._answer = partial(predict_tasks, stack, configs=configs, batch_size=answering.batch_size)
        self.columns = stack.shared.columns
        self.by_query = False
        self.tokens = False
        self.identity = {task: _identity(stack.use(task).badge.weights_hash(), configs[task]) for task in configs}

    def __call__(self, texts: Iterable[Pair]) -> Generator[dict[str, Any], None, None]:
        """One dict per text, in order; see `predict`."""
        return self._answer(texts=texts)

    def table(self, texts: list[Pair]) -> pa.Table:
        """The same as columns, of the same types for any texts: none give the columns without rows."""
        lines = list(self(texts or [("", "" if self.by_query else None)]))
        columns = dict.fromkeys(_OF_TOKENS) if self.tokens else lines[0]
        schema = pa.schema([(name, _type_of(name, value)) for name, value in columns.items()])
        return pa.Table.from_pylist(lines, schema).slice(0, len(texts))


def _identity(weights_hash: str, config: EarlyExitConfig) -> dict[str, Any]:
    return {"weights_hash": weights_hash, "early_exit": EarlyExitConfig.of(config, calibration=None).to_dict()}


def _type_of(name: str, value: Any) -> pa.DataType:
    """Of a column, which may hold None in any row."""
    if isinstance(value, dict):
        return pa.struct([(inner, _type_of(inner, own)) for inner, own in value.items()])
    if name in ("score", "value"):
        return pa.list_(pa.float64()) if isinstance(value, list) else pa.float64()
    if name == "entities":
        return pa.list_(pa.struct([(inner, _type_of(inner, None)) for inner in _ENTITY]))
    if name in ("labels", "tags", "tokens"):
        return pa.list_(pa.string())
    return pa.int64() if name in _WHOLE else pa.string()
