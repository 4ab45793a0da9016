"""`Engine` and batches: each request gets what the pipeline answers to it alone."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="the extra `serve` is not installed")

from badge_peft import pipeline  # noqa: E402
from badge_peft.early_exit.config import EarlyExitConfig  # noqa: E402
from badge_peft.serving import ExitMonitor  # noqa: E402
from badge_peft.serving.base_engine import labeled  # noqa: E402
from badge_peft.serving.batching import Work, answer_together  # noqa: E402
from badge_peft.serving.engine import Engine  # noqa: E402
from badge_peft.serving.requests import RequestError  # noqa: E402
from badge_peft.serving.settings import MAIN  # noqa: E402
from tests.serving.adapters import NAMES, close, save_adapter  # noqa: E402
from tests.texts import sentences  # noqa: E402

TEXTS = [text for text, _ in sentences(12, seed=5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(str(folder), threads=1, batch_size=4)


def test_each_request_of_a_batch_gets_the_pipelines_answers(engine, folder):
    works = [
        Work([(text, None) for text in TEXTS[:5]]),
        Work([(TEXTS[5], TEXTS[6])]),
        Work([(TEXTS[7], None)], None, 1),
    ]
    results = answer_together(engine, works, engine.configs)
    alone = pipeline(model=str(folder))
    assert close(results[0], alone(TEXTS[:5]), 1e-5)
    assert close(results[1], [alone({"text": TEXTS[5], "text_pair": TEXTS[6]})], 1e-5)
    assert close(results[2], alone([TEXTS[7]], max_exit=1), 1e-5)
    assert results[2][0]["exit_layer"] <= 1


def test_a_client_can_have_the_scores_of_all_labels(engine, folder):
    works = [Work([(text, None) for text in TEXTS[:3]], all_scores=True), Work([(TEXTS[3], None)])]
    asked, other = answer_together(engine, works, engine.configs)
    assert "scores" not in other[0]
    for answer, expected in zip(asked, pipeline(model=str(folder))(TEXTS[:3], top_k=None), strict=True):
        assert answer["scores"] == pytest.approx({one["label"]: one["score"] for one in expected}, abs=1e-5)
        assert answer["scores"][answer["label"]] == answer["score"] == max(answer["scores"].values())


def test_an_adapter_of_pairs_answers_no_single_text(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pairs")
    config = tmp_path / "pairs" / "adapter_config.json"
    columns = {"text": "question", "text_pair": "answer", "label": None}
    config.write_text(json.dumps({**json.loads(config.read_text()), "data_columns": columns}))
    engine = Engine(str(tmp_path / "pairs"), threads=1)
    works = [Work([(TEXTS[0], TEXTS[1])]), Work([(TEXTS[0], None)])]
    pair, one = answer_together(engine, works, engine.configs)
    assert pair[0]["label"] in NAMES.values() and one.status == 400 and "trained on pairs" in str(one)


def test_a_group_that_fails_leaves_the_others(engine):
    works = [Work([(TEXTS[0], None)], None, 0), Work([(TEXTS[1], None)])]
    refused, other = answer_together(engine, works, engine.configs)
    assert isinstance(refused, RequestError) and refused.status == 400
    assert "the first exit is at block 1" in refused.message and len(other) == 1


@pytest.mark.parametrize("own", [None, 2])
def test_a_bound_that_the_model_does_not_have_is_refused_whatever_the_setting(engine, own):
    configs = {MAIN: EarlyExitConfig.of(engine.configs[MAIN], max_exit=own)}
    with pytest.raises(RequestError, match="max_exit=99"):
        engine.predict([(TEXTS[0], None)], configs, max_exit=99)
    never = {MAIN: EarlyExitConfig(policy="never", max_exit=own)}
    for bound in (1, 3):
        (found,) = engine.predict([(TEXTS[0], None)], never, max_exit=bound)
        assert found["exit_layer"] == min(bound, own or 3)


def test_one_request_that_fails_fails_alone(engine, monkeypatch):
    whole = engine.predict

    def predict(rows, *more):
        if ("bad", None) in rows:
            raise RuntimeError("of the tokenizer")
        return whole(rows, *more)

    monkeypatch.setattr(engine, "predict", predict)
    works = [Work([(text, None)]) for text in (TEXTS[0], "bad", TEXTS[1])]
    results = answer_together(engine, works, engine.configs)
    assert isinstance(results[1], RuntimeError)
    for i in (0, 2):
        assert close(results[i], whole(works[i].rows, engine.configs), 1e-5)


def test_the_setting_of_the_call_counts(engine):
    rows = [(text, None) for text in TEXTS]
    for depth in (1, 3):
        found = engine.predict(rows, {MAIN: EarlyExitConfig(policy="fixed_depth", depth=depth)})
        assert {answer["exit_layer"] for answer in found} == {depth}


def test_shadow_runs_are_what_the_monitor_takes(engine):
    config = engine.configs[MAIN]
    monitor = ExitMonitor.for_adapter(config)
    found = engine.shadow(MAIN, [(text, None) for text in TEXTS], config)
    monitor.observe(EarlyExitConfig.of(found["config"]), found["exit_layer"], found["logits"], found["full_logits"])
    assert monitor.rows == len(TEXTS)
    exits = [answer["exit_layer"] for answer in engine.predict([(text, None) for text in TEXTS], engine.configs)]
    assert found["exit_layer"] == exits


def test_a_setting_that_does_not_suit_is_refused(engine):
    with pytest.raises(ValueError, match="depth=9"):
        engine.checks()(MAIN, EarlyExitConfig(policy="fixed_depth", depth=9))
    with pytest.raises(ValueError, match="learn_to_exit"):  # or each request would fail
        pickle.loads(pickle.dumps(engine.checks()))(MAIN, EarlyExitConfig(policy="learned"))


def test_many_tasks(folder):
    engine = Engine({"one": str(folder), "two": str(folder)}, batch_size=4)
    rows = [(text, None) for text in TEXTS[:3]]
    both = engine.predict(rows, engine.configs, ("one", "two"))
    assert [set(answer) for answer in both] == [{"one", "two"}] * 3
    assert close([a["two"] for a in both], [a["two"] for a in engine.predict(rows, engine.configs, ("two",))], 1e-5)
    assert engine.shadow("two", rows, engine.configs["two"])["exit_layer"] == [a["two"]["exit_layer"] for a in both]


def test_rerank(tmp_path, engine):
    ranks = Engine(str(save_adapter(tmp_path, num_labels=1)))
    found, exits = ranks.rerank(TEXTS[0], TEXTS[1:6], 3, ranks.configs[MAIN])
    assert exits == [3] * 5  # not calibrated: full depth
    scores = [item["score"] for item in found]
    assert len(found) == 3 and scores == sorted(scores, reverse=True)
    assert {item["index"] for item in found} <= set(range(5))
    with pytest.raises(RequestError, match="several outputs"):
        engine.rerank("q", ["a"], None, engine.configs[MAIN])
    with pytest.raises(RequestError, match="query"):
        ranks.rerank("", ["a"], None, ranks.configs[MAIN])
    rule = EarlyExitConfig(policy="top_k", top_k=1, parameters={"margins": [0.0, 0.0, None]})
    ranks.badge.set_early_exit_config(rule)
    best, exits = ranks.rerank(TEXTS[0], TEXTS[1:6], 1, rule)
    assert len(best) == 1 and exits[best[0]["index"]] == max(exits) == 3 and min(exits) == 1
    named_none, exits = ranks.rerank(TEXTS[0], TEXTS[1:6], None, rule)  # the calibrated k, and candidates leave
    assert named_none == best and min(exits) == 1
    for bound in (1, 2):  # of the setting, not of the adapter
        assert max(ranks.rerank(TEXTS[0], TEXTS[1:6], 1, EarlyExitConfig.of(rule, max_exit=bound))[1]) == bound
    with pytest.raises(RequestError, match="use /rerank"):  # rows of other requests would compete
        ranks.predict([(text, None) for text in TEXTS[:2]], {MAIN: rule})


def test_texts_are_cut_at_what_the_model_reads_where_the_tokenizer_knows_no_limit(tmp_path):
    folder = save_adapter(tmp_path)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 10**30}))
    without = Engine(str(folder))
    assert len(without.predict([("film " * 500, None)], without.configs)) == 1


def test_numbers_that_json_does_not_have_are_none():
    answers = labeled(
        np.array([[np.nan, 0.0], [0.0, np.inf], [0.0, 1.0]]), [1, 1, 1], NAMES, "single_label_classification"
    )
    assert [answer["score"] is None for answer in answers] == [True, True, False]
    assert labeled(np.array([[np.inf]]), [1], ["value"], "regression")[0]["score"] is None
