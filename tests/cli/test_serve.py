"""`badge-peft serve`: wrong arguments are said before anything starts. The service itself: tests/serving."""

from __future__ import annotations

import json

import pytest

from badge_peft.cli import serving
from badge_peft.cli.main import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on-drift", "panic"], "on_drift='panic'"),
        (["--autoscaling", "{max"], "is no JSON"),
        (["--autoscaling", "4"], "give an object"),
        (["--autoscaling", '{"max_replicas": 4}', "--replicas", "2"], "--replicas 2 is not allowed"),
    ],
)
def test_options_that_cannot_be(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "adapter", *options])
    assert message in capsys.readouterr().err


def test_a_file_is_served_with_onnx_and_an_adapter_without(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx.*badge-peft export"):
        serving._file([str(tmp_path)], None)
    (tmp_path / "model.onnx").touch()
    (tmp_path / "early_exit.json").write_text(json.dumps({"format": 1}))
    assert serving._file([str(tmp_path)], None) == str(tmp_path)
    with pytest.raises(ValueError, match="serve it with --onnx"):
        serving._adapter([str(tmp_path)])
    with pytest.raises(ValueError, match="badge-peft export --task"):
        serving._file(["a=x", "b=y"], None)
    with pytest.raises(ValueError, match="--base-model is not allowed"):
        serving._file([str(tmp_path)], "base")


def test_a_path_with_an_equals_sign_is_no_task(tmp_path):
    place = tmp_path / "lr=0.01"
    place.mkdir()
    (place / "adapter_config.json").write_text("{}")
    assert serving._adapter([str(place)]) == str(place)
    with pytest.raises(FileNotFoundError, match="runs/lr=0.01/none"):
        serving._adapter(["runs/lr=0.01/none"])
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx"):
        serving._file([str(place)], None)


def test_adapters_are_looked_at(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        serving._adapter([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="holds no adapter"):
        serving._adapter([f"one={tmp_path}"])
