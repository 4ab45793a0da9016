"""`predict`: texts in, answers out, batch by batch, by one process or several."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import build_policy, policy_class
from badge_peft.evaluation.collate import pad_features
from badge_peft.evaluation.words import Words, answers_of, tokenize_words
from badge_peft.ranking.segments import CandidatePass
from badge_peft.utils import distributed
from badge_peft.utils.checks import check_int
from badge_peft.utils.problem import problem_of
from badge_peft.utils.texts import length_limit
from badge_peft.workflows.adapter_dir import Adapter, early_exit_configs, open_tasks
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.encode import check_one_text, encoded_rows
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
STATE_BYTES = 2**30  # for the states of one query's candidates
_ENTITY = ("label", "start", "end", "text", "score", "exit_layer")


def predict(
    adapter: Adapter | dict[str, Adapter], texts: Iterable[Pair], config: Any = None, batch_size: int = 32
) -> Generator[dict[str, Any], None, None]:
    """Answers each text at the exit that the policy chooses, in order, with as many batches at a time as there are
    processes.

    Each process has to make the call. The first reads the texts and gets all answers; the others read nothing and get
    none. The batches are those of one process, and so are the answers.

    Args:
        adapter: From `open_adapter`; or those of many tasks, from `open_tasks`, which answer in one pass.
        texts: Texts with their second text, or None; from `read_texts`.
        config: How to stop, of many tasks a dict; None takes the adapter's own.
        batch_size: Texts per pass, in each process.

    Returns:
        One dict per text: `text` (and `text_pair`), `label`, `exit_layer` (the block that answered), and `score` (the
        label's probability). Regression gives `value` in the place of label and score; a model that gives several
        labels gives `labels`, and the score of the least sure decision. A policy of queries takes rows of one
        query, which must follow one another, for its candidates, and gives their `rank`; those that left early have
        none.
        Of token classification `text` and `entities`, or `tokens`, `tags` and `entities`, as `answers_of` has them;
        `exit_layer` is where the text left. Of many tasks `text` (and `text_pair`), `tasks`, with what each says, and
        `blocks`, the deepest block that the text went through.
    """
    if isinstance(adapter, dict):
        configs = config or early_exit_configs(adapter)
        return answer_in_turn(texts, batch_size, partial(_answer_tasks, adapter, configs))
    config = config or adapter.early_exit_config()
    if policy_class(config).by_group:
        return answer_in_turn(queries_of(texts), 1, partial(_rank, adapter, config, batch_size))
    return answer_in_turn(texts, batch_size, partial(_answer, adapter, config))


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


def _answer_tasks(
    adapters: dict[str, Adapter], configs: dict[str, EarlyExitConfig], texts: list[Pair]
) -> list[dict[str, Any]]:
    batch, words = batch_of([*adapters.values()], texts)
    model = next(iter(adapters.values())).model
    output = early_exit_forward(model, tasks=[*adapters], early_exit_config=configs, **batch)
    found: list[dict[str, Any]] = [{**_asked(text), "tasks": {}} for text in texts]
    for task, own in output.items():
        for line, answer in zip(found, _answers(adapters[task], texts, words, own), strict=True):
            line["tasks"][task] = answer
    return [{**line, "blocks": blocks} for line, blocks in zip(found, output.blocks_run.tolist(), strict=True)]


def _asked(text: Pair) -> dict[str, Any]:
    return {"text": text[0], **({} if text[1] is None else {"text_pair": text[1]})}


def _answers(adapter: Adapter, texts: list[Pair], words: list[Words] | None, output: Any) -> list[dict[str, Any]]:
    """What one adapter answers to each text. Where it labels tokens, the first sub-token of a word answers for it, and
    the others hold no text."""
    logits = output.logits.float().cpu().numpy()
    names = adapter.labels.names
    answers: list[dict[str, Any]]
    if adapter.labels.tokens and words is not None:
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
    if any(adapter.labels.tokens for adapter in adapters):
        check_one_text(seconds)
        rows, words = tokenize_words([text[0] for text in texts], first.tokenizer, length_limit(first.tokenizer))
    else:
        rows = encoded_rows([text[0] for text in texts], seconds or None, first.tokenizer)
    batch = pad_features(rows, base, tokens=words is not None)
    return {name: value.to(first.device) for name, value in batch.items()}, words


def _rank(
    adapter: Adapter, config: EarlyExitConfig, batch_size: int, queries: list[list[Pair]]
) -> list[dict[str, Any]]:
    """The candidates of one query, with a `rank` from 1 on where one has gone as deep as any."""
    (pairs,) = queries
    documents = [pair[1] for pair in pairs if pair[1] is not None]
    if len(documents) < len(pairs):
        raise ValueError("ranking takes pairs of a query and a document: name the documents with --text-pair-column.")
    rows = encoded_rows([pair[0] for pair in pairs], documents, adapter.tokenizer)
    found = CandidatePass(adapter.badge, rows, build_policy(config), batch_size, STATE_BYTES).run()
    last = np.flatnonzero(found.exit_layer == found.exit_layer.max())
    order = last[np.argsort(-found.scores[last], kind="stable")]
    places = {int(i): place for place, i in enumerate(order, start=1)}
    return [
        {
            **_asked(pair),
            "value": round(float(score), 6) if np.isfinite(score) else None,
            "exit_layer": int(number),
            "rank": places.get(i),
        }
        for i, (pair, score, number) in enumerate(zip(pairs, found.scores, found.exit_layer, strict=True))
    ]


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
    """Opened adapters; a call answers texts as `predict` does.

    Attributes:
        reading: What `read_texts` is told of it: `recorded`, `tokens` and `by_query`.
        identity: Weights and settings as JSON: equal ones give equal answers.
    """

    def __init__(self, answering: Answering) -> None:
        place = answering.adapter
        places = {None: place} if isinstance(place, str) else place
        alone = None in places
        adapters = open_tasks(places, answering.base_model, answering.device)
        configs = early_exit_configs(adapters, **vars(answering.overrides))
        first = next(iter(adapters.values()))
        given = (first, configs[None]) if alone else (adapters, configs)
        self._answer = partial(predict, given[0], config=given[1], batch_size=answering.batch_size)
        self.reading: dict[str, Any] = {
            "recorded": first.columns,
            "tokens": alone and first.labels.tokens,
            "by_query": alone and policy_class(configs[None]).by_group,
        }
        identity = {task: _identity(first.badge.weights_hash(task), config) for task, config in configs.items()}
        self.identity: dict[str, Any] = identity[None] if alone else identity

    def __call__(self, texts: Iterable[Pair]) -> Generator[dict[str, Any], None, None]:
        """One dict per text, in order; see `predict`."""
        return self._answer(texts=texts)

    def table(self, texts: list[Pair]) -> pa.Table:
        """The same as columns, of the same types for any texts: none give the columns without rows."""
        lines = list(self(texts or [("", "" if self.reading["by_query"] else None)]))
        columns = dict.fromkeys(_OF_TOKENS) if self.reading["tokens"] else lines[0]
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
