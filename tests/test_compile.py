"""compile_blocks: equal answers to rounding, few compilations over many lengths, and clear errors."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from badge_peft import compile_blocks
from badge_peft.compile import longest_sequence

from .models import CASES, PAD, exits_of, make_badge, make_batch, make_labels, make_model, one_of_each_kind

BATCHES = [make_batch(4, 8), make_batch(3, 5, seed=3), make_batch(1, 7), make_batch(6, 7)]
RULE = {"policy": "entropy", "threshold": 0.6}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(case="bert", blocks=4, **fields):
    layers = "n_layers" if case == "distilbert" else "num_hidden_layers"
    return make_badge(case, base=make_model(case, **({} if case == "albert-inner" else {layers: blocks})), **fields)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


WHOLE = ("bert", "deberta-v2")
COPIES = ("xlm-roberta", "camembert")  # RoBERTa's modeling code under other names: what is compiled is the same


@pytest.mark.parametrize("case", one_of_each_kind(case for case in sorted(CASES) if case not in COPIES))
def test_equal_answers_on_every_backbone(case):
    """In one graph a block (`fullgraph`), with what a placement reads among its results. Compiling takes most of the
    time: all but a few backbones have two blocks and inputs of one bucket."""
    turn = sorted(CASES).index(case)
    blocks, batches = (3, BATCHES) if case in WHOLE else (2, BATCHES[1:3])
    model = make(
        case, blocks, placement=("block", "ffn", "mhsa")[turn % 3], final_exit=("base_head", "exit")[turn % 2]
    )
    full = [exits_of(model, batch) for batch in batches]
    early = [model.early_exit_forward(**batch, **RULE) for batch in batches]
    assert case not in WHOLE or len({int(m) for out in early for m in out.exit_layer}) > 1
    counter = CompileCounterWithBackend("eager")
    compile_blocks(model, buckets=[4, 8], backend=counter, fullgraph=True)
    for batch, logits, want in zip(batches, full, early, strict=True):
        close(exits_of(model, batch), logits)
        out = model.early_exit_forward(**batch, **RULE)
        assert out.exit_layer.tolist() == want.exit_layer.tolist()
        close(out.logits, want.logits)
    assert 0 < counter.frame_count <= 16


def test_many_lengths_and_sizes_are_few_compilations():
    model = make(blocks=2)
    counter = CompileCounterWithBackend("eager")
    compile_blocks(model, buckets=[4, 8], backend=counter)
    for length in (2, 3, 4, 5, 7, 8):
        for rows in (1, 2 + length % 5):
            batch = {"input_ids": torch.randint(5, 99, (rows, length))}
            exits_of(model, batch)
    # by bucket: one row or several; a mask or none (a length that is a bucket); a block with an exit or the last one
    assert counter.frame_count <= 2 * 2 * 2 * 2


def test_what_it_leaves_alone():
    model = make()
    plain, batch = exits_of(model, BATCHES[0]), make_batch(4, 20)
    long = exits_of(model, batch)
    counter = CompileCounterWithBackend("eager")
    handle = compile_blocks(model, buckets=[8], backend=counter)
    assert torch.equal(exits_of(model, batch), long)  # longer than any bucket
    loss = model(**BATCHES[0], labels=torch.zeros(4, dtype=torch.long)).loss  # training
    loss.backward()
    with torch.no_grad():
        states = model(**BATCHES[1], output_hidden_states=True).hidden_states
    assert states[0].shape[1] == 5 and counter.frame_count == 0
    handle.remove()
    assert torch.equal(exits_of(model, BATCHES[0]), plain) and counter.frame_count == 0


def test_inputs_of_every_kind_are_padded():
    model = make()
    batch = {**make_batch(3, 5), "token_type_ids": torch.ones(3, 5, dtype=torch.long)}
    batch["position_ids"] = torch.arange(5).expand(3, -1) + 1
    embeds = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach()}
    del embeds["input_ids"]
    want = exits_of(model, batch)
    compile_blocks(model, buckets=[8], backend="eager")
    handle = model.base_model.compiled
    for inputs in (batch, embeds):
        close(exits_of(model, inputs), want)
    with torch.no_grad():
        padded = handle.pad(batch)
        assert {name: tuple(value.shape) for name, value in padded.items()} == dict.fromkeys(batch, (3, 8))
        assert (padded["input_ids"][:, 5:] == PAD).all() and not padded["attention_mask"][:, 5:].any()
        assert handle.pad({"input_ids": batch["input_ids"]})["attention_mask"].sum() == 15
        odd = {**batch, "attention_mask": torch.ones(3, 1, 5, 5)}
        assert handle.pad(odd) is odd


def test_survivors_are_cut_to_a_bucket():
    model = make(blocks=6)
    shapes = []
    compile_blocks(model, buckets=[4, 8, 11, 16], backend="eager")
    handle = model.base_model.compiled
    whole = handle.run
    handle.run = lambda layer, recorders, length, *rest: (
        shapes.append(length) or whole(layer, recorders, length, *rest)
    )
    batch = make_batch(6, 12)
    surest = exits_of(model, batch)[:, 0].softmax(-1).amax(-1)
    threshold = float(surest[0]) - 1e-4  # at exit 1 the longest row leaves, and whoever is as sure
    out = model.early_exit_forward(**batch, policy="max_prob", threshold=threshold)
    assert out.exit_layer[0] == 1 and out.exit_layer.max() > 1
    assert set(shapes) <= {4, 8, 11, 16} and len(set(shapes)) > 1


def test_threads_share_compiled_blocks():
    model = make(blocks=2)
    batches = [make_batch(3, 8, seed=seed) for seed in range(8)]
    compile_blocks(model, buckets=[8], backend="eager")
    want = [exits_of(model, batch) for batch in batches]
    found, errors = {}, []

    def work(i):
        try:
            for _ in range(5):
                found[i] = exits_of(model, batches[i])
                assert torch.equal(found[i], want[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 8


def test_a_copy_compiles_for_itself():
    model = make(blocks=2)
    compile_blocks(model, buckets=[8], backend="eager")
    want = exits_of(model, BATCHES[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.base_model.compiled is not model.base_model.compiled
        close(exits_of(other, BATCHES[0]), want)


@pytest.mark.parametrize("buckets", [[], [0, 8], [8, 8], [16, 8], [8.0], [True], "8", 8, [None]])
def test_wrong_buckets(buckets):
    with pytest.raises(ValueError, match=r"buckets=.* is not allowed: it must be a list of increasing whole numbers"):
        compile_blocks(make(), buckets=buckets)


@pytest.mark.parametrize(("case", "limit"), [("bert", 40), ("roberta", 38), ("mpnet", 38), ("modernbert-cls", 40)])
def test_buckets_end_where_the_positions_end(case, limit):
    model = make(case, blocks=1)
    assert longest_sequence(model.base_model.model) == limit
    assert compile_blocks(model, backend="eager").buckets == [16, 32]
    with pytest.raises(ValueError, match=f"the model has positions for {limit} tokens"):
        compile_blocks(model, buckets=[16, limit + 1])
    compile_blocks(model, buckets=[limit], backend="eager")
    exits_of(model, make_batch(2, limit - 1))


def test_a_model_without_badge():
    with pytest.raises(ValueError, match="carries no BADGE adapter"):
        compile_blocks(make_model())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler here")
def test_with_inductor():
    model = make(blocks=2)
    batch = make_batch(2, 7)
    want = exits_of(model, batch)
    compile_blocks(model, buckets=[8])
    close(exits_of(model, batch), want)
    close(model.early_exit_forward(**batch, policy="never").logits, want[:, -1])


def test_hooks_that_break_the_graph_of_a_block():
    """transformers 5 leaves capture hooks behind; torch then shares code between blocks with our hooks and without."""
    model = make(blocks=3)
    with torch.no_grad():
        model.base_model.model(**BATCHES[0], output_hidden_states=True)
    plain = [model.early_exit_forward(**BATCHES[0], policy="fixed_depth", depth=depth).logits for depth in (1, 3, 1)]
    compile_blocks(model, buckets=[8], backend="eager")
    for depth, want in zip((1, 3, 1), plain, strict=True):
        close(model.early_exit_forward(**BATCHES[0], policy="fixed_depth", depth=depth).logits, want)


@pytest.mark.parametrize(
    ("placement", "case"),
    [
        pytest.param(placement, case, marks=[] if i == j else pytest.mark.exhaustive)
        for i, placement in enumerate(("block", "ffn", "mhsa"))
        for j, case in enumerate(("bert", "albert", "modernbert-mean"))
    ],
)
def test_torch_compile_of_the_whole_model(placement, case) -> None:
    """Not faster, as a pass stays Python, but neither an error nor another answer."""
    model = make_badge(case, placement=placement, exit_dropout=0.0, backbone="full")
    batch, labels = make_batch(), make_labels()
    expected = model(**batch, labels=labels)
    compiled = torch.compile(model, backend="eager")
    found = compiled(**batch, labels=labels)
    torch.testing.assert_close(found.exit_logits, expected.exit_logits, rtol=0, atol=0)
    found.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".badge_" in name)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).exit_logits, expected.exit_logits, rtol=1e-5, atol=1e-5)
    rule = {"policy": "entropy", "threshold": 0.7}
    wanted = model.early_exit_forward(**batch, **rule).exit_layer
    assert torch.equal(compiled.early_exit_forward(**batch, **rule).exit_layer, wanted)


def test_one_graph_of_the_whole_model_is_torchs_error() -> None:
    model = torch.compile(make_badge().eval(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(**make_batch())
