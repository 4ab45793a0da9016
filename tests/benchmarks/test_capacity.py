"""`benchmarks/capacity.py`: times fitted, queues as theory has them, controllers in the loop, and a page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("simpy", reason="the extra `benchmarks` is not installed")
for name in ("prometheus_client", "pydantic"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import capacity  # noqa: E402
from capacity_parts.fleet import simulate  # noqa: E402
from capacity_parts.plan import Case, governed, replicas_needed  # noqa: E402
from capacity_parts.service import Rows, Service  # noqa: E402
from capacity_parts.times import ServiceTimes  # noqa: E402
from capacity_parts.traffic import bursts, day, harder, steady  # noqa: E402

from badge_peft import load_pretrained  # noqa: E402
from badge_peft.evaluation import calibrate, collect_exit_logits  # noqa: E402
from badge_peft.evaluation.curve import stored_curve  # noqa: E402
from tests.evaluation.logits import plausible  # noqa: E402
from tests.serving.adapters import save_adapter  # noqa: E402
from tests.texts import make_tokenizer, sentences  # noqa: E402

#: Three settings at which 100 texts stop at block 12, 8 and 4; a quarter of them is hard and wrong at the last.
ROWS = Rows(
    np.repeat([[12], [8], [4]], 100, axis=1),
    np.array([[True] * 100, [True] * 100, [True] * 75 + [False] * 25]),
    np.array([False] * 75 + [True] * 25),
)
PLAIN = Service(ServiceTimes(0.0, 0.012, 0.0, 0.0), ROWS, batch_size=1)


def test_the_fit_finds_the_times_and_their_spread() -> None:
    random = np.random.default_rng(0)
    true = ServiceTimes(0.002, 0.0003, 0.001, 0.0002)
    batches = []
    for size in (1, 2, 4, 8, 16, 32) * 30:
        exits = random.integers(1, 13, size=size)
        batches.append({"exits": exits.tolist(), "seconds": true.mean(exits) * random.uniform(0.98, 1.02)})
    found = ServiceTimes.fit(batches)
    assert [found.call, found.row, found.block, found.active] == pytest.approx(
        [true.call, true.row, true.block, true.active], rel=0.1
    )
    assert found.error < 0.02 and max(found.ratios) < 1.04
    exits = np.arange(1, 13).repeat(6)  # 72 rows: passes of 32, 32 and 8
    passes = sum(true.mean(part) for part in (exits[:32], exits[32:64], exits[64:]))
    assert true.mean(exits) == pytest.approx(passes)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_replica_waits_as_queueing_theory_has_it(load: float) -> None:
    seconds = PLAIN.times.row
    found = simulate(PLAIN, [1.0], steady(200.0), load / seconds, seed=1)
    expected = seconds + load * seconds / (2 * (1 - load))  # M/D/1, Pollaczek and Khinchine
    assert found.unanswered == found.refused == 0
    assert found.latencies.mean() == pytest.approx(expected, rel=0.08)
    assert found.latencies.min() >= seconds * 0.999
    assert len(found.latencies) == pytest.approx(200 * load / seconds, rel=0.05)


def test_batches_routes_refusals_and_slow_machines() -> None:
    batched = replace(PLAIN, times=ServiceTimes(0.01, 0.001, 0.0, 0.0), batch_size=32)
    rate = 4 * 0.7 * 32 / 0.042
    fleet = simulate(batched, [1.0] * 4, steady(20.0), rate)
    assert fleet.quantile(0.99) < 0.15 and fleet.refused == 0
    assert simulate(batched, [1.0] * 4, steady(20.0), rate).latencies.tolist() == fleet.latencies.tolist()
    late = simulate(replace(batched, batch_wait=0.02), [1.0] * 4, steady(20.0), rate / 20)
    assert np.median(late.latencies) == pytest.approx(0.02 + 0.011, rel=0.01)  # it waits for others, and then goes
    slow = simulate(batched, [1.0, 1.0, 1.0, 2.0], steady(20.0), rate)
    assert slow.quantile(0.99) > fleet.quantile(0.99)
    full = simulate(replace(batched, waiting_rows=64), [1.0], steady(20.0), rate)
    assert full.refused > 0 and full.quantile(0.99) == np.inf
    assert full.refused + full.unanswered + len(full.latencies) == pytest.approx(20 * rate, rel=0.05)


def test_batches_take_texts_and_whole_requests() -> None:
    for size, rows, requests in ((32, 1, 32), (32, 8, 4), (32, 5, 6), (8, 20, 1)):
        assert replace(PLAIN, batch_size=size, request_rows=rows).batch_requests == requests
    # all at once: batches of four requests of 8 texts, then a last one
    times = ServiceTimes(1.0, 0.0, 0.0, 0.0)
    at_once = replace(steady(1.0), recorded=np.full(9, 0.001))
    found = simulate(replace(PLAIN, times=times, batch_size=32, request_rows=8), [1.0], at_once, 0.0)
    assert np.round(found.latencies).tolist() == [1.0] * 4 + [2.0] * 4 + [3.0]


def test_the_services_own_governor_keeps_what_full_depth_does_not() -> None:
    config = calibrate(plausible(), "entropy", target_blocks_saved=0.4)
    curve = [point.config for point in stored_curve(config)]
    depths = [12 - 8 * number / (len(curve) - 1) for number in range(len(curve))]  # 12 to 4 ms for a text
    rows = Rows(np.repeat([[depth] for depth in depths], 100, axis=1), np.ones((len(curve), 100), bool), ROWS.hard)
    fixed = Service(ServiceTimes(0.0, 0.0, 0.0, 0.001), rows, settings=curve, batch_size=8, waiting_rows=10**6)
    moved = replace(fixed, governor=governed(config, 0.1, 0.9))
    peak = 1.6 / 0.012  # 1.6 times what the first setting can do
    full, kept = (simulate(way, [1.0], bursts(60.0), peak) for way in (fixed, moved))
    assert full.quantile(0.95) > 1 and kept.quantile(0.95) < 0.3
    used = [number for _, number in kept.settings]
    assert used[0] == 0 and max(used) > 0 and any(later < one for one, later in zip(used, used[1:], strict=False))
    assert len(full.settings) == 0
    two = simulate(moved, [1.0, 1.0], bursts(60.0), 2 * peak)
    assert two.quantile(0.95) < 0.3  # both hear of the one setting


def test_hard_texts_cost_what_the_setting_loses_on_them() -> None:
    fixed = Service(ServiceTimes(0.0, 0.0, 0.0, 0.001), ROWS, setting=2, batch_size=8)
    hard, easy = (simulate(fixed, [1.0], traffic(60.0), 50.0) for traffic in (harder, day))
    assert easy.right == pytest.approx(0.75, abs=0.03) and hard.right == pytest.approx(0.5, abs=0.03)


def test_the_search_finds_the_least_number_of_replicas() -> None:
    case = Case(steady(8.0), 10)
    rate, target = 150.0, 0.05
    count, outcome = replicas_needed(PLAIN, case, rate, target, guess=2)
    assert outcome.quantile(0.99) <= target < simulate(PLAIN, [1.0] * (count - 1), case.traffic, rate).quantile(0.99)
    assert replicas_needed(PLAIN, case, rate, target, guess=8)[0] == count >= rate * 0.012
    with pytest.raises(ValueError, match=r"target of 0.001 s is not kept with"):
        replicas_needed(PLAIN, case, rate, 0.001, guess=1)
    slow = Case(steady(1.0), 20, slow=2.0)
    assert [slow.fleet(count).count(2.0) for count in (1, 3, 20)] == [1, 1, 2]


@pytest.mark.exhaustive
def test_from_an_adapter_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tmp_path)
    tokenizer = make_tokenizer()
    rows: list[dict[str, Any]] = [dict(tokenizer(text)) for text, _ in sentences(80)]
    collect_exit_logits(load_pretrained(str(adapter)), rows).save(adapter / "exit_logits.safetensors")
    (tmp_path / "texts.txt").write_text("\n".join(text for text, _ in sentences(60)))
    store = ["--json", str(tmp_path / "capacity.json")]
    with pytest.raises(FileNotFoundError, match="measure first"):
        capacity.main([*store, "page", str(tmp_path / "x.md")])
    assert capacity.main([*store, "measure", str(adapter), str(tmp_path / "texts.txt"), "--repeats", "2"]) == 0
    small = ["--seconds", "3", "--sizes", "1", "2", "--target", "1.0", "--request-rows", "2"]
    assert capacity.main([*store, "simulate", *small]) == 0
    data = json.loads((tmp_path / "capacity.json").read_text())
    assert {result["case"] for result in data["results"]} > {"a day", "bursts", "a harder day"}
    assert all(own["replicas"] for result in data["results"] for own in result["ways"].values())

    run = [[0.1 * i, 0.0, 0.02, 200, 8, 8, 8, 20] for i in range(50)]
    load_test = {
        "size": 8,
        "target": 0.5,
        "max_score_drop": 0.9,
        "overhead": {"the empty deployment": {"p50": 3.0}},
        "capacity": {"stock": {"texts_per_second": 1000.0}},
        "runs": {"Poisson": {"stock": run, "fixed": run, "controller": [*run[:-1], [5.0, 0.0, 0.0, 429, 0, 0, 0, 0]]}},
    }
    (tmp_path / "serve.json").write_text(json.dumps(load_test))
    assert capacity.main([*store, "check", str(tmp_path / "serve.json")]) == 0
    checked = json.loads((tmp_path / "capacity.json").read_text())["check"]["runs"]
    assert [row["way"] for row in checked] == ["stock", "fixed", "controller"]
    assert checked[0]["measured"]["p99"] == 0.02 and checked[2]["measured"]["p99"] == float("inf")
    assert all(0.003 < row["simulated"]["p50"] < 0.1 for row in checked)
    assert capacity.main([*store, "page", str(tmp_path / "docs" / "scale.md")]) == 0
    text = (tmp_path / "docs" / "scale.md").read_text()
    assert "To keep p99 below 1000 ms" in text and "| stock | Poisson | 20 ms /" in text
    assert {path.name for path in (tmp_path / "docs" / "img").iterdir()} == {"scale_replicas.png", "scale_burst.png"}
