"""`predict_shared`: the texts of one source, answered by several processes."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.utils import distributed
from badge_peft.utils.checks import whole
from badge_peft.workflows.adapter import Adapter
from badge_peft.workflows.predict import exit_rule, predict


def predict_shared(
    adapter: Adapter,
    texts: Iterable[tuple[str, str | None]],
    rule: EarlyExitConfig | None = None,
    batch_size: int = 32,
) -> Generator[dict[str, Any], None, None]:
    """As `predict`, with as many batches at a time as there are processes; each has to make the call.

    The first process reads the texts and gets all answers, in the order of the texts; the others read nothing and get
    none. The batches are those of one process, and so are the answers. With one process it is `predict`.

    Args:
        adapter: From `open_adapter`.
        texts: As for `predict`.
        rule: None takes the adapter's own.
        batch_size: Texts per pass, in each process.

    Returns:
        As `predict`, in the first process.

    Raises:
        Exception: whatever reading the texts raises, in every process.
    """
    whole("batch_size", batch_size, at_least=1)
    distributed.join()
    rank, size = distributed.together()
    rule = rule or exit_rule(adapter)
    if size == 1:
        return predict(adapter, texts, rule, batch_size)
    return _answers(adapter, texts, rule, batch_size, rank, size)


def _answers(
    adapter: Adapter,
    texts: Iterable[tuple[str, str | None]],
    rule: EarlyExitConfig,
    batch_size: int,
    rank: int,
    size: int,
) -> Generator[dict[str, Any], None, None]:
    source = iter(texts)
    while chunk := distributed.in_main(lambda: list(islice(source, size * batch_size))):
        mine = chunk[rank * batch_size : (rank + 1) * batch_size]
        found = distributed.gather(list(predict(adapter, mine, rule, batch_size)))
        if rank == 0:
            try:
                yield from found
            except GeneratorExit:  # nobody wants more, and the others wait for the next texts
                distributed.in_main(list)
                raise
