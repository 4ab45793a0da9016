"""Rows with a tag for each token, or with the entities of a text: found by their columns, and checked.

Two forms: `tokens` and `tags`, lists of the same length; or `text` and `entities`, a list of `{start, end, label}` in
characters. Tags may be any names; those of IOB1, IOB2, IOBES and BILOU are read as entities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from badge_peft.evaluation.entities import OUTSIDE, kind_of
from badge_peft.workflows.columns import LABEL_NAMES, Names
from badge_peft.workflows.settings import Columns, TextColumns

WORD_NAMES = ("tokens", "words")
TAG_NAMES = ("tags", "ner_tags", "labels", "pos_tags", "upos")
ENTITY_NAMES = ("entities", "spans")
_KEYS = ("start", "end", "label")

Sample = Callable[[str], Iterable[Any]]  # column -> its values


def find_token_columns(
    columns: Sequence[str], sample: Sample, wanted: TextColumns, recorded: Mapping[str, str | None] | None = None
) -> tuple[str | None, str | None]:
    """The column of tokens, where the data has them, and that of tags or entities; None and None where rows are texts
    with a label, or with none.

    Args:
        columns: Of the data.
        sample: Gives the values of a column.
        wanted: What the user named.
        recorded: What training recorded of its own columns.
    """
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
    """Refuses a row whose tags are not those of its tokens.

    Raises:
        ValueError: another number of tags than tokens, or something that is no name.
    """
    if len(words) != len(tags):
        raise ValueError(f"row {row} has {len(words)} tokens and {len(tags)} tags: each token needs one. Mend it.")
    for i, tag in enumerate(tags):
        if not isinstance(tag, str) or not tag:
            raise ValueError(
                f"row {row} has the tag {tag!r} at token {i + 1}: tags are names, such as O, B-x, I-x or NOUN. Write "
                "them in place of numbers."
            )


def check_entities(text: str, entities: Sequence[Any], row: int) -> None:
    """Refuses a row whose entities are no places in its text.

    Raises:
        ValueError: an entity without whole numbers `start` and `end` in the text and a `label`, or two that overlap.
    """
    end = 0
    for entity in sorted(entities, key=lambda e: e.get("start") if isinstance(e.get("start"), int) else -1):
        first, last, label = (entity.get(key) for key in _KEYS)
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (first, last))
        if not (whole and 0 <= first < last <= len(text) and text[first:last].strip()):
            raise ValueError(
                f"row {row} has the entity {entity}, and its text has {len(text)} characters: start and end are "
                "places in it, with something but white space between them. Mend the row."
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


def token_columns(words: str | None, text: str | None, label: str | None) -> Names:
    """As `find_columns` names them."""
    return {"text": words or text, "text_pair": None, "label": label}


def _holds(values: Iterable[Any], fits: Callable[[list[Any]], bool]) -> bool:
    """Whether a column holds lists, and the first that is not empty fits."""
    lists = [value for value in values if value is not None]
    return bool(lists) and isinstance(lists[0], list) and fits(next(filter(None, lists), []))


def _are_words(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _are_entities(values: list[Any]) -> bool:
    return all(isinstance(value, dict) and set(_KEYS) <= value.keys() for value in values)
