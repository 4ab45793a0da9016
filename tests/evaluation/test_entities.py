"""Entities of tags, against seqeval itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES

from badge_peft import ExitLogits, exit_scores
from badge_peft.evaluation.entities import EntityReader, in_iob2, kind_of, scheme_of
from badge_peft.evaluation.exit_logits import Units
from badge_peft.evaluation.words import Words, answers_of
from badge_peft.utils.problem import UNKNOWN_LABEL

TAGS = ["O", "B-x", "I-x", "B-y", "I-y", "B-a-b"]
LAW = settings(deadline=None, derandomize=True, max_examples=150)
pairs = st.lists(st.tuples(st.integers(0, len(TAGS) - 1), st.integers(0, len(TAGS) - 1)), min_size=1, max_size=9)


IOBES_TAGS = ["O", "B-x", "I-x", "E-x", "S-x", "E-y", "S-y"]
spans = st.lists(st.tuples(st.sampled_from("oxy"), st.integers(1, 3)), min_size=1, max_size=6)  # of a text, in turn


def names_of(texts: list[list[tuple[int, int]]], side: int, tags: list[str] = TAGS) -> list[list[str]]:
    return [[tags[pair[side]] for pair in text] for text in texts]


@LAW
@given(st.lists(pairs, min_size=1, max_size=5), st.sampled_from([TAGS, IOBES_TAGS]))
def test_f1_is_that_of_seqeval(texts: list[list[tuple[int, int]]], tags: list[str]) -> None:
    """Whatever a model answers, tags that begin nowhere among it."""
    flat = np.array([pair for text in texts for pair in text])
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    both, answered, labeled = EntityReader(tags).counts(flat[:, 0], flat[:, 1], Units(len(flat), owner))
    expected = float(f1_score(names_of(texts, 1, tags), names_of(texts, 0, tags), zero_division=0))
    assert 2 * both.sum() / max(answered.sum() + labeled.sum(), 1) == pytest.approx(expected)
    logits = torch.nn.functional.one_hot(torch.from_numpy(flat[:, 0]), len(tags)).float().unsqueeze(1)
    stored = ExitLogits(logits, torch.from_numpy(flat[:, 1]), texts=owner, label_names=tags)
    assert exit_scores(stored, "entity_f1").per_exit == [pytest.approx(expected)]
    for i in range(len(texts)):  # what is counted for each text is counted of it alone
        own = [part[i : i + 1] for part in (names_of(texts, 1, tags), names_of(texts, 0, tags))]
        f1 = float(f1_score(*own, zero_division=0))
        assert 2 * both[i] / max(answered[i] + labeled[i], 1) == pytest.approx(f1)


def test_an_entity_that_the_model_does_not_know_is_found_by_no_answer() -> None:
    labels = np.array([UNKNOWN_LABEL, 1])
    both, answered, labeled = EntityReader(TAGS).counts(np.array([1, 1]), labels, Units(2, np.zeros(2)))
    assert (both.tolist(), answered.tolist(), labeled.tolist()) == ([1], [2], [2])


def written(parts: list[tuple[str, int]], prefixes: str, iob1: bool = False) -> list[str]:
    """Tags of parts (kind, length), `o` outside; `prefixes` are those of a first, an inner, a last, a single one."""
    tags: list[str] = []
    first, inner, last, single = prefixes
    before = "o"
    for kind, count in parts:
        letters = single if count == 1 else first + inner * (count - 2) + last
        if iob1 and before != kind:
            letters = "I" + letters[1:]
        tags += ["O"] * count if kind == "o" else [f"{letter}-{kind}" for letter in letters]
        before = kind
    return tags


@pytest.mark.parametrize(
    ("scheme", "prefixes", "names"),
    [(IOB1, "BIIB", "BI"), (IOB2, "BIIB", "BI"), (IOBES, "BIES", "BIES"), (BILOU, "BILU", "BILU")],
)
@LAW
@given(said=spans, true=spans)
def test_each_scheme_is_read_as_seqeval_reads_it(
    scheme: Any, prefixes: str, names: str, said: list[tuple[str, int]], true: list[tuple[str, int]]
) -> None:
    """Strictly, where a tagging is right in it."""
    longest = max(sum(count for _, count in parts) for parts in (said, true))
    sides = [[*parts, ("o", longest - sum(count for _, count in parts))] for parts in (said, true)]
    answers, labels = (written(parts, prefixes, scheme is IOB1) for parts in sides)
    tags = ["O", *(f"{prefix}-{kind}" for kind in "xy" for prefix in names)]
    numbers = [np.array([tags.index(tag) for tag in side]) for side in (answers, labels)]
    both, answered, given_ = EntityReader(tags).counts(*numbers, Units(longest, np.zeros(longest)))
    f1 = float(f1_score([labels], [answers], mode="strict", scheme=scheme, zero_division=0))
    assert 2 * both.sum() / max(answered.sum() + given_.sum(), 1) == pytest.approx(f1)
    assert in_iob2(labels, tags) == written(sides[1], "BIIB")


def test_what_is_a_tag() -> None:
    assert [kind_of(tag) for tag in TAGS] == [None, "x", "x", "y", "y", "a-b"]
    assert kind_of("S-x") == kind_of("U-x") == "x"
    assert all(kind_of(tag) == tag for tag in ("B-", "-LRB-", "BI-x", "NOUN"))
    assert scheme_of(TAGS) == "BI" and scheme_of(["O", "S-x"]) == "BIES" and scheme_of(["U-x", "I-x"]) == "BILU"
    for others in (["O"], ["O", "noun"], ["B-x", "E-x", "L-x"], ["O", "B-"], ["b-x"], ["-LRB-"], ["LABEL_0"]):
        assert scheme_of(others) is None
    assert in_iob2(["O", "noun", "noun"], ["O", "noun"]) == ["O", "B-noun", "B-noun"]


@pytest.mark.parametrize("texts", [None, [0, 0, 4, 7, 7, 7]])
def test_units(texts: list[int] | None) -> None:
    values = np.array([[3, 1, 2, 9, 4, 4], [0, 0, 1, 1, 2, 5]])
    units = Units(6, None if texts is None else np.array(texts))
    owners = list(range(6)) if texts is None else texts
    members = [[i for i in range(6) if owners[i] == owner] for owner in dict.fromkeys(owners)]
    assert len(units) == len(members) and units.sizes.tolist() == [len(rows) for rows in members]
    assert units.largest(values).tolist() == [[max(row[i] for i in rows) for rows in members] for row in values]
    assert units.total(values).tolist() == [[sum(row[i] for i in rows) for rows in members] for row in values]
    picked = units.rows_of(np.array([2, 0, 2]))
    assert picked.tolist() == [*members[2], *members[0], *members[2]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "metric='entity_f1' does not suit single_label_classification: use accuracy"),
        ({"texts": [0, 1]}, "reads entities out of tags .*, and the labels have no names"),
        ({"texts": [0, 1], "label_names": ["noun", "verb"]}, "reads entities .*, and the labels are noun, verb"),
    ],
)
def test_scores_without_tags(fields: dict[str, Any], message: str) -> None:
    stored = ExitLogits(torch.zeros(2, 1, 2), torch.tensor([0, 1]), **fields)
    with pytest.raises(ValueError, match=message):
        exit_scores(stored, "entity_f1")


def test_a_confidence_that_is_no_number_is_none() -> None:
    words = Words("ab c", [(0, 2), (3, 4)], [0, 1])
    found = answers_of(words, np.array([[0, np.inf], [0.0, 5.0]]), np.array([1, 1]), ["O", "B-x"])
    assert [entity["score"] for entity in found["entities"]] == [None, pytest.approx(0.9933, abs=1e-4)]
