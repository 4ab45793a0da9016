"""`OnnxEngine`: a file answers as its adapter does at every setting that a call can bring, and refuses others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("pydantic", reason="the extra `serve` is not installed")

from badge_peft import load_pretrained  # noqa: E402
from badge_peft.early_exit.config import EarlyExitConfig  # noqa: E402
from badge_peft.early_exit.policies import POLICIES, build_policy  # noqa: E402
from badge_peft.export import export_onnx, export_tasks_onnx  # noqa: E402
from badge_peft.serving.engine import Engine  # noqa: E402
from badge_peft.serving.fixed_policy import FixedPolicy
from badge_peft.serving.onnx_engine import OnnxEngine  # noqa: E402
from badge_peft.serving.requests import RequestError  # noqa: E402
from badge_peft.serving.settings import MAIN  # noqa: E402
from tests.serving.adapters import close, save_adapter  # noqa: E402
from tests.texts import make_tokenizer, sentences  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_translation")
TEXTS = [text for text, _ in sentences(12, seed=5)]
ROWS = [*((text, None) for text in TEXTS[:9]), (TEXTS[9], TEXTS[10]), (TEXTS[11], TEXTS[0])]
SINGLE = "single_label_classification"
RULE = EarlyExitConfig(policy="entropy", threshold=0.6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def engines(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("file")
    export_onnx(load_pretrained(str(folder)), place, tokenizer=make_tokenizer(), early_exit_config=RULE)
    return OnnxEngine(str(place), threads=1, batch_size=4), Engine(str(folder), batch_size=4)


def test_a_file_answers_as_the_adapter_whatever_the_threshold(engines):
    file, adapter = engines
    assert file.configs == {MAIN: RULE} and file.problems == adapter.problems and file.labels == adapter.labels
    found = []
    for threshold in (0.0, 0.3, 0.6, 0.66, 0.68, 0.69, 0.7):
        config = replace(RULE, threshold=threshold)
        file.checks()(MAIN, config)
        found.append(file.predict(ROWS, {MAIN: config}))
        assert close(found[-1], adapter.predict(ROWS, {MAIN: config}))
    assert found[0] != found[-1]


def test_a_row_in_int8_is_answered_as_alone(folder, tmp_path):
    model, tokenizer = load_pretrained(str(folder)), make_tokenizer()
    export_onnx(model, tmp_path, tokenizer=tokenizer, early_exit_config=RULE, int8=True)
    file = OnnxEngine(str(tmp_path), threads=1, batch_size=8)
    alone = [file.predict([row], file.configs)[0] for row in ROWS]
    assert file.predict(ROWS, file.configs) == alone
    said = file.shadow(MAIN, [row for row in ROWS if row[1] is None], file.configs[MAIN])
    assert said["exit_layer"] == [
        answer["exit_layer"] for answer, row in zip(alone, ROWS, strict=True) if row[1] is None
    ]


def test_a_file_goes_to_full_depth(engines):
    file, adapter = engines
    never = {MAIN: EarlyExitConfig(policy="never")}
    assert close(file.predict(ROWS, never), adapter.predict(ROWS, never))


def test_shadow_rows_are_those_of_the_adapter(engines):
    file, adapter = engines
    rows = ROWS[:5]
    found, expected = (engine.shadow(MAIN, rows, replace(RULE, threshold=0.68)) for engine in engines)
    assert found["exit_layer"] == expected["exit_layer"] and found["config"] == expected["config"]
    torch.testing.assert_close(
        torch.tensor(found["full_logits"]), torch.tensor(expected["full_logits"]), atol=1e-4, rtol=0
    )


def test_what_is_fixed_in_the_file_is_refused(engines):
    file, _ = engines
    for other, message in (
        (EarlyExitConfig(policy="max_prob"), "policy='max_prob' is not allowed: it is fixed in the file as 'entropy'"),
        (replace(RULE, max_exit=1), "max_exit=1 is not allowed"),
        (replace(RULE, threshold=[0.1, 0.2]), "takes one number"),
    ):
        with pytest.raises(ValueError, match=message):
            file.checks()(MAIN, other)
    with pytest.raises(RequestError, match="max_exit is fixed"):
        file.predict(ROWS, file.configs, None, 1)
    with pytest.raises(RequestError, match="does not rank"):
        file.rerank("q", ["a"], None, RULE)


@pytest.mark.parametrize(
    "name", [name for name, policy in POLICIES.items() if not policy.needs_fit and not policy.by_group]
)
def test_the_numbers_of_full_depth_stop_no_row_whatever_the_policy(name):
    own = EarlyExitConfig(policy=name, **({"depth": 2} if POLICIES[name].takes_depth else {}))
    rule = FixedPolicy(own, 3, SINGLE, 4, 0)
    never = EarlyExitConfig(policy="never")
    if name == "fixed_depth":
        with pytest.raises(ValueError, match="cannot be sent to full depth"):
            rule.inputs(never)
        return
    threshold, patience = rule.inputs(never)
    moved = EarlyExitConfig.of(own, **({} if threshold is None else {"threshold": threshold}), patience=patience)
    logits = 9 * torch.randn(200, 4, 3, generator=torch.Generator().manual_seed(0))
    doubts = torch.rand(200, 4, generator=torch.Generator().manual_seed(1))
    stops = build_policy(moved).replay(logits.round(), uncertainty=doubts)
    assert stops.tolist() == [4] * 200


def test_a_file_that_ends_early_has_no_full_depth():
    rule = FixedPolicy(EarlyExitConfig(max_exit=3), 3, SINGLE, 4, 0)
    with pytest.raises(ValueError, match="cannot be sent to full depth"):
        rule.inputs(EarlyExitConfig(policy="never"))


def test_many_tasks_in_one_file(folder, tmp_path):
    places = {"one": str(folder), "two": str(folder)}
    configs = {"one": {"policy": "entropy", "threshold": 0.5}, "two": {"policy": "divergence", "patience": 1}}
    model = load_pretrained(places)
    export_tasks_onnx(model, tmp_path, tokenizer=make_tokenizer(), early_exit_config=configs)
    file, adapters = OnnxEngine(str(tmp_path), batch_size=4), Engine(places, batch_size=4)
    assert file.tasks == ["one", "two"] and set(file.exits) == {"one", "two"}
    for own in (file.configs, {**file.configs, "one": EarlyExitConfig(policy="entropy", threshold=0.68)}):
        found, expected = (engine.predict(ROWS, own, ("one", "two")) for engine in (file, adapters))
        for task in file.tasks:
            assert close([answer[task] for answer in found], [answer[task] for answer in expected])
    assert [set(answer) for answer in file.predict(ROWS, file.configs, ("two",))] == [{"two"}] * len(ROWS)
    alone = file.predict(ROWS[:4], file.configs, ("two",))
    said = file.shadow("two", ROWS[:4], file.configs["two"])
    assert said["exit_layer"] == [answer["two"]["exit_layer"] for answer in alone]


def test_a_file_that_ranks(tmp_path):
    adapter = save_adapter(tmp_path, num_labels=1, num_hidden_layers=2)
    rule = {"policy": "top_k", "top_k": 2, "parameters": {"margins": [0.0, None]}}
    export_onnx(load_pretrained(str(adapter)), tmp_path / "file", tokenizer=make_tokenizer(), early_exit_config=rule)
    file = OnnxEngine(str(tmp_path / "file"))
    assert file.ranks
    full, exits = file.rerank(TEXTS[0], TEXTS[1:7], 6, file.configs[MAIN])
    assert exits == [2] * 6
    assert len(full) == 6 and [i["score"] for i in full] == sorted((i["score"] for i in full), reverse=True)
    best, exits = file.rerank(TEXTS[0], TEXTS[1:7], 2, file.configs[MAIN])
    assert len(best) == 2 and sorted(exits) == [1, 1, 1, 1, 2, 2]
    assert file.rerank(TEXTS[0], TEXTS[1:7], None, file.configs[MAIN]) == (best, exits)
    with pytest.raises(RequestError, match="query"):
        file.rerank("", ["a"], None, file.configs[MAIN])
    with pytest.raises(RequestError, match="use /rerank"):
        file.predict(ROWS[:1], file.configs)
