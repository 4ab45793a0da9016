"""Which columns of a data set hold the texts, their second texts, and the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from badge_peft.workflows.settings import Columns, TextColumns

TEXT_NAMES = ("text", "sentence", "content", "review", "question", "utterance", "query", "title", "document")
LABEL_NAMES = ("label", "labels", "category", "class", "intent", "sentiment", "target", "coarse_label", "y")

Names = dict[str, str | None]  # `text`, `text_pair` and `label`: what they are called in the data


def find_columns(
    columns: Sequence[str],
    wanted: TextColumns,
    recorded: Mapping[str, str | None] | None = None,
    holds_text: Callable[[str], bool] = lambda column: True,
) -> Names:
    """The columns that are named, else those of the adapter's training, else those with a usual name, in any case.

    Args:
        columns: Of the data.
        wanted: What the user named; labels are looked for where it is a `Columns`.
        recorded: What training recorded of its own columns.
        holds_text: Whether a column may hold texts: the only one that does needs no usual name.

    Raises:
        ValueError: there is no such column, several may hold the texts, or an adapter of pairs has no second texts.
    """
    known = {key: column for key, column in (recorded or {}).items() if column in columns}
    label = _named(columns, wanted.label_column, "label") if isinstance(wanted, Columns) else None
    label = label or known.get("label")
    text = _named(columns, wanted.text_column, "text") or known.get("text") or _usual(columns, TEXT_NAMES, label)
    if text is None:
        others = [c for c in columns if c != label and c.lower() not in LABEL_NAMES and holds_text(c)]
        if len(others) != 1:
            raise ValueError(f"cannot tell which column holds the texts. {_remedy(columns, 'text')}")
        text = others[0]
    pair = _named(columns, wanted.text_pair_column, "text-pair")
    if pair is None and recorded and recorded.get("text_pair"):
        pair = known.get("text_pair")
        if pair is None:
            raise ValueError(
                f"this adapter was trained on pairs of texts, and there is no text-pair column "
                f"{recorded['text_pair']!r}. {_remedy(columns, 'text-pair')}"
            )
    if not isinstance(wanted, Columns) or wanted.unlabeled:
        label = None
    elif label is None:
        label = _usual(columns, LABEL_NAMES, text, pair)
    return {"text": text, "text_pair": pair, "label": label}


def _named(columns: Sequence[str], name: str | None, kind: str) -> str | None:
    if name is not None and name not in columns:
        raise ValueError(f"there is no {kind} column {name!r}. {_remedy(columns, kind)}")
    return name


def _usual(columns: Sequence[str], usual: Sequence[str], *taken: str | None) -> str | None:
    by_lower = {column.lower(): column for column in columns if column not in taken}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def _remedy(columns: Sequence[str], kind: str) -> str:
    return f"Say which with --{kind}-column: the columns are {', '.join(columns)}."
