"""Every policy on every family: a call stops where a replay of its logits does, and one pass of several tasks gives
each what a call of its adapter alone gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from badge_peft import BadgeConfig
from badge_peft.early_exit.policies import build_policy
from tests.decoders import FAMILIES as DECODERS
from tests.decoders import make_decoder
from tests.models import make_batch, make_model, shake

from .rules import NAMES, by_label, labels_are_safe, with_threshold
from .test_tokens import make_base

ROWS, LENGTH = 5, 8
FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder": (lambda: make_model("bert"), "SEQ_CLS"),
    "pre-LN encoder": (lambda: make_model("modernbert-mean"), "SEQ_CLS"),
    "tokens": (make_base, "TOKEN_CLS"),
    **{name: (partial(make_decoder, name), "SEQ_CLS") for name in DECODERS},
}
#: Two of like shape and policy, which are read and decided together, and one by itself.
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"num_labels": 4},
    "alike": {"num_labels": 6},
    "doubts": {"num_labels": 3, "learn_to_exit": True, "exit_layers": [0, 2], "r": 2},
}


def _kin(family: str) -> Any:
    """One decoder stands for the others."""
    return pytest.param(family, marks=pytest.mark.exhaustive) if family in DECODERS and family != "llama" else family


def make(family: str) -> Any:
    base, task_type = FAMILIES[family]
    model: Any = None
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        config = BadgeConfig(**{"task_type": task_type, "r": 4, "final_exit": "exit", **fields})
        if model is None:
            model = get_peft_model(base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        shake(model, seed=seed, only=f".{name}.")
    return model.eval()


def rule_of(model: Any, name: str, policy: str, batch: dict[str, Tensor]) -> dict[str, Any] | None:
    """With a threshold that rounding cannot reach on this batch; None where labels hang on rounding."""
    model.set_adapter(name)
    with torch.no_grad():
        out = model(**batch)
    logits, doubts = out.exit_logits, out.exit_uncertainty
    if logits.dim() == 4:  # of tokens [B, E, S, K]
        real = batch["attention_mask"] != 0
        logits = logits.transpose(1, 2)[real]
        doubts = None if doubts is None else doubts.transpose(1, 2)[real]
    rule = {"policy": policy}
    if by_label(rule) and not labels_are_safe(logits):
        return None
    return with_threshold(rule, logits, model.base_model.exit_layers(), 0.5, doubts)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.exhaustive) if name in DECODERS and name != "llama" else name
        for name in FAMILIES
    ],
)
def test_every_policy(family: str) -> None:
    model, decided = make(family), set()
    for policy in NAMES:
        names = ["doubts"] if policy == "learned" else [*ADAPTERS]
        for seed in range(9):
            batch = make_batch(ROWS, LENGTH, seed)
            rules = {name: rule_of(model, name, policy, batch) for name in names}
            if None not in rules.values():
                break
        out = model.early_exit_forward(**batch, tasks=names, early_exit_config=rules)
        for name in names:
            model.set_adapter(name)
            want = model.early_exit_forward(**batch, early_exit_config=rules[name])
            assert out[name].exit_layer.tolist() == want.exit_layer.tolist(), (policy, name)
            torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)
            if family == "tokens":
                assert torch.equal(out[name].token_exit_layer, want.token_exit_layer)
            else:
                with torch.no_grad():
                    full = model(**batch)
                replayed = build_policy(rules[name]).replay(
                    full.exit_logits, model.base_model.exit_layers(), uncertainty=full.exit_uncertainty
                )
                assert want.exit_layer.tolist() == replayed.tolist(), (policy, name)
            decided |= {policy} if len(want.exit_layer.unique()) > 1 else set()
    assert len(decided) >= 5
