"""What PEFT says about a model, and which of its weights are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.helpers import check_if_peft_model
from safetensors.torch import load_file

from badge_peft import BadgeConfig
from tests.models import blocks_of, exits_of, make_badge, make_batch, make_labels, make_model, shake
from tests.peft_verbs.table import ARCHITECTURES, CONFIGS

MODES = ("frozen", "lora", "full")


def trained_names(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CONFIGS)
def test_status(name: str) -> None:
    model = make_badge(**CONFIGS[name])
    status = model.get_model_status()
    assert status == get_model_status(model)
    assert (status.adapter_model_type, status.peft_types) == ("BadgeModel", {"default": "BADGE"})
    assert status.enabled and status.active_adapters == status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.total_params == sum(p.numel() for p in model.parameters())
    layers = model.get_layer_status()
    assert layers == get_layer_status(model)
    assert sum(layer.module_type == "badge.BadgeBlock" for layer in layers) == len(blocks_of(model))
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_trainable_parameters_are_printed(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_badge(case)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) < total
    model.print_trainable_parameters()
    said = capsys.readouterr().out
    assert said.startswith(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: ")


@pytest.mark.parametrize("name", CONFIGS)
def test_inference_mode(name: str, tmp_path: Path) -> None:
    """Nothing is trained, until the adapter is made the active one to train."""
    expected = trained_names(make_badge(**CONFIGS[name]))
    model = get_peft_model(make_model(), BadgeConfig(r=4, inference_mode=True, **CONFIGS[name]))
    assert not trained_names(model) and model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter("default")
    assert trained_names(model) == expected
    model.set_adapter("default", inference_mode=True)
    assert not trained_names(model)
    model.save_pretrained(tmp_path)
    assert not trained_names(PeftModel.from_pretrained(make_model(), tmp_path))
    assert trained_names(PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)) == expected


@pytest.mark.parametrize("backbone", MODES)
def test_gradients_are_switched_off_and_on(backbone: str) -> None:
    model = make_badge(backbone=backbone)
    before = trained_names(model)
    model.set_requires_grad("default", False)
    assert not trained_names(model)
    model.set_requires_grad(["default"], True)
    assert trained_names(model) == before


@pytest.mark.parametrize("backbone", MODES[:2])
def test_a_second_adapter_that_is_loaded_to_train(backbone: str, tmp_path: Path) -> None:
    make_badge(backbone=backbone).save_pretrained(tmp_path)
    model = make_badge(backbone=backbone)
    first = trained_names(model)
    model.load_adapter(tmp_path, "second", is_trainable=True)
    second = {name.replace(".default.", ".second.") for name in first}
    assert trained_names(model) == first | second
    model.set_adapter("second")
    assert trained_names(model) == second


def test_low_cpu_mem_usage_of_a_new_adapter() -> None:
    """A placeholder until its weights are loaded, as everywhere in PEFT."""
    model = make_badge()
    before = exits_of(model, make_batch())
    model.add_adapter("second", BadgeConfig(r=2), low_cpu_mem_usage=True)
    meta = {name for name, p in model.named_parameters() if p.is_meta}
    assert meta and all(".second." in name for name in meta)
    assert torch.equal(exits_of(model, make_batch()), before)


# ---- modules_to_save


EXTRA = {"bert": "pooler", "roberta": "word_embeddings", "distilbert": "pre_classifier", "albert": "pooler"}


@pytest.mark.parametrize("case", EXTRA)
def test_modules_to_save(case: str, tmp_path: Path) -> None:
    """More modules are trained, saved, switched and taken away with the adapter that has them."""
    extra = EXTRA[case]
    model = make_badge(case, modules_to_save=[extra])
    model.add_adapter("plain", BadgeConfig(r=2, train_head=False))
    trained = {name for name in trained_names(model) if f".{extra}.modules_to_save.default." in name}
    assert trained
    model.train()(**make_batch(), labels=make_labels()).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)
    shake(model.eval(), only=".modules_to_save.")
    expected = exits_of(model, make_batch())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert any(f".{extra}." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(make_model(case), tmp_path)
    assert torch.equal(exits_of(loaded, make_batch()), expected)
    model.set_adapter("plain")
    with torch.no_grad():
        assert torch.equal(model(**make_batch()).logits, make_model(case)(**make_batch()).logits)
    model.delete_adapter("default")
    assert not [name for name, _ in model.named_parameters() if ".default" in name]


def test_peft_recognises_the_folder(tmp_path: Path) -> None:
    make_badge().save_pretrained(tmp_path)
    assert check_if_peft_model(str(tmp_path)) is True
