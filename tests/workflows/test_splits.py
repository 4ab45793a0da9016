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
    except ValueError:
        assert len({text.casefold() for text in texts}) < 3
        return
    keys = [text.casefold() for rows in parts.values() for text in rows.texts]
    assert len(keys) == len(set(keys)) == len({text.casefold() for text in texts})
    assert list(parts) == ["train", "validation", "test"]
    pairs = set(zip(texts, data["train"].labels or [], strict=True))
    assert all(pair in pairs for rows in parts.values() for pair in zip(rows.texts, rows.labels or [], strict=True))
    again = split_in_three(data, seed, max_eval=max_eval)
    assert parts == again


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"all": 1000}, (680, 160, 160)),
        ({"train": 50, "dev": 20, "test": 10}, (50, 20, 10)),
        ({"train": 100, "test": 30}, (84, 16, 30)),
        ({"train": 100, "validation": 30}, (84, 16, 30)),  # whose test labels are hidden
    ],
)
def test_splits_that_are_there_are_kept_and_others_cut(source: dict[str, int], expected: tuple[int, int, int]) -> None:
    data = {name: dataset(numbered(count, 1000 * i)) for i, (name, count) in enumerate(source.items())}
    found = split_in_three(data)
    assert tuple(sizes(found).values()) == expected
    assert sizes(split_in_three(data, max_train=9, max_eval=5)) == {"train": 9, "validation": 5, "test": 5}
    last = [*data.values()][-1]
    assert set(found["test"].texts) <= set(last.texts)
    assert {found[name].texts[0] for name in found} != {split_in_three(data, 1)[name].texts[0] for name in found}


def test_a_text_of_the_test_split_never_trains() -> None:
    source = {"train": dataset(["A  film", "x", *numbered(40)]), "test": dataset(["a film ", "a Film", "y"])}
    parts = split_in_three(source)
    assert sorted(parts["test"].texts) == ["a film ", "y"]
    assert "A  film" not in [*parts["train"].texts, *parts["validation"].texts]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="too few different texts.*2 in all"):
        split_in_three({"train": dataset(["a", "b", "A ", "b"])})
    with pytest.raises(ValueError, match="no training split, only validation, test"):
        split_in_three({"validation": dataset(["a"]), "test": dataset(["b"])})


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
