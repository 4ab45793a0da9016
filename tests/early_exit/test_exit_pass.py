"""Where a pass ends, and what of a model's own ways it has to keep to: hooks, chunks, devices, inputs without rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from badge_peft import BadgeConfig
from badge_peft.early_exit.calls import MixedCall
from tests.models import CASES, blocks_of, exits_of, make_badge, make_batch, make_model, one_of_each_kind, shake

PARTS = ["pooler", "classifier", "encoder"]


def outside(model, part):
    """A module of the base model outside of its blocks."""
    base = model.base_model.model
    return base.classifier if part == "classifier" else base.bert.get_submodule(part)


@pytest.mark.parametrize("part", PARTS)
def test_nothing_behind_the_last_answer_runs(part):
    model = make_badge(train_head=False)
    model.early_exit_forward(**make_batch(), policy="fixed_depth", depth=1)
    ran = []
    outside(model, part).register_forward_pre_hook(lambda *_: ran.append(part))
    out = model.early_exit_forward(**make_batch(), policy="fixed_depth", depth=1)
    assert out.exit_layer.tolist() == [1] * 4 and ran == (["encoder"] if part == "encoder" else [])


@pytest.mark.parametrize("part", PARTS)
def test_a_hook_sees_what_the_model_computes(part):
    model, seen = make_badge(train_head=False), []
    plain = exits_of(model, make_batch())[:, 0]
    handle = outside(model, part).register_forward_hook(lambda module, args, output: seen.append(output))
    out = model.early_exit_forward(**make_batch(), policy="fixed_depth", depth=1)
    assert len(seen) == 1 and out.exit_layer.tolist() == [1] * 4
    torch.testing.assert_close(out.logits, plain)
    handle.remove()
    model.early_exit_forward(**make_batch(), policy="fixed_depth", depth=1)
    assert len(seen) == 1


def test_what_transformers_records_is_recorded_to_the_end():
    model, ran = make_badge(train_head=False), []
    model.base_model.model.config.output_hidden_states = True
    outside(model, "classifier").register_forward_pre_hook(lambda *_: ran.append(1))
    model.early_exit_forward(**make_batch(), policy="fixed_depth", depth=1)
    assert ran == [1]


WAYS: dict[str, dict[str, Any]] = {
    "one adapter": {},
    "an adapter for each row": {"adapter_names": ["default", "other", "__base__", "other"]},
    "tasks": {"tasks": ["other", "default"]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", one_of_each_kind(CASES))
@pytest.mark.parametrize("rule", [{"policy": "fixed_depth", "depth": 1}, {"policy": "entropy", "threshold": 0.6}])
def test_a_pass_that_ends_answers_as_one_that_walks_on(case, way, rule):
    model = make_badge(case)
    model.add_adapter("other", BadgeConfig(r=4, placement="ffn", num_labels=5, exit_layers=[1]))
    shake(model, seed=5)
    ended = model.early_exit_forward(**make_batch(), **WAYS[way], **rule)
    with_hook = outside(model, "classifier").register_forward_hook(lambda *_: None)
    walked = model.early_exit_forward(**make_batch(), **WAYS[way], **rule)
    with_hook.remove()
    for found, want in zip(ended.values(), walked.values(), strict=True) if way == "tasks" else [(ended, walked)]:
        assert found.keys() == want.keys()
        for name in found:
            assert torch.equal(found[name], want[name]), name
            assert found[name].dtype is want[name].dtype


def test_answers_have_one_precision_whether_the_head_is_read_or_not():
    model = make_badge(train_head=False)
    model.base_model.model.classifier.double()
    model.base_model.model.classifier.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    found = {model.early_exit_forward(**make_batch(), policy="fixed_depth", depth=m).logits.dtype for m in (1, 3)}
    assert found == {torch.float64}


@pytest.mark.parametrize("chunk", [2, 4])
@pytest.mark.parametrize("placement", ["block", "mhsa"])
def test_rows_are_cut_to_what_the_blocks_can_part_into_chunks(chunk, placement):
    model = make_badge(base=make_model(chunk_size_feed_forward=chunk), placement=placement)
    whole = make_badge(base=make_model(), placement=placement)
    for seed in range(20):  # until the first row, which is the longest, is the surest at exit 1
        batch = make_batch(5, 8, seed)
        batch["attention_mask"][1:, 5:] = 0  # 5 is no multiple
        sure = exits_of(whole, batch)[:, 0].softmax(-1).amax(-1)
        if sure[0] > sure[1:].max() + 0.01:
            break
    rule = {"policy": "max_prob", "threshold": [float(sure[0]) - 0.005, 1.0, 1.0]}
    found, want = (each.early_exit_forward(**batch, **rule) for each in (model, whole))
    assert found.exit_layer.tolist() == want.exit_layer.tolist() == [1, 3, 3, 3, 3]
    torch.testing.assert_close(found.logits, want.logits, rtol=1e-4, atol=1e-4)


def test_a_block_on_another_device_than_the_one_before():
    """Accelerate moves the input inside of the wrapped block, so the pass has it where the block before was."""
    model = make_badge(final_exit="exit", exit_layers=[2, 3])
    for block in blocks_of(model)[1:]:
        block.to("meta")
    inside = [block.base_layer for block in blocks_of(model)[1:]]
    for module in (*inside, outside(model, "pooler"), outside(model, "classifier")):
        module.to("meta")
        add_hook_to_module(module, AlignDevicesHook(execution_device="meta"))
    with torch.no_grad():
        logits = model(**make_batch()).exit_logits
    assert logits.device.type == "meta" and logits.shape == (4, 2, 3)


def test_inputs_without_rows_keep_their_order():
    names, rows = ["b", "a", "b", "a"], 4
    inputs = {"input_ids": torch.arange(8).view(rows, 2), "head_mask": torch.arange(12).view(4, 3)}
    inputs["cache_position"] = torch.arange(4)
    found = MixedCall(names).sort(inputs)
    assert found["input_ids"].tolist() == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert torch.equal(found["head_mask"], inputs["head_mask"])
    assert torch.equal(found["cache_position"], inputs["cache_position"])
