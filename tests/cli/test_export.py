"""`badge-peft export`: from an adapter's folder to one file that answers early."""

from __future__ import annotations

import json

import numpy as np
import pytest

from badge_peft import load_pretrained
from badge_peft.cli.answering import _changes
from badge_peft.export import OnnxEarlyExitModel
from badge_peft.export.report import ParityReport
from tests.export.cuts import one_cut
from tests.texts import make_tokenizer

pytestmark = pytest.mark.usefixtures("one_translation")


@pytest.fixture(scope="module")
def exported(trained, place, cli, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    with one_cut("trained"):
        result = cli("export", trained, out / "onnx", "--data", place / "rows.csv", "--json", out / "report.json")
    return out, result.output


def test_folder_and_report(exported):
    out, said = exported
    report = json.loads((out / "report.json").read_text())
    assert report["policy"] == "max_prob" and report["max_difference"] < 1e-4
    assert report["changes"]["rows"] == 120
    assert report["changes"]["same_exit"] == report["changes"]["same_answer"] == 1.0
    assert report["changes"]["score"] == report["changes"]["score_before"] > 0.4
    assert "same exit 100.0%" in said and "model.onnx" in said


def test_values_are_not_told_as_a_share():
    found = ParityReport(rows=9, same_answer=0.0004, same_exit=1.0, mean_exit=2.0, mean_exit_before=2.0)
    assert "values differ by 0.0004 in the mean, same exit 100.0%" in _changes(found, "regression")
    assert "same answer 0.0%" in _changes(found, "single_label_classification")


def test_the_rule_and_the_labels_of_the_adapter(exported, trained):
    session = OnnxEarlyExitModel.from_pretrained(exported[0] / "onnx")
    model = load_pretrained(str(trained))
    assert session.labels == [model.config.id2label[i] for i in range(2)]
    encoded = make_tokenizer()(["the film was good", "a dull end"], padding=True, return_tensors="pt")
    fields = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    wanted = model.early_exit_forward(**fields)
    found = session(**{name: value.numpy() for name, value in fields.items()})
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    np.testing.assert_allclose(found.logits, wanted.logits.numpy(), atol=1e-4)


def test_another_rule_in_int8(trained, cli, tmp_path):
    with one_cut("trained"):
        cli("export", trained, tmp_path, "--int8", "--policy", "divergence", "--threshold", 0.5, "--patience", 2)
    facts = json.loads((tmp_path / "early_exit.json").read_text())
    assert (facts["early_exit"]["policy"], facts["threshold"], facts["patience"]) == ("divergence", 0.5, 2)
    assert facts["int8"] is True


def test_errors_are_told_plainly(trained, cli, tmp_path, monkeypatch):
    said = cli("export", tmp_path / "nothing" / "here", tmp_path / "x", fails=True).output
    assert "there is no folder" in said
    said = cli("export", trained, tmp_path / "x", "--policy", "fixed_depth", "--depth", 99, fails=True).output
    assert "depth=99 is not allowed" in said
    for taken in (tmp_path / "taken", tmp_path / "taken" / "inside"):  # said before anything is exported
        (tmp_path / "taken").touch()
        result = cli("export", trained, taken, fails=True)
        assert f"{tmp_path / 'taken'} is a file" in result.stderr and "exporting" not in result.output
    import badge_peft.utils.extras as needs

    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    said = cli("export", trained, tmp_path / "x", fails=True).output
    assert "badge-peft[onnx]" in said
    assert not (tmp_path / "x").exists()
