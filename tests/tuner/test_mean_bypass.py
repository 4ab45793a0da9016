"""The pooled bypass as one function: values and gradients are those of the modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from badge_peft.tuner.bypass import ACTIVATION_MODULES, Bypass, bypassed_states
from badge_peft.tuner.context import Frame
from badge_peft.tuner.mean_bypass import _MeanOfBypassed, mean_of_bypassed
from badge_peft.tuner.pooling import Pooling
from tests.design import pairs
from tests.models import make_badge, make_batch


def make_frame(**changes: torch.Tensor) -> Frame:
    generator = torch.Generator().manual_seed(1)
    frame = Frame(torch.randn(4, 6, 8, generator=generator))
    frame.attention = torch.randn(4, 6, 8, generator=generator)
    frame.ffn_sum = 2 + torch.randn(4, 6, 8, generator=generator)
    frame.output = torch.randn(4, 6, 8, generator=generator)
    for name, value in changes.items():
        setattr(frame, name, value)
    return frame


def make_bypass(activation="gelu", bias=True, norm_bias=True):
    torch.manual_seed(0)
    norm = nn.LayerNorm(8, bias=norm_bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    bypass = Bypass(8, 3, activation, bias, norm)
    nn.init.normal_(bypass.up.weight)
    return bypass


MASK = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] * 5 + [0], [0] * 6])


def by_modules(bypass, placement, pre_norm, frame, pooling):
    residual = frame.output if pre_norm else frame.ffn_sum
    source = frame.block_input if placement == "block" else frame.attention
    return pooling.reduce(bypass(source, residual))


def gradients(function, parameters, *arguments):
    vector = function(*arguments)
    weights = torch.randn(vector.shape, generator=torch.Generator().manual_seed(2))
    return vector, torch.autograd.grad((vector * weights).sum() + vector.square().sum(), parameters)


NORMS = [(True, True), (False, False), (True, False)]  # bias, norm_bias


@pytest.mark.parametrize(
    ("activation", "norms", "placement", "pre_norm", "mask"),
    pairs(ACTIVATION_MODULES, NORMS, ["block", "ffn"], [True, False], [None, MASK]),
    ids=lambda value: "masked" if isinstance(value, torch.Tensor) else str(value),
)
def test_values_and_gradients(activation, norms, placement, pre_norm, mask):
    bypass = make_bypass(activation, *norms)
    parameters = list(bypass.parameters())
    arguments = (bypass, placement, pre_norm, make_frame(), Pooling("mean", mask))
    found, grads = gradients(mean_of_bypassed, parameters, *arguments)
    expected, wanted = gradients(by_modules, parameters, *arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


def test_the_backward_is_the_derivative():
    double = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(3)}
    source, residual = torch.randn(2, 3, 5, **double), torch.randn(2, 3, 5, **double)
    weights = torch.rand(2, 3, **double)
    trained = [torch.randn(*shape, **double).requires_grad_() for shape in ((2, 5), (2,), (5, 2), (5,))]
    torch.autograd.gradcheck(lambda *t: _MeanOfBypassed.apply(source, residual, weights, *t, nn.GELU(), 1e-5), trained)


def test_what_is_left_to_the_modules():
    bypass = make_bypass()
    pooling = Pooling("mean", MASK)
    given = {"placement": "block", "pre_norm": False, "frame": make_frame(), "pooling": pooling}
    hooked = make_bypass()
    hooked.down.register_forward_hook(lambda module, args, output: output * 2)
    other = make_bypass()
    other.norm = nn.RMSNorm(8)
    for change in (
        {"bypass": None},
        {"bypass": hooked},
        {"bypass": make_bypass().to(torch.bfloat16)},
        {"placement": "mhsa"},
        {"pooling": Pooling("cls", MASK)},
        {"frame": make_frame(ffn_sum=torch.randn(4, 6, 8, requires_grad=True))},
        {"frame": make_frame(ffn_sum=torch.randn(4, 6, 8).half())},
        {"bypass": other},
    ):
        assert mean_of_bypassed(**{"bypass": bypass, **given, **change}) is None, change
    with torch.no_grad():
        assert mean_of_bypassed(bypass, **given) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mean_of_bypassed(bypass, **given) is None
    assert mean_of_bypassed(bypass, **given) is not None


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        *(({"exit_type": name}, 3) for name in ("linear", "pooled", "past_future")),
        ({"exit_type": "residual_mha"}, 0),  # which reads all positions
    ],
)
def test_a_model_trains_as_by_its_modules(fields, asked, monkeypatch):
    model = make_badge(exit_pooling="mean", final_exit="exit", **fields).train()
    batch = {**make_batch(), "labels": torch.tensor([0, 1, 2, 0])}
    losses, grads = [], []
    for by_function in (True, False):
        calls = []
        original = mean_of_bypassed
        monkeypatch.setattr(
            "badge_peft.tuner.layer.mean_of_bypassed",
            lambda *args: calls.append(1) or (original(*args) if by_function else None),  # noqa: B023
        )
        torch.manual_seed(0)  # dropout
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss))
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == asked
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5)


def test_bypassed_states_says_the_same():
    """The reference of the tests above is Eq. 2 as the package has it."""
    from badge_peft.tuner.architectures import ARCHITECTURES

    bypass = make_bypass()
    frame, pooling = make_frame(), Pooling("mean", MASK)
    states = bypassed_states(bypass, "block", nn.Identity(), ARCHITECTURES["bert"], frame, pooling)
    torch.testing.assert_close(pooling.reduce(states), by_modules(bypass, "block", False, frame, pooling))
