"""Base models in int8, and decoders in 4 bits, where torchao or bitsandbytes is installed (both run on a CPU)."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TorchAoConfig

from badge_peft import BadgeConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.tuner.preconditions import is_quantized
from tests.decoders import make_decoder
from tests.early_exit.rules import with_threshold
from tests.models import exits_of, make_badge, make_batch, make_labels, make_model, shake, trained
from tests.peft_verbs.table import CONFIGS

BATCH = make_batch()
SMALL = {"initializer_range": 0.1}  # small weights, so that rounding stays small


def torchao(skip: list[str]) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skip)


def torchao_dynamic(skip: list[str]) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=skip)


def bitsandbytes(skip: list[str]) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    return BitsAndBytesConfig(llm_int8_skip_modules=skip, load_in_8bit=True)


def four_bits(skip: list[str]) -> Any:
    bitsandbytes(skip)
    return BitsAndBytesConfig(llm_int8_skip_modules=skip, load_in_4bit=True, bnb_4bit_quant_type="nf4")


WAYS = [torchao, torchao_dynamic, bitsandbytes]


def quantized(path: Path, way: Any, skip: tuple[str, ...] = ("classifier",)) -> Any:
    config = way(list(skip))
    if not (path / "base").exists():
        make_model(**SMALL).save_pretrained(path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        path / "base", quantization_config=config, device_map={"": "cpu"}
    ).eval()
    assert sum(is_quantized(p) for p in base.parameters()) >= 18  # six in each of three blocks
    return base


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("full")])
def test_an_adapter_of_the_full_precision_serves(way: Any, name: str, tmp_path: Path) -> None:
    base = quantized(tmp_path, way)
    model = trained(base=make_model(**SMALL), **CONFIGS[name])
    expected = exits_of(model, BATCH)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        own = base(**BATCH).logits
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    found = exits_of(loaded, BATCH)
    assert (found - expected).abs().max() < 0.1 * expected.std()
    out = loaded.early_exit_forward(**BATCH, policy="never")
    torch.testing.assert_close(out.logits, found[:, -1])
    with loaded.disable_adapter(), torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, own)


# torchao's rounding of activations has no gradient, so nothing under the last block's output can be trained with it.
TRAINED = [(way, name) for way in WAYS for name in ("block", "mhsa", "lora")]
TRAINED.remove((torchao_dynamic, "lora"))


@pytest.mark.parametrize(("way", "name"), TRAINED)
def test_an_adapter_is_trained_saved_and_copied(way: Any, name: str, tmp_path: Path) -> None:
    model = get_peft_model(quantized(tmp_path, way), BadgeConfig(**CONFIGS[name]))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    for _ in range(2):  # the first step moves W_up alone, which starts at zero
        optimizer.zero_grad()
        labels = make_labels(num_labels=model.peft_config["default"].resolved_labels)
        model.train()(**BATCH, labels=labels).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable.values())
    expected = exits_of(model.eval(), BATCH)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantized(tmp_path, way), tmp_path / "adapter")
    assert torch.equal(exits_of(again, BATCH), expected)
    assert torch.equal(exits_of(copy.deepcopy(model), BATCH), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # PEFT calls it
@pytest.mark.parametrize("way", WAYS)
def test_prepared_by_peft(way: Any, tmp_path: Path) -> None:
    base = prepare_model_for_kbit_training(
        quantized(tmp_path, way), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = make_badge(base=base).train()
    model(**BATCH, labels=make_labels()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"'classifier' cannot be trained on this model: classifier.weight is quantized.*train_head=False"),
        ({"backbone": "full"}, r"backbone='full' is not allowed.*quantized.*backbone='frozen' or 'lora'"),
        ({"modules_to_save": ["pooler"], "train_head": False}, r"'pooler' cannot be trained"),
    ],
    ids=str,
)
def test_what_is_quantized_cannot_be_trained(way: Any, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = quantized(tmp_path, way, skip=("none",))
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, BadgeConfig(**fields))
    assert list(base.state_dict()) == names
    model = get_peft_model(base, BadgeConfig(train_head=False)).eval()  # the remedy
    assert exits_of(model, BATCH).shape == (4, 3, 3)


@pytest.mark.parametrize("way", [*WAYS, four_bits])
def test_a_decoder(way: Any, tmp_path: Path) -> None:
    """Full depth bit for bit, and live is replay."""
    wide = make_decoder("llama", hidden_size=64, intermediate_size=64, head_dim=32)  # 4 bits: blocks of 64
    wide.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", quantization_config=way(["score"]), device_map={"": "cpu"}
    ).eval()
    assert sum(is_quantized(p) for p in base.parameters()) >= 21  # seven in each of three blocks
    batch = make_batch(5, 9)
    with torch.no_grad():
        own = base(**batch).logits
    model = get_peft_model(base, BadgeConfig(task_type="SEQ_CLS", r=4, train_head=False)).eval()
    shake(model)
    logits = exits_of(model, batch)
    assert torch.equal(logits[:, -1], own)
    rule = with_threshold({"policy": "max_prob"}, logits, [1, 2, 3], 0.5)
    out = model.early_exit_forward(**batch, **rule)
    assert torch.equal(build_policy(rule).replay(logits), out.exit_layer)
    assert len(out.exit_layer.unique()) > 1
