"""What a reranker has in common on PyTorch and on ONNX: pairs of a query and a document as rows of tokens, which of
them had to be cut, the ranking, and what it has cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from badge_peft.ranking.segments import RankedCandidates


@dataclass(frozen=True)
class ExitReport:
    """What one call of `rank` did.

    Args:
        candidates: How many there were, N.
        num_blocks: M.
        blocks_run: Over all candidates; full depth is N * M.
        left: Block number of each exit -> candidates that went on after it; 0 after the last.
        cut: Candidates that were longer than the model reads, and were cut.
        exit_layer: [N], the block that each candidate stopped at.
    """

    candidates: int
    num_blocks: int
    blocks_run: int
    left: dict[int, int]
    cut: int
    exit_layer: np.ndarray = field(repr=False)

    @property
    def blocks_saved(self) -> float:
        """Share of full depth's blocks that were not run."""
        return 1 - self.blocks_run / (self.candidates * self.num_blocks)


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, Any]], int]:
    """The rows of tokens, and how many of the pairs were longer than `max_length`.

    As in `sentence_transformers.CrossEncoder` the longer text of a pair is cut, token by token.
    """
    queries, documents = (list(texts) for texts in zip(*pairs, strict=True))
    columns = tokenizer(queries, documents, truncation=True, max_length=max_length)
    full = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) >= max_length]  # cut, or just as long
    cut = 0
    if full:
        whole = tokenizer([queries[i] for i in full], [documents[i] for i in full], truncation=False, verbose=False)
        cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], cut


def check_documents(query: Any, documents: Any) -> list[str]:
    """The documents as a list; refuses no query, no documents, and something else than texts."""
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"query={query!r} is empty or no text: give the question as a string.")
    if isinstance(documents, str):
        raise ValueError("documents is one string: give a list of texts.")
    if isinstance(documents, Mapping) or not isinstance(documents, Iterable):
        raise ValueError(f"documents is {type(documents).__name__}: give a list of texts.")
    texts = list(documents)
    if not texts:
        raise ValueError("documents is empty: there is nothing to rank.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"document {i} is {type(text).__name__}, not a text.")
    return texts


def warn_of_more(top_k: int, calibrated: int, stacklevel: int) -> None:
    """Warns of a `top_k` beyond that of the margins, by which they are used all the same; `stacklevel` as usual."""
    warnings.warn(
        f"the margins were calibrated for top_k={calibrated}, and {top_k} are requested: how often these are full "
        f"depth's is not known. Calibrate with top_k={top_k}.",
        stacklevel=stacklevel,
    )


def ranking(
    found: RankedCandidates,
    texts: Sequence[str],
    top_k: int | None,
    return_documents: bool,
    blocks_and_cut: tuple[int, int] | None,
    activated: Callable[[np.ndarray], np.ndarray] = lambda scores: scores,
) -> Any:
    """The `top_k` best of the candidates that went deepest, best first, with their `texts` where these are wanted;
    given M and how many texts were cut, a pair of it and the report."""
    last = np.flatnonzero(found.exit_layer == found.exit_layer.max())
    best = last[np.argsort(-found.scores[last], kind="stable")][:top_k]
    answers: list[dict[str, Any]] = [
        {"corpus_id": i, "score": score, **({"text": texts[i]} if return_documents else {})}
        for i, score in zip(best.tolist(), activated(found.scores[best]).tolist(), strict=True)
    ]
    if blocks_and_cut is None:
        return answers
    blocks, cut = blocks_and_cut
    return answers, ExitReport(len(texts), blocks, int(found.exit_layer.sum()), found.left, cut, found.exit_layer)
