"""Which columns of a data set hold the texts, their second texts, and the labels; rows with a label for each token.

These have two forms: `tokens` and `tags`, lists of the same length; or `text` and `entities`, a list of `{start, end,
label}` in characters. Tags may be any names; those of IOB1, IOB2, IOBES and BILOU are read as entities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from badge_peft.evaluation.entities import OUTSIDE, kind_of
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
WORD_NAMES = ("tokens", "words")
TAG_NAMES = ("tags", "ner_tags", "labels", "pos_tags", "upos")
ENTITY_NAMES = ("entities", "spans")
_KEYS = ("start", "end", "label")
Sample = Callable[[str], Iterable[Any]]  # column -> its values


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


def find_token_columns(
    columns: Sequence[str], sample: Sample, wanted: TextColumns, recorded: Mapping[str, str | None] | None = None
) -> tuple[str | None, str | None]:
    """The column of tokens, where the data has them, and that of tags or entities; None and None where rows are texts
    with a label, or with none."""
    recorded = {key: name for key, name in (recorded or {}).items() if name in columns}
    named = wanted.label_column if isinstance(wanted, Columns) else None
    by_lower = {column.lower(): column for column in columns}

    def first(own: str | None, known: str | None, usual: Sequence[str], fits: Callable[[list[Any]], bool]) -> Any:
        names = [own] if own else [known] if known else [by_lower[name] for name in usual if name in by_lower]
        return next((name for name in names if name in columns and _holds(sample(name), fits)), None)

    words = first(wanted.text_column, recorded.get("text"), WORD_NAMES, _are_words)
    if words is not None:
        tags = first(named, recorded.get("label"), TAG_NAMES, lambda values: not _are_entities(values))
        if tags is not None or words in (wanted.text_column, recorded.get("text")):
            return words, tags
    one_label = any(name in by_lower for name in LABEL_NAMES)
    usual = () if one_label else ENTITY_NAMES  # beside a label of the text, entities have to be named
    return None, first(named, recorded.get("label"), usual, _are_entities)


def find_words(row: Mapping[str, Any], wanted: TextColumns, recorded: Mapping[str, str | None] | None) -> str | None:
    """The column of tokens in a row without tags: one that is named, that of the training, or a usual one."""
    names = [wanted.text_column] if wanted.text_column else [(recorded or {}).get("text"), *WORD_NAMES]
    return next((name for name in names if name is not None and isinstance(row.get(name), list)), None)


def check_tags(words: Sequence[str], tags: Sequence[Any], row: int) -> None:
    """Refuses a row whose tags are not those of its tokens."""
    if len(words) != len(tags):
        raise ValueError(f"row {row} has {len(words)} tokens and {len(tags)} tags: each token needs one. Fix the row.")
    for i, tag in enumerate(tags):
        if not isinstance(tag, str) or not tag:
            raise ValueError(
                f"row {row} has the tag {tag!r} at token {i + 1}: tags are names, such as O, B-x, I-x or NOUN. Write "
                "them in place of numbers."
            )


def check_entities(text: str, entities: Sequence[Any], row: int) -> None:
    """Refuses a row whose entities are no places in its text."""
    end = 0
    for entity in sorted(entities, key=lambda e: e.get("start") if isinstance(e.get("start"), int) else -1):
        first, last, label = (entity.get(key) for key in _KEYS)
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (first, last))
        if not (whole and 0 <= first < last <= len(text) and text[first:last].strip()):
            raise ValueError(
                f"row {row} has the entity {entity}, and its text has {len(text)} characters: start and end are "
                "places in it, with something but white space between them. Fix the row."
            )
        if not isinstance(label, str) or not label:
            raise ValueError(f"row {row} has the entity {entity}, whose label must be the name of its kind.")
        if first < end:
            raise ValueError(
                f"row {row} has the entity {entity}, which overlaps the one before: leave one of them out."
            )
        end = last


def kinds_of(labels: Sequence[Any]) -> set[str]:
    """The kinds of entities in a row's tags or entities; tags that name none are their own."""
    names = [label["label"] if isinstance(label, dict) else kind_of(label) for label in labels]
    return {name for name in names if name is not None}


def tag_names(kinds: Iterable[str], scheme: str = "BI") -> list[str]:
    """O, and each kind, by the alphabet, with each prefix of the scheme."""
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in sorted(set(kinds)) for prefix in scheme)]


def _holds(values: Iterable[Any], fits: Callable[[list[Any]], bool]) -> bool:
    """Whether a column holds lists, and the first that is not empty fits."""
    lists = [value for value in values if value is not None]
    return bool(lists) and isinstance(lists[0], list) and fits(next(filter(None, lists), []))


def _are_words(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _are_entities(values: list[Any]) -> bool:
    return all(isinstance(value, dict) and set(_KEYS) <= value.keys() for value in values)
