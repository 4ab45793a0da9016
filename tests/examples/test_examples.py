"""Every example runs as a user runs it, models and data from disk, nothing from the network: as the main program of
this process, which saves the import of torch and transformers each time."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    HfArgumentParser,
)

import badge_peft
from badge_peft.export import export_onnx
from tests.models import make_model, shake
from tests.pages import ROOT, blocks
from tests.ranking.pairs import make_documents, pair_tokenizer
from tests.texts import WORDS, make_tokenizer, save_base, sentences

pytestmark = pytest.mark.usefixtures("one_translation")
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "examples.md"
Start = Callable[..., str]
SCRIPTS = ("train_glue", "after_deployment", "ablate_placement", "swap_adapters", "guard_stack", "rerank")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder/`, a tiny BERT with its tokenizer, and `data/`, JSON lines of a task with the labels bad and good."""
    folder = tmp_path_factory.mktemp("examples")
    save_base(folder / "encoder")
    rows = [{"text": text, "label": label} for text, label in sentences(120)]
    write_lines(folder / "data" / "train.jsonl", rows[:64])
    write_lines(folder / "data" / "validation.jsonl", rows[64:96])
    write_lines(folder / "data" / "test.jsonl", rows[96:])
    return folder


def save_adapters(place: Path, folder: Path, kinds: dict[str, dict[str, Any]]) -> Any:
    """Adapters of the encoder that differ, each with the tokenizer; the tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    for seed, (name, fields) in enumerate(kinds.items()):
        kind = AutoModelForTokenClassification if name == "tags" else AutoModelForSequenceClassification
        base = kind.from_pretrained(place / "encoder", num_labels=2)
        model = get_peft_model(base, badge_peft.BadgeConfig(r=4, final_exit="exit", **fields))
        shake(model, seed=seed)
        shake(model, seed=seed, only=".lora_B")
        model.save_pretrained(str(folder / name))
        tokenizer.save_pretrained(folder / name)
    return tokenizer


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """Runs a script as the main program, in the folder `tmp_path`; what it printed."""

    def run(script: Path, *arguments: Any, **variables: Any) -> str:
        monkeypatch.syspath_prepend(str(script.parent))
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(script), run_name="__main__")
        return printed.getvalue()

    return run


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Imports an example, as a neighbour of it does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return importlib.import_module


# ----------------------------------------------------------------------------------------------------- the examples


@pytest.mark.slow
def test_train_glue(place: Path, tmp_path: Path, example: Any, start: Start) -> None:
    command = ("--data-dir", place / "data", "--model", place / "encoder", "--r", 4, "--epochs", 1)
    said = start(EXAMPLES / "train_glue.py", *command, "--output-dir", "out")
    model = badge_peft.load_pretrained(str(tmp_path / "out"))
    config = model.peft_config["default"]
    assert (config.backbone, config.r, config.label_names) == ("lora", 4, ["bad", "good"])
    task = example("glue_data").load_task(None, str(place / "data"), make_tokenizer())
    scores = badge_peft.exit_scores(badge_peft.collect_exit_logits(model, task.splits["test"]))
    assert re.findall(r"exit +(\d+) +(\S+)%", said) == [
        (str(m), f"{100 * score:.1f}") for m, score in zip(scores.exit_layers, scores.per_exit, strict=True)
    ]
    assert f"S-avg    {scores.avg:.1%}" in said and f"S-best   {scores.best:.1%}" in said
    assert config.early_exit.calibration["rows"] == 32  # chosen on the validation rows
    assert f"stopping early ({config.early_exit.policy})" in said
    answer = badge_peft.pipeline("text-classification", model=str(tmp_path / "out"))("the film was good")
    assert answer[0]["label"] in ("bad", "good")


@pytest.mark.slow
def test_after_deployment(place: Path, tmp_path: Path, start: Start) -> None:
    classifier = place / "encoder"
    weights = (classifier / "model.safetensors").read_bytes()
    texts = [text for text, _ in sentences(80)]
    (tmp_path / "requests.txt").write_text("\n".join([*texts, *texts[:20]]) + "\n", encoding="utf-8")
    command = ("--model", classifier, "--texts", "requests.txt", "--output-dir", "out", "--epochs", 1)
    start(EXAMPLES / "after_deployment.py", *command, "--timed-rows", 4, "--max-score-drop", 0.1)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["full_depth_is_checkpoint"] is True
    assert report["held_out_texts"] == 16  # a fifth of the texts, each taken once
    assert report["same_answer_per_exit"]["3"] == 1.0 and report["same_answer"] >= 0.9
    assert (classifier / "model.safetensors").read_bytes() == weights

    model = badge_peft.load_pretrained(str(tmp_path / "out"))
    assert model.get_early_exit_config().policy == report["policy"]
    base = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    batch = make_tokenizer()([text for text, _ in sentences(20, seed=1)], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        assert torch.equal(model.early_exit_forward(**batch, policy="never").logits, base(**batch).logits)
    stored = badge_peft.ExitLogits.load(tmp_path / "out" / "exit_logits.safetensors")
    assert len(stored) == 16 and stored.labels is None


@pytest.mark.slow
def test_ablate_placement(place: Path, tmp_path: Path, start: Start) -> None:
    command = ("--data-dir", place / "data", "--model", place / "encoder", "--output", "out.json", "--only", "r")
    said = start(EXAMPLES / "ablate_placement.py", *command, "--epochs", 1, "--max-rows", 16)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["placement"], row["r"], row["exit_type"]) for row in rows] == [
        ("block", r, "linear") for r in (16, 4, 64)
    ]
    d, k, exits = 32, 2, 3
    for row in rows:
        (run,) = row["runs"]
        assert run["trained"] == exits * (2 * d * row["r"] + 2 * d + k * (d + 1))
        assert run["s_avg"] == pytest.approx(sum(run["per_exit"]) / exits) and run["s_best"] == max(run["per_exit"])
        line = f"| block | {row['r']} | linear | {run['trained']:,} | {run['s_avg']:.1%} | {run['s_best']:.1%} |"
        assert line in said.splitlines()


@pytest.mark.parametrize("change", range(10))
def test_every_variant_of_the_ablation_can_be_built(change: int, example: Any) -> None:
    ablation = example("ablate_placement")
    assert len(ablation.CHANGES) == 10
    fields = {**ablation.DEFAULT, **ablation.CHANGES[change]}
    model = get_peft_model(make_model(num_labels=2), badge_peft.BadgeConfig(final_exit="exit", **fields))
    assert len(model.base_model.exit_layers()) == 3


@pytest.mark.slow
def test_swap_adapters(place: Path, tmp_path: Path, start: Start) -> None:
    """Requests of three adapters in turn get what each adapter, alone on the encoder, answers."""
    kinds: dict[str, dict[str, Any]] = {
        "mood": {"num_labels": 2, "label_names": ["bad", "good"], "early_exit": {"threshold": 1.0, "patience": 1}},
        "topic": {"num_labels": 4, "label_names": list("abcd"), "backbone": "lora"},
        "score": {"num_labels": 1, "problem_type": "regression", "early_exit": {"policy": "never"}},
    }
    tokenizer = save_adapters(place, tmp_path, kinds)
    requests = [
        {"task": task, "text": text}
        for task, (text, _) in zip(("mood", "topic", "score", "mood", "score", "topic"), sentences(6), strict=True)
    ]
    write_lines(tmp_path / "requests.jsonl", requests)
    said = start(EXAMPLES / "swap_adapters.py", "--adapters", *kinds, "--requests", "requests.jsonl")
    answers = [json.loads(line) for line in said.splitlines()]
    assert [{"task": a["task"], "text": a["text"]} for a in answers] == requests
    alone = {name: badge_peft.load_pretrained(str(tmp_path / name)) for name in kinds}
    for answer in answers:
        out = alone[answer["task"]].early_exit_forward(**tokenizer(answer["text"], return_tensors="pt"))
        names = kinds[answer["task"]].get("label_names")
        wanted = float(out.logits[0, 0]) if names is None else names[int(out.logits[0].argmax())]
        assert (answer["answer"], answer["exit_layer"]) == (wanted, int(out.exit_layer))


@pytest.mark.slow
def test_rerank(tmp_path: Path, start: Start) -> None:
    make_model(num_labels=1).save_pretrained(tmp_path / "cross-encoder")
    pair_tokenizer().save_pretrained(tmp_path / "cross-encoder")
    weights = (tmp_path / "cross-encoder" / "model.safetensors").read_bytes()
    lines = [{"query": f"was the {word}", "document": d} for i, word in enumerate(WORDS) for d in make_documents(6, i)]
    write_lines(tmp_path / "pairs.jsonl", lines)
    command = ("--model", "cross-encoder", "--pairs", "pairs.jsonl", "--output-dir", "out", "--epochs", 1)
    said = start(EXAMPLES / "rerank.py", *command, "--top_k", 2, "--keep", 0.6, "--max_length", 40)
    config = badge_peft.load_pretrained(str(tmp_path / "out")).get_early_exit_config()
    assert (config.policy, config.top_k, config.calibration["queries"]) == ("top_k", 2, 3)
    assert f"{config.calibration['score']:.1%} of 3 queries keep their top 2" in said
    assert said.count("of the blocks saved, behind each exit: {") == 2
    assert (tmp_path / "cross-encoder" / "model.safetensors").read_bytes() == weights


def test_guard_stack(place: Path, tmp_path: Path, start: Start) -> None:
    """Every text gets from each task what its adapter alone answers, and the bundle answers the same."""
    kinds: dict[str, dict[str, Any]] = {
        "mood": {"num_labels": 2, "label_names": ["bad", "good"], "early_exit": {"threshold": 1.0, "patience": 1}},
        "topic": {"num_labels": 4, "label_names": list("abcd"), "early_exit": {"policy": "fixed_depth", "depth": 2}},
        "score": {"num_labels": 1, "problem_type": "regression", "early_exit": {"policy": "never"}},
        "tags": {"task_type": "TOKEN_CLS", "num_labels": 3, "label_names": ["O", "B-x", "I-x"]},
    }
    tokenizer = save_adapters(place, tmp_path, kinds)
    texts = [text for text, _ in sentences(5)]
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    options = ("--texts", "texts.txt", "--bundle", "guards")
    said = start(EXAMPLES / "guard_stack.py", "--tasks", *(f"{name}={name}" for name in kinds), *options)
    answers = [json.loads(line) for line in said.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    bundle = badge_peft.load_pretrained(str(tmp_path / "guards"))
    for name, fields in kinds.items():
        alone = badge_peft.load_pretrained(str(tmp_path / name))
        for answer in answers:
            batch = tokenizer(answer["text"], return_tensors="pt")
            out = alone.early_exit_forward(**batch)
            names = fields.get("label_names")
            if name == "tags":  # a token for each word, between two special ones
                out = alone.early_exit_forward(**batch, special_tokens_mask=special_tokens(batch))
                tags = [names[i] for i in out.logits[0, 1:-1].argmax(dim=-1)]
                words = zip(answer["text"].split(), tags, strict=True)
                wanted: Any = [[word, tag] for word, tag in words if tag != "O"]
            else:
                best = int(out.logits[0].argmax())
                wanted = pytest.approx(float(out.logits[0, 0]), abs=1e-4) if names is None else names[best]
            assert (answer["answers"][name], answer["exits"][name]) == (wanted, int(out.exit_layer))
            batch["special_tokens_mask"] = special_tokens(batch)
            again = bundle.early_exit_forward(**batch, tasks=[name])[name]
            assert int(again.exit_layer) == answer["exits"][name]


def special_tokens(batch: Any) -> torch.Tensor:
    """[1, S]: the first and the last."""
    mask = torch.zeros_like(batch["input_ids"])
    mask[:, [0, -1]] = 1
    return mask


@pytest.mark.slow
def test_onnx_service(place: Path, tmp_path: Path, start: Start) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(place / "encoder")
    model = get_peft_model(base, badge_peft.BadgeConfig(r=4, early_exit={"threshold": 1.0})).eval()
    shake(model)
    export_onnx(model, tmp_path / "onnx", tokenizer=make_tokenizer())
    texts = [text for text, _ in sentences(3)]
    said = start(EXAMPLES / "onnx_service.py", "onnx", *texts, "--threshold", 0.6, "--patience", 1)
    for text, line in zip(texts, said.splitlines(), strict=True):
        batch = make_tokenizer()(text, return_tensors="pt")
        batch.pop("token_type_ids", None)
        out = model.early_exit_forward(**batch, threshold=0.6, patience=1)
        answer = json.loads(line)
        assert answer["text"] == text and answer["exit_layer"] == int(out.exit_layer)
        assert answer["label"] == model.config.id2label[int(out.logits.argmax())]
        assert answer["score"] == pytest.approx(float(out.logits.softmax(-1).max()), abs=1e-3)


@pytest.mark.slow
def test_quickstart_notebook(place: Path, tmp_path: Path, start: Start) -> None:
    """Its code cells, one after the other in one process, as Jupyter runs them."""
    cells = notebook_cells("code")
    data = tmp_path / "data"
    for split in ("train", "validation", "test"):
        lines = (place / "data" / f"{split}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        write_lines(data / f"{split}.jsonl", [{**row, "label": int(row["label"] == "good")} for row in rows])
    (tmp_path / "cells.py").write_text("\n".join(cells), encoding="utf-8")
    said = start(
        tmp_path / "cells.py",
        BADGE_MODEL=place / "encoder",
        BADGE_DATA=data,
        BADGE_OUT="out",
        BADGE_TRAIN_ROWS=32,
    )
    model = badge_peft.load_pretrained(str(tmp_path / "out"))
    assert f"policy: {model.get_early_exit_config().policy}; adapter of" in said
    assert len(re.findall(r"'label': '(?:negative|positive)'.*'exit_layer': \d", said)) == 3
    assert re.search(r"accuracy \S+% \(full depth \S+%\), \S+% of the blocks saved", said)
    assert (tmp_path / "out" / "tradeoff.png").stat().st_size > 1000


# -------------------------------------------------------------------------------------------------- what is around


def notebook_cells(kind: str) -> list[str]:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_plain_and_has_no_outputs() -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert not re.search(r"^\s*[%!]", "".join(cell["source"]), re.M), "the cells also run as a script"


def test_the_page_names_every_example() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    named = set(re.findall(r"examples/(\w+\.(?:py|ipynb))", PAGE.read_text(encoding="utf-8")))
    assert named == files


def commands() -> list[tuple[str, str]]:
    """(example, arguments) of every command in the examples' docstrings and on the page."""
    texts = [block.code for block in blocks(PAGE, "bash")]
    texts += [(EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1] for name in SCRIPTS]
    whole = "\n".join(texts).replace("\\\n", " ")
    return re.findall(r"^ *python examples/(\w+)\.py (.*)$", whole, re.M)


def test_every_command_that_is_printed_is_understood(example: Any) -> None:
    found = commands()
    assert {name for name, _ in found} == {*SCRIPTS, "onnx_service"}
    for name, arguments in found:
        if name in SCRIPTS:
            parser = HfArgumentParser(example(name).Arguments)
            (parsed,) = parser.parse_args_into_dataclasses(args=shlex.split(arguments, comments=True))
            assert parsed is not None


# --------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("labels", "names", "numbers", "metric"),
    [
        (["no", "yes", "no"], ["no", "yes"], [0, 1, 0], "accuracy"),
        ([3, 7, 7], ["3", "7"], [0, 1, 1], "accuracy"),
        ([0.5, 4.0, 2.5], None, [0.5, 4.0, 2.5], "pearson"),
    ],
    ids=["strings", "numbers", "values"],
)
def test_labels_of_a_folder(labels: Any, names: Any, numbers: Any, metric: str, tmp_path: Path, example: Any) -> None:
    rows = [{"text": "the film", "text_pair": "a plot", "label": label} for label in labels]
    for split, some in (("train", rows), ("validation", rows * 2)):
        write_lines(tmp_path / "task" / f"{split}.jsonl", some)
    task = example("glue_data").load_task(None, str(tmp_path / "task"), make_tokenizer())
    assert (task.name, task.label_names, task.metric) == ("task", names, metric)
    assert task.splits["train"]["labels"][:] == numbers
    assert task.num_labels == (1 if names is None else len(names))
    assert {split: len(part) for split, part in task.splits.items()} == {"train": 3, "validation": 3, "test": 3}
    assert "text" not in task.splits["train"].column_names


def test_what_cannot_be_read_is_refused(tmp_path: Path, example: Any) -> None:
    load_task = example("glue_data").load_task
    with pytest.raises(SystemExit, match="'sst3' is not allowed: one of cola, .*--data-dir"):
        load_task("sst3", None, AutoTokenizer)
    write_lines(tmp_path / "task" / "train.jsonl", [{"text": "a", "label": 0}])
    with pytest.raises(SystemExit, match=r"must hold train.jsonl and validation.jsonl; it has \['train'\]"):
        load_task(None, str(tmp_path / "task"), AutoTokenizer)
