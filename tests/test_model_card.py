"""The card that lies beside a saved adapter: what it says, and whose text it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig, calibrate, collect_exit_logits
from badge_peft.model_card import END, START, base_license, hub_id, write_model_card
from tests.evaluation.logits import plausible
from tests.evaluation.rows import make_rows
from tests.models import make_badge, make_model, shake

LATENCY = {
    **{"p50_ms": 3.0, "p95_ms": 9.0, "full_depth_p50_ms": 12.0, "full_depth_p95_ms": 17.0},
    **{"time_saved": 0.5, "rows": 20, "device": "cpu", "threads": 2},
}


def save(folder: Path, license: str | None = None, **fields: Any) -> Path:
    """A calibrated adapter in `folder/adapter`, for a base model in `folder/base`."""
    make_model().save_pretrained(folder / "base")
    if license is not None:
        (folder / "base" / "README.md").write_text(f"---\nlicense: {license}\n---\n# A model\n")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    model = get_peft_model(base, BadgeConfig(**{"r": 4, **fields}))
    model.set_early_exit_config(calibrate(plausible(exits=3), "divergence", target_blocks_saved=0.3))
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def set_base(folder: Path, name: str | None) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))


def add_report(folder: Path, **changes: Any) -> dict[str, Any]:
    rule = json.loads((folder / "adapter_config.json").read_text())["early_exit"]
    report = {
        "calibration": rule["calibration"],
        "metric": "accuracy",
        "rows": 200,
        "exit_layers": [1, 2, 3],
        "per_exit": [0.25, 0.5, 0.875],
        "early_exit": {"rows_stopped": [100, 80, 20]},
        "latency": LATENCY,
        **changes,
    }
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "tradeoff.png").write_bytes(b"")
    return report


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_save_pretrained_leaves_our_card(tmp_path: Path) -> None:
    folder = save(tmp_path)
    text = text_of(folder)
    rule = json.loads((folder / "adapter_config.json").read_text())["early_exit"]
    record = rule["calibration"]
    assert "Model Card for Model ID" not in text and "More Information Needed" not in text
    assert "import badge_peft" in text and "PEFT does not know" in text
    assert f"| `threshold` | `{rule['threshold']:.6g}` |" in text and f"| `patience` | `{rule['patience']}` |" in text
    for m, score in record["exit_scores"].items():
        assert f"| {m} | {score:.1%} |" in text
    scores = record["exit_scores"].values()
    assert f"S-avg {sum(scores) / 3:.1%}, S-best {max(scores):.1%} (400 rows)" in text
    assert f"accuracy {record['score']:.1%}, at full depth {record['full_depth_score']:.1%}" in text
    assert f"{record['blocks_saved']:.1%} of the blocks are saved." in text
    assert "tradeoff.png" not in text and "on the clock" not in text


def test_metadata(tmp_path: Path) -> None:
    folder = save(tmp_path)
    data = metadata_load(folder / "README.md")
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-classification"
    assert data["tags"] == ["badge", "early-exit", "peft", "transformers"]
    assert "license" not in data and "base_model" not in data  # nothing is known of the one, the other is a path
    assert str(tmp_path) not in text_of(folder)
    set_base(folder, "google-bert/bert-base-uncased")
    write_model_card(folder, "someone/exits", license="apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "google-bert/bert-base-uncased" and card.data.license == "apache-2.0"
    assert "base_model:adapter:google-bert/bert-base-uncased" in (card.data.tags or [])
    assert 'load_pretrained("someone/exits")' in card.text and 'model="someone/exits"' in card.text


def test_the_licence_is_the_base_models(tmp_path: Path) -> None:
    assert metadata_load(save(tmp_path, license="mit") / "README.md")["license"] == "mit"
    (tmp_path / "base" / "README.md").unlink()
    assert base_license(str(tmp_path / "base")) is None
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "license": "bsd-3-clause"}))
    assert base_license(str(tmp_path / "base")) == "bsd-3-clause"
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [\n---\n")  # broken, and nobody's business here
    assert base_license(str(tmp_path / "base")) == "bsd-3-clause"
    assert base_license(None) is None and base_license("no/such-model") is None


def test_a_name_on_the_hub() -> None:
    names = ["google-bert/bert-base-uncased", "bert-base-uncased"]
    assert [hub_id(name) for name in names] == names
    assert not any(map(hub_id, (None, "", "/models/bert", "./bert", "a/b/c", "C:\\models\\bert")))


def test_saving_again_changes_nothing_and_follows_the_rule(tmp_path: Path) -> None:
    folder = save(tmp_path)
    model = PeftModel.from_pretrained(make_model(), folder)
    model.save_pretrained(str(folder))
    first = text_of(folder)
    model.save_pretrained(str(folder))
    assert text_of(folder) == first
    model.set_early_exit_config({"policy": "entropy", "threshold": 0.125})
    model.save_pretrained(str(folder))
    text = text_of(folder)
    assert "`0.125`" in text and "`entropy`" in text and "divergence" not in text and "S-avg" not in text
    model.set_early_exit_config(None)
    model.save_pretrained(str(folder))
    assert "No policy is saved" in text_of(folder)


def test_text_of_somebody_stays(tmp_path: Path) -> None:
    folder = save(tmp_path)
    file = folder / "README.md"
    file.write_text(
        file.read_text().replace("<!-- badge_peft:start", "# Mine\n\n<!-- badge_peft:start") + "\nThe end.\n"
    )
    model = PeftModel.from_pretrained(make_model(), folder)
    model.set_early_exit_config({"threshold": 0.0625})
    model.save_pretrained(str(folder))
    text = file.read_text()
    assert "# Mine" in text and text.endswith("\nThe end.\n") and "`0.0625`" in text
    assert text.count("## How it stops") == 1
    model.save_pretrained(str(folder))
    assert file.read_text() == text
    file.write_text("---\nlicense: cc-by-4.0\nlanguage: de\n---\n# Alles meins\n")
    model.save_pretrained(str(folder))
    text, data = file.read_text(), metadata_load(file)
    assert "# Alles meins" in text and "How it stops" not in text
    assert data["license"] == "cc-by-4.0" and data["language"] == "de" and "badge" in data["tags"]


def test_a_report_of_the_rule_in_force_counts(tmp_path: Path) -> None:
    folder = save(tmp_path)
    add_report(folder)
    write_model_card(folder)
    text = text_of(folder)
    assert "| 1 | 25.0% | 50.0% |" in text and "S-best 87.5% (200 rows)" in text
    assert "| time of a row, p50 | 12.00 ms | 3.00 ms |" in text and "on the clock 50.0% of the time (20 rows" in text
    assert "![Score against speed-up](tradeoff.png)" in text
    add_report(folder, latency=None)
    write_model_card(folder)
    assert "on the clock" not in text_of(folder)
    add_report(folder, calibration={"rows": 1})  # calibrated again since
    write_model_card(folder)
    text = text_of(folder)
    assert "25.0%" not in text and "on the clock" not in text and "tradeoff.png" not in text and "S-avg" in text
    (folder / "report.json").write_text("{")
    write_model_card(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "Its backbone is frozen."),
        ({"train_head": False}, "full depth answers as before, bit for bit"),
        ({"backbone": "lora"}, "A LoRA in its blocks"),
        ({"backbone": "full", "exit_layers": [1]}, "Its backbone was trained"),
        ({"label_names": ["a", "b|c", "d"]}, "3 (a, b/c, d)"),
        ({"exit_layers": [0, 2]}, "| exits after blocks | 0, 2, and the last |"),
    ],
    ids=str,
)
def test_what_it_is(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in text_of(save(tmp_path, **fields))


def test_a_regressions_scores_and_a_bound(tmp_path: Path) -> None:
    folder = save(tmp_path)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    record = calibrate(
        plausible("regression", 1, exits=3), "divergence", target_blocks_saved=0.3, metric="pearson"
    ).calibration
    assert record is not None and record.pop("settings")  # the adapter's own are others
    config["early_exit"]["calibration"] = {**record, "confidence": 0.95, "max_score_drop": 0.02}
    file.write_text(json.dumps(config))
    write_model_card(folder)
    text = text_of(folder)
    assert f"pearson {record['score']:.3f}" in text and "With a confidence of 0.95" in text and "below 0.02" in text


def test_every_adapter_has_a_card_and_a_config_alone_has_none(tmp_path: Path) -> None:
    model = make_badge()
    model.add_adapter("other", BadgeConfig(r=2))
    model.save_pretrained(str(tmp_path))
    assert "r = 4" in text_of(tmp_path) and "r = 2" in text_of(tmp_path / "other")
    BadgeConfig().save_pretrained(str(tmp_path / "bare"))
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["adapter_config.json"]


def test_numbers_of_other_weights_are_not_shown(tmp_path: Path) -> None:
    """Weights that were trained on after the calibration: no score, no bound, no picture of the ones before."""
    folder = save(tmp_path)
    model = PeftModel.from_pretrained(make_model(), folder, is_trainable=True).eval()
    rows = collect_exit_logits(model, make_rows(30, labels=False))
    model.set_early_exit_config(calibrate(rows, "auto", target_blocks_saved=0.3))
    model.save_pretrained(str(folder))
    add_report(folder)
    write_model_card(folder)
    assert "S-best" in text_of(folder) and "of the blocks are saved" in text_of(folder)
    shake(model, seed=9)
    model.save_pretrained(str(folder))
    text, config = text_of(folder), json.loads((folder / "adapter_config.json").read_text())
    assert "## How it stops\n\n| field | value |" in text
    for claim in ("Chosen on", "S-best", "of the blocks are saved", "on the clock", "tradeoff.png"):
        assert claim not in text
    assert config["early_exit"]["calibration"] is None and model.get_early_exit_config().calibration is None


@pytest.mark.parametrize(
    "changes",
    [
        {"early_exit": 3},
        {"early_exit": {"rows_stopped": [1]}},
        {"early_exit": {"rows_stopped": ["a", "b", "c"]}},
        {"exit_layers": 3},
        {"per_exit": [0.5]},
        {"rows": "many"},
        {"latency": [1]},
        {"latency": {"p50_ms": "fast"}},
    ],
    ids=str,
)
def test_an_edited_report_is_left_aside(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path)
    without = text_of(folder)
    add_report(folder, **changes)
    write_model_card(folder)
    assert text_of(folder) == without


def test_marks_in_the_wrong_order_lose_no_text(tmp_path: Path) -> None:
    folder = save(tmp_path)
    file = folder / "README.md"
    mine = f"# Mine\n\n{END}\n\nbetween\n\n{START}\n\nbehind\n"
    file.write_text(mine)
    write_model_card(folder)
    assert file.read_text().endswith(f"---\n{mine}")


@pytest.mark.parametrize("content", [b"---\nlicense: [\n---\n# Mine\n", b"# caf\xe9\n"], ids=["yaml", "latin-1"])
def test_a_card_that_cannot_be_read_stays(content: bytes, tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match="README.md cannot be read as a model card"):
        write_model_card(folder)
    assert (folder / "README.md").read_bytes() == content
