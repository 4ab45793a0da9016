"""Where a base model's weights may be (accelerate's hooks on a whole model: table.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig, load_pretrained
from tests.models import exits_of, make_batch, make_model, trained
from tests.peft_verbs.table import save


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto", {"bert": "cpu", "classifier": "cpu"}], ids=str)
def test_device_maps(device_map: object, tmp_path: Path) -> None:
    model = trained()
    expected = exits_of(model, make_batch())
    folder = save(model, tmp_path, "bert")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", device_map=device_map)
    assert torch.equal(exits_of(PeftModel.from_pretrained(base, folder), make_batch()), expected)
    assert torch.equal(exits_of(load_pretrained(str(folder), device_map=device_map), make_batch()), expected)


def test_a_base_on_disk_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    model = trained()
    expected = exits_of(model, make_batch())
    folder = save(model, tmp_path, "bert")
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    names = [name for name, _ in base.named_parameters()]
    message = r"puts bert\.encoder on 'disk'.*device_map='cpu'.*disk_offload"
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, BadgeConfig())
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert [name for name, _ in base.named_parameters()] == names
    loaded = load_pretrained(str(folder), device_map="cpu")
    disk_offload(loaded, str(tmp_path / "again"), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in loaded.parameters())
    assert torch.equal(exits_of(loaded, make_batch()), expected)


def test_a_model_without_weights_takes_an_adapter() -> None:
    """To count parameters, say: nothing is computed."""
    with torch.device("meta"):
        model = get_peft_model(make_model(), BadgeConfig())
    assert model.get_nb_trainable_parameters()[0] > 0 and all(p.is_meta for p in model.parameters())
