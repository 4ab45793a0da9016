"""`benchmarks/decoders.py` on a tiny decoder: exits on states that are computed once, scores, times, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import decoders
import pytest
from transformers import AutoModelForCausalLM

from tests.decoders import make_decoder
from tests.texts import make_tokenizer, sentences


@pytest.mark.slow
def test_a_decoder(tmp_path: Path) -> None:
    make_decoder("llama", AutoModelForCausalLM).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for seed, name in enumerate(decoders.SPLITS):
        lines = [json.dumps({"text": text, "label": label}) for text, label in sentences(24, seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    results = str(tmp_path / "decoders.json")
    arguments = [str(tmp_path / "model"), f"mood={tmp_path}", "--adapters", str(tmp_path / "adapters")]
    few = ["--rows", "16", "--others", "8", "--epochs", "1", "--time", "2", "--threads", "1", "--policy", "max_prob"]
    few += ["--forms", "no bypass", "block bypass, carried logits"]
    assert decoders.main([*arguments, *few, "--json", results]) == 0
    sections = json.loads(Path(results).read_text())
    scores, times = sections["scores/mood"], sections["time/mood"]
    assert scores["rows"] == {"train": 16, "validation": 8, "test": 8} and len(scores["per_exit"]) == 3
    assert scores["policy"]["policy"] in ("max_prob", "fixed_depth") and times["rows"] == 2
    assert decoders.main(["--json", results, "--docs", str(tmp_path / "page.md")]) == 0
    assert list(scores["forms"]) == ["no bypass", "block bypass, carried logits"]
    assert scores["forms"]["block bypass, carried logits"]["best"] == scores["best"]
    page = (tmp_path / "page.md").read_text()
    assert f"| mood | {100 * scores['per_exit'][0]:.1f} |" in page
    assert f"**mood: {scores['blocks_saved']:.0%} of the blocks" in page
