"""What saving and PEFT's functions on state dicts write and give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_base_model_state_dict, set_base_model_state_dict
from safetensors.torch import load_file

from tests.models import exits_of, make_badge, make_batch, make_model, shake, trained
from tests.peft_verbs.table import ARCHITECTURES, save

FILE = "adapter_model.safetensors"
CARD = "README.md"


def embeddings(folder: Path) -> list[str]:
    return [name for name in load_file(folder / FILE) if name.endswith("word_embeddings.weight")]


def test_the_card_is_made_and_updated(tmp_path: Path) -> None:
    """PEFT updates its metadata and leaves our text; what somebody wrote stays, too."""
    model = trained()
    folder = save(model, tmp_path, "bert")
    text = (folder / CARD).read_text()
    assert "<!-- badge_peft:start -->" in text and "library_name: peft" in text
    (folder / CARD).write_text(text + "\nWritten by somebody.\n")
    model.create_or_update_model_card(str(folder))
    updated = (folder / CARD).read_text()
    assert "<!-- badge_peft:start -->" in updated and updated.rstrip().endswith("Written by somebody.")
    (tmp_path / "new").mkdir()
    model.create_or_update_model_card(str(tmp_path / "new"))
    assert (tmp_path / "new" / CARD).exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    make_badge().save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_embeddings_are_saved_on_demand(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "without")
    model.save_pretrained(tmp_path / "with", save_embedding_layers=True)
    assert not embeddings(tmp_path / "without") and len(embeddings(tmp_path / "with")) == 1
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "with")
    assert torch.equal(exits_of(loaded, make_batch()), exits_of(model, make_batch()))


def test_a_larger_vocabulary_travels(tmp_path: Path) -> None:
    def larger(seed: int) -> Any:
        base = make_model()
        base.name_or_path = str(tmp_path / "base")  # where the smaller one is
        base.resize_token_embeddings(110, mean_resizing=False)
        shake(base, seed=seed, only="word_embeddings")
        return base

    make_model().save_pretrained(tmp_path / "base")
    model = make_badge(base=larger(1))
    batch = make_batch()
    batch["input_ids"][0, 1] = 105
    expected = exits_of(model, batch)
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(larger(1), tmp_path / "adapter")
    assert torch.equal(exits_of(loaded, batch), expected)


@pytest.mark.parametrize("case", ARCHITECTURES)
@pytest.mark.parametrize("fields", [{}, {"train_head": False}, {"backbone": "lora"}], ids=str)
def test_the_base_models_weights_under_its_own_names(case: str, fields: dict[str, Any]) -> None:
    model = trained(case, **fields)
    base, given = make_model(case).state_dict(), get_base_model_state_dict(model)
    assert given.keys() == base.keys() and all(torch.equal(given[name], value) for name, value in base.items())
    before = exits_of(model, make_batch())
    other = make_model(case, seed=5).state_dict()
    assert not any(set_base_model_state_dict(model, other))
    given = get_base_model_state_dict(model)
    assert all(torch.equal(given[name], value) for name, value in other.items())
    assert not torch.equal(exits_of(model, make_batch()), before)
    set_base_model_state_dict(model, base)
    assert torch.equal(exits_of(model, make_batch()), before)
