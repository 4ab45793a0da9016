"""Labelled texts: from a file or a Hub data set to tokenised splits."""

from __future__ import annotations

from badge_peft.data.load import load_text_dataset
from badge_peft.data.split import split_texts
from badge_peft.data.tokens import tokenise

__all__ = ["load_text_dataset", "split_texts", "tokenise"]
