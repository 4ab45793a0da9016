"""A tiny tokenizer, a base model on disk, and made-up labeled texts: what a command needs to run from end to end."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.models import PAD, make_model

WORDS = ("the", "film", "plot", "was", "is", "a", "very", "quite", "and", "story", "cast", "end")
GOOD, BAD = ("good", "fine", "great", "bright"), ("bad", "dull", "poor", "flat")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One number per word; [CLS] is 0, the padding token that of tests.models."""
    special = {"[CLS]": 0, "[PAD]": PAD, "[SEP]": 2, "[UNK]": 3}
    vocabulary = {**special, **{word: i for i, word in enumerate((*WORDS, *GOOD, *BAD), start=4)}}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        cls_token="[CLS]",
        pad_token="[PAD]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=40,
    )


def save_base(folder: Path, case: str = "bert", num_labels: int = 2) -> str:
    """A random base model with its tokenizer in `folder`; its path."""
    make_model(case, num_labels=num_labels).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different texts with the label `good` or `bad`, which one of their words gives away."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        label = rng.choice(("good", "bad"))
        words = [*rng.choices(WORDS, k=rng.randint(2, 9)), rng.choice(GOOD if label == "good" else BAD)]
        rng.shuffle(words)
        found[" ".join(words)] = label
    return list(found.items())


def write_csv(path: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("text", "label")) -> str:
    """A csv file with a header; its path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return str(path)
