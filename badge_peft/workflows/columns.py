"""Which columns of a data set hold the texts, their second texts, and the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from datasets import Dataset

from badge_peft.workflows.settings import Columns, TextColumns

TEXT_NAMES = ("text", "sentence", "content", "review", "question", "utterance", "query", "title", "document")
PAIR_NAMES = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("text_1", "text_2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "document"),
    ("query", "passage"),
    ("question", "document"),
    ("question", "answer"),
)
QUERY_ID_NAMES = ("query_id", "qid", "query-id", "question_id")
LABEL_NAMES = ("label", "labels", "category", "class", "intent", "sentiment", "target", "coarse_label", "y")

_SAMPLE = 200  # rows by which a column is judged

Names = dict[str, str | None]  # `text`, `text_pair`, `label` (and `query_id`): what they are called in the data


def find_columns(
    columns: Sequence[str],
    wanted: TextColumns,
    recorded: Mapping[str, str | None] | None = None,
    holds_text: Callable[[str], bool] = lambda column: True,
) -> Names:
    """The columns that are named, else those of the adapter's training, else those with a usual name, in any case:
    first those of a pair."""
    recorded = recorded or {}
    known = {key: column for key, column in recorded.items() if column in columns}
    label = _named(columns, wanted.label_column, "label") if isinstance(wanted, Columns) else None
    label = label or known.get("label")
    query_id = _named(columns, wanted.query_id_column, "query-id") or known.get("query_id")
    text = _named(columns, wanted.text_column, "text") or known.get("text")
    pair = _named(columns, wanted.text_pair_column, "text-pair") or known.get("text_pair")
    if text is None and pair is None and (not recorded.get("text") or recorded.get("text_pair")):
        text, pair = _usual_pair([column for column in columns if column != label and holds_text(column)])
    text = text or _usual(columns, TEXT_NAMES, label, pair)
    if text is None:
        others = [c for c in columns if c not in (label, pair) and c.lower() not in LABEL_NAMES and holds_text(c)]
        if len(others) != 1:
            raise ValueError(f"cannot tell which column holds the texts. {_remedy(columns, 'text')}")
        text = others[0]
    if pair is None and recorded.get("text_pair"):
        raise ValueError(
            f"this adapter was trained on pairs of texts, and there is no text-pair column "
            f"{recorded['text_pair']!r}. {_remedy(columns, 'text-pair')}"
        )
    if not isinstance(wanted, Columns) or wanted.unlabeled:
        label = None
    elif label is None:
        label = _usual(columns, LABEL_NAMES, text, pair)
    if pair is not None and query_id is None:
        query_id = _usual(columns, QUERY_ID_NAMES, text, pair, label)
    found = {"text": text, "text_pair": pair, "label": label}
    return found if query_id is None else {**found, "query_id": query_id}


def unused_texts(data: Dataset, strings: Iterable[str], used: Names) -> list[str]:
    """The columns of strings that read like texts, most values several words and not all the same few, beside those
    that are `used`."""
    sample = data.select(range(min(_SAMPLE, len(data))))

    def reads_like_text(column: str) -> bool:
        values = [value for value in sample[column] if value]
        words = sum(len(value.split()) > 1 for value in values)
        return words > len(values) / 2 and len(set(values)) > len(values) / 5

    return [column for column in data.features if column in {*strings} - {*used.values()} and reads_like_text(column)]


def _usual_pair(columns: Sequence[str]) -> tuple[str | None, str | None]:
    by_lower = {column.lower(): column for column in columns}
    found = (pair for pair in PAIR_NAMES if all(name in by_lower for name in pair))
    first, second = next(found, (None, None))
    return (by_lower[first], by_lower[second]) if first and second else (None, None)


def _named(columns: Sequence[str], name: str | None, kind: str) -> str | None:
    if name is not None and name not in columns:
        raise ValueError(f"there is no {kind} column {name!r}. {_remedy(columns, kind)}")
    return name


def _usual(columns: Sequence[str], usual: Sequence[str], *taken: str | None) -> str | None:
    by_lower = {column.lower(): column for column in columns if column not in taken}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def _remedy(columns: Sequence[str], kind: str) -> str:
    return f"Say which with --{kind}-column: the columns are {', '.join(columns)}."
