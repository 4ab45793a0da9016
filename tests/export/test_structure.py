"""Which blocks are the same but for their weights, and one translated block with the weights of another."""

from __future__ import annotations

import pytest
import torch

from badge_peft.export import trace
from badge_peft.export.trace import structure_of
from tests.models import make_badge, make_model


def exported(module: torch.nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), (torch.ones(2, 4, dtype=module.shift.dtype),), strict=False)


class Scaled(torch.nn.Module):
    def __init__(self, size: int = 4, by: float = 2.0, tied: bool = False) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, size), torch.nn.Linear(size, 4)
        self.register_buffer("shift", torch.rand(4))
        self.by, self.tied = by, tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.tied:
            y = self.first(y)
        return self.by * self.second(y) + self.shift


def test_structures_are_equal_where_only_weights_differ() -> None:
    structure, weights = structure_of(exported(Scaled()))
    assert list(weights) == ["first.weight", "first.bias", "second.weight", "second.bias", "shift"]
    other, others = structure_of(exported(Scaled()))
    assert other == structure and not torch.equal(others["shift"], weights["shift"])
    for different in (Scaled(size=3), Scaled(by=3.0), Scaled(tied=True), Scaled().double()):
        assert structure_of(exported(different))[0] != structure


@pytest.mark.parametrize(
    ("case", "times"), [("bert", 3), pytest.param("modernbert-cls", 5, marks=pytest.mark.exhaustive)]
)
def test_like_blocks_are_translated_once(monkeypatch, case, times) -> None:
    """Embeddings, one block of each kind, the last with the model's own head. ModernBERT's first block has no norm
    before its attention, and its blocks look far or near in turn."""
    calls = []
    monkeypatch.setattr(trace, "to_onnx", trace.to_onnx.__wrapped__)  # without what other tests have translated
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: calls.append(1) or export(*args, **kwargs))
    blocks = 3 if case == "bert" else 5
    model = make_badge(case, base=make_model(case, num_hidden_layers=blocks)).base_model
    pieces = trace.export_blocks(model, {("",): {blocks}})
    assert len(calls) == times and list(pieces.graphs) == list(range(blocks + 1))
    if case == "bert":
        names = [{*graph.initializers} for graph in pieces.graphs.values()]
        for number in (1, 2):
            own = f"badge.model.bert.encoder.layer.{number - 1}.base_layer.intermediate.dense.bias"
            assert own in names[number] and not any(own in others for i, others in enumerate(names) if i != number)
