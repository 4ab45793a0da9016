"""What answers texts for `predict`: one adapter, or many tasks in one pass; as dicts, or as the columns of a table."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import policy_class
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.goal import PolicyOverrides
from badge_peft.workflows.predict import predict, predict_tasks
from badge_peft.workflows.stream import Pair
from badge_peft.workflows.tasks import open_tasks

_WHOLE = ("exit", "rank", "blocks", "start", "end")  # what `predict` gives as a whole number
_OF_TOKENS = ("text", "tokens", "tags", "entities", "exit")  # of texts and of lists of tokens, which may be mixed
_ENTITY = ("label", "start", "end", "text", "confidence", "exit")


@dataclass(frozen=True)
class Answering:
    """How texts are answered; plain data, so that other processes can open the same.

    Args:
        adapter: A folder or repository, or a dict from tasks to such.
        overrides: Of the adapter's own setting, or of all tasks'.
        batch_size: Texts per pass.
        base_model: As for `open_adapter`.
        device: As for `open_adapter`.
    """

    adapter: str | dict[str, str]
    overrides: PolicyOverrides = PolicyOverrides()
    batch_size: int = 32
    base_model: str | None = None
    device: str | None = None


class Answerer:
    """Opened adapters; a call answers texts as `predict` or `predict_tasks` does.

    Args:
        answering: What to open, and how to stop.

    Attributes:
        columns: What training recorded of its data's columns.
        tokens: Whether a text may be a list of tokens.
        by_query: Whether the rows of a query belong together.
        identity: Weights and settings as JSON: equal ones give equal answers.
    """

    def __init__(self, answering: Answering) -> None:
        place, rest = answering.adapter, (answering.base_model, answering.device)
        overrides = vars(answering.overrides)
        self.identity: dict[str, Any]
        if isinstance(place, str):
            opened = open_adapter(place, *rest)
            config = opened.early_exit_config(**overrides)
            self._answer: Any = partial(predict, opened, config=config, batch_size=answering.batch_size)
            self.columns, self.by_query = opened.columns, policy_class(config).by_group
            self.tokens = opened.task == "tokens"
            self.identity = _identity(opened.badge.weights_hash(), config)
            return
        stack = open_tasks(place, *rest)
        configs = stack.early_exit_configs(**overrides)
        self._answer = partial(predict_tasks, stack, configs=configs, batch_size=answering.batch_size)
        self.columns, self.by_query, self.tokens = stack.shared.columns, False, False
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
    if name in ("confidence", "value"):
        return pa.list_(pa.float64()) if isinstance(value, list) else pa.float64()
    if name == "entities":
        return pa.list_(pa.struct([(inner, _type_of(inner, None)) for inner in _ENTITY]))
    if name in ("labels", "tags", "tokens"):
        return pa.list_(pa.string())
    return pa.int64() if name in _WHOLE else pa.string()
