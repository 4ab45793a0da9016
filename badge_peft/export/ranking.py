"""`OnnxReranker`: ranks the documents of a query with a file that `export_onnx` wrote of a ranking adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from badge_peft.export.runtime import OnnxEarlyExitModel
from badge_peft.ranking.pairs import check_documents
from badge_peft.utils.checks import check_int


class OnnxReranker:
    """As `EarlyExitReranker`, with onnxruntime: all candidates of a query are one call of the graph, which takes those
    out that leave.

    Args:
        model: Of a ranking adapter, with its tokenizer.

    Raises:
        ValueError: its rule does not rank.
    """

    def __init__(self, model: OnnxEarlyExitModel) -> None:
        if "top_k" not in model.config:
            raise ValueError(
                f"{model.directory} was exported with policy={model.config['early_exit']['policy']!r}, which ranks "
                "nothing: export a calibrated ranking adapter."
            )
        self.model = model

    @classmethod
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> OnnxReranker:
        """Loads a folder; arguments and errors are those of `OnnxEarlyExitModel.from_pretrained`."""
        return cls(OnnxEarlyExitModel.from_pretrained(directory, **kwargs))

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        """The best documents for a query, by the scores of the model's own head.

        Args:
            query: The question.
            documents: Texts; those that are longer than the model reads are cut.
            top_k: How many are returned; None: as many as the file's margins were calibrated for, which fewer are the
                first of.
            return_documents: Put the texts into the answers.
            threshold: A factor on the margins; None is the file's own.

        Returns:
            A list of dicts with `corpus_id`, `score` and, if asked for, `text`, best first.

        Raises:
            ValueError: an empty query or no documents, or a number that is not allowed.
        """
        texts = check_documents(query, documents)
        check_int("top_k", top_k, at_least=1)
        own = int(self.model.config["top_k"])
        k = own if top_k is None else top_k
        columns = self.model.tokenizer(
            [query] * len(texts),
            texts,
            padding=True,
            truncation=True,
            max_length=self.model.config["max_length"],
            return_tensors="np",
        )
        fields = {name: columns[name] for name in self.model.config["inputs"] if name in columns}
        output = self.model(**fields, threshold=threshold, top_k=max(k, own))
        last = np.flatnonzero(output.exit_layer == output.exit_layer.max())
        scores = output.logits[:, 0]
        best = last[np.argsort(-scores[last], kind="stable")][:k]
        return [
            {"corpus_id": int(i), "score": float(scores[i]), **({"text": texts[i]} if return_documents else {})}
            for i in best
        ]
