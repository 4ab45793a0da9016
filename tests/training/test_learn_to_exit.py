"""Learning to exit (LTE): its loss by hand; its layer trained; policy `learned` live and replayed."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from badge_peft import collect_exit_logits
from badge_peft.early_exit.policies import build_policy
from badge_peft.tuner.adapter_file import CONFIG_TENSOR
from badge_peft.tuner.losses import exit_loss, uncertainty_loss
from tests.models import CASES, HIDDEN, exits_of, make_badge, make_batch, make_labels
from tests.thresholds import in_a_gap

from .runs import MULTI, PROBLEMS, SINGLE, Rows, arguments, close, make, make_trainer, moved, weights

BATCH = make_batch()
RATES = {"adapter_learning_rate": 0.1, "max_steps": 5}


def output_of(model, batch=BATCH):
    with torch.no_grad():
        return model(**batch)


def wrongness(logits, labels, problem_type):
    """t of each row: 1 where the exit is wrong, for regression |tanh(y' - y)|."""
    targets = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if problem_type == SINGLE:
            targets.append(float(row.index(max(row)) != label))
        elif problem_type == MULTI:
            targets.append(float([v > 0 for v in row] != [v > 0.5 for v in label]))
        else:
            targets.append(abs(math.tanh(row[0] - label)))
    return targets


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
@pytest.mark.parametrize(
    "fields", [{}, {"final_exit": "exit"}, {"exit_layers": [0, 2], "exit_weights": "linear"}], ids=str
)
def test_loss(fields, problem_type, num_labels):
    model = make(problem_type, num_labels, learn_to_exit=True, **fields)
    labels = make_labels(problem_type, num_labels=num_labels)
    out = model(**BATCH, labels=labels)
    numbers = model.base_model.exit_layers()
    own = len(numbers) - ("final_exit" not in fields)  # the model's own head always answers: it has no uncertainty
    losses = []
    for place in range(own):
        targets = wrongness(out.exit_logits[:, place], labels, problem_type)
        losses += [(u - t) ** 2 for u, t in zip(out.exit_uncertainty[:, place].tolist(), targets, strict=True)]
    depth = [max(m, 1) / sum(max(n, 1) for n in numbers) if "exit_weights" in fields else 1 for m in numbers]
    joint = sum(w * exit_loss(x, labels, problem_type) for w, x in zip(depth, out.exit_logits.unbind(1), strict=True))
    assert float(out.loss.detach()) == pytest.approx(float(joint) + sum(losses) / len(losses), rel=1e-5)
    if own < len(numbers):
        assert not out.exit_uncertainty[:, -1].any()


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
def test_doubt_loss_teaches_the_doubts_alone(problem_type, num_labels):
    logits = torch.randn(4, num_labels, requires_grad=True)
    doubts = torch.rand(4, requires_grad=True)
    labels = make_labels(problem_type, num_labels=num_labels)
    loss = uncertainty_loss({2: doubts}, {2: logits, 3: -logits}, labels, problem_type)
    targets = torch.tensor(wrongness(logits, labels, problem_type))
    torch.testing.assert_close(loss, ((doubts - targets) ** 2).mean())
    loss.backward()
    assert doubts.grad.any() and logits.grad is None


@pytest.mark.parametrize(
    ("case", "exit_type"),
    [(case, ("linear", "pooled", "mha", "past_future")[i % 4]) for i, case in enumerate(CASES)],
)
@torch.no_grad()
def test_doubt_is_one_layer_on_what_each_exit_reads(case, exit_type):
    """u_m = sigmoid(w . v_m + b), w and b shared by all exits; v_m stands before the exit's linear layer."""
    model = make_badge(case, exit_type=exit_type, final_exit="exit", exit_layers=[0, 1, 2, 3], learn_to_exit=True)
    seen = []
    for number in model.base_model.exit_layers():
        block = next(b for b in model.base_model.wrapped if b.has_exit("default", number))
        block.own_exit("default", number).dropout.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    doubts = output_of(model).exit_uncertainty
    layers = [p for name, p in model.named_parameters() if "badge_doubt" in name]
    assert [tuple(p.shape) for p in layers] == [(1, HIDDEN), (1,)]
    expected = torch.stack([1 / (1 + torch.exp(-(v @ layers[0][0] + layers[1]))) for v in seen], dim=1)
    assert doubts.shape == (4, len(seen))
    torch.testing.assert_close(doubts, expected)
    assert doubts.std() > 0.01


@pytest.mark.parametrize("objective", ["joint", "alternating", "gradient_equilibrium", "two_stage"])
def test_trained_with_every_objective(objective, tmp_path):
    model = make(learn_to_exit=True)
    before = weights(model)
    make_trainer(tmp_path, model, objective=objective, **RATES).train()
    assert {name for name in moved(before, weights(model)) if "badge_doubt" in name} == {
        name for name in before if "badge_doubt" in name
    }


def test_a_trained_doubt_knows_which_rows_are_wrong(tmp_path):
    data, model = Rows(rows=24), make(learn_to_exit=True, train_head=False)
    make_trainer(
        tmp_path, model, data, optim="adamw_torch", adapter_learning_rate=0.02, max_steps=60,
        per_device_train_batch_size=24,
    ).train()  # fmt: skip
    out = output_of(model.eval(), data.batch)
    wrong = out.exit_logits[:, :2].argmax(-1) != data.labels[:, None]
    doubts = out.exit_uncertainty[:, :2]
    rate = wrong.float().mean()
    assert ((doubts - wrong.float()) ** 2).mean() < 0.5 * rate * (1 - rate) + 0.02


def test_the_trainers_loss_is_the_models(tmp_path):
    data, model = Rows(), make(learn_to_exit=True)
    found = make_trainer(tmp_path, model, Rows(rows=5), eval_dataset=data).evaluate()["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(float(model.eval()(**data.batch, labels=data.labels).loss), rel=1e-4)


def test_stage_one_is_without_it(tmp_path):
    """It trains the final exit, so nothing else may pull at the backbone: as if there were no LTE."""
    with_doubts, without = make(backbone="full", learn_to_exit=True), make(backbone="full")
    for model, folder in ((with_doubts, "a"), (without, "b")):
        make_trainer(tmp_path / folder, model, objective="two_stage").train()
    a, b = (load_file(tmp_path / x / "stage1" / "best" / "adapter_model.safetensors") for x in "ab")
    backbone = [key for key in b if ".badge_" not in key and key != CONFIG_TENSOR]
    assert len(backbone) > 10 and all(torch.equal(a[key], b[key]) for key in backbone)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_single_exit_is_trained_as_without_it(depth, tmp_path):
    """LTE judges the one exit that is trained; the model's own head, exit 3, has no uncertainty."""
    found = []
    for learn_to_exit, folder in ((True, "a"), (False, "b")):
        model = make(learn_to_exit=learn_to_exit)
        before = weights(model)
        make_trainer(tmp_path / folder, model, objective="single_exit", depth=depth).train()
        found.append({name for name in moved(before, weights(model)) if ".modules_to_save." not in name})
    doubt = {name for name in found[0] if "badge_doubt" in name}
    assert found[0] - doubt == found[1] and len(doubt) == (2 if depth < 3 else 0)
    assert all(f".{depth}." in name for name in found[1])


# ---------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("final_exit", ["base_head", "exit"])
@pytest.mark.parametrize("case", ["bert", "albert-groups", "modernbert-mean"])
def test_live_is_replay(case, final_exit):
    model = make_badge(case, learn_to_exit=True, final_exit=final_exit, exit_layers=[0, 1, 2, 3]).double()
    batch = make_batch(rows=11, seed=4)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(11)]
    stored = collect_exit_logits(model, rows, batch_size=4)
    full = output_of(model, batch)
    torch.testing.assert_close(stored.uncertainty, full.exit_uncertainty.float())
    rule = in_a_gap({"policy": "learned"}, stored.logits, stored.exits, uncertainty=stored.uncertainty)
    replayed = build_policy(rule).replay(stored)
    assert torch.equal(
        replayed, build_policy(rule).replay(full.exit_logits, stored.exits, uncertainty=full.exit_uncertainty)
    )
    out = model.early_exit_forward(**batch, early_exit_config=rule)
    assert out.exit_layer.tolist() == replayed.tolist() and len(replayed.unique()) >= 2
    by_hand = [
        next((m for m, u in zip(stored.exits[:-1], row, strict=False) if u < rule["threshold"]), stored.exits[-1])
        for row in stored.uncertainty.tolist()
    ]
    assert replayed.tolist() == by_hand
    index = torch.tensor([stored.exits.index(m) for m in by_hand])
    torch.testing.assert_close(out.logits, full.exit_logits[torch.arange(11), index], rtol=1e-9, atol=1e-9)
    for i in range(11):
        alone = model.early_exit_forward(**{k: v[i : i + 1] for k, v in batch.items()}, early_exit_config=rule)
        assert alone.exit_layer.tolist() == by_hand[i : i + 1]


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
def test_problem_types(problem_type, num_labels):
    model = make(problem_type, num_labels, learn_to_exit=True, final_exit="exit")
    batch = make_batch(rows=9, seed=4)
    out = output_of(model, batch)
    rule = in_a_gap({"policy": "learned"}, out.exit_logits, [1, 2, 3], problem_type, out.exit_uncertainty, least=1e-3)
    found = model.early_exit_forward(**batch, early_exit_config=rule).exit_layer
    want = build_policy(rule).replay(out.exit_logits, problem_type=problem_type, uncertainty=out.exit_uncertainty)
    assert found.tolist() == want.tolist()


def test_default_threshold_is_a_tenth():
    logits = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    uncertainty = torch.tensor([[0.2, 0.11, 0.09, 0.0], [0.05, 0.9, 0.9, 0.0], [0.5, 0.4, 0.3, 0.0]])
    assert build_policy(policy="learned").replay(logits, uncertainty=uncertainty).tolist() == [3, 1, 4]
    equal = build_policy(policy="learned", threshold=0.5).replay(logits, uncertainty=uncertainty)
    assert equal.tolist() == [1, 1, 2]  # below, not at, the threshold


def test_without_the_layer_it_says_so():
    model = make_badge()
    message = r"policy='learned' needs an adapter with an LTE layer: train with BadgeConfig\(learn_to_exit=True\)"
    before = exits_of(model, BATCH)
    with pytest.raises(ValueError, match=message):
        model.early_exit_forward(**BATCH, policy="learned")
    with pytest.raises(ValueError, match=message):
        build_policy(policy="learned").replay(before)
    assert torch.equal(exits_of(model, BATCH), before)
    assert output_of(model).exit_uncertainty is None


def test_accumulation_of_a_plain_trainer_does_not_change_it(tmp_path):
    found = []
    for size, steps in ((8, 1), (2, 4)):
        model = make(learn_to_exit=True)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        Trainer(model, arguments(tmp_path, **options), train_dataset=Rows(), optimizers=(optimizer, None)).train()
        found.append(weights(model))
    close(found[1], found[0])
