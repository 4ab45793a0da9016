"""`Watched`: copies of weights are good until a module, a tensor or what a call does is another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from badge_peft.tuner.watched import Watched


def make() -> tuple[nn.Module, Watched]:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2, bias=False)}), "norm": nn.LayerNorm(2)})
    watched = Watched()
    watched.path(model, "a.b")
    watched.entry(model["norm"].__dict__, "training")
    for module in (model["a"]["b"], model["norm"]):
        watched.calls(module)
        watched.parameters(module)
    return model.eval(), watched


def changed(change: Callable[[nn.Module], object]) -> bool:
    model, watched = make()
    model.train()  # as it was
    assert watched.holds()
    change(model)
    return not watched.holds()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a module": lambda model: model["a"].update({"b": nn.Linear(2, 2, bias=False)}),
    "a module above": lambda model: model.update({"a": nn.ModuleDict({"b": nn.Linear(2, 2)})}),
    "a parameter": lambda model: setattr(model["norm"], "weight", nn.Parameter(torch.ones(2))),
    "what is in a parameter": lambda model: torch.nn.init.zeros_(model["norm"].bias),
    "where that is": lambda model: setattr(model["norm"].bias, "data", torch.ones(2)),
    "its precision, and back": lambda model: model.half().float(),
    "a mode": lambda model: model.eval(),
    "a hook": lambda model: model["a"]["b"].register_forward_hook(lambda *_: None),
    "a pre-hook": lambda model: model["norm"].register_forward_pre_hook(lambda *_: None),
    "a forward": lambda model: setattr(model["norm"], "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_no_longer_as_it_was(change: Callable[[nn.Module], object]) -> None:
    assert changed(change)


def test_what_changes_nothing() -> None:
    assert not changed(lambda model: model["a"]["b"](torch.ones(1, 2)))
    assert not changed(lambda model: model["norm"].register_forward_hook(lambda *_: None).remove())
