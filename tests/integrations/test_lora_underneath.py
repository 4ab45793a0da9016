"""A model that has been fine-tuned with PEFT's LoRA: merged it is a model like any other, live it is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig, load_pretrained
from tests.models import CASES, blocks_of, crossed, exits_of, make_badge, make_batch, make_model, shake

BATCH = make_batch()
CLASSIC = transformers.__version__.startswith("4.")  # 5.24 asks for a PEFT that is not out yet
TARGETS = {"distilbert": ["q_lin", "v_lin"], "mpnet": ["attn.q", "attn.v"], "deberta-v2": ["query_proj", "value_proj"]}


def lora(case="bert", **fields):
    targets = ["Wqkv"] if case.startswith("modernbert") else TARGETS.get(case, ["query", "value"])
    return LoraConfig(**{"task_type": "SEQ_CLS", "r": 2, "target_modules": targets, **fields})


def trained_lora(case="bert", **fields):
    """A PeftModel with a LoRA, and a head of its own, as if trained."""
    model = get_peft_model(make_model(case), lora(case, **fields))
    for part in ("lora_", "modules_to_save"):
        shake(model, only=part)
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model(**BATCH).logits


# ------------------------------------------------------------------------------------------------------------ merged


@pytest.mark.parametrize(("case", "backbone"), crossed(CASES, ["frozen", "lora"]))
def test_a_merged_lora_is_part_of_the_model(case, backbone, tmp_path):
    """What a refusal of the live one recommends."""
    before = logits_of(trained_lora(case))
    merged = trained_lora(case).merge_and_unload().eval()
    expected = logits_of(merged)
    torch.testing.assert_close(expected, before, rtol=1e-4, atol=1e-4)
    model = make_badge(case, merged, train_head=False, backbone=backbone)
    exits = exits_of(model, BATCH)
    assert torch.equal(exits[:, -1], expected)
    answer = model.early_exit_forward(**BATCH, policy="fixed_depth", depth=2)
    torch.testing.assert_close(answer.logits, exits[:, 1], rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".lora_" in key for key in keys) == (backbone == "lora")
    again = PeftModel.from_pretrained(trained_lora(case).merge_and_unload().eval(), tmp_path)
    assert torch.equal(exits_of(again, BATCH), exits)


def test_the_saved_merged_model_and_the_adapter_come_back_in_one_call(tmp_path):
    merged = trained_lora().merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    model = make_badge(base=base)
    model.save_pretrained(tmp_path / "exits")
    assert torch.equal(exits_of(load_pretrained(str(tmp_path / "exits")), BATCH), exits_of(model, BATCH))


@pytest.mark.parametrize("train_head", [False, True])
def test_the_base_without_the_lora_is_noticed(train_head, tmp_path):
    make_badge(base=trained_lora().merge_and_unload(), train_head=train_head).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a LoRA had been merged into it before the exits were trained: merge it"):
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_a_lora_that_was_unloaded_has_left_nothing():
    base = trained_lora().unload().eval()
    expected = logits_of(base)
    model = make_badge(base=base, adapter_name="exits", train_head=False)
    assert torch.equal(exits_of(model, BATCH)[:, -1], expected)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


# -------------------------------------------------------------------------------------------------------------- live


def injected(**fields):
    model = make_model()
    inject_adapter_in_model(lora(**fields), model)
    shake(model, only="lora_")
    return model.eval()


def loaded_by(auto, **fields):
    def build(tmp_path):
        make_model().save_pretrained(tmp_path / "base")
        model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), lora())
        model.save_pretrained(tmp_path / "lora")
        return auto.from_pretrained(tmp_path / "lora", **fields)

    return build


def added_by_transformers(tmp_path):
    model = make_model()
    model.add_adapter(lora())
    return model


def stale(tmp_path):
    model = make_model()
    model.peft_config = {"old": lora()}
    return model


only_4 = pytest.mark.skipif(not CLASSIC, reason="transformers 5.24 refuses the newest PEFT there is")
MERGE = r"`model = model.merge_and_unload\(\)`.*backbone='lora'"
LIVE = {
    "peft-model": (
        lambda tmp: trained_lora(),
        "a PeftModelForSequenceClassification with the adapter 'default' .*MERGE",
    ),
    "peft-model-head-only": (lambda tmp: trained_lora(modules_to_save=["pooler"]), r"'default' \(LORA\): .*MERGE"),
    "tuner": (lambda tmp: trained_lora().base_model, r"a LoraModel with the adapter 'default' \(LORA\): .*MERGE"),
    "base-of-it": (
        lambda tmp: trained_lora().get_base_model(),
        r"a live peft.tuners.lora.layer.Linear of the adapter 'default' \(LORA\) at "
        r"'bert.encoder.layer.0.attention.self.query': load it as a PeftModel.*MERGE",
    ),
    "injected": (lambda tmp: injected(), r"a live .*Linear of the adapter 'default' \(LORA\) at .*MERGE"),
    "injected-outside-of-the-blocks": (
        lambda tmp: injected(target_modules=["bert.pooler.dense"]),
        r"a live .*Linear of .* at 'bert.pooler.dense': .*MERGE",
    ),
    "dora": (lambda tmp: injected(use_dora=True), r"a live .*Linear of .*MERGE"),
    "loaded-by-peft": (
        loaded_by(AutoPeftModelForSequenceClassification, num_labels=3),
        r"a PeftModelForSequenceClassification with the adapter 'default' .*MERGE",
    ),
    "loaded-by-transformers": (
        loaded_by(AutoModelForSequenceClassification),
        r"a live .*Linear of .*PeftModel.from_pretrained.*MERGE",
    ),
    "added-by-transformers": (added_by_transformers, r"a live .*Linear of .*MERGE"),
    "ia3": (
        lambda tmp: get_peft_model(
            make_model(), IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
        ),
        r"'default' \(IA3\): .*MERGE",
    ),
    "prompts": (
        lambda tmp: get_peft_model(make_model(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)),
        r"'default' \(PROMPT_TUNING\): vectors before the sequence.*model.get_base_model\(\)",
    ),
    "config-left-behind": (stale, r"no layer of the adapter 'old' \(LORA\) any more.*`del model.peft_config`"),
    "badge": (lambda tmp: make_badge(), r"already carries a BADGE adapter \('default' \(BADGE\)\): model.add_adapter"),
    "base-of-badge": (lambda tmp: make_badge().get_base_model(), "already carries a BADGE adapter .*model.unload"),
}


@pytest.mark.parametrize(
    ("kind", "backbone", "adapter_name"),
    [
        pytest.param(
            kind, backbone, ("default", "exits")[i % 2], marks=only_4 if kind.endswith("transformers") else ()
        )
        for i, kind in enumerate(kind for kind in LIVE if kind != "badge")
        for backbone in (("frozen", "lora", "full") if kind in ("peft-model", "injected") else ("frozen",))
    ],
)
def test_a_live_adapter_is_refused_and_stays_as_it_is(kind, backbone, adapter_name, tmp_path):
    build, message = LIVE[kind]
    model = build(tmp_path).eval()
    names = [(name, type(module)) for name, module in model.named_modules()]
    weights = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    configs = {name: type(config) for name, config in model.peft_config.items()}
    answers = getattr(model(**BATCH), "exit_logits", None)
    answers = logits_of(model) if answers is None else answers
    with pytest.raises(ValueError, match=message.replace("MERGE", MERGE)):
        get_peft_model(model, BadgeConfig(r=4, backbone=backbone), adapter_name=adapter_name)
    assert {name: type(config) for name, config in model.peft_config.items()} == configs
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(torch.equal(p, weights[n][0]) and p.requires_grad == weights[n][1] for n, p in after.items())
    out = model(**BATCH)
    assert torch.equal(getattr(out, "exit_logits", out.logits), answers)


def test_badge_twice_is_refused():
    model = make_badge()
    before = exits_of(model, BATCH)
    with pytest.raises(ValueError, match=LIVE["badge"][1]):
        get_peft_model(model, BadgeConfig(r=4), adapter_name="exits")
    assert list(model.peft_config) == ["default"] and torch.equal(exits_of(model, BATCH), before)
    model.add_adapter("exits", BadgeConfig(r=4))  # what the message says
    assert list(model.peft_config) == ["default", "exits"]


@pytest.mark.parametrize("kind", ["peft-model", "base-of-it", "injected"])
def test_a_saved_adapter_is_not_loaded_onto_a_live_lora(kind, tmp_path):
    make_badge().save_pretrained(tmp_path)
    model = LIVE[kind][0](tmp_path).eval()
    before = logits_of(model)
    with pytest.raises(ValueError, match=LIVE[kind][1].replace("MERGE", MERGE)):
        PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits_of(model), before) and not blocks_of(model)


def test_peft_itself_refuses_to_mix_the_two_on_one_model(tmp_path):
    make_badge().save_pretrained(tmp_path)
    model = trained_lora()
    before = logits_of(model)
    for attempt in (
        lambda: model.add_adapter("exits", BadgeConfig(r=4)),
        lambda: model.load_adapter(str(tmp_path), "exits"),
        lambda: make_badge().add_adapter("third", lora()),
    ):
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            attempt()
    assert torch.equal(logits_of(model), before) and list(model.peft_config) == ["default"]
