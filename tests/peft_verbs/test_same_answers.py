"""Every verb that should change no answer; each backbone and each kind of adapter with a verb of every sort.

A verb sees a backbone only through `BadgeBlock`, and a kind of adapter only through its names and tensors. So each
verb is tried on one model, and backbones and kinds of adapters, in changing pairs, with the representatives.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch

from badge_peft import EarlyExitConfig
from tests.models import make_batch, trained
from tests.peft_verbs.table import (
    ARCHITECTURES,
    CONFIGS,
    EARLY,
    LOW,
    OFFLOADED,
    REPRESENTATIVES,
    SECOND,
    VERBS,
    Verb,
    beside_another,
)

EACH = [(verb, "bert", "block") for verb in VERBS]
EACH += [(verb, case, "block") for verb in REPRESENTATIVES for case in ARCHITECTURES if case != "bert"]
EACH += [
    (verb, ARCHITECTURES[(turn + i) % len(ARCHITECTURES)], name)
    for turn, verb in enumerate(REPRESENTATIVES)
    for i, name in enumerate(CONFIGS)
    if name != "block"
]
EACH = [
    (verb, case, name)
    for verb, case, name in EACH
    if not (verb in SECOND and name.startswith("full")) and not (verb in OFFLOADED and case == "deberta-v2")
]


def answers(model: Any) -> dict[str, torch.Tensor]:
    """All that a model says about a batch: at full depth, and with the rule that it carries."""
    with torch.no_grad():
        full = model(**make_batch())
    early = model.early_exit_forward(**make_batch())
    found = {"logits": full.logits, "exits": full.exit_logits, "doubts": full.exit_uncertainty}
    found.update(early=early.logits, exit_layer=early.exit_layer)
    return {name: value for name, value in found.items() if value is not None}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], exact: bool = True) -> bool:
    equal = torch.equal if exact else partial(torch.allclose, rtol=1e-5, atol=1e-6)
    return found.keys() == expected.keys() and all(equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("verb", "case", "name"), EACH, ids=[f"{verb.__name__}-{case}-{name}" for verb, case, name in EACH]
)
def test_the_same_answers(verb: Verb, case: str, name: str, tmp_path: Any) -> None:
    model = trained(case, early_exit=EARLY, **CONFIGS[name])
    expected = answers(model)
    after = verb(model, case, tmp_path)
    assert not after.training or verb.__name__ in ("is_trainable", "onto_the_same", "state_dicts")
    assert same(answers(after.eval()), expected, exact=verb not in LOW)
    assert after.get_early_exit_config() == EarlyExitConfig(**EARLY)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in OFFLOADED])
def test_what_was_changed_later_travels_too(verb: Verb, tmp_path: Any) -> None:
    """The rule is part of the adapter, and so is whatever calibrate put there after the adapter was made."""
    model = trained()
    assert model.get_early_exit_config() == EarlyExitConfig()
    model.set_early_exit_config(EARLY)
    after = verb(model, "bert", tmp_path)
    assert after.get_early_exit_config() == EarlyExitConfig(**EARLY)
    after.save_pretrained(tmp_path / "again", selected_adapters=[after.active_adapter])
    stored = next((tmp_path / "again").rglob("adapter_config.json"))
    assert json.loads(stored.read_text())["early_exit"]["threshold"] == 0.6


def test_the_table_can_fail(tmp_path: Any) -> None:
    """The comparison sees another adapter for what it is."""
    model = trained(early_exit=EARLY)
    other = beside_another(model, "bert", tmp_path)
    other.set_adapter("first")
    other.set_early_exit_config(EARLY)
    assert not same(answers(other.eval()), answers(model))
