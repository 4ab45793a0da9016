"""The commands on rows with a tag for each token, and on texts with their entities."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from seqeval.metrics import f1_score
from transformers import AutoModelForTokenClassification

from badge_peft import ExitLogits, load_pretrained
from badge_peft.early_exit.policies import build_policy
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.data import read_examples
from badge_peft.workflows.predict import Answerer, Answering
from badge_peft.workflows.settings import Columns
from tests.cli.conftest import FAST, ROWS, Cli, one_line, save_classifier
from tests.models import make_model
from tests.texts import BAD, GOOD, WORDS, make_tokenizer, write_csv

KINDS = {**dict.fromkeys(GOOD, "good"), **dict.fromkeys(BAD, "bad")}
LEARNS = ("--epochs", 6, "--batch-size", 8, "--adapter-lr", 0.05)
TAGS = ["O", "B-bad", "I-bad", "B-good", "I-good"]


def tagged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of words of which some are entities, side by side ones one entity."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words = [draw.choice((*WORDS, *GOOD, *BAD)) for _ in range(draw.randint(3, 10))]
        tags, before = [], None
        for word in words:
            kind = KINDS.get(word)
            tags.append("O" if kind is None else f"{'I' if kind == before else 'B'}-{kind}")
            before = kind
        rows.append({"tokens": words, "tags": tags})
    return rows


def as_entities(row: dict[str, Any]) -> dict[str, Any]:
    """The same in characters of a text."""
    text, found, start, before = " ".join(row["tokens"]), [], 0, "O"
    for word, tag in zip(row["tokens"], row["tags"], strict=True):
        if tag.startswith("B") or (tag.startswith("I") and before[2:] != tag[2:]):
            found.append({"start": start, "end": start + len(word), "label": tag[2:]})
        elif tag.startswith("I"):
            found[-1]["end"] = start + len(word)
        start, before = start + len(word) + 1, tag
    return {"text": text, "entities": found}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder/`; `rows.jsonl`, `rows.json` and `rows.parquet` with tags, `spans.jsonl` the same with entities; and of
    others `test.jsonl` and `test_spans.jsonl`."""
    folder = tmp_path_factory.mktemp("tags")
    save_encoder(folder / "encoder")
    rows, others = tagged(100), tagged(30, seed=1)
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    write_jsonl(folder / "spans.jsonl", [as_entities(row) for row in rows])
    write_jsonl(folder / "test.jsonl", others)
    write_jsonl(folder / "test_spans.jsonl", [as_entities(row) for row in others])
    return folder


def save_encoder(folder: Path) -> None:
    """An encoder without a head, in which a word is the same wherever it stands, so that exits learn in no time."""
    model: Any = make_model("bert").base_model
    for table in (model.embeddings.position_embeddings, model.embeddings.token_type_embeddings):
        table.weight.data.zero_()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def train(cli: Cli, corpus: Path, data: str, out: Path, *more: Any) -> Any:
    return cli("train", corpus / "encoder", corpus / data, "--output-dir", out, *FAST[2:], *LEARNS, *more)


@pytest.fixture(scope="module")
def adapter(corpus: Path, cli: Cli) -> Path:
    found = train(cli, corpus, "rows.jsonl", corpus / "adapter", "--exit-layers", "0-3", "--policy", "max_prob")
    assert "5 tags of tokens (O, B-bad, I-bad, B-good, I-good)" in found.stdout and "entity f1" in found.stdout
    return corpus / "adapter"


def test_what_training_leaves(adapter: Path, corpus: Path) -> None:
    report, card = json.loads((adapter / "report.json").read_text()), (adapter / "README.md").read_text()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS" and config["label_names"] == TAGS == report["label_names"]
    assert report["metric"] == "entity_f1" and report["rows"] == 20 and report["tokens"] > 60
    assert report["columns"] == {"text": "tokens", "text_pair": None, "label": "tags"}
    assert sum(report["early_exit"]["rows_stopped"]) == 20 and report["s_best"] > 0.5
    assert "pipeline_tag: token-classification" in card and 'pipeline("token-classification"' in card
    assert "20 texts with" in card and "| exit after block | entity f1 | texts it answers |" in card
    stored = ExitLogits.load(adapter / "exit_logits.safetensors")
    assert stored.label_names == TAGS and len(stored.units) == 20


@pytest.mark.parametrize("data", ["rows.json", "rows.parquet"])
def test_other_formats_are_read_alike(corpus: Path, data: str) -> None:
    found, expected = (read_examples(corpus / name) for name in (data, "rows.jsonl"))
    assert (found.words, found.labels, found.tagged) == (expected.words, expected.labels, True)
    assert found.classes() == expected.classes()


def test_entities_in_characters_are_the_same_labels(corpus: Path, adapter: Path, cli: Cli) -> None:
    """By whichever columns the rows come, the same tokens have the same labels; so the same exits come of it."""
    opened = open_adapter(adapter, device="cpu")
    words, spans = (opened.encode(opened.read(corpus / name)) for name in ("test.jsonl", "test_spans.jsonl"))
    assert words.to_list() == spans.to_list()
    train(cli, corpus, "spans.jsonl", corpus / "spans", "--exit-layers", "0-3", "--policy", "max_prob")
    assert json.loads((corpus / "spans" / "report.json").read_text())["columns"]["label"] == "entities"
    stored, same = (ExitLogits.load(corpus / name / "exit_logits.safetensors") for name in ("adapter", "spans"))
    assert stored.logits.shape == same.logits.shape and torch.equal(stored.labels, same.labels)


@pytest.mark.parametrize("onnx", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bench(corpus: Path, adapter: Path, cli: Cli, tmp_path: Path, onnx: bool) -> None:
    """Texts of several lengths, whose tokens are answered as `evaluate` has it."""
    options = [] if onnx else ["--no-onnx"]
    cli("bench", adapter, corpus / "test.jsonl", "--rows", 12, "--json", tmp_path / "b.json", *options)
    found = {each["name"]: each for each in json.loads((tmp_path / "b.json").read_text())["results"]}
    early = found["BADGE PyTorch"]
    write_jsonl(tmp_path / "first.jsonl", tagged(30, seed=1)[:12])
    cli("evaluate", adapter, tmp_path / "first.jsonl", "--json", tmp_path / "e.json", "--latency", 0)
    expected = json.loads((tmp_path / "e.json").read_text())["early_exit"]
    assert (early["score"], early["mean_exit"]) == pytest.approx((expected["score"], expected["mean_exit"]))
    assert early["answers_as_full_depth"] == pytest.approx(expected["answers_as_full_depth"])
    assert "BADGE ONNX" not in found or found["BADGE ONNX"]["mean_exit"] == early["mean_exit"]


def test_evaluate_calibrate_and_sweep(corpus: Path, adapter: Path, cli: Cli, tmp_path: Path) -> None:
    out = cli("evaluate", adapter, corpus / "test.jsonl", "--json", tmp_path / "e.json", "--latency", 2)
    assert "entity f1" in out.stdout and "latency (" in out.stdout
    report = json.loads((tmp_path / "e.json").read_text())
    rows = tagged(30, seed=1)
    lines = [json.loads(x) for x in cli("predict", adapter, corpus / "test.jsonl").stdout.splitlines()]
    said = [line["tags"] for line in lines]
    f1 = f1_score([row["tags"] for row in rows], said)
    assert report["early_exit"]["score"] == pytest.approx(f1)
    assert report["early_exit"]["mean_exit"] == pytest.approx(sum(line["exit_layer"] for line in lines) / 30)
    accuracy = cli(
        "evaluate", adapter, corpus / "test_spans.jsonl", "--metric", "accuracy", "--json", tmp_path / "a.json"
    )
    right = sum(a == b for row, tags in zip(rows, said, strict=True) for a, b in zip(row["tags"], tags, strict=True))
    found = json.loads((tmp_path / "a.json").read_text())["early_exit"]["score"]
    assert found == pytest.approx(right / sum(len(tags) for tags in said)) and "accuracy" in accuracy.stdout
    table = cli("sweep", adapter, "--policies", "entropy", "--points", 4, "--json", tmp_path / "s.json").stdout
    assert "entity_f1" in table
    cli("calibrate", adapter, corpus / "test_spans.jsonl", "--policy", "entropy", "--target-blocks-saved", 0.3)
    after: Any = open_adapter(adapter, device="cpu").early_exit_config()
    assert after.calibration["policy_asked_for"] == "entropy" and after.calibration["metric"] == "entity_f1"
    assert after.calibration["rows"] == 30
    stored = ExitLogits.load(adapter / "exit_logits.safetensors")
    assert len(build_policy(after).replay(stored)) == len(stored)


def test_predict_names_entities_of_texts(corpus: Path, adapter: Path, cli: Cli) -> None:
    """Those that the tags of the same tokens make."""
    tagged_words = cli("predict", adapter, corpus / "test.jsonl", "--policy", "never").stdout.splitlines()
    words = [json.loads(line) for line in tagged_words]
    texts = [as_entities(line)["text"] for line in words]
    found = cli("predict", adapter, "--policy", "never", input="\n".join(texts) + "\n").stdout.splitlines()
    assert sum(len(line["entities"]) for line in words) > 0
    for line, own, text in zip(map(json.loads, found), words, texts, strict=True):
        assert (
            line["text"] == text
            and line["exit_layer"] == own["exit_layer"] == 3
            and line["entities"] == own["entities"]
        )
        for entity in line["entities"]:
            assert entity["text"] == text[entity["start"] : entity["end"]] and 0 < entity["score"] <= 1
    batched = [json.loads(x) for x in cli("predict", adapter, corpus / "test_spans.jsonl").stdout.splitlines()]
    alone = cli("predict", adapter, corpus / "test_spans.jsonl", "--batch-size", 1).stdout.splitlines()
    assert [line["exit_layer"] for line in batched] == [json.loads(line)["exit_layer"] for line in alone]


def test_a_row_without_tokens_has_no_entities(adapter: Path, cli: Cli) -> None:
    """As an empty text has none; training leaves both out."""
    given = "".join(json.dumps({"tokens": words}) + "\n" for words in ([], ["a", "fine"], []))
    found = [json.loads(x) for x in cli("predict", adapter, "--format", "jsonl", input=given).stdout.splitlines()]
    (empty,) = map(json.loads, cli("predict", adapter, input="\n").stdout.splitlines())
    assert found[0] == found[2] == {"tokens": [], "tags": [], "entities": [], "exit_layer": empty["exit_layer"]}
    assert empty["entities"] == [] and len(found[1]["tags"]) == 2


def test_a_table_of_answers_has_the_same_columns_for_texts_and_tokens(adapter: Path) -> None:
    answerer = Answerer(Answering(str(adapter), device="cpu"))
    text, tokens = ("a fine film", None), (["a", "fine"], None)
    found, first, none = answerer.table([text, tokens]), answerer.table([tokens]), answerer.table([])
    assert found.schema == first.schema == none.schema and len(none) == 0
    rows = found.to_pylist()
    assert rows[0]["text"] == text[0] and rows[0]["tokens"] is rows[0]["tags"] is None
    assert rows[1] == first.to_pylist()[0] and rows[1]["tokens"] == tokens[0] and len(rows[1]["tags"]) == 2
    assert rows[1]["text"] is None and all(row["entities"] is not None for row in rows)


def test_many_tasks_with_tokens_among_them(corpus: Path, adapter: Path, cli: Cli, tmp_path: Path) -> None:
    text = write_csv(tmp_path / "texts.csv", ROWS[:60])
    cli("train", corpus / "encoder", text, "--output-dir", tmp_path / "mood", *FAST)
    tasks = ("--task", f"mood={tmp_path / 'mood'}", "--task", f"names={adapter}")
    given = "a fine film\nbad plot end\n"
    lines = [json.loads(x) for x in cli("predict", *tasks, input=given).stdout.splitlines()]
    alone = [json.loads(x) for x in cli("predict", adapter, input=given).stdout.splitlines()]
    for line, own in zip(lines, alone, strict=True):
        assert line["tasks"]["names"] == {"entities": own["entities"], "exit_layer": own["exit_layer"]}
        assert line["blocks"] >= own["exit_layer"] and "label" in line["tasks"]["mood"]
    rows = [{**as_entities(row), "mood": "good"} for row in tagged(6, seed=3)]
    data = write_jsonl(tmp_path / "both.jsonl", [{**row, "names": row.pop("entities")} for row in rows])
    out = cli("evaluate", *tasks, data, "--json", tmp_path / "t.json").stdout
    assert "entity f1" in out and json.loads((tmp_path / "t.json").read_text())["tasks"]["names"]["labels"] == "given"
    pairs = write_csv(tmp_path / "pairs.csv", [("the film", "was good")], ("text", "text_pair"))
    for place in (tasks, (adapter,)):
        told = cli("predict", *place, pairs, "--text-pair-column", "text_pair", fails=True)
        one_line(told, "pairs of texts", "--text-column")


def test_a_tagger_in_service_teaches_its_exits(corpus: Path, cli: Cli, tmp_path: Path) -> None:
    model: Any = AutoModelForTokenClassification.from_config(make_model(num_labels=5).config)
    model.config.id2label, model.config.label2id = dict(enumerate(TAGS)), {tag: i for i, tag in enumerate(TAGS)}
    model.save_pretrained(tmp_path / "tagger")
    make_tokenizer().save_pretrained(tmp_path / "tagger")
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(row["tokens"]) for row in tagged(40)), encoding="utf-8")
    out = tmp_path / "exits"
    found = cli("train", tmp_path / "tagger", tmp_path / "texts.txt", "--output-dir", out, "--keep-head", *FAST)
    assert "full depth answers as the checkpoint, bit for bit" in found.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["labels"] == "full depth's own answers" and report["per_exit"][-1] == 1.0
    assert load_pretrained(str(out)).get_base_model().config.id2label[1] == "B-bad"
    one_line(
        cli("train", tmp_path / "tagger", write_csv(tmp_path / "l.csv", ROWS[:9]), "--output-dir", "x", fails=True),
        "labels tokens",
        "has one label for each text (column 'label')",
    )


NOUNS = {**dict.fromkeys((*GOOD, *BAD), "ADJ"), **dict.fromkeys(("film", "plot", "story", "cast", "end"), "NOUN")}


def test_tags_that_name_no_entities(corpus: Path, cli: Cli, tmp_path: Path) -> None:
    """Parts of speech train, are scored by the token, and come out word by word, of commands, file and pipeline."""
    rows = [{"tokens": row["tokens"], "pos_tags": [NOUNS.get(w, "X") for w in row["tokens"]]} for row in tagged(60)]
    data, out = write_jsonl(tmp_path / "pos.jsonl", rows), tmp_path / "pos"
    found = cli("train", corpus / "encoder", data, "--output-dir", out, *FAST[2:], *LEARNS, "--exit-layers", "0-3")
    assert "3 tags of tokens (ADJ, NOUN, X)" in found.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["metric"] == "accuracy" and report["label_names"] == ["ADJ", "NOUN", "X"] and report["s_best"] > 0.8
    assert "| exit after block | accuracy | texts it answers |" in (out / "README.md").read_text()
    cli("evaluate", out, data, "--json", tmp_path / "e.json")
    lines = [json.loads(line) for line in cli("predict", out, data, "--policy", "never").stdout.splitlines()]
    pairs = [
        (a, b)
        for row, line in zip(rows, lines, strict=True)
        for a, b in zip(row["pos_tags"], line["tags"], strict=True)
    ]
    full = json.loads((tmp_path / "e.json").read_text())["full_depth_score"]
    assert full == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    for line in lines:
        assert [entity["label"] for entity in line["entities"]] == line["tags"]
    assert (
        cli("predict", out, "--format", "jsonl", input=json.dumps({"tokens": ["film"] * 50})).stdout.count("null") > 9
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"tokens": ["a", "b"], "tags": ["O"]}, "row 2 has 2 tokens and 1 tags: each token needs one"),
    "no name": ({"tokens": ["a", "b"], "tags": ["B-x", ""]}, "row 2 has the tag '' at token 2: tags are names"),
    "outside": ({"text": "a b", "entities": [{"start": 1, "end": 9, "label": "x"}]}, "its text has 3 characters"),
    "blank": ({"text": "a b", "entities": [{"start": 1, "end": 2, "label": "x"}]}, "something but white space"),
    "no kind": ({"text": "a b", "entities": [{"start": 0, "end": 1, "label": ""}]}, "label must be the name"),
    "overlap": (
        {"text": "a b", "entities": [{"start": 0, "end": 3, "label": "x"}, {"start": 2, "end": 3, "label": "x"}]},
        "which overlaps the one before",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_cannot_be_meant(name: str, corpus: Path, cli: Cli, tmp_path: Path) -> None:
    row, message = WRONG[name]
    good = (
        {"tokens": ["c"], "tags": ["B-x"]} if "tokens" in row else {"text": "c d", "entities": [{**E, "label": "x"}]}
    )
    data = write_jsonl(tmp_path / "rows.jsonl", [good, row])
    out = tmp_path / "out"
    one_line(cli("train", corpus / "encoder", data, "--output-dir", out, fails=True), message)
    assert not out.exists()


E = {"start": 0, "end": 1}


def test_what_is_for_the_other_kind(corpus: Path, adapter: Path, trained: Path, cli: Cli, tmp_path: Path) -> None:
    rows = corpus / "rows.jsonl"
    save_classifier(tmp_path / "texts")
    new = write_jsonl(tmp_path / "n.jsonl", [{"tokens": ["a"], "tags": ["B-new"]}])
    for arguments, message in (
        (
            ("train", tmp_path / "texts", rows, "--output-dir", tmp_path / "x"),
            "classifies texts, and the data has",
        ),
        (("evaluate", trained, rows), "the adapter classifies texts, and"),
        (("evaluate", adapter, write_csv(tmp_path / "l.csv", ROWS[:9])), "the adapter labels tokens, and"),
        (("predict", trained, rows), "row 1 has a list in column 'tokens', and the adapter classifies texts"),
        (
            ("evaluate", adapter, new),
            "row 1 has the tag 'B-new', which the model",
        ),
        (("calibrate", adapter, "--confidence", 0.9), "confidence needs max_score_drop, metric='accuracy'"),
        (("evaluate", trained, corpus.parent / "none.csv", "--metric", "entity_f1"), "none.csv"),
    ):
        one_line(cli(*arguments, fails=True), message)


def test_a_column_of_entities_beside_labels_has_to_be_named(tmp_path: Path) -> None:
    rows = [
        {"text": "a b", "label": "x", "entities": [{**E, "label": "y"}]},
        {"text": "c", "label": "z", "entities": []},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_examples(data).labels == ["x", "z"] and not read_examples(data).tagged
    named = read_examples(data, Columns(label_column="entities"))
    assert named.tagged and named.labels == [[{**E, "label": "y"}], []]
    words = [{"text": "a b", "tokens": ["a", "b"], "label": "x"}, {"text": "c", "tokens": ["c"], "label": "z"}]
    assert read_examples(write_jsonl(tmp_path / "words.jsonl", words)).labels == ["x", "z"]
