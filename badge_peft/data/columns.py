"""Which column of a data set holds the texts, and which the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT_NAMES = ("text", "sentence", "content", "review", "question", "utterance", "query", "title", "document")
LABEL_NAMES = ("label", "labels", "category", "class", "intent", "sentiment", "target", "coarse_label", "y")


def find_column(
    features: Mapping[str, Any], given: str | None, usual: tuple[str, ...], what: str, taken: str | None = None
) -> str:
    """The column called `given`, else the first of the `usual` names, else the only one that could be meant.

    Args:
        features: The data set's features by column.
        given: The user's word, or None.
        usual: Names to look for, in any case.
        what: `text` or `label`.
        taken: A column that is something else.

    Raises:
        ValueError: there is no such column, or several might be meant.
    """
    columns = list(features)
    remedy = f"Say which with {what}_column (--{what}-column): the columns are {', '.join(columns)}."
    if given is not None:
        if given not in features:
            raise ValueError(f"there is no {what} column {given!r}. {remedy}")
        return given
    by_lower = {column.lower(): column for column in columns if column != taken}
    for name in usual:
        if name in by_lower:
            return by_lower[name]
    others = [column for column in columns if column != taken]
    if what == "text":
        others = [c for c in others if _is_string(features[c]) and c.lower() not in LABEL_NAMES]
    if len(others) == 1:
        return others[0]
    raise ValueError(f"cannot tell which column holds the {what}s. {remedy}")


def _is_string(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")) in ("string", "large_string")
