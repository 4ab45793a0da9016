"""`Reader`: from a text to what all exits say about it. The last few texts are kept: a moved slider runs no model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from badge_peft.app.explain import Reading, read_exits
from badge_peft.evaluation.collate import pad_features
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.encode import encode_texts

MOST_CHARACTERS = 20_000
_KEPT = 32


@dataclass(frozen=True)
class ReadText:
    """A text as the model read it.

    Args:
        reading: What all exits said.
        tokens: How many tokens the model read.
        all_tokens: How many the text has; those beyond `tokens` were cut.
    """

    reading: Reading
    tokens: int
    all_tokens: int


class Reader:
    """Runs texts through an adapter, one at a time, encoded as `badge-peft predict` encodes them.

    Args:
        adapter: From `open_adapter`.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._read = lru_cache(maxsize=_KEPT)(self._run)

    @property
    def pairs(self) -> bool | None:
        """Whether the adapter was trained on pairs of texts; None where nothing was recorded."""
        columns = self.adapter.columns
        return columns.get("text_pair") is not None if columns else None

    def read(self, text: str | None, pair: str | None = None) -> ReadText:
        """What all exits say about `text`.

        Args:
            text: To read; longer than the model can read is cut, as everywhere.
            pair: The second text; empty is none.

        Raises:
            ValueError: no text, no second text for an adapter of pairs, or a text too long for a page.
        """
        text, pair = text or "", pair or ""
        if not text.strip():
            raise ValueError("there is no text: type one.")
        if self.pairs and not pair.strip():
            raise ValueError("this adapter was trained on pairs of texts: type the second one, too.")
        for what, value in (("text", text), ("second text", pair)):
            if len(value) > MOST_CHARACTERS:
                raise ValueError(
                    f"the {what} has {len(value):,} characters: this page takes {MOST_CHARACTERS:,} at most. Shorten "
                    "it, or answer it with `badge-peft predict`."
                )
        return self._read(text, pair if pair.strip() else None)

    def _run(self, text: str, pair: str | None) -> ReadText:
        model, tokenizer = self.adapter.model, self.adapter.tokenizer
        encoded = encode_texts([text], None if pair is None else [pair], tokenizer)
        batch = pad_features([{name: values[0] for name, values in encoded.items()}], model.get_base_model())
        device = next(model.parameters()).device
        reading = read_exits(model, {name: value.to(device) for name, value in batch.items()})
        whole = tokenizer(text, pair, truncation=False, verbose=False)["input_ids"]
        return ReadText(reading, int(batch["input_ids"].shape[1]), len(whole))
