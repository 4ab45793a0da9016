"""`EarlyExitReranker`: ranks documents as `sentence_transformers.CrossEncoder` does, and exits early."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import validate_policy
from badge_peft.early_exit.policies import ExitPolicy, build_policy
from badge_peft.hub import load_pretrained, load_tokenizer
from badge_peft.model import get_badge_model
from badge_peft.ranking.pairs import check_documents, encode_pairs, ranking, warn_of_more
from badge_peft.ranking.segments import CandidatePass, RankedCandidates
from badge_peft.tuner.architectures import max_positions
from badge_peft.utils.checks import check_int
from badge_peft.utils.texts import longest_text


class EarlyExitReranker:
    """A cross-encoder with exits, which ranks documents for a query.

    Any number of candidates, from one to many thousands: at most `batch_size` of them are in a block at once. They are
    one call of the model where that fits into `max_state_bytes`; else their states are kept without padding, beyond
    `max_state_bytes` in a temporary file.

    Args:
        model: A PEFT model with an active BADGE adapter and one output. It goes into eval mode.
        tokenizer: Of the model.
        max_length: Tokens of a pair at most; None is what tokenizer and model can read.
        batch_size: Candidates in a block at once.
        activation: Applied to the scores [n] that are returned; None returns the model's outputs as they are.
        max_state_bytes: Memory for the states of one query's candidates.

    Raises:
        ValueError: no adapter, more than one output, no tokenizer, or a number that is not allowed.

    Example:

    ```python
    reranker = EarlyExitReranker.from_pretrained("my-adapter")
    reranker.rank("how are glacier caves formed?", passages, top_k=3, return_documents=True)
    ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        max_state_bytes: int = 2**30,
    ) -> None:
        check_int("max_length", max_length, at_least=4)
        check_int("batch_size", batch_size, at_least=1, optional=False)
        check_int("max_state_bytes", max_state_bytes, at_least=0, optional=False)
        self.badge = get_badge_model(model)
        exits = self.badge.adapter_exits(self.badge.single_active_adapter())
        if exits.num_labels != 1:
            raise ValueError(
                f"the model has {exits.num_labels} outputs, and candidates are ranked by one score: load it with "
                "num_labels=1."
            )
        if tokenizer is None:
            raise ValueError("tokenizer is None: give that of the model, or use EarlyExitReranker.from_pretrained.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length = longest_text(tokenizer, max_positions(self.badge.model), max_length)
        self.batch_size, self.activation, self.max_state_bytes = batch_size, activation, max_state_bytes
        if self.badge.model.config.pad_token_id is None:
            self.badge.model.config.pad_token_id = tokenizer.pad_token_id

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        batch_size: int = 32,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        max_state_bytes: int = 2**30,
        **kwargs: Any,
    ) -> EarlyExitReranker:
        """Loads an adapter, of a folder or Hub repository, on its base model. Other arguments are those of the class.

        Args:
            adapter: A folder or Hub repository.
            tokenizer: A tokenizer; None takes the one in the adapter's folder, else that of its base model.
            **kwargs: For `load_pretrained` (`base_model`, `dtype`, `token`, ...).

        Raises:
            ValueError: as `load_pretrained` and the class; or there is no tokenizer.
        """
        model = load_pretrained(str(adapter), **kwargs)
        if tokenizer is None:
            base = get_badge_model(model).config_of().base_model_name_or_path
            tokenizer = load_tokenizer([str(adapter), base])
        fields: Any = {"max_length": max_length, "batch_size": batch_size, "max_state_bytes": max_state_bytes}
        return cls(model, tokenizer, activation=activation, **fields)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = 10,
        return_documents: bool = False,
        *,
        full_depth: bool = False,
        return_report: bool = False,
        batch_size: int | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        early_exit_config: EarlyExitConfig | None = None,
        **fields: Any,
    ) -> Any:
        """The best documents for a query, by the scores of the model's own head.

        Args:
            query: The question.
            documents: Texts, in any number.
            top_k: How many are returned. Fewer than the adapter's margins were calibrated for are the first of these;
                with more the margins are used all the same, and a warning says so. None: all, at full depth.
            return_documents: Put the texts into the answers.
            full_depth: Run all blocks for all documents.
            return_report: Return an `ExitReport` as well.
            batch_size: In place of the reranker's own.
            activation: In place of the reranker's own.
            early_exit_config: How candidates leave, in place of the adapter's own.
            **fields: Of `EarlyExitConfig`, in place of the adapter's own: `threshold=1.5` makes its margins wider.

        Returns:
            A list of dicts with `corpus_id` (the document's place), `score` and, if asked for, `text`, best first;
            with `return_report` a pair of it and the report. Equal scores are in the order of the documents.

        Raises:
            ValueError: an empty query or no documents, a number that is not allowed, or an adapter that was not
                calibrated for ranking.
        """
        texts = check_documents(query, documents)
        for name, number in (("top_k", top_k), ("batch_size", batch_size)):
            check_int(name, number, at_least=1)
        config = EarlyExitConfig(policy="never")
        if not (full_depth or top_k is None):
            own = early_exit_config or self.badge.get_early_exit_config()
            config = self._config(top_k, EarlyExitConfig.of(own, **fields))
        rows, cut = encode_pairs([(query, text) for text in texts], self.tokenizer, self.max_length)
        validate_policy(config, self.badge.config_of(), self.badge.num_blocks)
        found = self._run(rows, build_policy(config), batch_size or self.batch_size)
        if found.non_finite.any():
            warnings.warn(
                f"{found.non_finite.sum()} of {len(texts)} candidates had scores that are NaN or infinite at an exit. "
                "They did not leave there. Check the precision and the weights of the model.",
                stacklevel=2,
            )
        activated = partial(_activated, activation=activation or self.activation)
        told = (self.badge.num_blocks, cut) if return_report else None
        return ranking(found, texts, top_k, return_documents, told, activated)

    def predict(self, pairs: Sequence[tuple[str, str]] | tuple[str, str]) -> Any:
        """Scores of pairs at full depth.

        Args:
            pairs: Pairs of a query and a document, or one pair.

        Returns:
            [n] float32; of one pair a number.

        Raises:
            ValueError: no pairs, or something else than pairs of texts.
        """
        if not hasattr(pairs, "__len__") or isinstance(pairs, str):
            raise ValueError(f"pairs is {type(pairs).__name__}: give a list of pairs, a query and a document each.")
        single = _is_pair(pairs)
        given = [cast("tuple[str, str]", tuple(pair)) for pair in ([pairs] if single else pairs)]
        if not given:
            raise ValueError("pairs is empty: there is nothing to score.")
        for i, pair in enumerate(given):
            if not _is_pair(pair):
                raise ValueError(f"pair {i} is {pair!r}: a pair is a query and a document, two texts.")
        rows, _ = encode_pairs(given, self.tokenizer, self.max_length)
        scores = self._run(rows, build_policy(policy="never"), self.batch_size).scores
        found = _activated(scores, self.activation)
        return float(found[0]) if single else found

    def check_calibrated(self, config: EarlyExitConfig | None = None) -> None:
        """Refuses a config without margins, by which no candidate can leave; None takes the adapter's own."""
        config = config or self.badge.get_early_exit_config()
        if config.policy != "top_k" or config.parameters is None:
            raise ValueError(
                "the adapter was not calibrated for ranking: pass the exits' scores of some queries to "
                "badge_peft.ranking.calibrate_ranking and store what it returns with model.set_early_exit_config; or "
                "ask for rank(..., full_depth=True)."
            )

    def _run(self, rows: list[dict[str, Any]], policy: ExitPolicy, batch_size: int) -> RankedCandidates:
        if self.model.training:  # a training has gone on meanwhile, and dropout would make scores random
            self.model.eval()
        return CandidatePass(self.badge, rows, policy, batch_size, self.max_state_bytes).run()

    def _config(self, top_k: int, own: EarlyExitConfig) -> EarlyExitConfig:
        """How the candidates of a call leave."""
        self.check_calibrated(own)
        calibrated = own.resolved_top_k
        if top_k <= calibrated:
            return own
        warn_of_more(top_k, calibrated, stacklevel=4)
        return EarlyExitConfig.of(own, top_k=top_k)


def _is_pair(given: Sequence[Any]) -> bool:
    return len(given) == 2 and all(isinstance(text, str) for text in given)


def _activated(scores: Any, activation: Callable[[torch.Tensor], torch.Tensor] | None) -> Any:
    return scores if activation is None else activation(torch.from_numpy(scores)).float().numpy()
