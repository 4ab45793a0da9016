"""`OnnxReranker`: ranks the documents of a query with a file that `export_onnx` wrote of a ranking adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from badge_peft.export.runtime import OnnxEarlyExitModel
from badge_peft.ranking.pairs import check_documents, encode_pairs, ranking, warn_of_more
from badge_peft.ranking.segments import RankedCandidates
from badge_peft.utils.checks import check_int
from badge_peft.utils.texts import longest_text

_COPIES = 4  # of the states of all candidates of a call, beside masks [N, 1, S, S]
_HIDDEN_SIZE = 1024  # where a file of an earlier version does not say it


class OnnxReranker:
    """As `EarlyExitReranker`, with onnxruntime: all candidates of a query are one call of the graph, which takes those
    out that leave, and runs its blocks for a few of similar length at a time.

    Candidates that would take more than `max_state_bytes` together are several calls, each for candidates of similar
    length. The bar is then that of each call, so that fewer leave, and the best of all calls are the answer.

    Args:
        model: Of a ranking adapter, with its tokenizer.
        max_state_bytes: Memory for the states and masks of one query's candidates.

    Raises:
        ValueError: its policy does not rank, or a number that is not allowed.
    """

    def __init__(self, model: OnnxEarlyExitModel, *, max_state_bytes: int = 2**30) -> None:
        check_int("max_state_bytes", max_state_bytes, at_least=0, optional=False)
        if model.has_tasks:
            raise ValueError(
                f"{model.directory} holds a file of many tasks, none of which ranks: export a ranking one."
            )
        if "top_k" not in model.config:
            raise ValueError(
                f"{model.directory} was exported with policy={model.config['early_exit']['policy']!r}, which ranks "
                "nothing: export a calibrated ranking adapter."
            )
        self.model = model
        self.max_state_bytes = max_state_bytes

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, max_state_bytes: int = 2**30, **kwargs: Any) -> OnnxReranker:
        """Loads a folder; other arguments and errors are those of `OnnxEarlyExitModel.from_pretrained`."""
        return cls(OnnxEarlyExitModel.from_pretrained(directory, **kwargs), max_state_bytes=max_state_bytes)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        threshold: float | None = None,
        return_report: bool = False,
    ) -> Any:
        """The best documents for a query, by the scores of the model's own head.

        Arguments, answers and errors are those of `EarlyExitReranker.rank`. `top_k` None: as many as the file's
        margins were calibrated for; `threshold` is a factor on them, None the file's own."""
        texts = check_documents(query, documents)
        check_int("top_k", top_k, at_least=1)
        own = int(self.model.config["top_k"])
        k = own if top_k is None else top_k
        if k > own:
            warn_of_more(k, own, stacklevel=3)
        model = self.model
        longest = longest_text(model.tokenizer, model.config["max_length"])
        rows, cut = encode_pairs([(query, text) for text in texts], model.tokenizer, longest)
        lengths = np.array([len(row["input_ids"]) for row in rows])
        scores, exits = np.empty(len(rows), np.float32), np.empty(len(rows), np.int64)
        for part in self._parts(np.argsort(-lengths, kind="stable"), lengths):  # the longest first, as slices want it
            columns = model.tokenizer.pad([rows[i] for i in part], return_tensors="np")
            fields = {name: columns[name] for name in model.config["inputs"] if name in columns}
            output = model(**fields, threshold=threshold, top_k=max(k, own))
            scores[part], exits[part] = output.logits[:, 0], output.exit_layer
        left = {number: int((exits > number).sum()) for number in model.config["exit_layers"]}
        found = RankedCandidates(scores, exits, left, np.zeros(len(rows), bool))
        return ranking(found, texts, k, return_documents, (model.config["num_blocks"], cut) if return_report else None)

    def _parts(self, order: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """The candidates in `order`, the longest first, in as many parts as the memory makes of them."""
        size = 4 * self.model.config.get("hidden_size", _HIDDEN_SIZE)
        while len(order):
            longest = int(lengths[order[0]])
            count = max(1, self.max_state_bytes // (longest * (_COPIES * size + 4 * longest)))
            yield order[:count]
            order = order[count:]
