from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    DeiTForImageClassification,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTForImageClassification,
)

from badge_peft import ARCHITECTURES, BadgeConfig, BlockLayout
from badge_peft.tuner.architectures import block_names, get_layout, head_pooling, max_positions
from tests import reference
from tests.decoders import FAMILIES
from tests.models import CASES, VOCAB, exits_of, make_badge, make_batch, make_model


def ernie() -> PreTrainedModel:
    """A backbone that the table lacks."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "ernie", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=VOCAB
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


ERNIE = {
    "blocks": "encoder.layer",
    "attention_norm": "attention.output.LayerNorm",
    "ffn": ["intermediate", "output.dense", "output.dropout"],
    "last_norm": "output.LayerNorm",
}


def test_every_row_has_a_model_in_these_tests():
    assert {model_type for model_type, _ in CASES.values()} | {"gpt2", "opt"} == set(ARCHITECTURES)
    assert {"gpt2", "opt"} <= set(FAMILIES)


@pytest.mark.parametrize("case", [*CASES, "albert-uneven"])
def test_blocks_are_named_in_the_order_in_which_they_run(case):
    uneven = {"num_hidden_layers": 5, "num_hidden_groups": 3}
    base = make_model("albert", **uneven) if case == "albert-uneven" else make_model(case)
    names = {module: name for name, module in base.named_modules()}
    states, _ = reference.trace(base, make_batch())
    assert block_names(base, get_layout(base)) == [names[state.block] for state in states]


@pytest.mark.parametrize("case", CASES)
def test_feed_forward_part_of_the_layout_is_that_of_the_block(case):
    base = make_model(case).double()
    layout = get_layout(base)
    with torch.no_grad():
        states, _ = reference.trace(base, make_batch())
        for state in states:
            x = state.attention
            for path in layout.ffn:
                x = state.block.get_submodule(path)(x)
            torch.testing.assert_close(x + state.attention, state.ffn_sum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_head_is_all_that_is_not_the_backbone(case):
    base = make_model(case)
    outside = {n for n, _ in base.named_parameters() if not n.startswith(f"{base.base_model_prefix}.")}
    inside = {n for n, _ in base.named_parameters() if n.split(".")[0] in get_layout(base).head}
    assert outside == inside and outside


@pytest.mark.parametrize("case", CASES)
def test_pooling_is_that_of_the_models_own_head(case):
    """The gradient says which positions of H_M the head reads."""
    base = make_model(case)
    batch = make_batch()
    states, logits = reference.trace(base, batch)
    (gradient,) = torch.autograd.grad(logits.square().sum(), states[-1].output)
    read = gradient.abs().amax(dim=-1) > 0  # [B, S]
    expected = batch["attention_mask"].bool()
    if head_pooling(base, get_layout(base)) == "cls":
        expected = torch.arange(8).expand(4, 8) == 0
    assert torch.equal(read, expected)


def test_row_from_a_dict_and_the_backbone_alone():
    base = make_model("bert")
    row = {**ERNIE, "mask_arguments": ["attention_mask"]}
    assert get_layout(base) == ARCHITECTURES["bert"]
    assert get_layout(base, row) == replace(ARCHITECTURES["bert"], pooler=None)  # which the row does not name
    encoder = AutoModel.from_config(base.config)
    assert block_names(encoder, get_layout(encoder)) == [f"encoder.layer.{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "encoder.layers"}, "layers"),
        ({"attention_norm": "attention.norm"}, "norm"),
        ({"ffn": ["intermediate", "dense"]}, "dense"),
        ({"last_norm": "LayerNorm"}, "LayerNorm"),
        ({"last_norm": None, "final_norm": "norm"}, "norm"),
        ({"blocks": "encoder.layer.0.attention.self"}, r"has no len\(\)"),
    ],
)
def test_layout_that_does_not_fit(change, message):
    base = make_model("bert")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=f"does not fit BertForSequenceClassification.*{message}"):
        get_peft_model(base, BadgeConfig(block_layout={**ERNIE, **change}))
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize("pooling", ["max", None])
def test_a_pooling_that_neither_the_table_nor_the_models_config_knows(pooling):
    with pytest.raises(ValueError, match=rf"own pooling {pooling}='None' is not one of cls, mean, last: set"):
        get_peft_model(make_model("bert"), BadgeConfig(block_layout={**ERNIE, "pooling": pooling}))


def test_unknown_architecture_names_those_that_are_known_and_the_remedy():
    base = ernie()
    before = base(**make_batch()).logits
    with pytest.raises(ValueError, match=r"model_type='ernie'.*bert.*modernbert.*BlockLayout") as error:
        get_peft_model(base, BadgeConfig())
    assert all(name in str(error.value) for name in ARCHITECTURES)
    assert torch.equal(base(**make_batch()).logits, before)


@pytest.mark.parametrize("layout", [ERNIE, BlockLayout(**ERNIE)], ids=["dict", "BlockLayout"])  # type: ignore[arg-type]
def test_row_of_the_user(layout: Any, tmp_path):
    base, batch = ernie(), make_batch()
    with torch.no_grad():
        expected = base(**batch).logits
    model = make_badge(base=copy.deepcopy(base), block_layout=layout, placement="ffn")
    exits = exits_of(model, batch)
    assert exits.shape == (4, 2, 2) and torch.equal(exits[:, -1], expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(exits_of(PeftModel.from_pretrained(base, tmp_path).eval(), batch), exits)


# ---- the longest input


@pytest.mark.parametrize(("case", "wanted"), [("bert", 40), ("roberta", 38), ("modernbert-cls", None)])
def test_longest_input(case, wanted):
    """RoBERTa counts from behind the padding position, ModernBERT has no table."""
    assert max_positions(make_model(case)) == wanted


def test_longest_input_of_a_peft_model():
    assert max_positions(make_badge("bert")) == 40


@pytest.mark.parametrize("kind", [ViTForImageClassification, DeiTForImageClassification, Dinov2ForImageClassification])
def test_models_of_images_are_refused(kind: Any) -> None:
    sizes: Any = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = kind(kind.config_class(**sizes))
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="ForImageClassification reads images, and exits are put on models that read"):
        get_peft_model(model, BadgeConfig())
    assert [name for name, _ in model.named_modules()] == before
