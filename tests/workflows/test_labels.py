"""Labels to targets: by name or by place, of every problem type, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from badge_peft.utils.problem import UNKNOWN_LABEL
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.labels import LabelSet
from tests.texts import make_tokenizer

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def rows(labels: list[Any], class_names: list[str] | None = None) -> TextDataset:
    return TextDataset(["x"] * len(labels), labels=labels, class_names=class_names, columns={"label": "mark"})


@pytest.mark.parametrize(("count", "kind"), [(1, "regression"), (2, SINGLE)])
def test_the_labels_of_a_model(count: int, kind: str) -> None:
    config = SimpleNamespace(num_labels=count, id2label=dict(enumerate("ab"[:count])), problem_type=None)
    assert LabelSet.of_model(config) == LabelSet(list("ab"[:count]), kind)
    config.problem_type = MULTI
    assert LabelSet.of_model(config).problem_type == MULTI


@pytest.mark.parametrize(("labels", "problem_type"), [([["a"], ["a", "b"]], None), (["a", "b"], MULTI)])
def test_several_labels_per_row_need_a_head_that_is_there(labels: list[Any], problem_type: str | None) -> None:
    with pytest.raises(ValueError, match="a new head for several labels per row is not supported"):
        LabelSet.of_data(rows(labels), problem_type)


def test_numbers_are_read_by_name_or_by_place_and_never_by_both() -> None:
    names = LabelSet(["1", "2", "3"], SINGLE)
    assert names.targets(rows([1, 2])) == [0, 1]
    for scored in (False, True):
        with pytest.raises(ValueError, match="does not know the labels '0'.*from 0 to 2 alone"):
            names.targets(rows([0, 1, 2]), scored)
    assert LabelSet(["bad", "good"], SINGLE).targets(rows([1, 0, None])) == [1, 0, None]


def test_labels_without_names_of_their_own_take_those_of_the_data_by_place() -> None:
    unnamed = LabelSet(["LABEL_0", "LABEL_1"], SINGLE)
    assert unnamed.targets(rows([1, 0], ["bad", "good"])) == [1, 0]
    with pytest.raises(ValueError, match="does not know the labels 'bad', 'good'"):
        unnamed.targets(rows([1, 0], ["bad", "good", "odd"]))


@pytest.mark.parametrize(
    ("names", "labels", "class_names", "expected"),
    [
        (["bad", "good"], ["Good", "odd", None, "bad"], None, [1, UNKNOWN_LABEL, None, 0]),
        (["0", "1"], [0, 1, 2], None, [0, 1, UNKNOWN_LABEL]),
        (["bad", "good"], [0, 1, 2], ["odd", "good", "bad"], [UNKNOWN_LABEL, 1, 0]),
    ],
)
def test_a_label_that_only_the_rows_to_score_have(
    names: list[str], labels: list[Any], class_names: list[str] | None, expected: list[int]
) -> None:
    found = LabelSet(names, SINGLE)
    with pytest.warns(UserWarning, match=f"1 of {len(labels)} rows to score have a label that the model"):
        assert found.targets(rows(labels, class_names), scored=True) == expected
    with pytest.raises(ValueError, match="does not know the labels"):
        found.targets(rows(labels, class_names))


def test_rows_to_score_of_which_no_label_is_known_are_refused() -> None:
    with pytest.raises(ValueError, match="does not know the labels 'no', 'yes' "):
        LabelSet(["bad", "good"], SINGLE).targets(rows(["yes", "no"]), scored=True)


def test_of_many_unknown_labels_the_first_five_are_named() -> None:
    with pytest.raises(ValueError, match="does not know the labels 'a', 'b', 'c', 'd', 'e', ... "):
        LabelSet(["bad", "good"], SINGLE).targets(rows([*"abcdef"]))


def test_two_labels_as_numbers_can_be_read_in_two_ways() -> None:
    both = LabelSet(["a", "b"], MULTI)
    assert both.targets(rows([[1, 1], [0, 1]])) == [[1.0, 1.0], [0.0, 1.0]]
    assert both.targets(rows([[0, 1], [1]])) == [[1.0, 1.0], [0.0, 1.0]]
    assert both.targets(rows([[0.0, 1.0]])) == [[0.0, 1.0]]
    with pytest.raises(ValueError, match="'mark' can be read in two ways"):
        both.targets(rows([[0, 1], [0, 1]]))


@pytest.mark.parametrize("value", ["nan", float("inf"), "1e400", "much", [1.0, 2.0]])
def test_a_value_that_is_no_finite_number_is_refused_with_its_row(value: Any) -> None:
    data = rows([0.5, 0.25, value, 1.0]).select([3, 2])
    with pytest.raises(ValueError, match=r"'mark' holds .* in row 3, but the model does regression"):
        LabelSet(["value"], "regression").targets(data)


def test_several_values_in_a_row() -> None:
    two = LabelSet(["x", "y"], "regression")
    assert two.targets(rows([[1, 2.5], None])) == [[1.0, 2.5], None]
    with pytest.raises(ValueError, match="row 2.*a list of 2 finite numbers"):
        two.targets(rows([[1, 2.5], 3.0]))


@pytest.mark.parametrize(
    ("prefixes", "tags"),
    [
        ("BI", ["B-a", "I-a", "B-a"]),
        ("BI", ["I-a", "I-a", "B-a"]),
        ("BIES", ["B-a", "E-a", "S-a"]),
        ("BILU", ["B-a", "L-a", "U-a"]),
    ],
)
def test_tags_of_every_scheme(prefixes: str, tags: list[str]) -> None:
    """A head has all tags of the scheme, and entities in characters are the same labels as the tags."""
    words = TextDataset(["film plot end"], labels=[tags], words=[["film", "plot", "end"]], tagged=True)
    found = LabelSet.of_tags(words)
    assert found.names == ["O", *(f"{prefix}-a" for prefix in prefixes)] and found.tokens
    entities = [{"start": 0, "end": 9, "label": "a"}, {"start": 10, "end": 13, "label": "a"}]
    spans = TextDataset(["film plot end"], labels=[entities], tagged=True)
    labels = [found.encode(rows, make_tokenizer())["labels"][:] for rows in (words, spans)]
    assert tags[0] == "I-a" or labels[0] == labels[1]
