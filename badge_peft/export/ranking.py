"""`OnnxReranker`: ranks the documents of a query with a file that `export_onnx` wrote of a ranking adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from badge_peft.export.runtime import OnnxEarlyExitModel, OnnxOutput
from badge_peft.ranking.pairs import check_documents, encode_pairs, warn_of_more
from badge_peft.ranking.report import ExitReport
from badge_peft.utils.checks import check_int
from badge_peft.utils.texts import longest_text


class OnnxReranker:
    """As `EarlyExitReranker`, with onnxruntime: all candidates of a query are one call of the graph, which takes those
    out that leave, and runs its blocks for a few of similar length at a time.

    Args:
        model: Of a ranking adapter, with its tokenizer.

    Raises:
        ValueError: its rule does not rank.
    """

    def __init__(self, model: OnnxEarlyExitModel) -> None:
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
        return_report: bool = False,
    ) -> Any:
        """The best documents for a query, by the scores of the model's own head.

        Args:
            query: The question.
            documents: Texts; those that are longer than the model reads are cut.
            top_k: How many are returned; None: as many as the file's margins were calibrated for, which fewer are the
                first of; with more the margins are used all the same, and a warning says so.
            return_documents: Put the texts into the answers.
            threshold: A factor on the margins; None is the file's own.
            return_report: Return an `ExitReport` as well.

        Returns:
            A list of dicts with `corpus_id`, `score` and, if asked for, `text`, best first; with `return_report` a
            pair of it and the report.

        Raises:
            ValueError: an empty query or no documents, or a number that is not allowed.
        """
        texts = check_documents(query, documents)
        check_int("top_k", top_k, at_least=1)
        own = int(self.model.config["top_k"])
        k = own if top_k is None else top_k
        if k > own:
            warn_of_more(k, own, stacklevel=3)
        tokenizer = self.model.tokenizer
        longest = longest_text(tokenizer, self.model.config["max_length"])
        rows, cut = encode_pairs([(query, text) for text in texts], tokenizer, longest)
        order = np.array(sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])))  # as slices want it
        columns = tokenizer.pad([rows[i] for i in order], return_tensors="np")
        fields = {name: columns[name] for name in self.model.config["inputs"] if name in columns}
        output = self.model(**fields, threshold=threshold, top_k=max(k, own))
        back = np.argsort(order)
        output = OnnxOutput(output.logits[back], output.exit_layer[back])
        last = np.flatnonzero(output.exit_layer == output.exit_layer.max())
        scores = output.logits[:, 0]
        best = last[np.argsort(-scores[last], kind="stable")][:k]
        answers = [
            {"corpus_id": int(i), "score": float(scores[i]), **({"text": texts[i]} if return_documents else {})}
            for i in best
        ]
        if not return_report:
            return answers
        exits = output.exit_layer
        left = {number: int((exits > number).sum()) for number in self.model.config["exit_layers"]}
        run = int(exits.sum())
        return answers, ExitReport(len(texts), self.model.config["num_blocks"], run, left, cut, exits)
