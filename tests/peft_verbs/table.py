"""PEFT's verbs as a table: each takes a model and gives one that must answer as the first, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from badge_peft import BadgeConfig, load_pretrained
from tests.models import make_model

EARLY = {"policy": "max_prob", "threshold": 0.6, "calibration": {"score": 0.5}}

# One of each kind: several blocks, a shared block, no pooler, mixed states of rows, pre-LN.
ARCHITECTURES = ("bert", "roberta", "albert", "distilbert", "deberta-v2", "electra", "modernbert-cls")

CONFIGS: dict[str, dict[str, Any]] = {
    "block": {},
    "ffn": {"placement": "ffn", "bias": True},
    "mhsa": {"placement": "mhsa", "exit_type": "mha", "final_exit": "exit", "num_labels": 5},
    "none": {"placement": "none", "exit_type": "pooled", "train_head": False},
    "few exits": {"exit_layers": [0, 2], "exit_pooling": "mean"},
    "past_future": {"exit_type": "past_future", "final_exit": "exit"},
    "carry": {"carry": "logits", "exit_layers": [0, 2], "final_exit": "exit"},
    "learn_to_exit": {"learn_to_exit": True},
    "lora": {"backbone": "lora"},
    "full": {"backbone": "full"},
    "full, own exit": {"backbone": "full", "final_exit": "exit"},
}


def save(model: Any, path: Path, case: str = "", **kwargs: Any) -> Path:
    """Saves the adapter and, with a `case`, the base model that it names."""
    if case:
        make_model(case).save_pretrained(path / "base")
        model.peft_config["default"].base_model_name_or_path = str(path / "base")
    model.save_pretrained(path / "adapter", **kwargs)
    return path / "adapter"


def from_pretrained(model: Any, case: str, path: Path, **kwargs: Any) -> Any:
    return PeftModel.from_pretrained(make_model(case), save(model, path), **kwargs)


def another_name(model: Any, case: str, path: Path) -> Any:
    loaded = from_pretrained(model, case, path, adapter_name="other")
    assert loaded.active_adapter == "other" and list(loaded.peft_config) == ["other"]
    return loaded


def is_trainable(model: Any, case: str, path: Path) -> Any:
    return from_pretrained(model, case, path, is_trainable=True)


def low_cpu_mem_usage(model: Any, case: str, path: Path) -> Any:
    loaded = from_pretrained(model, case, path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    return loaded


def config_of_ones_own(model: Any, case: str, path: Path) -> Any:
    config = PeftConfig.from_pretrained(save(model, path))
    return PeftModel.from_pretrained(make_model(case), path / "adapter", config=config)


def subfolder(model: Any, case: str, path: Path) -> Any:
    save(model, path)
    return PeftModel.from_pretrained(make_model(case), path, subfolder="adapter")


def pickled_weights(model: Any, case: str, path: Path) -> Any:
    folder = save(model, path, safe_serialization=False)
    assert (folder / "adapter_model.bin").exists() and not (folder / "adapter_model.safetensors").exists()
    return PeftModel.from_pretrained(make_model(case), folder)


def given_state_dict(model: Any, case: str, path: Path) -> Any:
    return PeftModel.from_pretrained(make_model(case), save(model, path, state_dict=model.state_dict()))


def onto_the_same(model: Any, case: str, path: Path) -> Any:
    loaded = get_peft_model(make_model(case), BadgeConfig.from_pretrained(save(model, path)))
    loaded.load_adapter(path / "adapter", "default", is_trainable=True)
    return loaded


def beside_another(model: Any, case: str, path: Path, **kwargs: Any) -> Any:
    first = BadgeConfig(r=2, placement="none", final_exit="exit")
    loaded = get_peft_model(make_model(case), first, adapter_name="first")
    loaded.load_adapter(save(model, path), "second", **kwargs)
    assert loaded.active_adapter == "first"
    loaded.set_adapter("second")
    return loaded


def beside_another_low(model: Any, case: str, path: Path) -> Any:
    loaded = beside_another(model, case, path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    return loaded


def state_dicts(model: Any, case: str, path: Path) -> Any:
    new = get_peft_model(make_model(case), model.peft_config["default"])
    set_peft_model_state_dict(new, get_peft_model_state_dict(model))
    return new


def auto_class(model: Any, case: str, path: Path, **kwargs: Any) -> Any:
    return AutoPeftModelForSequenceClassification.from_pretrained(save(model, path, case), **kwargs)


def our_helper(model: Any, case: str, path: Path) -> Any:
    return load_pretrained(str(save(model, path, case)))


def deepcopy(model: Any, case: str, path: Path) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any, case: str, path: Path) -> Any:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: Any, case: str, path: Path) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def disabled_and_enabled(model: Any, case: str, path: Path) -> Any:
    with model.disable_adapter():
        assert not model.base_model.adapters_enabled
    return model


def unloaded_and_loaded(model: Any, case: str, path: Path) -> Any:
    folder = save(model, path)
    return PeftModel.from_pretrained(model.unload(), folder)


def offloaded_to_cpu(model: Any, case: str, path: Path) -> Any:
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    return model


def offloaded_to_disk(model: Any, case: str, path: Path) -> Any:
    disk_offload(model, str(path), execution_device=torch.device("cpu"))
    return model


Verb = Callable[[Any, str, Path], Any]

VERBS: list[Verb] = [
    from_pretrained,
    another_name,
    is_trainable,
    low_cpu_mem_usage,
    config_of_ones_own,
    subfolder,
    pickled_weights,
    given_state_dict,
    onto_the_same,
    beside_another,
    beside_another_low,
    state_dicts,
    auto_class,
    our_helper,
    deepcopy,
    pickled,
    torch_saved,
    disabled_and_enabled,
    unloaded_and_loaded,
    offloaded_to_cpu,
    offloaded_to_disk,
]

# One of each sort: what they do to backbones and kinds of adapters differs.
REPRESENTATIVES: list[Verb] = [
    from_pretrained,
    low_cpu_mem_usage,
    beside_another,
    state_dicts,
    deepcopy,
    unloaded_and_loaded,
    offloaded_to_cpu,
]

# Weights that were never copied lie where the file put them, and kernels for another alignment may round otherwise.
LOW = (low_cpu_mem_usage, beside_another_low)

# DeBERTa-v2 reads the weight of its relative positions without a call of their module, which accelerate needs.
OFFLOADED = (offloaded_to_cpu, offloaded_to_disk)

# Those that need room for a second adapter, which backbone="full" does not leave.
SECOND = (beside_another, beside_another_low)
