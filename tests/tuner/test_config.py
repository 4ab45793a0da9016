from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, TaskType

from badge_peft import ARCHITECTURES, BadgeConfig, BlockLayout, EarlyExitConfig
from badge_peft.tuner.config import exit_numbers, is_badge

LAYOUT = {"blocks": "h", "attention_norm": "ln_1", "ffn": ["mlp"], "final_norm": "ln_f"}

DEFAULTS = {
    "r": 16,
    "placement": "block",
    "activation": "gelu",
    "bias": False,
    "exit_type": "linear",
    "exit_pooling": "auto",
    "exit_dropout": 0.1,
    "exit_layers": None,
    "final_exit": "base_head",
    "carry": None,
    "train_head": True,
    "learn_to_exit": False,
    "backbone": "frozen",
    "lora": None,
    "exit_weights": "uniform",
    "early_exit": None,
    "num_labels": None,
    "problem_type": None,
    "label_names": None,
    "data_columns": None,
    "block_layout": None,
}

# every field with a value that is not its default
OTHER: dict[str, Any] = {
    "r": 4,
    "placement": "ffn",
    "activation": "swish",
    "bias": True,
    "exit_type": "pooled",
    "exit_pooling": "last",
    "exit_dropout": 0.0,
    "exit_layers": [0, 2, 3],
    "final_exit": "exit",
    "carry": "logits",
    "train_head": False,
    "learn_to_exit": True,
    "backbone": "full",
    "exit_weights": [0.5, 1.0, 2.0],
    "early_exit": {"policy": "patience", "patience": 2, "min_exit": 1},
    "num_labels": 5,
    "problem_type": "multi_label_classification",
    "label_names": ["a", "b", "c", "d", "e"],
    "data_columns": {"text": "question", "text_pair": "answer", "label": None},
    "block_layout": LAYOUT,
    "modules_to_save": ["embeddings"],
}


def test_defaults():
    config = BadgeConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.task_type == TaskType.SEQ_CLS
    assert not config.inference_mode and config.modules_to_save is None


def test_the_tests_know_every_field():
    filled_in = {
        "target_modules",
        "hidden_size",
        "num_blocks",
        "base_fingerprint",
        "badge_version",
        "weights_hash",
        "source",
        "after_saving",
    }
    own = {f.name for f in fields(BadgeConfig)} - {f.name for f in fields(PeftConfig)}
    assert own == DEFAULTS.keys() | filled_in | {"exclude_modules", "modules_to_save"}
    assert OTHER.keys() == (DEFAULTS.keys() - {"lora"}) | {"modules_to_save"}
    assert all(OTHER[name] != value for name, value in DEFAULTS.items() if name in OTHER)


def test_every_field_says_what_it_is():
    inherited = {f.name for f in fields(PeftConfig)}
    for f in fields(BadgeConfig):
        assert f.name in inherited or len(f.metadata["help"]) > 10, f.name


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("r", value, "at least 1") for value in (0, -3, 2.0, "8", True, None)),
        *(("placement", value, "block, ffn, mhsa, none") for value in ("attention", "Block", None)),
        *(("activation", value, "gelu, relu, leaky_relu, silu, swish, tanh, identity") for value in ("softmax", None)),
        *(("bias", value, "True or False") for value in ("none", 1, None)),
        *(
            ("exit_type", value, "linear, pooled, shared_pooled, mha, residual_mha, past_future")
            for value in ("mlp", None)
        ),
        *(("exit_pooling", value, "auto, cls, mean, last") for value in ("max", None)),
        *(("exit_dropout", value, r"\[0, 1\)") for value in (1, 1.0, -0.1, "0.1", None, True, math.nan, math.inf)),
        *(("exit_layers", value, "distinct block numbers") for value in ([], [1, 1], [-1], [1.0], [True], "12", 3)),
        *(("final_exit", value, "base_head, exit") for value in ("head", None)),
        *(("carry", value, "None or 'logits'") for value in ("state", True, [], 1)),
        *(("train_head", value, "True or False") for value in (0, "yes", None)),
        *(("learn_to_exit", value, "True or False") for value in (1, None)),
        *(("backbone", value, "frozen, lora, full") for value in ("trained", None)),
        ("lora", {"r": 8}, "backbone='lora'"),
        *(("exit_weights", value, "uniform") for value in ("linaer", 1.0, None)),
        *(("exit_weights", value, "numbers >= 0") for value in ([], [0, 0], [1, -1], [1, "a"], [math.nan, 1], [True])),
        *(("num_labels", value, "at least 1") for value in (0, 2.5, "2", True)),
        *((name, value, "at least 1") for name in ("num_blocks", "hidden_size") for value in (0, "3")),
        *(("problem_type", value, "single_label_classification, multi_label_classification") for value in ("x", 1)),
        *(("label_names", value, "list of different strings") for value in ("ab", ("a", "b"), ["a", "a"], [0, 1])),
        *(("task_type", value, "SEQ_CLS") for value in ("QUESTION_ANS", TaskType.CAUSAL_LM)),
        ("block_layout", "bert", "a BlockLayout or a dict"),
        ("block_layout", {"blocks": "h"}, "attention_norm"),
        ("block_layout", {**LAYOUT, "layers": "h"}, "'layers'.*attention_norm"),
        *(("modules_to_save", value, "None or a list") for value in ("classifier", ("classifier",))),
        *(("modules_to_save", value, "None or a list of names") for value in ([1], [None, {}])),
        *(("target_modules", value, "leave it None") for value in (3, {"a": 1}, [0], [["a"]])),
        ("r", 10**300, "must be below 2\\*\\*31"),
        ("carry", "states", "has been removed. Use carry='logits' or None.*trained again"),
        *(("data_columns", value, "a dict from text") for value in ("text", ["text"], {"text": 3}, {3: "text"})),
        *(("base_fingerprint", value, "numbers by name") for value in ([1], {"w": 3}, {"w": ["a"]}, {"w": []}, "w")),
        *(("exclude_modules", value, "exit_layers") for value in ("encoder.layer.0", ["encoder.layer.0"])),
    ],
)
def test_wrong_value_names_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=allowed) as error:
        BadgeConfig(**{name: value})
    assert name in str(error.value)
    if name != "lora":
        assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"early_exit": "divergence"}, "EarlyExitConfig, a dict or None, got str"),
        ({"early_exit": {"tau": 0.2}}, "no field tau; its fields are policy"),
        ({"early_exit": {"patience": 0}}, "patience=0"),
        ({"early_exit": {"policy": "luck"}}, "policy='luck'"),
        ({"block_layout": {**LAYOUT, "head": "score"}}, r"head='score' is not .* a tuple of names, \('score',\)"),
        ({"task_type": "NONSENSE"}, "NONSENSE"),
        ({"label_names": ["a", "b"], "num_labels": 3}, r"label_names=\['a', 'b'\] has 2 names, but num_labels=3"),
        ({"exit_type": "past_future"}, "exit_type='past_future' needs final_exit='exit'"),
    ],
)
def test_what_is_right_on_no_model(fields, message):
    with pytest.raises(ValueError, match=message):
        BadgeConfig(**fields)


@pytest.mark.parametrize("norms", [{}, {"last_norm": "a", "final_norm": "b"}])
def test_layout_has_one_of_two_norms(norms):
    with pytest.raises(ValueError, match="either last_norm .* or final_norm"):
        BlockLayout(blocks="h", attention_norm="ln_1", ffn=("mlp",), **norms)


@pytest.mark.parametrize(
    "changed",
    [{}, *({name: value} for name, value in OTHER.items()), OTHER, {"early_exit": EarlyExitConfig(depth=3)}],
    ids=lambda changed: "-".join(changed) if len(changed) < 2 else "all",
)
def test_json_gives_the_same_config_back(changed, tmp_path):
    config = BadgeConfig(**copy.deepcopy(changed))
    config.save_pretrained(tmp_path)
    for back in (BadgeConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(back) is BadgeConfig
        config.inference_mode = back.inference_mode  # PEFT saves every config for inference
        assert back == config
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "BADGE" and stored["task_type"] == "SEQ_CLS"
    for name in changed.keys() - {"early_exit", "block_layout"}:
        assert stored[name] == changed[name]


def test_unknown_key_of_a_newer_version_is_dropped(tmp_path):
    BadgeConfig(r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "field_of_tomorrow": 1}))
    with pytest.warns(UserWarning, match="field_of_tomorrow"):
        assert BadgeConfig.from_pretrained(tmp_path).r == 4


def test_deepcopy():
    config = BadgeConfig(**OTHER)
    copied = copy.deepcopy(config)
    assert copied == config
    copied.early_exit = replace(copied.early_exit, patience=7)
    assert config.early_exit.patience == 2


def test_dicts_become_what_they_describe_and_stay_as_they_were():
    early_exit, layout = {"threshold": 0.2}, dict(LAYOUT)
    config = BadgeConfig(early_exit=early_exit, block_layout=layout)
    assert config.early_exit == EarlyExitConfig(threshold=0.2)
    assert config.block_layout == BlockLayout(**LAYOUT)
    assert early_exit == {"threshold": 0.2} and layout == LAYOUT


@pytest.mark.parametrize("layout", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_row_of_the_table_survives_json(layout):
    assert BlockLayout(**json.loads(json.dumps(asdict(layout)))) == layout


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        (None, [1, 2, 3, 4]),
        ([1], [1, 4]),
        ([4], [4]),
        ([3, 0], [0, 3, 4]),
        ((2, 4), [2, 4]),
        ([4, 2, 3, 1], [1, 2, 3, 4]),
    ],
)
def test_exit_numbers(layers, numbers):
    assert exit_numbers(BadgeConfig(exit_layers=layers), 4) == numbers


def test_past_future_exits_with_an_exit_at_the_end():
    assert BadgeConfig(exit_type="past_future", final_exit="exit").exit_type == "past_future"


def test_exit_beyond_the_last_block():
    with pytest.raises(ValueError, match=r"exit_layers=\[2, 5\] names block 5, but the model has 4"):
        exit_numbers(BadgeConfig(exit_layers=[5, 2]), 4)


def test_is_badge():
    assert is_badge(BadgeConfig())
    assert not is_badge(LoraConfig())


# ---------------------------------------------------------------------------------------------------- fields that went


def saved_with(folder, **fields):
    """A config as an earlier version has saved it."""
    BadgeConfig(early_exit={"threshold": 0.2}, inference_mode=False).save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text())
    data["early_exit"] |= {name: fields.pop(name) for name in ("normalize",) if name in fields}
    path.write_text(json.dumps({**data, **fields}))
    return str(folder)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("ladder", True, "Leave it out.*trained again.*badge_version"),
        ("norm", "shared", "Leave it out.*trained again.*badge_version"),
        ("carry", "states", "Use carry='logits' or None.*trained again.*badge_version"),
        ("normalize", True, "multiply the threshold by ln K.*or calibrate again"),
    ],
)
def test_a_removed_field_that_was_set_is_refused_at_load(field, value, remedy, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r} is not allowed: ") + f".*{remedy}"):
        BadgeConfig.from_pretrained(saved_with(tmp_path, **{field: value}))


def test_removed_fields_at_their_old_defaults_load(tmp_path, recwarn):
    folder = saved_with(tmp_path, ladder=False, norm="own", carry=None, normalize=False)
    assert BadgeConfig.from_pretrained(folder).early_exit.threshold == 0.2
    assert not recwarn.list
