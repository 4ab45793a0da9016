"""Early exits for a `sentence_transformers.CrossEncoder` that is in service: its `rank` stays, and gets faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from badge_peft.hub import load_pretrained
from badge_peft.ranking.reranker import EarlyExitReranker
from badge_peft.utils.extras import require


def accelerate(cross_encoder: Any, adapter: str | Path, **kwargs: Any) -> EarlyExitReranker:
    """Puts a ranking adapter on a `CrossEncoder`, so that `cross_encoder.rank` exits early.

    `rank` takes and returns what it did, and scores are those of before, with the encoder's own activation. `predict`,
    `rank` without a `top_k`, and calls with prompts, pools, devices, an empty query or documents that are no texts run
    at full depth, as ever.

    Args:
        cross_encoder: With one output, on the model that the adapter was made for.
        adapter: Folder or Hub repository of a calibrated ranking adapter.
        **kwargs: For `load_pretrained` (`revision`, `token`, ...).

    Returns:
        The reranker behind it, whose own `rank` gives an `ExitReport` if asked for.

    Raises:
        ModuleNotFoundError: sentence-transformers is not installed.
        ValueError: something else than a CrossEncoder, more than one output, or an adapter that is not one for
            ranking, was not calibrated, or does not fit the model.
    """
    require("sentence-transformers", "sentence_transformers")
    from sentence_transformers import CrossEncoder

    if not isinstance(cross_encoder, CrossEncoder) or cross_encoder.model is None:
        raise ValueError(
            f"cross_encoder is a {type(cross_encoder).__name__}: give a sentence_transformers.CrossEncoder that runs "
            "in PyTorch."
        )
    model = load_pretrained(str(adapter), base_model=cross_encoder.model, **kwargs)
    renamed = hasattr(cross_encoder, "max_seq_length")  # since sentence-transformers 6; 5 has max_length
    longest = cross_encoder.max_seq_length if renamed else cross_encoder.max_length
    reranker = EarlyExitReranker(
        model, cross_encoder.tokenizer, max_length=longest, activation=cross_encoder.activation_fn
    )
    reranker.check_calibrated()
    cross_encoder.rank = _Rank(cross_encoder, reranker)
    return reranker


class _Rank:
    """`CrossEncoder.rank` with exits. A class, as an encoder is pickled for each process of a pool."""

    def __init__(self, cross_encoder: Any, reranker: EarlyExitReranker) -> None:
        self.cross_encoder, self.reranker = cross_encoder, reranker

    def __call__(
        self,
        query: Any,
        documents: Sequence[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        *others: Any,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        **more: Any,
    ) -> Any:
        """As `CrossEncoder.rank`."""
        encoder = self.cross_encoder
        texts = all(isinstance(text, str) for text in (query, *documents))
        prompt = getattr(encoder, "default_prompt_name", None)
        asks_more = bool(others or prompt or any(value is not None for value in more.values()))
        if top_k is None or asks_more or not texts or not query.strip() or not len(documents):
            own = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, "activation_fn": activation_fn}
            given = query, documents, top_k, return_documents, *others
            return type(encoder).rank(encoder, *given, **own, **more)
        options: Any = {"batch_size": batch_size, "activation": activation_fn or encoder.activation_fn}
        return self.reranker.rank(query, documents, top_k, return_documents, **options)
