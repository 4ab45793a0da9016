"""`early_exit_forward`: which config counts, what it refuses, and that a call leaves nothing behind."""

from __future__ import annotations

import copy
import warnings
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertForSequenceClassification

from badge_peft import BadgeConfig, EarlyExitConfig, early_exit_forward
from badge_peft.early_exit import readers as run_module
from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.early_exit.policies import build_policy
from badge_peft.tuner.context import current_pass
from tests.models import CASES, exits_of, make_badge, make_batch, make_model, shake

from .reference import SINGLE
from .rules import answers, fields_of, mixed_rule, watched_exits

ROWS = 9
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def at(depth):
    return {"policy": "fixed_depth", "depth": depth}


def depth_of(model, **kwargs):
    """The one block at which all rows of a batch stop."""
    (depth,) = set(model.early_exit_forward(**make_batch(ROWS), **kwargs).exit_layer.tolist())
    return depth


def make(blocks=3, case="bert", **fields):
    return make_badge(case, base=make_model(case, num_hidden_layers=blocks), **fields)


@pytest.fixture
def model():
    return make(6)


@pytest.fixture
def rule(model):
    """One by which some rows stop early and some never."""
    return mixed_rule(exits_of(model, make_batch(ROWS)), model.exit_layers())


# ------------------------------------------------------------------------------------------------- which config counts


class TestConfig:
    def test_the_adapters_own(self):
        assert depth_of(make(early_exit=at(2))) == 2
        assert depth_of(make(early_exit=EarlyExitConfig(**at(1)))) == 1

    @pytest.mark.parametrize("kind", [dict, EarlyExitConfig])
    def test_the_argument_wins_over_it(self, kind):
        assert depth_of(make(early_exit=at(2)), early_exit_config=kind(**at(1))) == 1

    def test_the_argument_replaces_it_whole(self):
        model = make(early_exit={"min_exit": 3})
        assert depth_of(model, policy="max_prob", threshold=0.0) == 1
        config = {"policy": "divergence", "divergence": "label", "threshold": 2.0}
        assert depth_of(model, early_exit_config=config) == 2

    @pytest.mark.parametrize("own", [at(2), {"threshold": 0.2, "max_exit": 2}, {"policy": "never", "max_exit": 2}])
    def test_never_is_full_depth_whatever_is_stored(self, own):
        model, batch = make(early_exit=own), make_batch(ROWS)
        out = model.early_exit_forward(**batch, policy="never")
        assert set(out.exit_layer.tolist()) == {3}
        assert torch.equal(out.logits, model(**batch).logits)
        assert depth_of(model, policy="never", max_exit=1) == 1

    def test_another_policy_takes_nothing_over(self, model):
        """A divergence of 0.2 is no probability, at which every row would stop."""
        stored, own = {"threshold": 0.2, "min_exit": 2, "max_exit": 4}, exits_of(model, make_batch(ROWS))
        for config in (stored, EarlyExitConfig(**stored)):
            model.set_early_exit_config(config)
            out = model.early_exit_forward(**make_batch(ROWS), policy="max_prob")
            want = build_policy(policy="max_prob").replay(own, model.exit_layers())
            assert out.exit_layer.tolist() == want.tolist()
            with pytest.raises(ValueError, match="policy='fixed_depth' needs depth"):
                model.early_exit_forward(**make_batch(ROWS), policy="fixed_depth")
            assert depth_of(model, policy="divergence", threshold=1e-9) == 4  # the same one keeps the rest

    def test_overrides_win_over_both_and_change_neither(self):
        model = make(early_exit=at(2))
        config = EarlyExitConfig(**at(1))
        assert depth_of(model, early_exit_config=config, depth=3) == 3
        assert depth_of(model, depth=1) == 1
        assert config == EarlyExitConfig(**at(1))
        assert model.get_early_exit_config() == EarlyExitConfig(**at(2))
        assert depth_of(model) == 2

    @pytest.mark.parametrize("field", sorted(EarlyExitConfig.__dataclass_fields__))
    def test_every_field_is_an_override(self, model, field):
        values = {"policy": "patience", "divergence": "js", "window": "consecutive", "threshold": 0.2, "patience": 1}
        values |= {
            "min_exit": 2,
            "max_exit": 4,
            "depth": 1,
            "top_k": 3,
            "decide_every": 2,
            "exit_layers": [2, 4],
            "temperature": [1.0] * 6,
        }
        values |= {"parameters": {}, "calibration": {}}
        config = {} if field == "policy" else {"policy": "max_prob" if field == "temperature" else "divergence"}
        batch = make_batch(ROWS)
        found = model.early_exit_forward(**batch, early_exit_config=config, **{field: values[field]})
        written = model.early_exit_forward(**batch, early_exit_config={**config, field: values[field]})
        assert found.exit_layer.tolist() == written.exit_layer.tolist()

    def test_without_any_it_is_the_default(self, model):
        logits, exits = exits_of(model, make_batch(ROWS)), model.exit_layers()
        assert model.get_early_exit_config() == EarlyExitConfig()
        out = model.early_exit_forward(**make_batch(ROWS))
        assert out.exit_layer.tolist() == build_policy().replay(logits, exits).tolist()

    def test_set_and_get(self, model):
        config = EarlyExitConfig(**at(2))
        model.set_early_exit_config(config)
        assert depth_of(model) == 2 and model.get_early_exit_config() == config
        model.set_early_exit_config(at(4))
        assert depth_of(model) == 4
        for found in (config, model.get_early_exit_config()):
            with pytest.raises(FrozenInstanceError):
                found.depth = 1
        assert depth_of(model) == 4
        model.set_early_exit_config(None)
        assert model.get_early_exit_config() == EarlyExitConfig()
        for call in (model.get_early_exit_config, lambda name: model.set_early_exit_config(None, name)):
            with pytest.raises(ValueError, match="no adapter 'other'"):
                call("other")

    def test_it_is_saved_with_the_adapter(self, model, tmp_path):
        model.set_early_exit_config(at(2))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_model("bert", num_hidden_layers=6), tmp_path).eval()
        batch = make_batch(ROWS)
        first, second = model.early_exit_forward(**batch), loaded.early_exit_forward(**batch)
        assert second.exit_layer.tolist() == [2] * ROWS
        assert torch.equal(first.logits, second.logits)


# ----------------------------------------------------------------------------------------------------- what is refused


class TestErrors:
    def test_a_model_without_badge(self):
        with pytest.raises(ValueError, match="BertForSequenceClassification carries no BADGE adapter"):
            early_exit_forward(make_model("bert"), **make_batch())
        lora = get_peft_model(make_model("bert"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        with pytest.raises(ValueError, match="PeftModelForSequenceClassification carries no BADGE adapter"):
            early_exit_forward(lora, **make_batch())

    def test_inputs_without_rows(self, model):
        for call in (model, model.early_exit_forward):
            with pytest.raises(ValueError, match=r"inputs have shape \[3\], and the model needs \[batch, sequence\]"):
                call(input_ids=torch.tensor([5, 6, 7]))

    @pytest.mark.parametrize(
        ("name", "value"),
        [("output_hidden_states", True), ("output_attentions", True)],
    )
    def test_arguments_without_a_meaning(self, model, name, value):
        with pytest.raises(ValueError, match=f"{name} is not supported by early_exit_forward"):
            model.early_exit_forward(**make_batch(ROWS), **{name: value})
        assert depth_of(model, **at(2), **{name: False}) == 2

    def test_a_disabled_adapter(self, model):
        with model.disable_adapter(), pytest.raises(ValueError, match="adapter is disabled"):
            model.early_exit_forward(**make_batch())
        assert depth_of(model, **at(2)) == 2

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"policy": "fixed_depth", "depth": 7}, "depth=7 is not allowed.*[1, 2, 3, 4, 5, 6]"),
            ({"policy": "fixed_depth", "depth": 0}, "depth=0 is not allowed"),
            ({"min_exit": 7}, "min_exit=7 is not allowed: the model has 6 blocks"),
            ({"max_exit": 7}, "max_exit=7 is not allowed: the model has 6 blocks"),
            ({"max_exit": 0}, "max_exit=0 is not allowed: the first exit is at block 1"),
            ({"patience": 0}, "patience=0"),
            ({"threshold": float("nan")}, "threshold=nan"),
            ({"policy": "dge"}, "policy='dge'"),
            ({"policy": "learned"}, "learn_to_exit"),
        ],
    )
    @pytest.mark.parametrize("how", ["override", "argument", "adapter"])
    def test_a_config_that_does_not_fit(self, model, fields, message, how):
        ran = []
        model.base_model.model.bert.register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            if how == "adapter":
                model.set_early_exit_config(fields)
                model.early_exit_forward(**make_batch())
            elif how == "argument":
                model.early_exit_forward(**make_batch(), early_exit_config=fields)
            else:
                model.early_exit_forward(**make_batch(), **fields)
        assert not ran or "learned" in str(fields)
        model.set_early_exit_config(None)
        assert depth_of(model, **at(2)) == 2

    @pytest.mark.parametrize("case", sorted(CASES))
    def test_a_misspelt_field(self, case):
        """Models take `**kwargs`, and would swallow it."""
        with pytest.raises(ValueError, match="treshold, tau is neither.*policy, divergence, threshold"):
            make_badge(case).early_exit_forward(**make_batch(), treshold=0.1, tau=None)

    @pytest.mark.parametrize("config", ["divergence", 0.2, ["never"]])
    def test_a_config_of_another_type(self, model, config):
        with pytest.raises(ValueError, match="must be an EarlyExitConfig, a dict or None"):
            model.early_exit_forward(**make_batch(), early_exit_config=config)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_a_mask_for_all_rows(pooling):
    """transformers takes it where nothing is padding."""
    model, ids = make(exit_pooling=pooling), make_batch(ROWS)["input_ids"]
    mask = torch.ones(1, ids.shape[1]).long()
    one, each = ({"input_ids": ids, "attention_mask": x} for x in (mask, mask.expand(ROWS, -1)))
    logits = exits_of(model, each)
    assert torch.equal(exits_of(model, one), logits)
    rule = mixed_rule(logits, model.base_model.exit_layers())
    found, want = (model.early_exit_forward(**inputs, **rule) for inputs in (one, each))
    assert torch.equal(found.logits, want.logits) and len(set(want.exit_layer.tolist())) > 1


def test_training_mode_warns(model, rule):
    model.train()
    with pytest.warns(UserWarning, match=r"training mode.*model.eval\(\)") as caught:
        early_exit_forward(model, **make_batch(), **rule)
    assert caught[0].filename == __file__  # it points at the call
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.early_exit_forward(**make_batch(), **rule)


# ------------------------------------------------------------------------------------------------------ what comes out


def test_the_output(model, rule):
    out = model.early_exit_forward(**make_batch(ROWS), **rule)
    assert list(out) == ["logits", "exit_layer", "non_finite"]
    assert out.logits.shape == (ROWS, 3) and out.exit_layer.shape == (ROWS,)
    assert out.logits.dtype == torch.float32 and out.exit_layer.dtype == torch.long
    assert not out.logits.requires_grad
    with torch.inference_mode():
        again = model.early_exit_forward(**make_batch(ROWS), **rule)
    assert torch.equal(again.logits, out.logits) and torch.equal(again.exit_layer, out.exit_layer)


def test_function_and_method_agree(model, rule):
    batch = make_batch(ROWS)
    calls = [
        model.early_exit_forward(**batch, **rule),
        model.base_model.early_exit_forward(**batch, **rule),
        early_exit_forward(model, **batch, **rule),
        early_exit_forward(model.base_model, **batch, **rule),
        early_exit_forward(model, early_exit_config=rule, **batch),
    ]
    for out in calls[1:]:
        assert torch.equal(out.logits, calls[0].logits) and torch.equal(out.exit_layer, calls[0].exit_layer)
    assert len(calls[0].exit_layer.unique()) > 1


def test_labels_and_what_trainer_adds_are_ignored(model, rule):
    batch = make_batch(ROWS)
    want = model.early_exit_forward(**batch, **rule)
    for more in ({"labels": torch.zeros(ROWS, dtype=torch.long)}, {"labels": torch.full((2,), 99)}, {"labels": None}):
        out = model.early_exit_forward(**batch, **rule, **more, return_dict=False, num_items_in_batch=3)
        assert torch.equal(out.logits, want.logits) and torch.equal(out.exit_layer, want.exit_layer)


OTHER_INPUTS = [
    *(("bert", name) for name in ("token_type_ids", "position_ids", "inputs_embeds", "no mask")),
    *((case, "position_ids") for case in ("modernbert-cls", "mpnet", "roberta")),
    *((case, name) for case in ("modernbert-mean", "deberta-v2", "albert") for name in ("inputs_embeds", "no mask")),
]


@pytest.mark.parametrize(("case", "name"), OTHER_INPUTS)
def test_other_inputs_go_with_their_rows(case, name):
    model = make(5, case)
    batch = make_batch(ROWS)
    rows = torch.arange(ROWS).unsqueeze(1)
    if name == "token_type_ids":
        batch[name] = (torch.arange(8) + rows) % 2
    elif name == "position_ids":
        batch[name] = torch.arange(8) + 2 + rows
    elif name == "inputs_embeds":
        batch[name] = model.get_input_embeddings()(batch.pop("input_ids")).detach() * 1.5
    else:
        del batch["attention_mask"]
    logits, exits = exits_of(model, batch), model.exit_layers()
    rule = mixed_rule(logits, exits)
    out = model.early_exit_forward(**batch, **rule)
    want = build_policy(rule).replay(logits, exits)
    assert out.exit_layer.tolist() == want.tolist()
    torch.testing.assert_close(out.logits, answers(logits, exits, want), **CLOSE)


@pytest.mark.parametrize(
    ("rule", "transfers"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"decide_every": 2}, [2, 2]),
        ({"decide_every": 3}, [3]),
        ({"decide_every": 6}, []),
        ({"min_exit": 4}, [4, 1]),
        ({"policy": "entropy", "decide_every": 2}, [1, 1]),
        ({"policy": "never"}, []),
        (at(4), []),
    ],
)
def test_logits_come_to_the_host_once_a_decision(model, rule, transfers, monkeypatch):
    """On a GPU each of these waits for the device. The last exit needs no decision."""
    found = []
    whole = run_module._on_host
    monkeypatch.setattr(run_module, "_on_host", lambda values: found.append(len(values)) or whole(values))
    model.early_exit_forward(**make_batch(ROWS), **{"threshold": 1e-9, **rule})
    assert found == transfers


# ------------------------------------------------------------------------------------------------ nothing stays behind


def test_a_call_changes_nothing_for_the_next(model, rule):
    batch = make_batch(ROWS)
    before = exits_of(model, batch)
    state = copy.deepcopy(model.state_dict())
    first = model.early_exit_forward(**batch, **rule)
    model.early_exit_forward(**make_batch(3, length=5, seed=9), policy="never")
    model.early_exit_forward(**make_batch(17), **at(1))
    second = model.early_exit_forward(**batch, **rule)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.exit_layer, second.exit_layer)
    assert torch.equal(exits_of(model, batch), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert current_pass() is None


def test_the_inputs_are_not_changed(model, rule):
    batch = make_batch(ROWS)
    before = {name: value.clone() for name, value in batch.items()}
    model.early_exit_forward(**batch, **rule)
    assert all(torch.equal(batch[name], before[name]) for name in before)


@pytest.mark.parametrize("block", [0, 2, 5])
def test_after_an_exception_the_next_call_works(model, rule, block):
    batch = make_batch(ROWS)
    want, full = model.early_exit_forward(**batch, **rule), exits_of(model, batch)

    def fail(module, args):
        raise KeyboardInterrupt("stop")

    handle = model.base_model.wrapped[block].base_layer.attention.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.early_exit_forward(**batch, policy="never")
    assert current_pass() is None
    handle.remove()
    out = model.early_exit_forward(**batch, **rule)
    assert torch.equal(out.logits, want.logits) and torch.equal(out.exit_layer, want.exit_layer)
    assert torch.equal(exits_of(model, batch), full)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("final_exit", ["base_head", "exit"])
def test_a_backbone_in_bfloat16(final_exit, own):
    """PEFT keeps the adapter in float32 (`own`) or in the backbone's precision; live and replay agree in both, and the
    precision of the answer does not depend on who gives it."""
    base = make_model("bert", num_hidden_layers=6).to(torch.bfloat16)
    config = BadgeConfig(r=4, final_exit=final_exit, placement="ffn")
    model = get_peft_model(base, config, autocast_adapter_dtype=own).eval()
    shake(model)
    dtype = torch.float32 if own else torch.bfloat16
    batch = make_batch(ROWS)
    logits, exits = exits_of(model, batch), model.exit_layers()
    assert logits.dtype == dtype
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits[:, -1])
    for depth in (1, 6):
        out = model.early_exit_forward(**batch, **at(depth))
        assert out.logits.dtype == dtype and out.exit_layer.tolist() == [depth] * ROWS
        assert torch.equal(out.logits, logits[:, depth - 1])
    # whole batches, because rounding to 8 bits is not the same for a batch and for a part of it
    for row in range(ROWS):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        logits = exits_of(model, one)
        for rule in ({"policy": "patience", "patience": 1}, {"threshold": 0.7}, {"policy": "max_prob"}):
            out = model.early_exit_forward(**one, **rule)
            want = build_policy(rule).replay(logits, exits)
            assert out.exit_layer.tolist() == want.tolist()
            assert torch.equal(out.logits, answers(logits, exits, want)) and out.logits.dtype == dtype


def test_two_active_adapters_are_refused():
    model = make(final_exit="exit")
    model.add_adapter("second", BadgeConfig(r=2, final_exit="exit"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"one active adapter, got \['default', 'second'\]"):
        model.early_exit_forward(**make_batch())


def test_a_subclass_whose_forward_names_nothing(rule):
    """Its arguments cannot be told from misspelt fields, so they are passed on."""

    class Quiet(BertForSequenceClassification):
        def forward(self, *args, **kwargs):
            kwargs.pop("note", None)
            return super().forward(*args, **kwargs)

    base = make_model("bert", num_hidden_layers=6)
    quiet = Quiet(base.config).eval()
    quiet.load_state_dict(base.state_dict())
    assert depth_of(make_badge(base=quiet), **at(2), note="hello") == 2


def test_a_new_adapter_follows_the_models_mode(model):
    """Dropout in the exits of an adapter that joins a model in eval() would make them random, with no warning."""
    assert not any(module.training for module in model.base_model.modules())
    model.add_adapter("second", BadgeConfig(r=2, final_exit="exit", exit_dropout=0.9))
    assert not any(module.training for block in model.base_model.wrapped for module in block.badge_exit.modules())
    model.set_adapter("second")
    batch = make_batch(ROWS)
    assert torch.equal(exits_of(model, batch), exits_of(model, batch))
    model.train()
    assert not torch.equal(exits_of(model, batch), exits_of(model, batch))


@pytest.mark.parametrize("policy", ["max_prob", "entropy", "divergence", "patience", "confident_patience"])
def test_rows_stop_at_exit_layers_alone(policy):
    """Live as replayed, and exits that nothing reads are not computed."""
    model, batch = make_badge("bert", make_model("bert", num_hidden_layers=6)), make_batch(rows=9)
    config = EarlyExitConfig(policy=policy, exit_layers=[2, 5])
    logits = model(**batch).exit_logits.detach()
    for threshold in (None, 0.34, 1.0, 1.2):
        asked = EarlyExitConfig.of(config, threshold=threshold)
        with watched_exits(model) as computed:
            found = model.early_exit_forward(**batch, early_exit_config=asked).exit_layer
        assert torch.equal(found, build_policy(asked).replay(logits)) and set(found.tolist()) <= {2, 5, 6}
        assert policy not in ("max_prob", "entropy") or {m for _, m in computed} <= {2, 5}


def test_a_policy_that_never_exits_is_the_base_model():
    """Bit for bit, and without a pass: so it costs what the base model costs."""
    base = make_model("bert")
    model, batch = make_badge("bert", base, train_head=False).eval(), make_batch(rows=5)
    with model.disable_adapter():
        expected = model(**batch).logits
    entered = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyExitPass, "visit", lambda *_: entered.append(1))
        out = model.early_exit_forward(**batch, policy="never")
    assert not entered and torch.equal(out.logits, expected)
    assert out.exit_layer.tolist() == [model.base_model.num_blocks] * 5 and not out.non_finite.any()


# -------------------------------------------------------------------------------------------- what a call may be given


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("exit_type", ["linear", "mha"])
def test_a_mask_by_place_reaches_the_exits(exit_type, pooling) -> None:
    model, batch = make_badge(exit_pooling=pooling, exit_type=exit_type, final_exit="exit"), make_batch()
    with torch.no_grad():
        found = model.base_model(batch["input_ids"], batch["attention_mask"]).exit_logits
    assert torch.equal(found, exits_of(model, batch))
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model.base_model(batch["input_ids"], **batch)


def test_misspelt_tensors() -> None:
    model, batch = make_badge(), make_batch()
    with pytest.raises(ValueError, match="atention_mask is no argument of Bert.*: is attention_mask meant"):
        model.early_exit_forward(input_ids=batch["input_ids"], atention_mask=batch["attention_mask"])


def test_lists_are_no_tensors() -> None:
    model = make_badge()
    for call in (model, model.early_exit_forward):
        with pytest.raises(ValueError, match="inputs are list, and the model needs tensors.*return_tensors='pt'"):
            call(input_ids=[[1, 2]])


def test_a_config_that_does_not_fit_is_refused_when_it_is_set() -> None:
    model = make_badge()
    with pytest.raises(ValueError, match="max_exit=99 is not allowed: the model has 3 blocks"):
        model.set_early_exit_config({"max_exit": 99})
    good = fields_of("agreement", [1, 2, 3], 3, SINGLE)
    some: list[dict[str, Any]] = [{"coefficients": [1, 2, 3]}, {"intercepts": [1]}, {"reference": "x"}]
    some += [{"coefficients": [["a"]] * 3}, {"coefficients": [[1.0], [], [1.0]]}, {"exits": ["1", "2", "3"]}]
    for wrong in (*some, {"exits": None}, {"coefficients": None}, {"intercepts": None}):
        with pytest.raises(ValueError, match="parameters of policy='agreement' are not as calibrate writes them"):
            model.set_early_exit_config({**good, "parameters": {**good["parameters"], **wrong}})
    assert model.get_early_exit_config() == EarlyExitConfig()
    model.set_early_exit_config(good)
    assert model.get_early_exit_config().policy == "agreement"
    with pytest.raises(ValueError, match="EarlyExitConfig has no field 1"):
        EarlyExitConfig.of({1: 2})
