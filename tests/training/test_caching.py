"""Cached states: exits and trainings are those of the backbone in evaluation mode, however they are stored."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset as TextDataset
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithPadding, default_data_collator

from badge_peft import CachedStates, MultiExitTrainer, cache_states, collect_exit_logits
from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.training.caching import StatePasses
from badge_peft.training.objectives import Objective
from badge_peft.training.sampling import sampling
from tests.models import CASES, make_badge, make_batch, make_model, needs_safe_torch_load, one_of_each_kind
from tests.texts import make_tokenizer

from .runs import Rows, Stop, arguments, make, make_trainer, moved, weights

collate = DataCollatorWithPadding(make_tokenizer())
ROUNDING = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
HALF: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 3}


def rows_of(batch):
    """A data set of the rows of a batch, each as long as it is."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [{"input_ids": ids[:n].tolist()} for ids, n in zip(batch["input_ids"], lengths, strict=True)]


def both_ways(model, dtype="float32", **options):
    """The exits of three rows of seven, by the model and by cached states."""
    batch = make_batch(rows=7)
    chosen = torch.tensor([5, 0, 3])
    part = {name: value[chosen] for name, value in batch.items()}
    with torch.no_grad(), cache_states(model, rows_of(batch), dtype=dtype, batch_size=3, **options) as states:
        found = model(**part, cached_states=states, cached_rows=chosen)
    with torch.no_grad():
        return found, model(**part)


# ---------------------------------------------------------------------------------------------------- the same exits


def check(model, dtype="float32", **options):
    found, expected = both_ways(model, dtype, **options)
    scale = expected.exit_logits.abs().max()
    error = (found.exit_logits - expected.exit_logits).abs().max() / scale
    assert error < ROUNDING[dtype]
    if expected.exit_uncertainty is not None:
        assert (found.exit_uncertainty - expected.exit_uncertainty).abs().max() < ROUNDING[dtype]
    return found


@pytest.mark.parametrize("final_exit", ["base_head", "exit"])
@pytest.mark.parametrize("exit_pooling", ["auto", "mean"])
@pytest.mark.parametrize("case", one_of_each_kind(CASES))
def test_every_backbone(case, exit_pooling, final_exit):
    check(make_badge(case, exit_pooling=exit_pooling, final_exit=final_exit, exit_layers=[0, 1, 2]))


@pytest.mark.parametrize("case", ["bert", "modernbert-cls", "deberta-v2"])
@pytest.mark.parametrize("exit_pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("placement", ["block", "ffn", "mhsa", "none"])
def test_every_placement(placement, exit_pooling, case):
    check(make_badge(case, placement=placement, exit_pooling=exit_pooling, bias=True))


@pytest.mark.parametrize("exit_pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("exit_type", ["linear", "pooled", "mha", "residual_mha", "past_future"])
def test_every_exit_type(exit_type, exit_pooling):
    model = make_badge(exit_type=exit_type, exit_pooling=exit_pooling, final_exit="exit", learn_to_exit=True)
    check(model)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_every_type_of_storage(dtype, train_head):
    found = check(make_badge(train_head=train_head, exit_pooling="mean"), dtype)
    if not train_head:  # the logits of a head that is not trained are kept as they are
        expected = both_ways(make_badge(train_head=False), "float32")[1]
        torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("placement", ["block", "none"])
def test_passes_under_autocast(placement):
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = both_ways(make_badge(placement=placement, exit_pooling="mean"), "float16")
    scale = expected.exit_logits.abs().max()
    assert (found.exit_logits - expected.exit_logits).abs().max() / scale < ROUNDING["bfloat16"]


def test_one_position_is_all_that_is_kept_where_one_is_read():
    batch = make_batch(rows=6)
    tokens = int(batch["attention_mask"].sum())
    sizes = {}
    for pooling in ("cls", "mean"):
        for placement in ("block", "none"):
            model = make_badge(placement=placement, exit_pooling=pooling, final_exit="exit")
            with cache_states(model, rows_of(batch)) as states:
                sizes[pooling, placement] = states.nbytes
    each = 32 * 2  # d numbers of two bytes
    assert sizes["cls", "none"] == sizes["mean", "none"] == 6 * 3 * each  # H_1 to H_3
    assert sizes["cls", "block"] == 6 * 6 * each  # H_0 to H_2, and H_{m,F}
    assert sizes["mean", "block"] == tokens * 6 * each


def test_no_block_runs(monkeypatch):
    model, batch = make_badge(), make_batch()
    with cache_states(model, rows_of(batch)) as states:
        for block in model.base_model.wrapped:
            monkeypatch.setattr(block.base_layer, "forward", None)
        model(**batch, cached_states=states, cached_rows=torch.arange(4))


def test_rows_are_found_by_their_texts():
    batch = make_batch(rows=6)
    with cache_states(make_badge(), rows_of(batch)) as states:
        part = {name: value[[4, 0, 5]] for name, value in batch.items()}
        assert states.find(part).tolist() == [4, 0, 5] and states.select([5, 0, 4]).find(part).tolist() == [2, 1, 0]
        others = ({"input_ids": part["input_ids"] + 1}, {"token_type_ids": torch.ones_like(part["input_ids"])})
        for other in (*others, {name: value.flip(1) for name, value in part.items()}):
            assert states.find({**part, **other}) is None


def test_the_model_is_left_as_it_was():
    model = make_badge().train()
    model.base_model.wrapped[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    cache_states(model, rows_of(make_batch())).close()
    assert {name: module.training for name, module in model.named_modules()} == before


# ------------------------------------------------------------------------------------------------ the same trainings

TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "joint": ({}, {}),
    "mean": ({"exit_pooling": "mean"}, {"exit_weights": "linear"}),
    "own final exit": ({"final_exit": "exit", "exit_layers": [0, 2]}, {}),
    "two_stage": ({}, {"objective": "two_stage"}),
    "two_stage full": ({"backbone": "full"}, {"objective": "two_stage"}),  # the second stage alone
    "distilled": ({"train_head": False}, {"distillation": 1.0}),
    "alternating": ({}, {"objective": "alternating"}),
    "gradient_equilibrium": ({"placement": "mhsa"}, {"objective": "gradient_equilibrium"}),
    "past_future": ({"exit_type": "past_future", "final_exit": "exit"}, {"objective": "past_future"}),
    "single_exit": ({"learn_to_exit": True}, {"objective": "single_exit", "depth": 2}),
    "carried logits": ({"carry": "logits", "exit_pooling": "mean", "exit_layers": [0, 1, 2]}, {}),
    "accumulated": ({"exit_type": "mha"}, {"gradient_accumulation_steps": 2}),
    "exit dropout": ({"exit_dropout": 0.3}, {}),
}


def train(path, model, data=None, **options):
    """The losses of the steps."""
    trainer = make_trainer(path, model, data, logging_strategy="steps", logging_steps=1, **{**HALF, **options})
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_the_uncached_one(name, tmp_path):
    fields, options = TRAININGS[name]
    alone, model = make(**fields), make(**fields)
    before = weights(model)
    _, expected = train(tmp_path / "a", alone, **options)
    trainer, found = train(tmp_path / "b", model, cache_states="auto", cache_dtype="float32", **options)
    assert trainer.state_cache["kept"] and trainer.state_cache["where"] == "memory"
    assert len(found) == len(expected) >= 3 and found == pytest.approx(expected, abs=1e-6, rel=1e-5)
    after = weights(alone)
    assert moved(before, after)
    for key, value in weights(model).items():
        torch.testing.assert_close(value, after[key], rtol=1e-4, atol=1e-5)


def test_the_backbone_is_in_evaluation_mode(tmp_path):
    """Dropout that it would have applied is what differs from the uncached training."""
    losses = {}
    for dropout in (0.0, 0.5):
        base = make_model(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        losses[dropout] = train(tmp_path, make_badge(base=base, exit_dropout=0.0), cache_states=True)[1]
        base = make_model(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        losses["uncached", dropout] = train(tmp_path, make_badge(base=base, exit_dropout=0.0))[1]
    assert losses[0.0] == losses[0.5] == pytest.approx(losses["uncached", 0.0], rel=ROUNDING["float16"])
    assert losses["uncached", 0.5] != pytest.approx(losses[0.5], rel=0.02)


@pytest.mark.parametrize("log", [{}, {"eval_strategy": "epoch", **sampling(by_length=True)}], ids=str)
def test_both_stages_read_the_states_of_the_training_rows(log, tmp_path):
    """Stage 2 has its backbone in evaluation mode; the rows of an evaluation have states of their own, and texts."""
    rows, others = (
        TextDataset.from_list([{**row, "label": i % 3, "text": "-"} for i, row in enumerate(rows_of(batch))])
        for batch in (make_batch(rows=8, seed=1), make_batch(rows=8, seed=3))
    )
    found, passes = [], []
    for cached in (False, True):
        model, calls = make(), []
        options = {"cache_states": cached, "cache_dtype": "float32", "data_collator": collate}
        options |= {"eval_dataset": others, "logging_strategy": "steps", "logging_steps": 1, **log, **HALF}
        trainer = make_trainer(tmp_path / str(cached), model, rows, objective="two_stage", **options)
        model.base_model.wrapped[0].base_layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        found.append([e.get("loss", e.get("eval_loss")) for e in trainer.state.log_history if "train_loss" not in e])
        passes.append(len(calls))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert passes[1] <= 6 < passes[0]  # three for each of the two: two of a check, and the one that is kept


@needs_safe_torch_load
@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_training_ends_as_one_that_was_not_interrupted(cached, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "cache_states": cached, "cache_dtype": "float32"}
    whole, broken = make(), make()
    _, expected = train(tmp_path / "a", whole, **options)
    trainer = make_trainer(tmp_path / "b", broken, callbacks=[Stop(4)], **{**HALF, **options})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = make()
    trainer = make_trainer(tmp_path / "b", again, **{**HALF, **options})
    trainer.train(resume_from_checkpoint=True)
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(again)[key], value, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- storage


def test_beyond_the_bound_they_are_in_a_file_that_is_gone_afterwards(tmp_path):
    _, expected = train(tmp_path / "a", make(), cache_states=True)
    trainer, found = train(tmp_path / "b", make(), cache_states=True, cache_memory_gb=0)
    assert found == expected
    assert trainer.state_cache["where"] == str(tmp_path / "b") and trainer.state_cache["bytes"] > 0
    assert list((tmp_path / "b").rglob("*states*")) == []


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_they_are_gone_after_an_error(memory_gb, tmp_path, monkeypatch):
    closed = []
    close = CachedStates.close
    monkeypatch.setattr(CachedStates, "close", lambda states: (closed.append(states.nbytes), close(states)))
    trainer = make_trainer(tmp_path, make(), callbacks=[Stop(1)], cache_states=True, cache_memory_gb=memory_gb, **HALF)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(closed) == 2  # the rows of the check, and all
    assert list(tmp_path.rglob("*states*")) == [] and trainer._cache.training is None


def test_no_room(tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("badge_peft.utils.ragged._new_file", full)
    with pytest.raises(ValueError, match="cache_states=True is not possible: there is no room.*No space left"):
        make_trainer(tmp_path, make(), cache_states=True, cache_memory_gb=0, **HALF).train()
    trainer = make_trainer(tmp_path, make(), cache_states="auto", cache_memory_gb=0, **HALF)
    trainer.train()
    assert "No space left" in trainer.state_cache["reason"]


# -------------------------------------------------------------------------------------------------- what cannot be


class Stream(IterableDataset):
    def __iter__(self):
        return iter([Rows()[i] for i in range(8)])


class Between(EarlyExitPass):
    def before_block(self, number, args, kwargs):
        return args, kwargs


def left_padded():
    data = Rows()
    data.batch = make_batch(rows=8, side="left")
    return data


def huge():
    base = make_model()
    with torch.no_grad():
        base.bert.encoder.layer[1].output.dense.bias.fill_(1e5)
    return make_badge(base=base)


REFUSED = {
    "backbone": (lambda: make(backbone="lora"), Rows, {}, r"the backbone is trained \(backbone='lora'\)"),
    "stream": (make, Stream, {"max_steps": 2}, "the training rows are a stream, or have no input_ids"),
    "left": (make, left_padded, {}, "rows are not padded on the right"),
    "noise": (make, Rows, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha changes the embeddings"),
    "between": (make, Rows, {"objective": Objective(exit_pass=Between)}, "Between changes what goes on between"),
    "overflow": (
        huge,
        Rows,
        {},
        "states are not finite in float16: take another cache_dtype, 'bfloat16' or 'float32'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept(name, tmp_path, caplog):
    model, data, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"cache_states=True is not possible: {message}.*Take 'auto'"):
        make_trainer(tmp_path, model(), data(), cache_states=True, **{**HALF, **options}).train()
    with caplog.at_level(logging.INFO, logger="badge_peft"):
        trainer = make_trainer(tmp_path, model(), data(), cache_states="auto", **{**HALF, **options})
        trainer.train()
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("states are not cached: ")
    assert trainer.state_cache == {"kept": False, "reason": trainer.state_cache["reason"]}
    if name == "overflow":
        assert train(tmp_path, huge(), cache_states=True, cache_dtype="bfloat16")[0].state_cache["kept"]


def test_what_auto_leaves_alone(tmp_path):
    for options, reason in (
        ({"max_steps": 2}, "each row is read once"),
        ({"num_train_epochs": 1}, "each row is read once"),
        ({"data_collator": lambda rows: default_data_collator(rows)}, r"a data_collator that is not known (function)"),
        ({"cache_states": False}, "cache_states=False"),
    ):
        trainer = make_trainer(tmp_path, make(), **{**HALF, "cache_states": "auto", **options})
        trainer.train()
        assert reason in trainer.state_cache["reason"]


def add_mean_of_input(block, args, output):
    if isinstance(output, tuple):  # transformers 4.57
        return (output[0] + args[0].mean(), *output[1:])
    return output + args[0].mean()


def test_a_model_whose_exits_read_something_else(tmp_path):
    model = make_badge()
    model.base_model.wrapped[1].register_forward_hook(add_mean_of_input)
    model.base_model.wrapped[1].badge_exit["default"]["2"].linear.register_forward_hook(
        lambda module, args, output: output + torch.rand(())
    )
    with pytest.raises(ValueError, match="by its states alone the exits of this model would differ by"):
        cache_states(model, rows_of(make_batch()))


# --------------------------------------------------------------------------------------------------- further adapters


def test_another_adapter_on_the_same_texts(tmp_path):
    data = Rows()
    alone, model = make(r=8, exit_layers=[2]), make(r=8, exit_layers=[2])
    _, expected = train(tmp_path, alone, data)
    with cache_states(make(), [data[i] for i in range(8)], dtype="float32", data_collator=default_data_collator) as s:
        trainer, found = train(tmp_path, model, data, cache_states=s)
        assert found == pytest.approx(expected, rel=1e-5) and trainer.state_cache["where"] == "given"
        again = train(tmp_path, make(r=8, exit_layers=[2]), data, cache_states=s)[1]  # they have not been closed
    assert again == found


def test_states_that_do_not_fit(tmp_path):
    data = Rows()
    rows, other = [data[i] for i in range(8)], Rows()
    other.batch["input_ids"][3, 0] += 1
    states = cache_states(make(exit_layers=[1]), rows, data_collator=default_data_collator)
    for model, given, message in (
        (make(), data, "the adapter reads"),
        (make_badge(base=make_model(seed=5), exit_layers=[1]), data, "the states are those of another backbone"),
        (make(exit_layers=[1]), other, "the states are those of other texts"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, model, given, cache_states=states)


def test_some_of_the_rows(tmp_path):
    """As many adapters on a part, and evaluated on another, as one likes."""
    model = make_badge(exit_pooling="mean")
    rows = [{**row, "labels": i % 3} for i, row in enumerate(rows_of(make_batch(rows=9)))]
    del rows[6]["labels"]  # not scored
    chosen = [6, 7, 0, 3]
    with cache_states(model, rows, dtype="float32") as states:
        part = states.select(chosen)
        found = collect_exit_logits(model, [rows[i] for i in chosen], cached_states=part, batch_size=2)
        again = collect_exit_logits(model, [rows[3]], cached_states=part.select([3]))
        part.close()
        whole = collect_exit_logits(model, rows, cached_states=states)
        with pytest.raises(ValueError, match="cached_states are those of other texts"):
            collect_exit_logits(model, [{"input_ids": [5, 6], "labels": 0}], cached_states=states)
    expected = collect_exit_logits(model, rows)
    torch.testing.assert_close(whole.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, whole.logits[[6, 0, 3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.logits, whole.logits[[3]], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels, expected.labels[[6, 0, 3]])


def test_trials_share_the_states(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    collected = []
    original = StatePasses.collect
    monkeypatch.setattr(StatePasses, "collect", lambda *args: collected.append(1) or original(*args))
    options = {"cache_states": "auto", "eval_strategy": "epoch", **HALF}
    trainer = make_trainer(tmp_path, None, model_init=lambda: make(), **options)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"objective": ["joint", "two_stage"][trial.suggest_int("stages", 1, 2) - 1]},
        compute_objective=lambda metrics: metrics["eval_s_avg"],
        direction="maximize",
        n_trials=3,
    )
    assert len(collected) == 1  # the evaluation has the same rows
    assert best.hyperparameters and trainer._cache.training is None


def test_a_trial_may_choose_how_states_are_kept(tmp_path):
    pytest.importorskip("optuna")
    dtypes, kept = ["float16", "float32"], []
    trainer = make_trainer(tmp_path, None, model_init=lambda: make(), cache_states="auto", **HALF)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"cache_dtype": dtypes[trial.number]},
        compute_objective=lambda metrics: kept.append((trainer.args.cache_dtype, trainer.state_cache["dtype"])) or 0.0,
        n_trials=2,
    )
    assert kept == [(dtype, dtype) for dtype in dtypes]


def test_trials_that_train_the_backbone_have_states_of_their_own(tmp_path):
    """The second stage of a trial leaves states behind, which are those of its LoRA."""
    pytest.importorskip("optuna")
    made = []

    def model_init():
        made.append(make(backbone="lora", final_exit="exit"))
        return made[-1]

    options = {**HALF, "cache_states": "auto", "objective": "two_stage", "learning_rate": 0.5}
    trainer = make_trainer(tmp_path, None, model_init=model_init, **options)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"seed": trial.suggest_categorical("seed", [3])},
        compute_objective=lambda metrics: metrics["eval_s_avg"],
        direction="maximize",
        n_trials=2,
    )
    first, second = (weights(model) for model in made[-2:])
    assert any(first[name].any() for name in first if "lora_B" in name)
    assert not moved(first, second)


@pytest.mark.parametrize("labeled", [True, False])
def test_evaluations_of_a_training_read_their_states_too(labeled, tmp_path, monkeypatch):
    made = [make(), make()]
    found = []
    for cached, model in zip((False, True), made, strict=True):
        options = {**HALF, "cache_states": cached, "cache_dtype": "float32", "per_device_eval_batch_size": 3}
        trainer = make_trainer(tmp_path, model, eval_strategy="epoch", metric_for_best_model="a_s_avg", **options)
        trainer.eval_dataset = {"a": Rows(rows=5), "b": Rows(rows=7, labeled=labeled)}
        monkeypatch.setattr("badge_peft.training.preflight.check_evaluation", lambda *args: None)
        trainer.train()
        found.append(
            [{k: v for k, v in e.items() if "_exit_" in k or k.endswith("_loss")} for e in trainer.state.log_history]
        )
        assert trainer._cache.evaluation is None
    for expected, entry in zip(*found, strict=True):
        entry.pop("train_loss", None), expected.pop("train_loss", None)
        assert entry == pytest.approx(expected, rel=1e-5)
    assert sum("eval_a_exit_1" in entry for entry in found[1]) == 3


def test_arguments_of_a_plain_trainer_are_not_needed(tmp_path):
    trainer = MultiExitTrainer(model=make(), args=arguments(tmp_path, **HALF), train_dataset=Rows())
    trainer.train()
    assert trainer.args.cache_states == "auto" and trainer.state_cache["kept"]
    assert trainer.state.total_flos == 0  # of blocks that do not run
    other = make_trainer(tmp_path, make(), **HALF)
    other.train()
    assert other.state.total_flos > 0
