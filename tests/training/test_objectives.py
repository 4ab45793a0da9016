"""Objectives: their loss by hand on given logits, and whole runs against loops written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from badge_peft import BadgeConfig
from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.outputs import MultiExitOutput
from badge_peft.training.objectives import (
    Alternating,
    EarlierExits,
    FinalExit,
    GradientEquilibrium,
    Objective,
    SingleExit,
    Step,
)
from badge_peft.training.passes import GradientEquilibriumPass, ImitationPass
from badge_peft.training.ranking import RankingDistillation
from badge_peft.tuner.losses import exit_loss
from tests import reference
from tests.design import pairs
from tests.models import LINKS, exits_of, make_batch, make_model

from .runs import (
    EACH_STEP,
    PROBLEMS,
    REGRESSION,
    SINGLE,
    Rows,
    Stop,
    close,
    kl,
    make,
    make_trainer,
    moved,
    scripted,
    weights,
)  # fmt: skip

LOGITS = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))  # [E, B, K]
LABELS = torch.tensor([0, 2, 1, 1, 0])


def step(number=0, exits=(1, 2, 3, 5), labels=LABELS, logits=LOGITS, problem_type=SINGLE, output=None):
    return Step(list(exits), list(logits), labels, problem_type, number, output or MultiExitOutput())


def hard(index):
    return float(reference.cross_entropy(LOGITS[index], LABELS))


# --------------------------------------------------------------------------------------------------- on given logits


@pytest.mark.parametrize(
    ("weights_", "exits", "expected"),
    [
        (None, (1, 2, 3, 5), [1, 1, 1, 1]),
        ("uniform", (0, 2, 3, 5), [1, 1, 1, 1]),
        ("linear", (1, 2, 3, 5), [1 / 11, 2 / 11, 3 / 11, 5 / 11]),
        ("linear", (0, 1, 2, 4), [1 / 8, 1 / 8, 2 / 8, 4 / 8]),
        ([0.5, 0, 2, 3], (1, 2, 3, 4), [0.5, 0, 2, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Objective, GradientEquilibrium])
def test_joint(kind, weights_, exits, expected):
    found = kind(weights=weights_)(step(exits=exits))
    assert float(found) == pytest.approx(sum(w * hard(i) for i, w in enumerate(expected)), rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_a_share_of_each_exit_below_m(share, temperature):
    found = Objective(distillation=share, temperature=temperature)(step())
    soft = [kl(LOGITS[3], LOGITS[i], SINGLE, temperature) for i in range(3)]
    expected = sum((1 - share) * hard(i) + share * soft[i] for i in range(3))
    expected += hard(3) if share < 1 else 0.0  # exit M teaches; with labels it learns from them
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_without_labels_the_exits_learn_from_exit_m():
    expected = sum(w * kl(LOGITS[3], LOGITS[i], SINGLE, 1.0) for i, w in enumerate([0.5, 1.0, 2.0]))
    found = Objective(weights=[0.5, 1.0, 2.0, 7.0], distillation=1.0)(step(labels=None))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    for objective in (Objective(distillation=0.5), Alternating(), SingleExit(depth=2), FinalExit(), EarlierExits()):
        with pytest.raises(ValueError, match=r"needs labels; without them, distil.*distillation=1\.0"):
            objective(step(labels=None))


@pytest.mark.parametrize("kind", [Objective, EarlierExits])
def test_the_teacher_takes_no_gradient(kind):
    logits = LOGITS.clone().requires_grad_()
    kind(distillation=1.0)(step(logits=logits)).backward()
    assert logits.grad[:3].abs().sum(dim=(1, 2)).min() > 0
    assert not logits.grad[3].any()


def test_alternating_is_evaluated_by_all_exits():
    evaluated = replace(step(number=0), training=False)
    assert float(Alternating()(evaluated)) == pytest.approx(sum(map(hard, range(4))), rel=1e-6)


def test_the_two_stages():
    assert float(FinalExit()(step())) == pytest.approx(hard(3), rel=1e-6)
    assert float(EarlierExits()(step())) == pytest.approx(sum(map(hard, range(3))), rel=1e-6)
    soft = sum(kl(LOGITS[3], LOGITS[i], SINGLE, 2.0) for i in range(3))
    found = EarlierExits(distillation=1.0, temperature=2.0)(step(labels=None))
    assert float(found) == pytest.approx(soft, rel=1e-5)
    linear = EarlierExits(weights="linear")(step())
    assert float(linear) == pytest.approx(sum(w * hard(i) for i, w in enumerate([1 / 11, 2 / 11, 3 / 11])), rel=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Objective(temperature=0.0), r"temperature=0\.0 is not allowed: it must be positive"),
        (lambda: Objective(weights=[1.0])(step()), "exit_weights has 1 numbers, but there are 4 exits"),
    ],
)
def test_bad_values(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ------------------------------------------------------------------------------------------------------- whole runs


def by_hand(model, data, loss, steps=3, run=EarlyExitPass):
    """SGD with the rates of `make_trainer`, on all rows at once; `loss(exits [B, E, K], step)`."""
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = ".modules_to_save." in name
            frozen = model.peft_config["default"].backbone != "full"
            rate = 0.1 if ".badge_" in name else (0.1 / 10 if head and frozen else 0.01)
            groups.append({"params": [parameter], "lr": rate})
    optimizer = torch.optim.SGD(groups)
    model.train()
    for number in range(steps):
        optimizer.zero_grad()
        output = model(**data.batch, exit_pass=run)
        loss(output.exit_logits, number, output).backward()
        optimizer.step()
    return weights(model)


def losses(data, problem_type):
    def each(exits):
        return [exit_loss(x, data.labels, problem_type) for x in exits.unbind(dim=1)]

    return each


RUNS = {
    "joint": ({}, lambda x, n: sum(x), EarlyExitPass),
    "linear": ({"exit_weights": "linear"}, lambda x, n: x[0] / 6 + x[1] / 3 + x[2] / 2, EarlyExitPass),
    "list": ({"exit_weights": [2.0, 0.0, 1.0]}, lambda x, n: 2 * x[0] + x[2], EarlyExitPass),
    "alternating": ({"objective": "alternating"}, lambda x, n: x[2] if n % 2 == 0 else sum(x), EarlyExitPass),
    "gradient_equilibrium": ({"objective": "gradient_equilibrium"}, lambda x, n: sum(x), GradientEquilibriumPass),
    "single_exit": ({"objective": "single_exit", "depth": 2}, lambda x, n: x[1], EarlyExitPass),
    "own": ({"objective": SingleExit(depth=1)}, lambda x, n: x[0], EarlyExitPass),
}


#: Runs on each backbone and placement, and of exits that build on one another.
CASES = [
    (name, {"backbone": b, "placement": p}) for name, b, p in product(RUNS, ("frozen", "full"), ("block", "none"))
]
CASES += [
    (name, {"backbone": backbone, "final_exit": final_exit, **link})
    for name, link, backbone, final_exit in pairs(RUNS, LINKS, ("frozen", "full"), ("base_head", "exit"))
]


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_a_run_is_this_loop(name, fields, tmp_path):
    options, total, run = RUNS[name]
    data, model = Rows(), make(**fields)
    before = weights(model)
    make_trainer(tmp_path, model, data, **options).train()
    each = losses(data, SINGLE)
    expected = by_hand(make(**fields), data, lambda exits, n, _: total(each(exits), n), run=run)
    close(weights(model), expected)
    if name not in ("single_exit", "own"):
        assert any(".badge_" in n for n in moved(before, expected))


@pytest.mark.parametrize("name", ["joint", "alternating"])
def test_accumulation_does_not_change_it(name, tmp_path):
    """`alternating` goes by optimizer steps: the two halves of a batch have the same loss."""
    options, total, run = RUNS[name]
    data, model = Rows(), make(backbone="full")
    make_trainer(
        tmp_path, model, data, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, **options
    ).train()
    each = losses(data, SINGLE)
    close(weights(model), by_hand(make(backbone="full"), data, lambda exits, n, _: total(each(exits), n), 4, run))


@pytest.mark.parametrize(
    ("problem", "fields", "name"),
    [(p, {}, "joint") for p in PROBLEMS] + [((SINGLE, 3), {"exit_weights": [2.0, 0.0, 1.0]}, "list")],
)
def test_problem_types_and_the_adapters_own_weights(problem, fields, name, tmp_path):
    data, model = Rows(*problem), make(*problem, **fields)
    make_trainer(tmp_path, model, data).train()
    each = losses(data, problem[0])
    close(weights(model), by_hand(make(*problem), data, lambda exits, n, _: RUNS[name][1](each(exits), n)))


@pytest.mark.parametrize(
    "options", [{"objective": "single_exit", "depth": 2}, {"exit_weights": [0.0, 1.0, 0.0]}], ids=str
)
def test_what_has_no_loss_does_not_move(options, tmp_path):
    """Exit 2 alone: bypass 1 and exit 1 stay, and so does block 3; the backbone up to block 2 moves."""
    model = make(backbone="full", final_exit="exit")
    before = weights(model)
    make_trainer(tmp_path, model, **options).train()
    names = moved(before, weights(model))
    assert {n for n in names if ".badge_" in n} == {n for n in before if ".layer.1.badge_" in n}
    assert {n.split(".layer.")[1][0] for n in names if ".layer." in n} == {"0", "1"}


@pytest.mark.parametrize("weights_", [None, "uniform"])
def test_past_future_run(weights_, tmp_path):
    fields = {"exit_type": "past_future", "final_exit": "exit", "backbone": "full"}
    data, model = Rows(), make(**fields)
    options = {} if weights_ is None else {"exit_weights": weights_}
    make_trainer(tmp_path, model, data, objective="past_future", **options).train()
    shares = [1 / 6, 2 / 6, 3 / 6] if weights_ is None else [1, 1, 1]
    each = losses(data, SINGLE)

    def loss(exits, number, output):
        return (sum(w * x for w, x in zip(shares, each(exits), strict=True)) + output.imitation_loss.mean()) / 2

    close(weights(model), by_hand(make(**fields), data, loss, run=ImitationPass))


def test_unlabeled_training(tmp_path):
    """From a deployed classifier's own answers: full depth stays, and the exits come closer to it."""
    data = Rows(labeled=False)
    model = make(train_head=False)
    before = exits_of(model, data.batch)
    with torch.no_grad():
        deployed = make_model()(**data.batch).logits
    assert torch.equal(before[:, -1], deployed)
    make_trainer(tmp_path, model, data, distillation=1.0, max_steps=30).train()
    after = exits_of(model.eval(), data.batch)
    assert torch.equal(after[:, -1], deployed)
    for m in range(2):
        start, end = (kl(deployed, exits[:, m], SINGLE, 1.0) for exits in (before, after))
        assert end < 0.5 * start


def test_training_without_labels_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"needs labels; without them, distil: MultiExitTrainer\(distillation=1\.0\)"):
        make_trainer(tmp_path, make(), Rows(labeled=False)).train()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"objective": "alternating"}, "Alternating"),
        ({"objective": "single_exit", "depth": 3}, "SingleExit"),
        ({"objective": FinalExit()}, "FinalExit"),
    ],
    ids=str,
)
def test_steps_of_a_frozen_final_exit_say_what_to_do(options, name, tmp_path):
    frozen = make(train_head=False)
    before = weights(frozen)
    with pytest.raises(ValueError, match=f"{name} trains exit 3 alone.*train_head=True, final_exit='exit'"):
        make_trainer(tmp_path, frozen, **options).train()
    assert not moved(before, weights(frozen))
    for fields in ({}, {"train_head": False, "final_exit": "exit"}, {"train_head": False, "backbone": "lora"}):
        make_trainer(tmp_path, make(**fields), **{**options, "max_steps": 2}).train()


# -------------------------------------------------------------------------------------------------------- two stages


def is_earlier(name):
    return ".badge_" in name and ".3." not in name.partition(".badge_")[2]


@pytest.mark.parametrize("distillation", [0.0, 1.0, 0.5])
@pytest.mark.parametrize(
    "fields",
    [{"backbone": "full"}, {"backbone": "full", "final_exit": "exit"}, {"backbone": "lora"}, {"backbone": "frozen"}],
    ids=str,
)
def test_two_stages(fields, distillation, tmp_path):
    data, model = Rows(), make(**fields)
    before = weights(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    make_trainer(tmp_path, model, data, objective="two_stage", distillation=distillation).train()
    after = weights(model)
    between = PeftModel.from_pretrained(make_model(), tmp_path / "stage1" / "best")
    between = {name: p for name, p in weights(between).items() if name in before}
    first, second = moved(before, between), moved(between, after)
    assert first and all(not is_earlier(name) for name in first)
    assert second and second == {name for name in before if is_earlier(name)}
    if fields["backbone"] != "frozen":
        assert any(".badge_" not in name and ".modules_to_save." not in name for name in first)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable  # all of it, as before


@pytest.mark.parametrize("distillation", [0.0, 1.0])
@pytest.mark.parametrize("link", LINKS, ids=str)
def test_exits_that_build_on_one_another_do_not_move_the_last_one_in_stage_2(link, distillation, tmp_path):
    """It is their teacher. What it would take of them stays at its start, as if it stood alone."""
    fields = {"r": 4, "final_exit": "exit", "exit_dropout": 0.0}
    plain = get_peft_model(make_model(), BadgeConfig(**fields))
    model = get_peft_model(make_model(), BadgeConfig(**fields, **link))
    model.load_state_dict(plain.state_dict(), strict=False)
    for each, name in ((plain, "plain"), (model, "linked")):
        options = {"objective": "two_stage", "distillation": distillation}
        make_trainer(tmp_path / name, each, Rows(), **options).train()
    found, alone = (exits_of(each.eval(), make_batch()) for each in (model, plain))
    torch.testing.assert_close(found[:, -1], alone[:, -1])
    shares = {name: p.any() for name, p in reference.own_weights(model).items() if ".carry." in name}
    assert shares and all(learned == (".2." in name) for name, learned in shares.items())


def test_both_stages_are_these_loops(tmp_path):
    data, model, fields = Rows(), make(backbone="full"), {"backbone": "full"}
    make_trainer(tmp_path, model, data, objective="two_stage").train()
    each, again = losses(data, SINGLE), make(**fields)
    for stage in (1, 2):
        for name, parameter in again.named_parameters():
            if ".original_module." not in name:
                parameter.requires_grad = is_earlier(name) == (stage == 2)
        by_hand(again, data, lambda exits, n, _, s=stage: each(exits)[2] if s == 1 else sum(each(exits)[:2]))
    close(weights(model), weights(again))


@pytest.mark.parametrize("final_exit", ["base_head", "exit"])
def test_the_teacher_of_stage_two_is_the_same_every_time(final_exit, tmp_path):
    base = make_model(hidden_dropout_prob=0.5)
    model = get_peft_model(base, BadgeConfig(r=4, final_exit=final_exit, exit_dropout=0.5))
    seen = {"stage1": [], "stage2": []}

    trainer = make_trainer(tmp_path, model, objective="two_stage", distillation=1.0)
    original = trainer.compute_loss

    def compute_loss(model, inputs, **_):
        loss, outputs = original(model, inputs, True)
        order = inputs["input_ids"].sum(dim=1).argsort()
        seen[Path(trainer.args.output_dir).name].append(outputs.logits[order].detach())
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    assert not torch.allclose(seen["stage1"][0], seen["stage1"][1], atol=1e-3)
    assert len(seen["stage2"]) == 3
    assert all(torch.allclose(x, seen["stage2"][0], atol=1e-5) for x in seen["stage2"])


def test_the_best_checkpoint_of_stage_one_is_kept(tmp_path):
    """Stage 1 is judged by exit M (there: best at its second of four steps), stage 2 by all exits."""
    model = make(backbone="full")
    metric = scripted([[0, 0, score] for score in (0.1, 0.9, 0.3, 0.2, 0.5, 0.6, 0.4, 0.3)])
    trainer = make_trainer(tmp_path, model, objective="two_stage", metric=metric, max_steps=4, **EACH_STEP)
    trainer.train()
    best, second, last = (
        load_file(tmp_path / "stage1" / folder / "adapter_model.safetensors")
        for folder in ("best", "checkpoint-2", "checkpoint-4")
    )
    assert all(torch.equal(best[key], second[key]) for key in best)
    assert any(not torch.equal(best[key], last[key]) for key in best)
    state = json.loads((tmp_path / "stage1" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.9 and state["best_global_step"] == 2
    state = json.loads((tmp_path / "stage2" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(0.2) and state["best_global_step"] == 2  # S-avg: 0.6 / 3
    end = load_file(tmp_path / "stage2" / "checkpoint-2" / "adapter_model.safetensors")
    model.save_pretrained(tmp_path / "end")
    found = load_file(tmp_path / "end" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], end[key]) for key in end)
    assert trainer.args.output_dir == str(tmp_path) and trainer.args.metric_for_best_model == "s_avg"


def test_early_stopping_counts_anew_in_stage_two(tmp_path):
    metric = scripted([[0, 0, score] for score in (0.9, 0.1, 0.1, 0.5, 0.6, 0.1, 0.1, *[0.0] * 9)])
    options = {"objective": "two_stage", "max_steps": 9, "early_stopping_patience": 2, **EACH_STEP}
    make_trainer(tmp_path, make(), metric=metric, **options).train()
    steps = {
        stage: max(int(p.name[11:]) for p in (tmp_path / stage).glob("checkpoint-*")) for stage in ("stage1", "stage2")
    }
    assert steps == {"stage1": 3, "stage2": 4}


@pytest.mark.parametrize(
    ("stage", "at", "fields"),
    [
        pytest.param("stage1", 2, {"backbone": "full"}, marks=pytest.mark.exhaustive),
        ("stage1", 2, {"backbone": "lora", "learn_to_exit": True}),
        ("stage2", 1, {"backbone": "full"}),
        pytest.param("stage2", 2, {"backbone": "lora", "learn_to_exit": True}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_resume_in_either_stage(stage, at, fields, tmp_path):
    options = {"objective": "two_stage", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    options |= {"optim": "adamw_torch", "lr_scheduler_type": "linear", "adapter_learning_rate": 0.01}
    options |= {"per_device_train_batch_size": 4}
    whole = make(**fields)
    make_trainer(tmp_path / "whole", whole, **options).train()
    model = make(**fields)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", model, callbacks=[Stop(at, stage)], **options).train()
    again = make(**fields)
    make_trainer(tmp_path / "cut", again, **options).train(resume_from_checkpoint=True)
    close(weights(again), weights(whole))
    assert moved(weights(again), weights(make(**fields)))


def test_resume_from_a_checkpoint_of_either_stage(tmp_path):
    """The one that is named, also where later ones are there."""
    options = {"objective": "two_stage", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make()
    make_trainer(tmp_path / "whole", whole, **options).train()
    for stage, place in (("stage1", "whole"), ("stage2", "elsewhere")):
        again = make()
        trainer = make_trainer(tmp_path / place, again, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / stage / "checkpoint-1"))
        close(weights(again), weights(whole))
    with pytest.raises(ValueError, match="a checkpoint of no stage: name one in a folder stage1 or stage2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_resume_with_nothing_to_resume_from_starts_anew(tmp_path):
    whole, again = make(), make()
    make_trainer(tmp_path / "a", whole, objective="two_stage").train()
    make_trainer(tmp_path / "b", again, objective="two_stage").train(resume_from_checkpoint=True)
    close(weights(again), weights(whole))


def test_a_failed_stage_leaves_the_trainer_as_it_was(tmp_path):
    model = make(backbone="full")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(tmp_path, model, objective="two_stage", callbacks=[Stop(1, "stage1")], **EACH_STEP)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert trainer.args.output_dir == str(tmp_path) and trainer.args.metric_for_best_model == "s_avg"


def test_two_stages_of_a_model_that_the_trainer_makes(tmp_path):
    """As for a search over hyper-parameters: stage 2 goes on with the model of stage 1."""
    trainer = make_trainer(tmp_path, None, objective="two_stage", model_init=lambda: make(backbone="full"))
    trainer.train()
    expected = make(backbone="full")
    make_trainer(tmp_path / "other", expected, objective="two_stage").train()
    close(weights(trainer.model), weights(expected))
    trainer.train()  # and once more from the start
    close(weights(trainer.model), weights(expected))


def test_a_deployed_model_has_nothing_to_train_in_stage_one(tmp_path):
    model = make(train_head=False)
    before = weights(model)
    make_trainer(tmp_path, model, Rows(labeled=False), objective="two_stage", distillation=1.0).train()
    assert moved(before, weights(model)) == {name for name in before if ".badge_" in name}
    assert not (tmp_path / "stage1").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"distillation": 1.0}, "distillation=1.0"),
        ({"objective": "two_stage"}, "objective='two_stage'"),
        ({"objective": RankingDistillation()}, r"objective=RankingDistillation\(\)"),
    ],
)
def test_nothing_follows_exit_m_where_it_is_alone(options, what, tmp_path):
    problem = (REGRESSION, 1) if "Ranking" in what else (SINGLE, 3)
    model = make(*problem, exit_layers=[3], final_exit="exit")
    with pytest.raises(ValueError, match=f"{what} is not allowed: it trains the exits below exit 3"):
        make_trainer(tmp_path, model, Rows(*problem), **options)
    make_trainer(tmp_path, model, Rows(*problem), max_steps=1).train()


def test_two_stages_are_not_for_exits_that_share_weights(tmp_path):
    model = make(exit_type="past_future", final_exit="exit")
    with pytest.raises(ValueError, match="objective='two_stage' is not allowed with exit_type='past_future'"):
        make_trainer(tmp_path, model, objective="two_stage")


@pytest.mark.parametrize("fields", LINKS)
def test_two_stages_are_not_for_an_exit_m_that_builds_on_the_others(fields, tmp_path):
    """As a joint training leaves it; one that begins anew keeps these weights at zero."""
    model = make(final_exit="exit", **fields)
    make_trainer(tmp_path, model, max_steps=1).train()
    before = weights(model)
    assert any(".3.carry." in name and value.any() for name, value in before.items())
    trainer = make_trainer(tmp_path, model, objective="two_stage")
    with pytest.raises(ValueError, match=r"'two_stage' is not allowed .*exit 3 has learned .*\.3\..*not zero"):
        trainer.train()
    assert not moved(before, weights(model)) and trainer.state.global_step == 0
