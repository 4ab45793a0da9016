"""Splits: three of them, no text twice, the same ones for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.settings import TrainColumns
from badge_peft.workflows.splits import hold_out, read_training_data, split_in_three
from tests.texts import write_csv


def dataset(texts: list[str]) -> TextDataset:
    return TextDataset(texts, labels=[i % 2 for i in range(len(texts))], class_names=["bad", "good"])


def numbered(count: int, start: int = 0) -> list[str]:
    return [f"text {i}" for i in range(start, start + count)]


def sizes(data: dict[str, TextDataset]) -> dict[str, int]:
    return {split: len(rows) for split, rows in data.items()}


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.sampled_from([c * n for c in "aAbBcdefgh" for n in range(1, 9)]), min_size=20, max_size=60),
    seed=st.integers(0, 3),
    max_eval=st.sampled_from([None, 1, 4]),
)
def test_laws(texts: list[str], seed: int, max_eval: int | None) -> None:
    """Whatever the texts: each one once, in one split; nothing invented; the seed decides."""
    data = {"train": dataset(texts)}
    try:
        parts = split_in_three(data, seed, max_eval=max_eval)
    except ValueError as error:  # too few of them, or a class that only the small splits have
        assert "no training row" in str(error) or len({text.casefold() for text in texts}) < 3
        return
    keys = [text.casefold() for rows in parts.values() for text in rows.texts]
    assert len(keys) == len(set(keys)) == len({text.casefold() for text in texts})
    assert list(parts) == ["train", "validation", "test"]
    pairs = set(zip(texts, data["train"].labels or [], strict=True))
    assert all(pair in pairs for rows in parts.values() for pair in zip(rows.texts, rows.labels or [], strict=True))
    again = split_in_three(data, seed, max_eval=max_eval)
    assert parts == again


def test_shares_and_limits() -> None:
    data = {"train": dataset(numbered(1000))}
    assert sizes(split_in_three(data)) == {"train": 680, "validation": 160, "test": 160}
    assert sizes(split_in_three(data, max_train=100, max_eval=50)) == {"train": 100, "validation": 50, "test": 50}


def test_another_seed_gives_other_splits() -> None:
    data = {"train": dataset(numbered(200))}
    assert set(split_in_three(data, 0)["test"].texts) != set(split_in_three(data, 1)["test"].texts)


def test_splits_of_the_source_are_kept() -> None:
    source = {"train": dataset(numbered(50)), "dev": dataset(numbered(20, 50)), "test": dataset(numbered(10, 70))}
    parts = split_in_three(source)
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        assert sorted(parts[split].texts) == sorted(source[name].texts)


def test_validation_is_cut_from_training_rows_where_the_source_has_a_test_split() -> None:
    parts = split_in_three({"train": dataset(numbered(100)), "test": dataset(numbered(30, 100))})
    assert sizes(parts) == {"train": 84, "validation": 16, "test": 30}
    assert set(parts["test"].texts) == set(numbered(30, 100))


def test_validation_rows_are_the_test_split_where_test_labels_are_hidden() -> None:
    parts = split_in_three({"train": dataset(numbered(100)), "validation": dataset(numbered(30, 100))})
    assert sizes(parts) == {"train": 84, "validation": 16, "test": 30}
    assert set(parts["test"].texts) == set(numbered(30, 100))


def test_several_validation_splits_are_one() -> None:
    source = {
        "train": dataset(numbered(100)),
        "validation_matched": dataset(numbered(10, 100)),
        "validation_mismatched": dataset(numbered(10, 110)),
    }
    assert sizes(split_in_three(source))["test"] == 20
    read = {name: part.select(range(len(part))) for name, part in source.items()}  # whose rows have numbers
    found = split_in_three(read)["test"]
    assert sorted(found.texts) == sorted(numbered(20, 100)) and sorted(found.numbers or []) == list(range(1, 21))


def test_labels_that_are_lists() -> None:
    """Several labels of a text, values, or tags."""
    labels = [["bad", "long"] if i % 2 else ["good"] for i in range(100)]
    parts = split_in_three({"train": TextDataset(numbered(100), labels=labels)})
    assert all(len(rows.labels or []) == len(rows) for rows in parts.values())
    only = {"train": TextDataset(numbered(50), labels=[["a"]] * 50), "test": TextDataset(["x"], labels=[["a", "b"]])}
    with pytest.raises(ValueError, match="no training row has the label 'b'"):
        split_in_three(only)


def test_a_text_of_the_test_split_never_trains() -> None:
    source = {"train": dataset(["A  film", "x", *numbered(40)]), "test": dataset(["a film ", "a Film", "y"])}
    parts = split_in_three(source)
    assert sorted(parts["test"].texts) == ["a film ", "y"]
    assert "A  film" not in [*parts["train"].texts, *parts["validation"].texts]


def test_a_single_split_of_any_name_is_cut_in_three() -> None:
    assert sizes(split_in_three({"test": dataset(numbered(100))})) == {
        "train": 68,
        "validation": 16,
        "test": 16,
    }


def test_refusals() -> None:
    with pytest.raises(ValueError, match="too few different texts.*2 in all"):
        split_in_three({"train": dataset(["a", "b", "A ", "b"])})
    with pytest.raises(ValueError, match="no training split, only validation, test"):
        split_in_three({"validation": dataset(["a"]), "test": dataset(["b"])})
    one_good = TextDataset(numbered(50), labels=[0] * 50, class_names=["bad", "good"])
    with pytest.raises(ValueError, match="no training row has the label 'good'"):
        split_in_three({"train": one_good, "test": dataset(["x", "y"])})


@pytest.mark.parametrize("seed", range(8))
def test_a_rare_class_is_not_held_out(seed: int) -> None:
    labels = ["rare", "odd", "odd", *["good", "bad"] * 20]
    train, held_out = hold_out(TextDataset(numbered(43), labels=labels), 0.3, seed)
    assert set(held_out.labels or []) <= set(train.labels or []) == {"rare", "odd", "good", "bad"}
    assert len(held_out) >= 11


def test_values_on_a_scale_are_held_out_though_no_other_row_has_them() -> None:
    train, held_out = hold_out(TextDataset(numbered(50), labels=list(range(50))), 0.2, 0)
    assert (len(train), len(held_out)) == (40, 10)


def test_training_rows_that_are_evaluation_rows_are_counted(tmp_path: Path) -> None:
    data = write_csv(tmp_path / "a.csv", [(f"film {i}", "good") for i in range(5)])
    other = write_csv(tmp_path / "b.csv", [("Film 1", "good"), ("film  3", "good")])
    with pytest.warns(UserWarning, match="2 of 5 rows are not trained on"):
        train, held_out = read_training_data(data, TrainColumns(eval_data=other), seed=0)
    assert (len(train), len(held_out)) == (3, 2)


def test_the_validation_split_is_evaluated_on_unless_a_share_is_asked_for(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("validation", 6), ("test", 4)):
        rows = [{"text": f"{split} text {i}", "label": i % 2} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train, held_out = read_training_data(str(tmp_path), TrainColumns(), seed=0)
    assert (len(train), len(held_out), held_out.split) == (20, 6, "validation")
    train, held_out = read_training_data(str(tmp_path), TrainColumns(eval_share=0.25), seed=0)
    assert (len(train), len(held_out), held_out.split) == (15, 5, "train")
