"""BADGE on a model with an active adapter of the adapters library, which is then a part of the backbone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

adapters: Any = pytest.importorskip(
    "adapters", reason="the adapters library, which pins transformers to 4.57, is missing"
)

from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from badge_peft import BadgeConfig, MultiExitTrainer, compile_blocks  # noqa: E402
from badge_peft.early_exit.policies import build_policy  # noqa: E402
from badge_peft.export import OnnxEarlyExitModel, export_onnx  # noqa: E402
from badge_peft.tuner.adapter_file import CONFIG_TENSOR  # noqa: E402
from tests.early_exit.rules import answers, labels_are_safe, mixed_rule  # noqa: E402
from tests.labels import label  # noqa: E402
from tests.models import LABELS, blocks_of, exits_of, make_batch, make_labels, make_model, shake  # noqa: E402

BATCH = make_batch()
# the backbones that both libraries know
CASES = ["bert", "roberta", "xlm-roberta", "electra", "albert", "distilbert", "deberta-v2", "modernbert-cls"]
KINDS = {
    "seq_bn": lambda: adapters.SeqBnConfig(reduction_factor=8),
    "seq_bn_inv": lambda: adapters.SeqBnInvConfig(reduction_factor=8),
    "double_seq_bn": lambda: adapters.DoubleSeqBnConfig(reduction_factor=8),
    "par_bn": lambda: adapters.ParBnConfig(reduction_factor=8),
    "scaled": lambda: adapters.SeqBnConfig(reduction_factor=8, scaling="channel", ln_before=True, ln_after=True),
    "lora": lambda: adapters.LoRAConfig(r=2),
    "dora": lambda: adapters.DoRAConfig(r=2),
    "ia3": lambda: adapters.IA3Config(),
    "lora+seq_bn": lambda: adapters.ConfigUnion(adapters.LoRAConfig(r=2), adapters.SeqBnConfig(reduction_factor=8)),
}
FOREIGN = (".adapters.", ".loras.", ".adapter_fusion_layer.", ".invertible_adapters.")
PLAIN = {"r": 4, "train_head": False}


def prepared(kind: Any = "seq_bn", case="bert", active: Any = "task", names=("task",), fuse=None, **changes):
    """A model with adapters as if trained."""
    model = make_model(case, **changes)
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=KINDS[kind]() if isinstance(kind, str) else kind)
    if fuse:
        model.add_adapter_fusion(fuse)
    model.set_active_adapters(active)
    for part in FOREIGN:
        shake(model, only=part)
    return model.eval()


def on_top(base, adapter_name="default", **fields):
    """Exits as if trained on `base`."""
    torch.manual_seed(0)
    model = get_peft_model(base, BadgeConfig(**{**PLAIN, **fields}), adapter_name=adapter_name).eval()
    shake(model)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(**BATCH).logits


def foreign(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if any(part in n for part in FOREIGN)}


def rows():
    labels = make_labels()
    return [{**{k: v[i] for k, v in BATCH.items()}, "labels": labels[i]} for i in range(4)]


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("case", "kind"),
    # the library has no DoRA for a matrix that is query, key and value in one
    [(c, k) for c in CASES for k in KINDS if (c, k) != ("modernbert-cls", "dora")],
)
def test_full_depth_is_that_of_the_model_and_exits_start_from_its_states(case, kind):
    plain = prepared(kind, case)
    with torch.no_grad():
        expected = plain(**BATCH, output_hidden_states=True)
        assert not torch.allclose(expected.logits, make_model(case)(**BATCH).logits)
    for placement in ("block", "ffn"):
        torch.manual_seed(0)
        config = BadgeConfig(**PLAIN, placement=placement, exit_pooling="cls")
        model = get_peft_model(prepared(kind, case), config).eval()
        exits = exits_of(model, BATCH)
        assert torch.equal(exits[:, -1], expected.logits)
        for m in (2,) if case == "deberta-v2" else (1, 2):  # a convolution follows its block 1
            # W_up is zero yet: H'_m = H_m
            states = expected.hidden_states[m]
            if case.startswith("modernbert"):
                states = plain.model.final_norm(states)
            block = next(block for block in blocks_of(model) if m in block.numbers)
            found = block.own_exit("default", m).linear(states[:, 0])
            torch.testing.assert_close(exits[:, m - 1], found, rtol=1e-4, atol=1e-4)
        shake(model)
        shaken = exits_of(model, BATCH)
        assert torch.equal(shaken[:, -1], expected.logits) and not torch.allclose(shaken[:, 0], exits[:, 0])


def test_the_bypass_reads_what_the_adapter_makes_of_a_block():
    """Written down by hand for a sequential adapter, whose block runs its last norm twice."""
    model = on_top(prepared("seq_bn"), placement="block", exit_layers=[2], exit_pooling="cls")
    with torch.no_grad():
        hidden = prepared("seq_bn")(**BATCH, output_hidden_states=True).hidden_states
    plain = prepared("seq_bn")
    inputs: list[Any] = []
    plain.bert.encoder.layer[1].output.LayerNorm.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    logits_of(plain)
    assert len(inputs) == 2 and not torch.allclose(*inputs)
    block = blocks_of(model)[1]
    bypass, exit_ = block.badge_bypass["default"]["2"], block.own_exit("default", 2)
    with torch.no_grad():
        adjusted = bypass.norm(bypass.bottleneck(hidden[1]) + inputs[-1])
        torch.testing.assert_close(exits_of(model, BATCH)[:, 0], exit_.linear(adjusted[:, 0]))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", ["seq_bn", "double_seq_bn", "par_bn", "lora", "ia3", "lora+seq_bn"])
@pytest.mark.parametrize("case", CASES)
def test_live_is_replay(case, kind, pooling):
    base = prepared(kind, case, **{"n_layers" if case == "distilbert" else "num_hidden_layers": 5})
    model = on_top(base, placement="ffn" if pooling == "cls" else "block", exit_pooling=pooling)
    batch = next(b for b in (make_batch(9, seed=s) for s in range(20)) if labels_are_safe(exits_of(model, b)))
    logits, exits = exits_of(model, batch), [1, 2, 3, 4, 5]
    for rule in (mixed_rule(logits, exits), {"policy": "patience", "patience": 2}, {"policy": "never"}):
        want = build_policy(rule).replay(logits, exits)
        out = model.early_exit_forward(**batch, early_exit_config=rule)
        assert out.exit_layer.tolist() == want.tolist()
        torch.testing.assert_close(out.logits, answers(logits, exits, want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("setup", "fuse"),
    [
        (Stack("one", "two"), None),
        (Average("one", "two", weights=[0.25, 0.75]), None),
        (Fuse("one", "two"), ["one", "two"]),
        (Stack("one", Fuse("one", "two")), ["one", "two"]),
    ],
    ids=str,
)
def test_compositions_that_keep_rows_and_positions(setup, fuse):
    base = prepared(active=setup, names=("one", "two"), fuse=fuse)
    base.requires_grad_(False)  # torch multiplies with weights that take gradients in another order
    expected = logits_of(base)
    model = on_top(base)
    logits = exits_of(model, BATCH)
    assert torch.equal(logits[:, -1], expected)
    rule = mixed_rule(logits, [1, 2, 3])
    out = model.early_exit_forward(**BATCH, early_exit_config=rule)
    want = build_policy(rule).replay(logits, [1, 2, 3])
    assert out.exit_layer.tolist() == want.tolist() and len(set(want.tolist())) > 1
    torch.testing.assert_close(out.logits, answers(logits, [1, 2, 3], want), rtol=1e-4, atol=1e-5)


def test_switched_off_and_taken_off_the_model_is_what_it_was():
    base = prepared()
    expected, names = logits_of(base), list(base.state_dict())
    model = on_top(base)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    unloaded = model.unload()
    assert torch.equal(logits_of(unloaded), expected) and list(unloaded.state_dict()) == names


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("trainer", [Trainer, MultiExitTrainer], ids=label)
@pytest.mark.parametrize("kind", ["seq_bn", "par_bn", "lora", "ia3"])
def test_training_moves_the_exits_and_no_adapter(kind, trainer, tmp_path):
    base = prepared(kind)
    base.train_adapter("task")  # its weights take gradients now
    base.set_active_adapters("task")
    model = get_peft_model(base, BadgeConfig(**PLAIN))
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".badge_" not in n} == set()
    before, ours = foreign(model), {n: p.clone() for n, p in model.named_parameters() if ".badge_" in n}
    expected = logits_of(model.eval())
    arguments = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=0.01, report_to=[], use_cpu=True)
    trainer(model, arguments, train_dataset=rows()).train()
    after = foreign(model)
    assert before and all(torch.equal(before[n], after[n]) for n in before)
    moved = {n for n, p in model.named_parameters() if n in ours and not torch.equal(p, ours[n])}
    assert len(moved) > len(ours) / 2
    assert torch.equal(logits_of(model.eval()), expected)


@pytest.mark.parametrize("kind", ["seq_bn", "lora"])
@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_backbone_says_whether_adapters_are_trained(backbone, kind, tmp_path):
    model = get_peft_model(prepared(kind), BadgeConfig(**PLAIN, backbone=backbone)).train()
    model(**BATCH, labels=make_labels()).loss.backward()
    for name, parameter in model.named_parameters():
        if any(part in name for part in FOREIGN):
            assert parameter.requires_grad == (backbone == "full")
            assert (parameter.grad is not None) == (backbone == "full")
    if backbone == "lora":
        assert any(".lora_B.default" in n and p.grad.any() for n, p in model.named_parameters() if p.grad is not None)
    shake(model, seed=7, only=".default.")  # the exits, and a LoRA of ours
    expected = exits_of(model.eval(), BATCH)
    model.save_pretrained(tmp_path)
    fresh = prepared(kind) if backbone == "full" else model_with_weights(kind, model)
    assert torch.equal(exits_of(PeftModel.from_pretrained(fresh, tmp_path), BATCH), expected)


def model_with_weights(kind, model):
    """A new base with the adapters' weights of `model`."""
    base = prepared(kind)
    weights = {n.replace("base_model.model.", ""): p for n, p in model.state_dict().items()}
    wanted = {n: p for n, p in weights.items() if any(part in n for part in FOREIGN)}
    assert wanted.keys() <= base.state_dict().keys()
    base.load_state_dict(wanted, strict=False)
    return base


# ---------------------------------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("kind", ["seq_bn", "par_bn", "lora", "ia3"])
@pytest.mark.parametrize("case", ["bert", "albert", "distilbert", "modernbert-cls"])
def test_both_save_and_come_back(case, kind, tmp_path):
    model = on_top(prepared(kind, case), adapter_name="exits")
    expected = exits_of(model, BATCH)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "exits" / "adapter_model.safetensors").keys() - {CONFIG_TENSOR}
    assert tensors and all("badge_" in key for key in tensors)
    model.save_adapter(str(tmp_path / "task"), "task", use_safetensors=True)  # through PEFT to the library's own
    plain = prepared(kind, case)
    plain.save_adapter(str(tmp_path / "plain"), "task", use_safetensors=True)
    files = [load_file(tmp_path / name / "adapter.safetensors") for name in ("task", "plain")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[1])

    base = make_model(case)
    adapters.init(base)
    base.load_adapter(str(tmp_path / "task"), set_active=True, use_safetensors=True)
    loaded = PeftModel.from_pretrained(base.eval(), tmp_path / "exits")
    assert torch.equal(exits_of(loaded, BATCH), expected)


@pytest.mark.parametrize("kind", ["seq_bn", "lora"])
def test_an_adapter_is_loaded_below_exits_that_are_there(kind, tmp_path):
    prepared(kind).save_adapter(str(tmp_path), "task", use_safetensors=True)
    base = make_model()
    adapters.init(base)
    model = on_top(base)
    model.base_model.model.load_adapter(str(tmp_path), load_as="second", use_safetensors=True)
    model.base_model.model.set_active_adapters("second")
    assert torch.equal(exits_of(model, BATCH)[:, -1], logits_of(prepared(kind)))


def test_state_dicts_of_a_model_without_exits_still_fit():
    model = on_top(prepared())
    other = prepared()
    shake(other, seed=11, only="")
    model.get_base_model().load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(exits_of(model, BATCH)[:, -1], logits_of(other))
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())  # every name, strictly
    assert torch.equal(exits_of(twin, BATCH), exits_of(model, BATCH))


@pytest.mark.parametrize("backbone", ["frozen", "full"])
@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("task", None),
        (None, "task"),
        ("task", "other"),
        (Stack("task", "other"), "task"),
        (Stack("task", "other"), Stack("other", "task")),
        (Average("task", "other"), Average("task", "other", weights=[0.9, 0.1])),
    ],
    ids=["forgotten", "too-many", "another", "one-of-two", "another-order", "other-weights"],
)
def test_exits_are_not_loaded_on_other_active_adapters(then, now, backbone, tmp_path):
    names = ("task", "other")
    on_top(prepared(active=then, names=names), backbone=backbone).save_pretrained(tmp_path)
    base = prepared(active=now, names=names)
    with pytest.raises(ValueError, match="exits were trained with .* active, here with .*set_active_adapters"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not blocks_of(base)
    base.set_active_adapters(then)
    PeftModel.from_pretrained(base, tmp_path)


def test_exits_are_not_loaded_on_the_plain_model(tmp_path):
    on_top(prepared()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="exits were trained with task of .* active, here with no adapter"):
        PeftModel.from_pretrained(make_model(), tmp_path)


@pytest.mark.parametrize("fuse", [Fuse("one", "two"), Fuse("one", "two", name="mix")], ids=["unnamed", "named"])
def test_another_fusion_of_the_same_adapters_is_noticed(fuse, tmp_path):
    given = {"active": fuse, "names": ("one", "two"), "fuse": fuse}
    on_top(prepared(**given)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(prepared(**given), tmp_path)
    base = prepared(**given)
    shake(base, seed=12, only=".adapter_fusion_layer.")
    with pytest.raises(ValueError, match=r"another backbone: the weight .*\.adapter_fusion_layer\."):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("kind", ["seq_bn", "par_bn", "lora"])
def test_an_adapter_of_that_name_with_other_weights_is_noticed(kind, tmp_path):
    on_top(prepared(kind)).save_pretrained(tmp_path)
    base = prepared(kind)
    for part in FOREIGN:
        shake(base, seed=12, only=part)
    with pytest.raises(ValueError, match=r"another backbone: the weight .*\.task\."):
        PeftModel.from_pretrained(base, tmp_path)


# ------------------------------------------------------------------------------------------------------ flexible heads


def flexible(head="classification", layers=1, **fields):
    torch.manual_seed(0)
    model = adapters.AutoAdapterModel.from_config(make_model().config)
    model.add_adapter("task", config=KINDS["seq_bn"]())
    if head:
        getattr(model, f"add_{head}_head")("task", layers=layers, **fields)
    model.set_active_adapters("task")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("final_exit", ["base_head", "exit"])
@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ("classification", {"num_labels": 4}),
        ("classification", {"num_labels": 5, "layers": 2}),
        ("classification", {"num_labels": 4, "use_pooler": True}),
        ("classification", {"num_labels": 1}),
        ("classification", {"num_labels": 4, "multilabel": True}),
    ],
    ids=label,
)
def test_a_flexible_head_is_exit_m(head, fields, final_exit, tmp_path):
    expected = logits_of(flexible(head, **fields))
    model = on_top(flexible(head, **fields), final_exit=final_exit)
    exits = exits_of(model, BATCH)
    assert exits.shape == (4, 3, fields["num_labels"])
    assert torch.equal(exits[:, -1], expected) == (final_exit == "base_head")
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    out = model.early_exit_forward(**BATCH, policy="fixed_depth", depth=3)
    torch.testing.assert_close(out.logits, exits[:, -1])
    kind = "multi_label_classification" if "multilabel" in fields else None
    assert model.peft_config["default"].problem_type == kind
    problem = kind or ("regression" if fields["num_labels"] == 1 else "single_label_classification")
    model(**BATCH, labels=make_labels(problem, num_labels=fields["num_labels"])).loss.backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(exits_of(PeftModel.from_pretrained(flexible(head, **fields), tmp_path), BATCH), exits)


@pytest.mark.parametrize("head", [None, "tagging", "masked_lm", "two"])
def test_a_flexible_model_without_a_classifier_is_refused(head):
    if head in (None, "masked_lm"):
        model = flexible(None)
        if head:
            model.add_masked_lm_head("mlm")
    else:
        model = flexible("tagging" if head == "tagging" else "classification", num_labels=3)
    if head == "two":
        model.add_classification_head("other", num_labels=2)
        model.active_head = ["task", "other"]
    with pytest.raises(ValueError, match=r"the active head .* is not allowed.*add_classification_head"):
        get_peft_model(model, BadgeConfig(**PLAIN))
    assert not blocks_of(model)


# ------------------------------------------------------------------------------------------------------------- refused


REFUSED = {
    "prefix tuning": (
        {"kind": lambda: adapters.PrefixTuningConfig()},
        "of type prefix_tuning.*Allowed are bottleneck",
    ),
    "prompt tuning": ({"kind": lambda: adapters.PromptTuningConfig()}, "of type prompt_tuning.*set_active_adapters"),
    "reft": ({"kind": lambda: adapters.LoReftConfig()}, "of type reft.*Allowed are bottleneck"),
    "mam": ({"kind": lambda: adapters.MAMConfig()}, "of type prefix_tuning"),
    "gate": (
        {"kind": lambda: adapters.SeqBnConfig(use_gating=True)},
        "use_gating=True, which is not allowed.*padding too.*use_gating=False",
    ),
    "lora gate": ({"kind": lambda: adapters.LoRAConfig(use_gating=True)}, "use_gating=True, which is not allowed"),
    "no last norm": (
        {"kind": lambda: adapters.SeqBnConfig(original_ln_after=False)},
        "original_ln_after=False, which is not allowed",
    ),
    "parallel": ({"setup": Parallel("one", "two")}, "active setup Parallel is not allowed.*Stack, Fuse, Average"),
    "split": ({"setup": Split("one", "two", splits=4)}, "active setup Split is not allowed"),
    "batch split": ({"setup": BatchSplit("one", "two", batch_sizes=2)}, "active setup BatchSplit is not allowed"),
    "inside": ({"setup": Stack("one", Parallel("one", "two"))}, "active setup Parallel is not allowed"),
    "mhsa": ({"fields": {"placement": "mhsa"}}, "placement='mhsa' is not allowed.*Allowed are block, ffn and none"),
    "mhsa ia3": (
        {"kind": lambda: adapters.IA3Config(), "fields": {"placement": "mhsa"}},
        "placement='mhsa' is not allowed with the active adapter 'one'",
    ),
    "head": (
        {"fields": {"train_head": True}},
        "train_head=True is not allowed.*train_head=False, or final_exit='exit'",
    ),
    "chunks": ({"changes": {"chunk_size_feed_forward": 2}}, "chunk_size_feed_forward=2 is not allowed.*set it to 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changes(case):
    given, message = REFUSED[case]
    setup = given.get("setup", "one")
    kind = given["kind"]() if "kind" in given else "seq_bn"
    model = prepared(kind, active=setup, names=("one", "two"), **given.get("changes", {}))
    modules = [(name, type(module)) for name, module in model.named_modules()]
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, BadgeConfig(**{**PLAIN, **given.get("fields", {})}))
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    if "fields" not in given and "changes" not in given:  # only what is active counts
        model.set_active_adapters(None)
        get_peft_model(model, BadgeConfig(**PLAIN))(**BATCH)


@pytest.mark.parametrize("placement", ["mhsa"])
@pytest.mark.parametrize("kind", ["lora", adapters.SeqBnConfig(mh_adapter=True, output_adapter=False)], ids=label)
def test_mhsa_where_the_feed_forward_part_has_no_adapter(kind, placement):
    torch.manual_seed(0)
    exits = exits_of(get_peft_model(prepared(kind), BadgeConfig(**PLAIN, placement=placement)).eval(), BATCH)
    torch.manual_seed(0)
    expected = exits_of(get_peft_model(prepared(kind), BadgeConfig(**PLAIN, placement="block")).eval(), BATCH)
    torch.testing.assert_close(exits, expected, rtol=1e-4, atol=1e-5)  # W_up is zero: the second pass is the first


def test_a_setup_that_comes_later_is_refused_when_it_is_used():
    model = on_top(prepared(names=("task", "other")))
    before = exits_of(model, BATCH)
    for call in (lambda: model(**BATCH), lambda: model.early_exit_forward(**BATCH)):
        with adapters.AdapterSetup(Parallel("task", "other")), pytest.raises(ValueError, match="setup Parallel"):
            call()
        model.base_model.model.set_active_adapters(Parallel("task", "other"))
        with pytest.raises(ValueError, match="setup Parallel"):
            call()
        model.base_model.model.set_active_adapters("task")
    assert torch.equal(exits_of(model, BATCH), before)
    with adapters.AdapterSetup("other"):
        assert not torch.equal(exits_of(model, BATCH), before)


def test_compiled_blocks_are_refused():
    model = on_top(prepared())
    with pytest.raises(ValueError, match=r"adapters library \(task\) cannot be compiled"):
        compile_blocks(model)
    assert model.base_model.compiled is None


@pytest.mark.parametrize(
    ("case", "given"),
    [
        ("bert", {"active": Fuse("one", "two"), "names": ("one", "two"), "fuse": Fuse("one", "two")}),
        ("roberta", {"kind": "par_bn"}),
        ("electra", {"kind": "seq_bn_inv"}),
        ("distilbert", {"kind": "lora"}),
        ("modernbert-cls", {"kind": "seq_bn"}),
    ],
    ids=label,
)
def test_an_onnx_file_answers_as_the_model(case, given, tmp_path):
    model = on_top(prepared(case=case, **given))
    logits = exits_of(model, BATCH)
    rule = mixed_rule(logits, model.base_model.exit_layers())
    model.set_early_exit_config(rule)
    wanted = model.early_exit_forward(**BATCH)
    assert len(set(wanted.exit_layer.tolist())) > 1
    export_onnx(model, tmp_path / "file")
    found = OnnxEarlyExitModel.from_pretrained(tmp_path / "file", threads=1)(**BATCH)
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    scale = float(logits.abs().max())
    torch.testing.assert_close(torch.tensor(found.logits) / scale, wanted.logits / scale, rtol=0, atol=1e-4)


def test_a_lora_without_an_onnx_form_is_refused_and_exported_when_merged(tmp_path):
    with pytest.raises(ValueError, match="'task' has no ONNX form: .*serve this model with PyTorch"):
        export_onnx(on_top(prepared("ia3", "modernbert-cls")), tmp_path / "file")
    model = on_top(prepared("lora+seq_bn", "modernbert-cls"))
    wanted = model.early_exit_forward(**BATCH)
    with pytest.raises(ValueError, match=r"'task' has no ONNX form: .*merge_adapter\('task'\)"):
        export_onnx(model, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    model.get_base_model().merge_adapter("task")
    export_onnx(model, tmp_path / "file")
    found = OnnxEarlyExitModel.from_pretrained(tmp_path / "file", threads=1)(**BATCH)
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    torch.testing.assert_close(torch.tensor(found.logits), wanted.logits, rtol=1e-3, atol=1e-4)


def test_the_number_of_labels_here_is_that_of_the_models():
    assert on_top(prepared()).peft_config["default"].num_labels == LABELS
