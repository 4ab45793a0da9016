"""`early_exit_forward(tasks=...)`: many tasks on every row in one pass, each as in a call of its own adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from badge_peft import BadgeConfig, EarlyExitConfig, EarlyExitOutput, MultiTaskOutput
from badge_peft.compile import compile_blocks
from badge_peft.early_exit.calls import config_of_each
from tests.models import CASES, blocks_of, make_badge, make_batch, make_model, shake

from .rules import RULES, watched_blocks, watched_exits, with_threshold
from .test_adapter_names import ADAPTERS, LENGTH, ROWS, make

NAMES = tuple(ADAPTERS)


def alone(model: Any, batch: dict[str, Tensor], name: str, **rule: Any) -> EarlyExitOutput:
    """A call with one adapter."""
    active = model.active_adapter
    model.set_adapter(name)
    try:
        return model.early_exit_forward(**batch, **rule)
    finally:
        model.set_adapter(active)


def check(model: Any, batch: dict[str, Tensor], names: Any, **rule: Any) -> MultiTaskOutput:
    """One pass gives each task what a call of its adapter gives."""
    out = model.early_exit_forward(**batch, tasks=list(names), **rule)
    assert isinstance(out, MultiTaskOutput) and list(out) == list(names) and len(out) == len(names)
    for name in names:
        want = alone(model, batch, name, **rule)
        assert out[name].exit_layer.tolist() == want.exit_layer.tolist(), name
        assert out[name].logits.dtype == want.logits.dtype
        torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)
        assert not out[name].non_finite.any() and out[name].num_labels is None
    deepest = torch.stack([out[name].exit_layer for name in names]).max(dim=0).values
    assert out.blocks_run.tolist() == deepest.tolist()
    return out


@pytest.fixture(scope="module")
def model() -> Any:
    """With all kinds of adapters; nobody may change it."""
    return make()


# ---------------------------------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("side", ["right", "left"])
def test_adapters_of_all_kinds_on_the_same_rows(model: Any, side: str) -> None:
    out = check(model, make_batch(ROWS, LENGTH, side=side), NAMES)
    assert len(set(out.blocks_run.tolist())) > 1 or len({tuple(x.exit_layer.tolist()) for x in out.values()}) > 2


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_backbone(case: str) -> None:
    check(make(case, ("default", "wide", "stock", "doubts")), make_batch(ROWS, LENGTH), ["stock", "wide", "default"])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_policy(model: Any, rule: dict[str, Any]) -> None:
    names = ["doubts"] if rule.get("policy") == "learned" else ["default", "stock", "doubts"]
    batch, configs = make_batch(ROWS, LENGTH), {}
    for name in names:
        model.set_adapter(name)
        with torch.no_grad():
            out = model(**batch)
        exits = model.exit_layers()
        own = {**rule, "depth": exits[1]} if "depth" in rule else rule
        configs[name] = with_threshold(own, out.exit_logits, exits, 0.5, out.exit_uncertainty)
    model.set_adapter("default")
    out = model.early_exit_forward(**batch, tasks=names, early_exit_config=configs)
    for name in names:
        want = alone(model, batch, name, early_exit_config=configs[name])
        assert out[name].exit_layer.tolist() == want.exit_layer.tolist()
        torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(data=st.data())
def test_any_tasks_any_batch(data: Any) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    batch = make_batch(ROWS, LENGTH, side=data.draw(st.sampled_from(["right", "left"])))
    rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS))
    check(_SHARED[0], {key: value[rows] for key, value in batch.items()}, names)


_SHARED: list[Any] = []


@pytest.fixture(autouse=True)
def _share(model: Any) -> None:
    _SHARED[:] = [model]


def test_a_row_leaves_with_its_last_task(model: Any) -> None:
    rules = {name: {"policy": "fixed_depth", "depth": depth} for name, depth in (("few", 2), ("tags", 1), ("wide", 3))}
    with watched_blocks(model) as seen:
        out = model.early_exit_forward(**make_batch(ROWS, LENGTH), tasks=list(rules), early_exit_config=rules)
    assert [rows for rows, _ in seen] == [ROWS] * 3 and out.blocks_run.tolist() == [3] * ROWS


def test_exits_that_no_task_asks_for_are_not_computed(model: Any) -> None:
    rules = {"tags": {"policy": "fixed_depth", "depth": 2}, "wide": {"policy": "patience", "patience": 1}}
    with watched_exits(model) as computed:
        out = model.early_exit_forward(**make_batch(1, LENGTH), tasks=list(rules), early_exit_config=rules)
    deepest = int(out["wide"].exit_layer)
    assert sorted(computed) == [("tags", 2), *(("wide", m) for m in range(1, deepest + 1))]


def test_without_a_mask_and_with_inputs_that_all_rows_share(model: Any) -> None:
    batch = make_batch(ROWS, LENGTH)
    check(model, {"input_ids": batch["input_ids"]}, NAMES)
    check(model, {**batch, "position_ids": torch.arange(LENGTH).flip(0)[None]}, NAMES)


def test_compiled_blocks() -> None:
    names = ["default", "wide", "stock", "doubts"]
    model, batch = make(names=tuple(names)), make_batch(ROWS, LENGTH)
    plain = model.early_exit_forward(**batch, tasks=names)
    compile_blocks(model, buckets=[8, 16], backend="eager")
    compiled = model.early_exit_forward(**batch, tasks=names)
    for name in names:
        assert compiled[name].exit_layer.tolist() == plain[name].exit_layer.tolist()
        torch.testing.assert_close(compiled[name].logits, plain[name].logits, rtol=1e-4, atol=1e-4)


def test_logits_that_are_not_finite() -> None:
    model = make(names=("default", "wide"))
    with torch.no_grad():
        blocks_of(model)[0].badge_exit["wide"]["1"].linear.bias.fill_(torch.nan)
    with pytest.warns(UserWarning, match="3 of 3 rows had logits that are NaN"):
        out = model.early_exit_forward(**make_batch(3, LENGTH), tasks=["default", "wide"])
    assert out["wide"].non_finite.all() and not out["default"].non_finite.any()


# -------------------------------------------------------------------------------------------- the model's own head


@pytest.mark.parametrize("case", sorted(CASES))
def test_heads_with_labels_of_their_own(case: str) -> None:
    """Beside other tasks, an adapter that trains the head may have another number of labels."""
    model = make_badge(case, adapter_name="first", train_head=False)
    for seed, (name, labels) in enumerate({"more": 7, "fewer": 2, "same": 3}.items()):
        model.add_adapter(name, BadgeConfig(r=4, num_labels=labels))
        shake(model, seed=seed, only=f".{name}.")
    model.eval()
    batch, names = make_batch(5, LENGTH), ["more", "first", "fewer", "same"]
    out = check(model, batch, names, policy="never")
    assert [out[name].logits.shape[1] for name in names] == [7, 3, 2, 3]
    mixed = model.early_exit_forward(**batch, adapter_names=[*names, "more"], policy="never")
    for i, name in enumerate([*names, "more"]):
        torch.testing.assert_close(mixed.logits[i, : mixed.num_labels[i]], out[name].logits[i], rtol=1e-4, atol=1e-4)


def test_a_head_with_labels_of_its_own_is_trained_saved_and_loaded(tmp_path: Any) -> None:
    model = make_badge(adapter_name="first")
    model.add_adapter("second", BadgeConfig(r=4, num_labels=5, label_names=list("abcde")))
    shake(model, only=".second.")
    model.set_adapter("second")
    loss = model(**make_batch(), labels=torch.tensor([4, 0, 3, 1])).loss
    loss.backward()
    head = model.get_base_model().classifier.modules_to_save["second"]
    assert head.weight.shape[0] == 5 and head.weight.grad is not None
    model.eval()
    want = model.early_exit_forward(**make_batch(), policy="never")
    model.save_pretrained(str(tmp_path))
    again = make_badge(adapter_name="first")
    again.load_adapter(str(tmp_path / "second"), "second")
    again.eval()
    found = again.early_exit_forward(**make_batch(), tasks=["first", "second"], policy="never")
    assert torch.equal(found["second"].logits, want.logits)
    assert again.base_model.label_names("second") == list("abcde")
    assert again.base_model.label_names("first") == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with pytest.raises(ValueError, match="num_labels=5, but the model's head has 3"):
        make_badge(base=make_model(), num_labels=5)  # alone it has the model's


# --------------------------------------------------------------------------------------------------- which rule counts


def test_one_config_for_all_or_one_for_each() -> None:
    rule, other = {"policy": "never"}, EarlyExitConfig(policy="fixed_depth", depth=1)
    assert config_of_each(None, ["a", "b"]) == {"a": None, "b": None}
    assert config_of_each(rule, ["a", "b"]) == {"a": rule, "b": rule}
    assert config_of_each(other, ["a", "b"]) == {"a": other, "b": other}
    assert config_of_each({"b": other}, ["a", "b"]) == {"a": None, "b": other}
    assert config_of_each({"threshold": None}, ["a"]) == {"a": {"threshold": None}}
    with pytest.raises(ValueError, match="'c', which is no task of this call; they are 'a', 'b'"):
        config_of_each({"a": rule, "c": other}, ["a", "b"])


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], r"tasks must be a list with the names of adapters, got \[\]: the model has 'default', 'wide'"),
        ("default", "tasks must be a list with the names of adapters, got 'default'"),
        ([None], "tasks must be a list"),
        (["default", "wide", "default"], "tasks has 'default' more than once: name each adapter once"),
        (["default", "other"], "no adapter 'other'; the model has 'default', 'wide'"),
        (["__base__"], "no adapter '__base__'"),
    ],
)
def test_tasks_that_do_not_fit(model: Any, tasks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.early_exit_forward(**make_batch(ROWS, LENGTH), tasks=tasks)


def test_tasks_or_adapter_names(model: Any) -> None:
    with pytest.raises(ValueError, match="adapter_names has one adapter for each row, tasks has them all.*give one"):
        model.early_exit_forward(**make_batch(2, LENGTH), tasks=["wide"], adapter_names=["wide"] * 2)


def test_adapters_that_change_what_others_pass_through() -> None:
    model = make(names=("default", "wide"))
    model.add_adapter("own", BadgeConfig(r=4, backbone="lora"))
    batch = make_batch(ROWS, LENGTH)
    with pytest.raises(ValueError, match="'own' has backbone='lora'.*tasks takes adapters with backbone='frozen'"):
        model.early_exit_forward(**batch, tasks=["wide", "own"])
    check(model, batch, ["default", "wide"])
    model.set_adapter("own")
    with pytest.raises(ValueError, match="active adapter 'own' has backbone='lora'.*set_adapter with"):
        model.early_exit_forward(**batch, tasks=["wide"])
