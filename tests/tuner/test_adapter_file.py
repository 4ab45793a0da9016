"""The hash of an adapter's weights, and the config inside of their file."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from badge_peft import BadgeConfig
from badge_peft.tuner.adapter_file import CONFIG_TENSOR, config_in, config_tensor, weights_hash
from tests.models import exits_of, make_batch, make_model, shake, trained

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@given(st.integers(0, 5), st.sampled_from([torch.float16, torch.float32, torch.bfloat16]), st.integers(0, 31))
def test_one_bit_changes_the_hash(element, dtype, bit):
    tensors = {"a": torch.arange(6).to(dtype), "b": torch.zeros(())}
    changed = tensors["a"].clone()
    data = changed.view(torch.uint8)
    data[element * dtype.itemsize + bit // 8 % dtype.itemsize] ^= 1 << (bit % 8)
    assert weights_hash({**tensors, "a": changed}) != weights_hash(tensors)


def test_hash_is_of_names_types_and_shapes_in_any_order():
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(1)}
    same = {"b": torch.zeros(1), "a": torch.ones(3, 2).T, CONFIG_TENSOR: torch.zeros(3, dtype=torch.uint8)}
    assert weights_hash(same) == weights_hash(tensors)
    for other in ({"a": torch.ones(3, 2)}, {"a": torch.ones(2, 3).double()}, {"c": torch.zeros(1)}):
        assert weights_hash({**tensors, **other}) != weights_hash(tensors)


@pytest.mark.parametrize("fields", [{}, {"backbone": "full"}, {"backbone": "lora", "train_head": False}], ids=str)
def test_model_file_and_config_have_one_hash(fields, tmp_path):
    model = trained(**fields)
    model.save_pretrained(tmp_path)
    found = weights_hash(load_file(tmp_path / FILE))
    assert found == json.loads((tmp_path / CONFIG).read_text())["weights_hash"]
    assert found == weights_hash(get_peft_model_state_dict(model))
    assert found == weights_hash(get_peft_model_state_dict(PeftModel.from_pretrained(make_model(), tmp_path)))


def test_what_was_measured_on_an_older_past_future_adapter_stays_its_own(tmp_path):
    """Its first exit had a layer that nothing reads: part of the hash that its calibration was recorded with."""
    model = trained(
        exit_type="past_future", final_exit="exit", early_exit={"threshold": 0.3, "calibration": {"rows": 9}}
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    second = {name: value for name, value in tensors.items() if ".2.imitate." in name}
    assert len(second) == 2
    for name, value in second.items():
        tensors[name.replace(".1.badge_exit.2.", ".0.badge_exit.1.")] = value.clone()
    config = json.loads((tmp_path / CONFIG).read_text())
    config["weights_hash"] = config["early_exit"]["calibration"]["weights_hash"] = old = weights_hash(tensors)
    save_file(tensors, tmp_path / FILE)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert loaded.base_model.weights_hash() == old
    assert not any(".1.imitate." in name for name, _ in loaded.named_parameters())  # which would get no gradient
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert again["weights_hash"] == again["early_exit"]["calibration"]["weights_hash"] == old
    batch = make_batch()
    assert exits_of(loaded.eval(), batch).equal(exits_of(model.eval(), batch))


def test_config_inside_of_the_weights(tmp_path):
    model = trained(placement="ffn", early_exit={"threshold": 0.3})
    model.save_pretrained(tmp_path)
    inside = config_in(load_file(tmp_path / FILE))
    beside = json.loads((tmp_path / CONFIG).read_text())
    assert inside == {**beside, "weights_hash": None, "base_model_name_or_path": None}
    for tensor in (torch.zeros(3), torch.tensor([91, 93], dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8)):
        assert config_in({CONFIG_TENSOR: tensor}) is None
    assert config_in({}) is None
    assert config_in({CONFIG_TENSOR: config_tensor({"r": 3})}) == {"r": 3}


def test_saving_that_ends_between_weights_and_config(tmp_path, monkeypatch):
    old, new = trained(placement="block"), trained(placement="ffn", early_exit={"threshold": 0.3})
    shake(new, seed=9)
    old.save_pretrained(tmp_path)

    def ends(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(BadgeConfig, "save_pretrained", ends)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="belongs to other weights"):
        loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    batch = make_batch()
    assert torch.equal(exits_of(loaded, batch), exits_of(new, batch))
    assert loaded.get_early_exit_config().threshold == 0.3
    loaded.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*belongs to other weights")
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_weights_of_another_save_are_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    other = load_file(tmp_path / FILE)
    del other[CONFIG_TENSOR]  # as versions before this one wrote it
    other = {name: value + 1 for name, value in other.items()}
    save_file(other, tmp_path / FILE)
    with pytest.raises(ValueError, match="set weights_hash to null"):
        PeftModel.from_pretrained(make_model(), tmp_path)
