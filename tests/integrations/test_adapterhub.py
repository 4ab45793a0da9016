"""`from_adapterhub`: a parallel adapter's tensors become bypasses, and exits read what it made of each block."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from badge_peft import BadgeBlock
from badge_peft.integrations import from_adapterhub
from tests.labels import label
from tests.models import BLOCKS, HIDDEN, blocks_of, exits_of, make_batch, make_labels, make_model, shake

try:
    import adapters as library
except ImportError:
    library: Any = None  # type: ignore[no-redef]

needs_library = pytest.mark.skipif(
    library is None, reason="the adapters library, which pins transformers to 4.57, is missing"
)
BATCH = make_batch()
# the backbones that both libraries know, whose blocks end in a norm: where their blocks are, and the adapter in one
PLACES = {
    "bert": ("bert.encoder.layer.{}", "output"),
    "roberta": ("roberta.encoder.layer.{}", "output"),
    "xlm-roberta": ("roberta.encoder.layer.{}", "output"),
    "electra": ("electra.encoder.layer.{}", "output"),
    "albert": ("albert.encoder.albert_layer_groups.0.albert_layers.0", "output_adapters"),
    "distilbert": ("distilbert.transformer.layer.{}", "output_adapters"),
    "deberta-v2": ("deberta.encoder.layer.{}", "output"),
}
CONFIG = {
    "is_parallel": True,
    "mh_adapter": False,
    "output_adapter": True,
    "non_linearity": "relu",
    "reduction_factor": 8,
    "original_ln_before": False,
    "original_ln_after": True,
    "scaling": 4.0,
    "leave_out": [],
}
ACTIVATIONS = {
    **{"relu": torch.relu, "gelu": nn.functional.gelu, "leakyrelu": nn.functional.leaky_relu, "tanh": torch.tanh},
    **{"swish": nn.functional.silu, "silu": nn.functional.silu, "linear": lambda x: x},
}


def write(folder, case="bert", weights=None, top=None, prefix=True, **config):
    """A folder as the library's `save_adapter` writes it; its tensors are as if trained."""
    config = {**CONFIG, **config}
    scaling, r = config["scaling"], max(1, int(HIDDEN // config["reduction_factor"]))
    generator = torch.Generator().manual_seed(5)
    place, inside = PLACES[case]
    tensors = {}
    for i in range(1 if case == "albert" else BLOCKS):
        if i in config["leave_out"]:
            continue
        stem = f"{place.format(i)}.{inside}.adapters.task."
        stem = stem if prefix else stem.partition(".")[2]
        shapes = {
            "adapter_down.0.weight": (r, HIDDEN),
            "adapter_down.0.bias": (r,),
            "adapter_up.weight": (HIDDEN, r),
            "adapter_up.bias": (HIDDEN,),
            **({"scaling": (1,) if scaling == "learned" else (HIDDEN,)} if isinstance(scaling, str) else {}),
        }
        tensors.update({stem + n: 0.4 * torch.randn(shape, generator=generator) for n, shape in shapes.items()})
    stored = {"name": "task", "model_type": case, "version": "adapters.1.3.0", "config": config, **(top or {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))
    save_file(weights(tensors) if weights else tensors, folder / "adapter.safetensors")
    return folder


def reads(model, number, states):
    """Logits [B, K] of exit `number` on the states [B, S, d], at the first position."""
    block = next(block for block in blocks_of(model) if number in block.numbers)
    return block.own_exit("default", number).linear(states[:, 0])


def hidden_states(base):
    with torch.no_grad():
        return base(**BATCH, output_hidden_states=True).hidden_states


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("prefix", [True, False], ids=["with head", "encoder alone"])
@pytest.mark.parametrize("non_linearity", ACTIVATIONS)
@pytest.mark.parametrize("scaling", [4.0, 1, 0.3, "learned", "channel"])
def test_a_folder_is_the_formula(scaling, non_linearity, prefix, tmp_path):
    """LN( s (f(H W_down + b) W_up + b') + H_{m,F} ), written down by hand from the file; no library needed."""
    folder = write(tmp_path / "a", prefix=prefix, scaling=scaling, non_linearity=non_linearity, reduction_factor=5)
    base = make_model()
    model = from_adapterhub(folder, base, train_head=False, exit_pooling="cls", final_exit="exit")
    config = model.peft_config["default"]
    assert (config.placement, config.r, config.bias) == ("ffn", HIDDEN // 5, True)
    tensors = load_file(folder / "adapter.safetensors")
    plain = make_model()
    states = hidden_states(plain)
    exits = exits_of(model, BATCH)
    for i, layer in enumerate(plain.bert.encoder.layer):
        seen: dict[str, Any] = {}
        layer.attention.output.register_forward_hook(lambda m, args, out, seen=seen: seen.update(mha=out))
        layer.output.LayerNorm.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(sum=args[0]))
        hidden_states(plain)
        stem = f"{'bert.' if prefix else ''}encoder.layer.{i}.output.adapters.task."
        part = {key.removeprefix(stem): value for key, value in tensors.items() if key.startswith(stem)}
        inner = ACTIVATIONS[non_linearity](seen["mha"] @ part["adapter_down.0.weight"].T + part["adapter_down.0.bias"])
        up = inner @ part["adapter_up.weight"].T + part["adapter_up.bias"]
        scale = part["scaling"] if isinstance(scaling, str) else scaling
        with torch.no_grad():
            expected = layer.output.LayerNorm.forward(up * scale + seen["sum"])
        assert not torch.allclose(expected, states[i + 1], atol=1e-2)
        torch.testing.assert_close(exits[:, i], reads(model, i + 1, expected), rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize("source", ["folder", "model", "model without head", "auto model"])
@pytest.mark.parametrize(
    "fields", [{}, {"scaling": "channel", "non_linearity": "gelu", "reduction_factor": 3}], ids=label
)
@pytest.mark.parametrize("case", PLACES)
def test_exits_read_what_the_library_makes_of_each_block(case, fields, source, tmp_path):
    """The library's own forward of each block with the adapter in it, given the states of the plain model."""
    model = make_model(case)
    library.init(model)
    model.add_adapter("task", config=library.ParBnConfig(**fields))
    model.set_active_adapters("task")
    shake(model, only=".adapters.")
    given: Any = model
    if source == "folder":
        model.save_adapter(str(tmp_path), "task", use_safetensors=True)
        given = str(tmp_path)
    elif source == "model without head":
        given = model.base_model
    elif source == "auto model":
        given = library.AutoAdapterModel.from_config(model.config)
        given.add_adapter("task", config=library.ParBnConfig(**fields))
        given.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." in k}, strict=False)

    badge = from_adapterhub(given, make_model(case), exit_pooling="cls", final_exit="exit", train_head=False).eval()
    inputs: list[Any] = []
    outputs: list[Any] = []
    record = lambda m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    plain = make_model(case)
    for block in unique(blocks_in(plain, case)):
        block.register_forward_pre_hook(record, with_kwargs=True)
    hidden_states(plain)
    assert len(inputs) == BLOCKS

    states = iter(inputs)

    def replace(module, args, kwargs):
        new = next(states)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    for block in unique(blocks_in(model, case)):
        block.register_forward_pre_hook(replace, with_kwargs=True)
        block.register_forward_hook(lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    hidden_states(model)
    exits = exits_of(badge, BATCH)
    untouched = hidden_states(make_model(case))
    for m, output in enumerate(outputs, start=1):
        torch.testing.assert_close(exits[:, m - 1], reads(badge, m, output), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(output, untouched[m], atol=1e-2)


def blocks_in(model, case):
    return [model.get_submodule(PLACES[case][0].format(i)) for i in range(BLOCKS)]


def unique(modules):
    return list(dict.fromkeys(modules))


@pytest.mark.parametrize("case", PLACES)
def test_full_depth_is_the_base_models_and_the_rest_is_an_adapter_like_any_other(case, tmp_path):
    base = make_model(case)
    expected = base(**BATCH).logits
    model = from_adapterhub(write(tmp_path / "a", case), base, train_head=False, adapter_name="exits")
    assert not model.training
    exits = exits_of(model, BATCH)
    assert torch.equal(exits[:, -1], expected)
    bypasses = [b.badge_bypass["exits"] for b in blocks_of(model) if "exits" in b.badge_bypass]
    assert [m for block in bypasses for m in block] == ["1", "2"]  # no exit of ours at block M
    model.save_pretrained(tmp_path)
    assert torch.equal(exits_of(PeftModel.from_pretrained(make_model(case), tmp_path / "exits"), BATCH), exits)
    model.train()(**BATCH, labels=make_labels()).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(".up.bias" in name for name in grads) and all(".badge_" in name for name in grads)


def test_blocks_that_were_left_out_start_from_their_own_states(tmp_path):
    folder = write(tmp_path / "a", leave_out=[0])
    model = from_adapterhub(folder, make_model(), exit_pooling="cls", train_head=False)
    states = hidden_states(make_model())
    exits = exits_of(model, BATCH)
    torch.testing.assert_close(exits[:, 0], reads(model, 1, states[1]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(exits[:, 1], reads(model, 2, states[2]), atol=1e-2)


@pytest.mark.parametrize("prefix", [True, False], ids=["with head", "encoder alone"])
def test_a_base_without_a_head(prefix, tmp_path):
    fields = {"final_exit": "exit", "exit_pooling": "cls"}
    folder = write(tmp_path / "a", prefix=prefix)
    found = from_adapterhub(folder, make_model().bert, num_labels=3, **fields)
    for block, other in zip(blocks_of(found), blocks_of(from_adapterhub(folder, make_model(), **fields)), strict=True):
        assert torch.equal(*(one.badge_bypass["default"][str(one.numbers[0])].up.weight for one in (block, other)))


def test_the_library_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "adapters", None)  # importing it is an error now
    model = from_adapterhub(str(write(tmp_path / "a")), make_model())
    assert model.peft_config["default"].placement == "ffn"


# ------------------------------------------------------------------------------------------------------------- refused


def without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def widen(tensors):
    return {
        k: torch.cat([v, v], dim=1 if "down.0.weight" in k else 0) if "bias" not in k else v
        for k, v in tensors.items()
    }


def two_widths(tensors):
    cut = {"adapter_down.0.weight": 0, "adapter_down.0.bias": 0, "adapter_up.weight": 1}
    for key in [key for key in tensors if ".layer.2." in key]:
        name = next((name for name in cut if key.endswith(name)), None)
        if name:
            tensors[key] = tensors[key].narrow(cut[name], 0, 2).contiguous()
    return tensors


REFUSED = {
    "sequential": ({"is_parallel": False}, "is_parallel=False of the adapter 'task'.*sequential.*config='par_bn'"),
    "attention": ({"mh_adapter": True}, "mh_adapter=True .* must be False: .*not after the attention"),
    "attention alone": ({"output_adapter": False}, "output_adapter=False .* must be True"),
    "cross": ({"cross_adapter": True}, "cross_adapter=True"),
    "norm before": ({"ln_before": True}, "ln_before=True .*no norm inside"),
    "norm after": ({"ln_after": True}, "ln_after=True .*no norm inside"),
    "gate": ({"use_gating": True}, "use_gating=True .*a bypass has no gate"),
    "compacter": ({"phm_layer": True}, "phm_layer=True .*plain matrices"),
    "invertible": ({"inv_adapter": "nice"}, "inv_adapter='nice' .*embeddings"),
    "no last norm": ({"original_ln_after": False}, "original_ln_after=False"),
    "activation": ({"non_linearity": "gelu_new"}, "non_linearity='gelu_new' .* must be one of relu, gelu"),
    "scaling": ({"scaling": "half"}, "scaling='half' .* must be a number, learned, channel"),
    "scaling by nothing": ({"scaling": float("nan")}, "scaling=nan .* must be a number, learned, channel"),
    "not finite": ({"weights": lambda t: {k: v / 0 for k, v in t.items()}}, "NaN or infinite in block 1"),
    "lora": ({"architecture": "lora"}, "architecture='lora', which is not allowed: only a bottleneck"),
    "union": ({"architecture": "union"}, "architecture='union'"),
    "config by name": ({"top": {"config": "par_bn"}}, "architecture='par_bn'"),
    "old": ({"top": {"version": None}}, "no version: .*adapter-transformers.*use_safetensors=True"),
    "not theirs": ({"top": {"model_type": None}}, "not of the adapters library.*PeftModel.from_pretrained"),
    "other backbone": ({"top": {"model_type": "roberta"}}, "model_type='roberta', and base_model of 'bert'"),
    "other size": ({"weights": widen}, f"base_model has hidden_size={HIDDEN}: give the model that"),
    "several widths": (
        {"weights": two_widths},
        r"reduction_factor=8 .* bottlenecks of \[2, 4\].*one reduction_factor",
    ),
    "no weights": ({"weights": lambda t: {"x": torch.zeros(1)}}, "holds no tensor of a bottleneck"),
    "half a block": ({"weights": without("layer.1.output.adapters.task.adapter_up.bias")}, "in block 2, not"),
    "a block less": ({"weights": without("layer.1")}, "no tensors for block 2, which its leave_out=.*damaged"),
    "elsewhere": (
        {"weights": lambda t: {**t, "bert.pooler.adapters.task.adapter_up.bias": torch.zeros(1)}},
        "has bert.pooler.adapters.task.adapter_up.bias, which is in no block",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changes(case, tmp_path):
    given, message = REFUSED[case]
    base = make_model()
    with pytest.raises(ValueError, match=message):
        from_adapterhub(write(tmp_path / "a", **given), base)
    assert not any(isinstance(module, BadgeBlock) for module in base.modules())
    assert all(p.requires_grad for p in base.parameters())


def test_folders_that_hold_no_such_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter of the adapters library: it has no adapter_config.json"):
        from_adapterhub(tmp_path, make_model())
    folder = write(tmp_path / "a")
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_adapter.bin\).*use_safetensors=True\)"):
        from_adapterhub(folder, make_model())
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(ValueError, match=r"has no adapter.safetensors"):
        from_adapterhub(folder, make_model())
    (folder / "adapter.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="adapter.safetensors is damaged"):
        from_adapterhub(folder, make_model())
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        from_adapterhub(folder, make_model())


def test_fields_that_the_adapter_says(tmp_path):
    folder, model = write(tmp_path / "a"), make_model()
    for field, value in {"placement": "block", "r": 4, "activation": "relu", "bias": True}.items():
        with pytest.raises(ValueError, match=rf"{field}=.* is not allowed here: the adapter says it"):
            from_adapterhub(folder, model, **{field: value})


def test_models_that_do_not_fit(tmp_path):
    folder = write(tmp_path / "a", top={"model_type": "modernbert"})
    with pytest.raises(ValueError, match="whose blocks end in a norm"):
        from_adapterhub(folder, make_model("modernbert-cls"))
    with pytest.raises(ValueError, match=r"no model of the adapters library: give one that adapters.init\(model\)"):
        from_adapterhub(make_model(), make_model())


@needs_library
def test_which_adapter_of_a_model(tmp_path):
    model = make_model()
    library.init(model)
    with pytest.raises(ValueError, match="name=None is not allowed: the model has no adapter"):
        from_adapterhub(model, make_model())
    for name, config in (("one", "par_bn"), ("two", "par_bn"), ("seq", "seq_bn")):
        model.add_adapter(name, config=config)
        shake(model, only=f".adapters.{name}.")
    with pytest.raises(ValueError, match="name=None is not allowed: the model has 'one', 'two', 'seq'"):
        from_adapterhub(model, make_model())
    with pytest.raises(ValueError, match="is_parallel=False of the adapter 'seq'"):
        from_adapterhub(model, make_model(), name="seq")
    torch.manual_seed(0)
    first = from_adapterhub(model, make_model(), name="one")
    torch.manual_seed(0)
    assert not torch.allclose(
        exits_of(first, BATCH), exits_of(from_adapterhub(model, make_model(), name="two"), BATCH)
    )
    model.set_active_adapters("one")
    with pytest.raises(ValueError, match="active adapter 'one', and would run it a second time"):
        from_adapterhub(model, model, name="one")
    assert not blocks_of(model)
