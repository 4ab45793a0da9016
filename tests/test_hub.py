"""`load_pretrained`: base and adapter in one call, from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig, load_pretrained
from tests.models import make_batch, make_model

RULE = {"policy": "divergence", "threshold": 0.7, "patience": 2}


def save(folder: Path, named: bool = True, **fields: Any) -> PeftModel:
    """A base model in `folder/base` and an adapter for it in `folder/adapter`; the model that was saved."""
    make_model().save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    model = get_peft_model(base, BadgeConfig(task_type="SEQ_CLS", early_exit=RULE, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".badge_" in name or ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter))
    if not named:
        model.peft_config["default"].base_model_name_or_path = None
        base.__dict__["name_or_path"] = ""
    model.save_pretrained(str(folder / "adapter"))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, PeftModel]:
    return str(tmp_path / "adapter"), save(tmp_path)


def exits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch()).exit_logits


def test_it_loads_the_base_that_the_adapter_names(saved: tuple[str, PeftModel]) -> None:
    path, before = saved
    model = load_pretrained(path)
    assert torch.equal(exits(model), exits(before))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_is_ready_to_exit_early(saved: tuple[str, PeftModel]) -> None:
    path, before = saved
    out, expected = (m.early_exit_forward(**make_batch()) for m in (load_pretrained(path), before))
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.exit_layer, expected.exit_layer)
    assert load_pretrained(path).get_early_exit_config().threshold == 0.7


@pytest.mark.parametrize("loaded", [True, False])
def test_a_base_of_ones_own(saved: tuple[str, PeftModel], tmp_path: Path, loaded: bool) -> None:
    path, before = saved
    moved = tmp_path / "elsewhere"
    (tmp_path / "base").rename(moved)
    base = AutoModelForSequenceClassification.from_pretrained(moved) if loaded else str(moved)
    assert torch.equal(exits(load_pretrained(path, base_model=base)), exits(before))


def test_a_head_that_no_exit_reads_may_have_any_size(tmp_path: Path) -> None:
    make_model(num_labels=2).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, BadgeConfig(final_exit="exit", exit_pooling="mean"))
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = load_pretrained(str(tmp_path / "adapter"))
    assert exits(loaded).shape[-1] == 5
    assert torch.equal(exits(loaded), exits(model.eval()))


def test_for_more_training_and_under_another_name(saved: tuple[str, PeftModel]) -> None:
    model = load_pretrained(saved[0], is_trainable=True, adapter_name="film")
    assert list(model.peft_config) == ["film"]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".film." in name for name in trainable)


def test_options_reach_the_base_model(saved: tuple[str, PeftModel]) -> None:
    model = load_pretrained(saved[0], dtype=torch.bfloat16)
    assert model.base_model.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_pretrained(str(tmp_path))


def test_an_adapter_of_another_kind(tmp_path: Path) -> None:
    model = get_peft_model(make_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="LORA adapter, not a BADGE one"):
        load_pretrained(str(tmp_path))


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    save(tmp_path, named=False)
    with pytest.raises(ValueError, match="does not name its base model: pass base_model"):
        load_pretrained(str(tmp_path / "adapter"))


def test_another_base_is_refused(saved: tuple[str, PeftModel]) -> None:
    with pytest.raises(ValueError, match="another backbone"):
        load_pretrained(saved[0], base_model=make_model(seed=1))
