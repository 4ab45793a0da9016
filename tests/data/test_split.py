"""Splits: three of them, no text twice, the same ones for the same seed."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.data import split_texts, tokenise
from tests.texts import make_tokenizer, sentences

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})


def dataset(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))]}, features=FEATURES)


def numbered(count: int, start: int = 0) -> list[str]:
    return [f"text {i}" for i in range(start, start + count)]


def sizes(data: DatasetDict) -> dict[str, int]:
    return {split: len(rows) for split, rows in data.items()}


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.sampled_from([c * n for c in "aAbBcdefgh" for n in range(1, 9)]), min_size=20, max_size=60),
    seed=st.integers(0, 3),
    max_eval=st.sampled_from([None, 1, 4]),
)
def test_laws(texts: list[str], seed: int, max_eval: int | None) -> None:
    """Whatever the texts: each one once, in one split; nothing invented; the seed decides."""
    data = DatasetDict({"train": dataset(texts)})
    try:
        parts = split_texts(data, seed, max_eval=max_eval)
    except ValueError as error:  # too few of them, or a class that only the small splits have
        assert "no training row" in str(error) or len({text.casefold() for text in texts}) < 3
        return
    keys = [text.casefold() for rows in parts.values() for text in rows["text"]]
    assert len(keys) == len(set(keys)) == len({text.casefold() for text in texts})
    assert list(parts) == ["train", "validation", "test"]
    pairs = set(zip(texts, data["train"]["label"], strict=True))
    assert all((row["text"], row["label"]) in pairs for rows in parts.values() for row in rows)
    again = split_texts(data, seed, max_eval=max_eval)
    assert all(parts[split].to_dict() == again[split].to_dict() for split in parts)


def test_shares_and_limits() -> None:
    data = DatasetDict({"train": dataset(numbered(1000))})
    assert sizes(split_texts(data)) == {"train": 680, "validation": 160, "test": 160}
    assert sizes(split_texts(data, max_train=100, max_eval=50)) == {"train": 100, "validation": 50, "test": 50}


def test_another_seed_gives_other_splits() -> None:
    data = DatasetDict({"train": dataset(numbered(200))})
    assert set(split_texts(data, 0)["test"]["text"]) != set(split_texts(data, 1)["test"]["text"])


def test_splits_of_the_source_are_kept() -> None:
    source = DatasetDict(
        {"train": dataset(numbered(50)), "dev": dataset(numbered(20, 50)), "test": dataset(numbered(10, 70))}
    )
    parts = split_texts(source)
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        assert sorted(parts[split]["text"]) == sorted(source[name]["text"])


def test_validation_is_cut_from_training_rows_where_the_source_has_a_test_split() -> None:
    parts = split_texts(DatasetDict({"train": dataset(numbered(100)), "test": dataset(numbered(30, 100))}))
    assert sizes(parts) == {"train": 84, "validation": 16, "test": 30}
    assert set(parts["test"]["text"]) == set(numbered(30, 100))


def test_validation_rows_are_the_test_split_where_test_labels_are_hidden() -> None:
    parts = split_texts(DatasetDict({"train": dataset(numbered(100)), "validation": dataset(numbered(30, 100))}))
    assert sizes(parts) == {"train": 84, "validation": 16, "test": 30}
    assert set(parts["test"]["text"]) == set(numbered(30, 100))


def test_several_validation_splits_are_one() -> None:
    source = DatasetDict(
        {
            "train": dataset(numbered(100)),
            "validation_matched": dataset(numbered(10, 100)),
            "validation_mismatched": dataset(numbered(10, 110)),
        }
    )
    assert sizes(split_texts(source))["test"] == 20


def test_a_text_of_the_test_split_never_trains() -> None:
    source = DatasetDict(
        {"train": dataset(["A  film", "x", *numbered(40)]), "test": dataset(["a film ", "a Film", "y"])}
    )
    parts = split_texts(source)
    assert sorted(parts["test"]["text"]) == ["a film ", "y"]
    assert "A  film" not in [*parts["train"]["text"], *parts["validation"]["text"]]


def test_a_single_split_of_any_name_is_cut_in_three() -> None:
    assert sizes(split_texts(DatasetDict({"test": dataset(numbered(100))}))) == {
        "train": 68,
        "validation": 16,
        "test": 16,
    }


def test_refusals() -> None:
    with pytest.raises(ValueError, match="too few different texts.*2 in all"):
        split_texts(DatasetDict({"train": dataset(["a", "b", "A ", "b"])}))
    with pytest.raises(ValueError, match="no training split, only validation, test"):
        split_texts(DatasetDict({"validation": dataset(["a"]), "test": dataset(["b"])}))
    one_good = Dataset.from_dict({"text": numbered(50), "label": [0] * 50}, features=FEATURES)
    with pytest.raises(ValueError, match="no training row has the label 'good'"):
        split_texts(DatasetDict({"train": one_good, "test": dataset(["x", "y"])}))


def test_tokens() -> None:
    rows = sentences(20)
    data = Dataset.from_dict({"text": [t for t, _ in rows], "label": [int(y == "good") for _, y in rows]})
    tokens = tokenise(data, make_tokenizer(), max_length=6)
    assert {"input_ids", "attention_mask", "labels"} <= set(tokens.column_names)
    assert "text" not in tokens.column_names
    assert max(map(len, tokens["input_ids"])) == 6
    assert list(tokens["labels"]) == [int(y == "good") for _, y in rows]
    assert all(ids[0] == 0 and ids[-1] == 2 for ids in tokens["input_ids"])


def test_the_models_own_limit_holds() -> None:
    long = Dataset.from_dict({"text": ["film " * 100], "label": [0]})
    assert len(tokenise(long, make_tokenizer(), max_length=1000)["input_ids"][0]) == 40
