"""`benchmarks/paper.py` from end to end, on a tiny random model and made-up data: every method, resumed, reported."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paper
import pytest
import torch
import yaml
from paper_grid import regret, resampled
from paper_grid.forms import CARRY, PLAIN, is_of, logits_of
from paper_grid.loop import Loop
from paper_grid.plan import Run, key_of, plan
from paper_grid.published import TABLE_1
from paper_grid.rates import choose
from paper_grid.records import gather, method_scores
from paper_grid.savings import GOALS, Savings
from paper_grid.settings import load_settings
from paper_grid.statistics import Paired, paired, summary
from paper_grid.store import Store
from paper_grid.training import Workshop
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from badge_peft.evaluation import ExitLogits, evaluate_policy, exit_scores
from badge_peft.evaluation.metrics import METRICS
from badge_peft.training import cache_states

BENCHMARKS = Path(paper.__file__).parent
WORDS = [f"w{i}" for i in range(20)]
METHODS = [
    "single_final",
    "single_exits",
    "two_stage",
    "joint",
    "joint_mha",
    "gradient_equilibrium",
    "alternating",
    "past_future",
    "badge",
    "badge_lte",
]
GRID: dict[str, Any] = {
    "title": "A tiny grid",
    "note": "Too small to say anything.",
    "epochs": 1,
    "batch_size": 8,
    "tasks": {"pairs": {"data": "pairs", "metric": "acc_and_f1", "max_train": 24, "max_length": 16}},
    "backbones": {"tiny": {"folder": "tiny", "blocks": 2, "pooling": "mean"}},
    "search": {"adapter_lr": {"full": [1e-3, 1e-2]}, "backbone_lr": {"full": [5e-5, 1e-4]}, "max_train": 8},
    "groups": [
        {
            "name": "table-1",
            "tasks": ["pairs"],
            "backbones": ["tiny"],
            "modes": ["full"],
            "methods": METHODS,
            "seeds": [0],
        },
        {
            "name": "variants",
            "tasks": ["pairs"],
            "backbones": ["tiny"],
            "modes": ["frozen"],
            "methods": ["joint", "badge"],
            "seeds": [0, 1],
            "variants": [
                {},
                {"placement": "ffn"},
                {"placement": "mhsa"},
                {"r": 4},
                {"r": 16},
                {"exit_0": True},
                {"carry": "logits"},
            ],
            "round": 1,
        },
        {
            "name": "lora",
            "tasks": ["pairs"],
            "backbones": ["tiny"],
            "modes": ["lora"],
            "methods": ["badge", {"badge": {"bias": True}}],
            "seeds": [0],
        },
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, a model, a grid and the store of one finished `run`."""
    folder = tmp_path_factory.mktemp("paper")
    _write_data(folder / "data" / "pairs")
    _write_model(folder / "models" / "tiny")
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    assert paper.main(_arguments("run", folder)) == 0
    yield folder


def _arguments(command: str, folder: Path, *more: str) -> list[str]:
    where = ["--data-dir", str(folder / "data"), "--model-dir", str(folder / "models")]
    where = where if command == "run" else []
    return [command, str(folder / "grid.yaml"), "--out", str(folder / "runs"), *where, *more]


def _write_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for split, rows in (("train", 32), ("validation", 12), ("test", 12)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(rows):
                first, second = (" ".join(rng.choices(WORDS[:10] if i % 2 else WORDS[10:], k=4)) for _ in range(2))
                file.write(json.dumps({"text": first, "text_pair": second, "label": i % 2}) + "\n")


def _write_model(folder: Path) -> None:
    torch.manual_seed(0)
    pieces = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "cls", "sep", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)


def _settings(place: Path) -> Any:
    return load_settings(place / "grid.yaml")


def test_every_method_is_run_and_stored(place: Path) -> None:
    settings, store = _settings(place), Store(place / "runs")
    records, missing = gather(settings, store)
    assert not missing
    full = ("pairs", "tiny", "full")
    for row in TABLE_1:
        assert list(method_scores(records, full, row, "best")) == [0], row
    for record in records:
        for split, rows in (("validation", 12), ("test", 12)):
            logits = store.logits(record.settled, split)
            assert len(logits) == rows
            assert logits.exits == record.result["scores"][split]["exits"]
        assert record.result["data"]["rows"]["train"] == 24
        assert "torch" in record.result["environment"] and "badge_peft commit" in record.result["environment"]
        assert record.result["seconds"]["total"] > 0
    exits = {tuple(r.result["scores"]["test"]["exits"]) for r in records}
    assert exits == {(1, 2), (0, 1, 2), (1,), (2,)}  # all, with exit 0, and the single ones
    lte = next(r for r in records if r.method == "badge_lte")
    assert store.logits(lte.settled, "test").uncertainty is not None


def test_rates_come_from_the_search(place: Path) -> None:
    settings, store = _settings(place), Store(place / "runs")
    sources = {run.settings["mode"]: choose(settings, run, store)[1] for run in plan(settings)}
    assert sources == {"full": "search", "frozen": "default", "lora": "default"}
    # two adapter rates and one more backbone rate, for each of the eight methods that have a search of their own
    assert len(list((place / "runs" / "trials").iterdir())) == 3 * 8
    for folder in (place / "runs" / "trials").iterdir():
        stored = json.loads((folder / "run.json").read_text())
        assert set(stored["scores"]) == {"validation"}


def test_what_is_stored_is_not_run_again(place: Path) -> None:
    settings, store = _settings(place), Store(place / "runs")
    runs = plan(settings)
    victim, _ = choose(settings, runs[3], store)
    before = store.read(victim)
    (store.folder(victim) / "run.json").unlink()
    (store.folder(victim) / "test.safetensors").unlink()
    (store.folder(victim) / "validation.safetensors").unlink()
    store.folder(victim).rmdir()
    assert paper.main(_arguments("run", place, "--threads", "1")) == 0
    after = store.read(victim)
    assert before is not None and after is not None
    assert after["scores"] == before["scores"]  # the same settings give the same result
    trained: list[str] = []
    Loop(settings, store, lambda run: trained.append(run["method"]) or {}).go(runs)  # type: ignore[func-returns-value]
    assert trained == []


def test_runs_of_a_frozen_task_share_one_pass(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, store = _settings(place), Store(place / "runs")
    passes: list[int] = []

    def counted(model: Any, rows: Any, **options: Any) -> Any:
        passes.append(len(rows))
        return cache_states(model, rows, **options)

    monkeypatch.setattr("paper_grid.states.cache_states", counted)
    workshop = Workshop(settings, Store(tmp_path), str(place / "data"), str(place / "models"))
    frozen = [run for run in plan(settings) if run.settings["mode"] == "frozen" and run.settings["seed"] == 0]
    for run in frozen:
        shared: list[dict[str, Any]] = [{}, {"carry": "logits"}, {"r": 4}]
        shared += [{"exit_0": True}] if run.settings["method"] == "badge" else []
        if run.settings["variant"] in shared:
            settled, _ = choose(settings, run, store)
            scores = workshop.run(settled)["scores"]
            assert run.settings["method"] == "joint" or scores == (store.read(settled) or {})["scores"], run.label
    assert passes == [24, 12, 12] * 2  # what exits without a bypass read, and those with one
    passes.clear()
    for run in reversed(frozen):
        if run.settings["variant"] == {}:
            workshop.run(choose(settings, run, store)[0])
    assert passes == []


def test_a_failure_does_not_stop_the_others(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = _settings(place)
    seen: list[str] = []

    def train(run: dict[str, Any]) -> dict[str, Any]:
        seen.append(run["method"])
        raise RuntimeError("no")

    loop = Loop(settings, Store(tmp_path), train)
    loop.go([run for run in plan(settings) if run.settings["mode"] == "frozen"][:3])
    assert len(seen) == 3
    assert len(loop.failed) == 3
    assert "FAILED" in capsys.readouterr().err


def test_a_run_that_another_process_is_at_is_left_to_it(place: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    run, _ = choose(_settings(place), plan(_settings(place))[0], store)
    with store.claim(run) as first, store.claim(run) as second:
        assert (first, second) == (True, False)
    with store.claim(run) as again:
        assert again


def test_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = place / "docs" / "paper.md"
    assert paper.main(_arguments("report", place, "--docs", str(docs))) == 0
    text = docs.read_text()
    for title in ("2ST", "GradEquil", "ALT", "GPF", "JT + MHA exit", "single final exit", "**BADGE**"):
        assert title in text
    for heading in ("Table 1", "Table 2", "Table 3", "Table 6", "Figure 2", "Exit 0", "Learning rates", "Data"):
        assert f"## {heading}" in text
    assert text.startswith("# A tiny grid\n\nToo small to say anything.\n\n")
    assert "Nothing: every run of the grid is stored." in text
    assert "70.2 / 77.9" in text  # the paper's own, beside ours
    assert "nan" not in text
    assert str(place) not in text
    pictures = list((place / "docs" / "paper").glob("*.png"))
    assert {p.name for p in pictures} >= {
        "pairs-tiny-full.png",
        "pairs-tiny-frozen.png",
        "pairs-tiny-frozen-exit0.png",
    }


def test_report_of_a_part(place: Path, tmp_path: Path) -> None:
    settings, store = _settings(place), Store(place / "runs")
    for run in plan(settings)[:6]:
        settled, _ = choose(settings, run, store)
        target = tmp_path / store.folder(settled).relative_to(store.root)
        target.mkdir(parents=True)
        for file in store.folder(settled).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    (tmp_path / "trials").symlink_to(store.root / "trials")
    options = ["--out", str(tmp_path), "--docs", str(tmp_path / "paper.md")]
    assert paper.main(["report", str(place / "grid.yaml"), *options]) == 0
    text = (tmp_path / "paper.md").read_text()
    assert "runs are not stored" in text and "pairs/tiny/frozen/badge" in text
    with pytest.raises(ValueError, match="start with the command `run`"):
        paper.main(["report", str(place / "grid.yaml"), "--out", str(tmp_path / "none"), "--docs", options[-1]])


def test_dry_run_starts_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(_arguments("run", place, "--dry-run", "--only", "full/badge")) == 0
    out = capsys.readouterr().out
    assert "done  pairs/tiny/full/badge/plain/s0 (search rates)" in out
    assert "0 to do" in out
    with pytest.raises(SystemExit, match="matches no run"):
        paper.main(_arguments("run", place, "--only", "no-such-run"))


def test_plan_has_no_run_twice_and_its_keys_are_stable(place: Path) -> None:
    runs = plan(_settings(place))
    keys = [key_of(run.settings) for run in runs]
    assert len(set(keys)) == len(keys)
    labels = [run.label for run in runs]
    assert len(set(labels)) == len(labels)
    assert "pairs/tiny/frozen/badge/r=16/s0" not in labels  # 16 is the grid's own
    assert "pairs/tiny/frozen/joint/r=4/s0" not in labels  # JT has no bottleneck
    assert Run("g", runs[0].settings).matches("pairs/*/s0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "has no field epoch"),
        ({"groups": [{**GRID["groups"][0], "methods": ["sudden"]}]}, "'sudden' is not defined"),
        ({"groups": [{**GRID["groups"][0], "tasks": ["rte"]}]}, "'rte' is not defined"),
        ({"backbones": {"tiny": {"blocks": 2}}}, "exactly one of package, folder and hub"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **change}))
    with pytest.raises(ValueError, match=message):
        load_settings(path)


def test_the_grids_that_are_shipped_can_be_read() -> None:
    every = {"badge", "joint", "alternating", "past_future", "two_stage"}
    some = {
        "paper_trained.yaml": {"past_future", "two_stage"},
        "paper_lora.yaml": every - {"badge", "joint"},
        "paper_e5.yaml": every - {"badge", "joint"},
    }
    for name in ("paper.yaml", "paper_small.yaml", "paper_full.yaml", *some):
        found = {run.settings["method"] for run in plan(load_settings(BENCHMARKS / name))}
        assert found >= every - some.get(name, set())


def test_statistics() -> None:
    pair = paired({0: 2.0, 1: 4.0, 2: 3.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0})
    assert pair is not None and pair.mean == 2.0
    low, high = pair.interval or (0.0, 0.0)
    assert (round(low, 3), round(high, 3)) == (-0.484, 4.484)  # 2 -+ 4.303 * 1 / sqrt(3)
    assert "not settled" in pair.verdict()
    assert pair.verdict(-1).startswith("does **not** hold")
    assert Paired([1.0, 1.1, 0.9]).verdict() == "holds"
    assert Paired([-1.0, -1.1, -0.9]).verdict().startswith("does **not** hold: the opposite")
    assert Paired([-1.0]).verdict().startswith("**not** the same direction")
    assert Paired([1.0]).interval is None
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert summary({0: 1.0, 1: 5.0, 2: 2.0}) == "2.0 (1.0-5.0)"


def test_methods_with_fields_of_their_own_and_the_order_of_tasks(place: Path) -> None:
    labels = [run.label for run in plan(_settings(place))]
    assert "pairs/tiny/lora/badge/bias=True/s0" in labels
    settings = _settings(place)
    settings.tasks["again"] = settings.tasks["pairs"]
    group = settings.groups[1]
    group.tasks, group.methods, group.variants = ["pairs", "again"], ["joint"], [{}]
    settings.groups = [group]
    assert [run.label[-2:] + run.label[:5] for run in plan(settings)] == ["s0pairs", "s1pairs", "s0again", "s1again"]
    group.round = None
    assert [run.label[-2:] + run.label[:5] for run in plan(settings)] == ["s0pairs", "s0again", "s1pairs", "s1again"]


def test_without_patience_the_last_state_counts(place: Path, tmp_path: Path) -> None:
    settings = _settings(place)
    settings.patience = None
    run, _ = choose(settings, next(r for r in plan(settings) if r.settings["mode"] == "frozen"), Store(tmp_path))
    found = Workshop(settings, Store(tmp_path), str(place / "data"), str(place / "models")).run(run)
    assert len(found["scores"]["test"]["per_exit"]) == 2


@pytest.mark.parametrize("metric", list(resampled.WEIGHTED))
def test_scores_of_resampled_rows(metric: str) -> None:
    draw = np.random.default_rng(0)
    labels = draw.normal(size=50) if metric == "pearson" else draw.integers(0, 2 if metric == "acc_and_f1" else 5, 50)
    answers = labels + draw.normal(size=50) if metric == "pearson" else np.where(draw.random(50) < 0.5, labels, 1)
    counts = np.concatenate([np.ones((1, 50), dtype=int), draw.multinomial(50, np.full(50, 1 / 50), size=20)])
    found = resampled.WEIGHTED[metric](answers, labels, counts)
    expected = [METRICS[metric](np.repeat(answers, row), np.repeat(labels, row)) for row in counts]
    assert np.allclose(found, expected)


def test_gains() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (80,), generator=draw)

    def logits(right: float) -> ExitLogits:
        sure = (torch.rand(80, 2, generator=draw) < right).float().unsqueeze(-1)
        noise = torch.rand(80, 2, 3, generator=draw)
        return ExitLogits(noise + 5 * sure * torch.nn.functional.one_hot(labels, 3).unsqueeze(1), labels)

    good, poor = ({seed: logits(right) for seed in range(3)} for right in (0.9, 0.4))
    found = resampled.gains(good, poor, "accuracy")
    assert found is not None
    by_hand = np.mean([exit_scores(good[s]).avg - exit_scores(poor[s]).avg for s in range(3)])
    assert found["avg"].mean == pytest.approx(100 * by_hand)
    assert 0 < found["avg"].low < found["avg"].mean < found["avg"].high
    same = resampled.gains(good, good, "accuracy")
    assert same is not None and (same["best"].low, same["best"].high) == (0, 0)
    assert resampled.gains(good, {7: good[0]}, "accuracy") is None


def test_headline(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GOALS, "share", {"target_blocks_saved": 0.25})  # of two blocks, 75% cannot be saved
    docs, picture = place / "docs" / "headline.md", place / "docs" / "img" / "frozen.png"
    assert paper.main([*_arguments("headline", place), "--docs", str(docs), "--picture", str(picture)]) == 0
    text = docs.read_text()
    sections = ("## Blocks saved", "## Answers", "## Targets")
    for part in ("BADGE + carry over BADGE", "paper/grid-gains.md", *sections):
        assert part in text, part
    by_task = (place / "docs" / "paper" / "grid-gains.md").read_text()
    for part in ("| JT (2) | ", "## Gains in S-best", "| BADGE over JT (2) | ", "| JT + carry over JT (2) | "):
        assert part in by_task, part
    assert "nan" not in text + by_task and str(place) not in text + by_task
    assert picture.stat().st_size > 1000
    settings, store = _settings(place), Store(place / "runs")
    records, _ = gather(settings, store)
    task = ("pairs", "tiny", "frozen")
    assert set(logits_of(records, CARRY, task, store)) == {0, 1}
    record, savings = next(r for r in records if is_of(r, PLAIN, task)), Savings(store)
    answers, saved = savings.answers(record, "share")
    rule, test = savings.rule(record, "share"), store.logits(record.settled, "test")
    expected = evaluate_policy(test, rule, record.settled["metric"])
    assert exit_scores(answers, record.settled["metric"]).best == pytest.approx(expected.score)
    assert saved == pytest.approx(expected.blocks_saved)
    assert 0 <= savings.within_drop(record)[0] < 1
    assert Savings(store).rule(record, "share") == rule  # as it was kept


def test_regrets_of_policies(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regret, "SIZES", (8,))
    monkeypatch.setattr(regret, "LEFT", 8)
    monkeypatch.setattr(regret, "SAVED", 0.25)
    docs, kept = tmp_path / "policies.md", tmp_path / "policies.json"
    more = ["--docs", str(docs), "--json", str(kept)]
    assert paper.main([*_arguments("policies", place), *more]) == 0
    entries = json.loads(kept.read_text())["entries"]
    assert {(e["task"], e["seed"], e["rows"]) for e in entries} == {("pairs", 0, 8), ("pairs", 1, 8)}
    assert {"auto", "max_prob", "divergence", "agreement"} <= set(entries[0]["policies"])
    found = regret.regrets(entries, 8)
    singles = [name for name in found if name != "auto"]
    best = max(found[name] for name in singles)
    assert best == 0 and found["auto"] == pytest.approx(
        np.mean([e["policies"]["auto"]["score"] for e in entries])
        - max(np.mean([e["policies"][name]["score"] for e in entries]) for name in singles)
    )
    assert "| `auto` |" in docs.read_text()
