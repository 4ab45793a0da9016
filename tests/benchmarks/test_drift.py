"""`benchmarks/drift.py` on made-up exits: quiet on undisturbed traffic, an alarm on other rows, and a page of both."""

from __future__ import annotations

import json
from dataclasses import replace

import drift

from tests.evaluation.logits import plausible


def test_it_measures_false_alarms_and_delays_and_writes_the_page(tmp_path):
    pool = plausible(rows=1200)
    pool.save(tmp_path / "pool.safetensors")
    wrong = pool.logits.clone()
    wrong[:, :-1] = 4 * wrong[:, :-1].roll(1, dims=-1)
    replace(pool, logits=wrong).save(tmp_path / "other.safetensors")
    results, page = tmp_path / "drift.json", tmp_path / "drift.md"
    sizes = ["--draws", "1", "--calibration-rows", "500", "--before", "50", "--rows", "400"]
    files = ["--logits", f"task={tmp_path}/pool.safetensors", "--other", f"task:wrong={tmp_path}/other.safetensors"]
    assert drift.main([*files, *sizes, "--json", str(results)]) == 0
    alarms = json.loads(results.read_text())["task"]["alarms"]
    assert alarms["undisturbed/0"] == [[None, None]]
    assert 0 < alarms["wrong/1.0"][0][0] < 100 and alarms["wrong/1.0"][0][0] <= alarms["wrong/0.3"][0][0]
    assert drift.main(["--json", str(results), "--docs", str(page)]) == 0
    text = page.read_text()
    assert "| task | 1 | 400 | 0 |" in text and f"| task | wrong | 100% | {alarms['wrong/1.0'][0][0]} |" in text


def test_labels_that_training_does_not_see(tmp_path):
    rows = [{"text": f"{label} {i}", "label": label} for i in range(30) for label in "abcde"]
    for name, part in (("t.jsonl", rows[:100]), ("p.jsonl", rows[100:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    assert drift.main(["--leave-out", "2", f"{tmp_path}/t.jsonl", f"{tmp_path}/p.jsonl", f"{tmp_path}/out"]) == 0
    found = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").open()]
        for name in ("train", "pool", "other")
    }
    labels = {name: {row["label"] for row in own} for name, own in found.items()}
    assert labels["train"] == labels["pool"] and len(labels["other"]) == 2
    assert labels["train"] | labels["other"] == set("abcde") and not labels["train"] & labels["other"]
    assert (len(found["train"]), len(found["pool"]), len(found["other"])) == (60, 30, 20)
