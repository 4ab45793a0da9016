"""The exported file against PyTorch: same exits, logits within 1e-4, on every backbone of the table."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from scipy.special import softmax

from badge_peft import early_exit_forward
from badge_peft.early_exit.policies import build_policy
from badge_peft.export import OnnxEarlyExitModel, export_full_depth, export_onnx
from badge_peft.export.onnx import OnnxExporter
from badge_peft.export.pieces import ALONE
from badge_peft.export.plain import FullDepthExporter
from badge_peft.export.policies import Decision
from badge_peft.export.sliced import assemble
from badge_peft.export.trace import export_blocks
from badge_peft.tuner import lora
from tests.decoders import make_decoder
from tests.early_exit.reference import SINGLE
from tests.early_exit.rules import labels_are_safe, mixed_rule, with_threshold
from tests.export.table import session_of
from tests.models import CASES, LABELS, LINKS, exits_of, make_badge, make_batch, make_model, one_of_each_kind
from tests.texts import make_tokenizer

# RoBERTa's modeling code under other names: what is traced is the same
COPIES = ("xlm-roberta", "camembert")

# Blocks take seconds to export: there are two, or one where the second is as the first, or all are those of another
# backbone here, with what differs in the embeddings or the head alone.
BLOCKS = {"roberta": 1, "electra": 1, "modernbert-mean": 1, "deberta-v2": 1}
SHORT = {
    "albert-groups": {"num_hidden_layers": 2, "num_hidden_groups": 2},
    "albert-inner": {"num_hidden_layers": 1, "num_hidden_groups": 1},
    "distilbert": {"n_layers": 2},
}
# each backbone gets another combination of what an adapter may be
KINDS = itertools.cycle(
    [
        {"exit_pooling": "cls", "placement": "block"},
        {"exit_pooling": "mean", "placement": "ffn", "exit_layers": [0, 1, 2]},
        {"exit_pooling": "last", "placement": "mhsa", "exit_layers": [0, 1, 2], "final_exit": "exit"},
        {"exit_pooling": "mean", "placement": "block", "exit_layers": [0, 1, 2], "exit_type": "mha"},
        {"exit_pooling": "cls", "placement": "none", "exit_type": "pooled", "exit_layers": [0, 1, 2]},
    ]
)
KIND_OF = dict(zip((case for case in CASES if case not in COPIES), KINDS, strict=False))
# exits that build on one another: the states that they leave travel with their rows
KIND_OF |= {
    "bert, mean": {"exit_pooling": "mean", "carry": "logits", "exit_layers": [0, 1, 2]},
    "bert, own": {
        **{"exit_pooling": "cls", "carry": "logits", "exit_layers": [1, 2], "final_exit": "exit"},
        **{"exit_type": "residual_mha", "placement": "ffn"},
    },
    "bert, past": {"exit_pooling": "cls", "exit_type": "past_future", "final_exit": "exit"},
}
RULES = [
    {"policy": "divergence"},
    {"policy": "divergence", "divergence": "label", "window": "consecutive"},
    {"policy": "max_prob"},
    {"policy": "learned"},
    {"policy": "agreement"},
    {"policy": "never"},
]


def run(session, batch, **scalars):
    names = [info.name for info in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in batch.items() if name in names}
    if "token_type_ids" in names:
        feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    types = {"threshold": np.float32, "patience": np.int64}
    feed |= {name: np.asarray(value, types[name]) for name, value in scalars.items() if value is not None}
    return session.run(["logits", "exit_layer"], feed)


def safe_batch(model, rows, length, seed, side="right"):
    """A batch whose labels do not hang on rounding."""
    for attempt in range(10):
        batch = make_batch(rows, length, seed + attempt, side)
        logits = exits_of(model, batch)
        if labels_are_safe(logits):
            return batch, logits
    raise AssertionError("ten batches in a row have labels that hang on rounding")


def stored_numbers(graph: onnx.GraphProto) -> int:
    """How many numbers the weights of a graph and of the graphs in it have."""
    inside = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    own = sum(math.prod(tensor.dims) for tensor in graph.initializer if len(tensor.dims) > 1)
    return own + sum(map(stored_numbers, inside))


@pytest.mark.parametrize("case", one_of_each_kind(KIND_OF))
def test_every_backbone(case):
    """One cut, many graphs: rules, rows taken out or not, rows alone and together, other lengths, left padding. A
    block that runs several times, as ALBERT's, is stored once."""
    kind, case = KIND_OF[case], case.split(",")[0]
    blocks = BLOCKS.get(case, 2)
    base = make_model(case, **SHORT.get(case, {"num_hidden_layers": blocks}))
    if "exit_layers" in kind:
        kind = {**kind, "exit_layers": [m for m in kind["exit_layers"] if m <= blocks]}
    model = make_badge(case, base=base, learn_to_exit=True, **kind)
    assert model.base_model.num_blocks == blocks
    badge = model.base_model
    exits = badge.exit_layers()
    pieces = export_blocks(badge, {(ALONE,): set(exits)})
    never = Decision(build_policy(policy="never"), exits, LABELS, SINGLE)
    whole = assemble(pieces, {ALONE: never}, int8=False)
    assert stored_numbers(whole.graph) <= sum(weight.numel() for weight in badge.parameters())
    batches = [safe_batch(model, 5, 11, 1), safe_batch(model, 1, 6, 2)]
    # a first position that is padding sees nothing but padding in ModernBERT's windows: its state is up to the kernel
    reads_first = case == "modernbert-cls" or kind["exit_pooling"] == "cls"
    if not (case.startswith("modernbert") and reads_first):
        batches.append(safe_batch(model, 3, 8, 3, "left"))
    for i, rule in enumerate(RULES):
        with torch.no_grad():
            logits, doubts = batches[0][1], model(**batches[0][0]).exit_uncertainty
        rule = with_threshold(rule, logits, exits, 0.4, doubts)
        decision = Decision(build_policy(rule), exits, LABELS, SINGLE)
        session = session_of(assemble(pieces, {ALONE: decision}, int8=False))
        for batch, _ in batches[: 3 if i < 2 else 1]:
            wanted = early_exit_forward(model, **batch, **rule)
            answers, exit_layer = run(session, batch, threshold=rule.get("threshold"), patience=rule.get("patience"))
            assert exit_layer.tolist() == wanted.exit_layer.tolist()
            scale = max(1.0, float(wanted.logits.abs().max()))
            np.testing.assert_allclose(answers / scale, wanted.logits.numpy() / scale, atol=1e-4)


def test_the_folder_holds_all_that_belongs_to_it(folder):
    names = {file.name for file in folder.iterdir()}
    assert {"model.onnx", "early_exit.json", "config.json", "tokenizer.json", "README.md"} <= names
    facts = json.loads((folder / "early_exit.json").read_text())
    assert (facts["threshold"], facts["patience"], facts["max_length"]) == (1.0, 1, 40)
    card = (folder / "README.md").read_text()
    assert "divergence" in card and "tokenizer.json" in card
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    assert str(Path.cwd()).encode() not in (folder / "model.onnx").read_bytes()  # no trace of where it was made


def test_speed_is_a_matter_of_the_call(folder, model):
    session = OnnxEarlyExitModel.from_pretrained(folder, threads=1)
    batch = make_batch(6, 9)
    fields = {name: tensor.numpy() for name, tensor in batch.items()}
    default = session(**fields)
    assert default.exit_layer.tolist() == early_exit_forward(model, **batch, threshold=1.0).exit_layer.tolist()
    depths = [session(**fields, threshold=tau).exit_layer.mean() for tau in (0.01, 0.8, 1.2, 50.0)]
    assert depths == sorted(depths, reverse=True) and depths[0] == 3 and depths[-1] == 1
    depths = [session(**fields, threshold=50.0, patience=t).exit_layer.tolist() for t in (1, 2, 3, 9, 2**70)]
    assert depths == [[1] * 6, [2] * 6, [3] * 6, [3] * 6, [3] * 6]
    of_numpy = session(**fields, threshold=np.float32(50.0), patience=np.int64(2))
    assert of_numpy.exit_layer.tolist() == [2] * 6


def test_blocks_behind_the_exit_are_not_computed(folder, tmp_path):
    """By the runtime's own profile: which matrix products ran."""
    counts = []
    for patience in (1, 2, 3):
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.log_severity_level = 3
        options.profile_file_prefix = str(tmp_path / f"profile{patience}")
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        run(session, make_batch(2, 9), threshold=50.0, patience=patience)
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = [e["name"] for e in events if e.get("cat") == "Node" and e["args"].get("op_name", "").endswith("MatMul")]
        counts.append(len(ran))
    assert counts[0] < counts[1] < counts[2]
    assert counts[2] - counts[1] >= 8 and counts[1] - counts[0] >= 8  # a block has 8 products


def test_texts_in_answers_out(folder, model):
    session = OnnxEarlyExitModel.from_pretrained(folder)
    texts = ["a very good film", "the plot was dull", "the cast is a very very fine cast"]
    together = session.predict(texts, threshold=1.0)
    alone = [session.predict(text, threshold=1.0)[0] for text in texts]
    assert [a["exit_layer"] for a in together] == [a["exit_layer"] for a in alone]
    encoded = make_tokenizer()(texts, padding=True, return_tensors="pt")
    fields = {k: v for k, v in encoded.items() if k != "token_type_ids"}
    wanted = early_exit_forward(model, **fields, threshold=1.0)
    names = model.config.id2label
    assert [a["label"] for a in together] == [names[int(i)] for i in wanted.logits.argmax(-1)]
    scores = wanted.logits.softmax(-1).amax(-1)
    assert [a["score"] for a in together] == pytest.approx(scores.tolist(), abs=1e-4)


def test_without_any_of_our_packages(folder):
    """The example in plain onnxruntime and tokenizers, in a process that cannot import anything else of ours."""
    script = Path(__file__).parents[2] / "examples" / "onnx_service.py"
    blocked = "import sys; sys.modules.update(dict.fromkeys(['badge_peft', 'torch', 'transformers', 'peft']))"
    code = f"{blocked}; import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(script), str(folder), "--threshold", "1.0", "a very good film"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": ""},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    wanted = OnnxEarlyExitModel.from_pretrained(folder).predict(["a very good film"], threshold=1.0)[0]
    assert (answer["label"], answer["exit_layer"]) == (wanted["label"], wanted["exit_layer"])


def test_int8_beside_float32_from_one_cut(exporter, tmp_path):
    rows = [{"input_ids": row, "labels": i % LABELS} for i, row in enumerate(make_batch(8, 9)["input_ids"].tolist())]
    report = exporter.write(tmp_path / "a", int8=True, examples=rows)
    plain = exporter.write(tmp_path / "b", examples=rows)
    assert report.size_bytes < 0.7 * plain.size_bytes  # even of so small a model
    assert report.changes is not None and plain.changes is not None
    assert (plain.changes.same_answer, plain.changes.same_exit, plain.changes.rows) == (1.0, 1.0, 8)
    assert plain.changes.score == plain.changes.score_before == report.changes.score_before
    assert report.changes.same_answer >= 0.5
    graph = onnx.load(tmp_path / "a" / "model.onnx").graph
    branches = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    kinds = [node.op_type for g in (graph, *branches) for node in g.node]
    assert sum("MatMulInteger" in kind for kind in kinds) >= 18  # six weights a block
    weights = [onnx.numpy_helper.to_array(w) for w in graph.initializer if w.data_type == onnx.TensorProto.INT8]
    assert len(weights) >= 18 and max(np.abs(w.astype(int)).max() for w in weights) <= 64  # 2 x 255 x 64 fits 16 bits
    assert kinds.count("Gemm") == 7  # one of exit 0, two of each bypass and one of its exit: these stay in float32
    OnnxEarlyExitModel.from_pretrained(tmp_path / "a")(make_batch()["input_ids"])


def test_a_fixed_depth_leaves_the_rest_out(model, folder, tmp_path):
    one = export_onnx(model, tmp_path / "one", early_exit_config={"policy": "fixed_depth", "depth": 1})
    assert one.exit_layers == [1] and one.size_bytes < (folder / "model.onnx").stat().st_size - 50_000
    batch = make_batch()
    found = OnnxEarlyExitModel.from_pretrained(tmp_path / "one")(batch["input_ids"], batch["attention_mask"])
    wanted = exits_of(model, batch)[:, 1]
    np.testing.assert_allclose(found.logits, wanted.numpy(), atol=1e-4)
    assert set(found.exit_layer.tolist()) == {1}


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_an_exit_on_which_no_decision_depends_is_in_the_file(int8, tmp_path):
    """The one before the exit that answers, which builds on it."""
    model, batch = make_badge("bert", make_model(num_hidden_layers=2), exit_layers=[0, 1, 2], **LINKS[0]), make_batch()
    export_onnx(model, tmp_path, early_exit_config={"policy": "fixed_depth", "depth": 1}, int8=int8)
    found = OnnxEarlyExitModel.from_pretrained(tmp_path)(**{name: x.numpy() for name, x in batch.items()})
    wanted = exits_of(model, batch)[:, 1]
    assert found.exit_layer.tolist() == [1] * 4
    scale = float(wanted.abs().max())
    np.testing.assert_allclose(found.logits / scale, wanted / scale, atol=0.3 if int8 else 1e-4)


def test_the_model_stays_as_it_is_and_the_file_has_its_lora_folded_in(tmp_path):
    lora_fields = {"backbone": "lora", "lora": {"r": 4, "target_modules": ["query", "value"]}}
    model = make_badge("bert", make_model(num_hidden_layers=1), exit_layers=[0, 1], **lora_fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    before = {name: (p, p.clone()) for name, p in model.state_dict(keep_vars=True).items()}
    report = export_onnx(model.train(), tmp_path, early_exit_config={"threshold": 1.0})
    assert report.max_difference is not None and report.max_difference < 1e-3
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])
    assert model.training and not any(layer.merged for layer in lora.lora_layers(model))
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not any("lora" in t.name for t in graph.initializer)


def test_full_depth_alone(tmp_path):
    batch, model = make_batch(3, 9), make_model(num_hidden_layers=1)
    with torch.no_grad():
        wanted = model(**batch).logits.numpy()
    exporter = FullDepthExporter(model)
    for int8 in (True, False):
        exporter.write(tmp_path / "full.onnx", int8=int8)
        session = onnxruntime.InferenceSession(str(tmp_path / "full.onnx"))
        feed = {name: tensor.numpy() for name, tensor in batch.items()}
        (logits,) = session.run(["logits"], {**feed, "token_type_ids": np.zeros_like(feed["input_ids"])})
        np.testing.assert_allclose(logits, wanted, atol=1e-4 if not int8 else 3.0)
    assert str(Path.cwd()).encode() not in (tmp_path / "full.onnx").read_bytes()  # no trace of where it was made


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_has_no_onnx_form(tmp_path):
    model, target = make_badge("bert"), tmp_path / "never"
    for given, rule, message in (
        (model, {"policy": "learned"}, "needs an adapter with an LTE layer"),
        (model, {"policy": "fixed_depth", "depth": 7}, "depth=7 is not allowed"),
        (make_badge("bert").half(), None, r"weights in torch\.float16.*dtype=torch\.float32"),
        (make_model("bert"), None, "carries no BADGE adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(given, target, early_exit_config=rule)
    with model.disable_adapter(), pytest.raises(ValueError, match="the adapter is disabled"):
        export_onnx(model, target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"patience": 0}, "patience=0 is not allowed"),
        ({"patience": 1.5}, "patience=1.5 is not allowed"),
        ({"threshold": float("nan")}, "threshold=nan is not allowed"),
        ({"input_ids": np.array([[5, -1]])}, "the token number -1, and the first is 0"),
        ({"input_ids": np.zeros((1, 41))}, "41 positions, and the model has 40: truncate"),
        ({"input_ids": np.zeros((0, 4))}, "not empty"),
        ({"input_ids": np.zeros(4)}, r"\[batch, sequence\]"),
        ({"attention_mask": np.ones((1, 3))}, "attention_mask has shape"),
    ],
)
def test_bad_calls(folder, call, message):
    session = OnnxEarlyExitModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        session(**{"input_ids": np.full((1, 4), 7), **call})


def test_texts_are_cut_where_the_tokenizer_cuts_them(exporter, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 5  # as training with --max-length 5 leaves it
    exporter.write(tmp_path, tokenizer=tokenizer)
    session = OnnxEarlyExitModel.from_pretrained(tmp_path)
    assert session.config["max_length"] == 5
    text = "the film was very dull and the plot was poor"
    cut = tokenizer(text, truncation=True, return_tensors="np")
    assert cut["input_ids"].shape == (1, 5)
    whole = make_tokenizer()(text, return_tensors="np")  # may still be asked, as token numbers
    one, other = (
        softmax(session(**{name: row[name] for name in session.config["inputs"] if name in row}).logits).max()
        for row in (cut, whole)
    )
    answer = session.predict(text)[0]["score"]
    assert answer == pytest.approx(one, abs=1e-5) != pytest.approx(other, abs=1e-5)


def test_an_adapter_of_pairs_answers_no_single_text(exporter, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter.badge.config_of(), "data_columns", {"text": "question", "text_pair": "answer"})
    exporter.write(tmp_path, tokenizer=make_tokenizer())
    session = OnnxEarlyExitModel.from_pretrained(tmp_path)
    assert session.predict(["a film"], ["good"])[0]["label"]
    with pytest.raises(ValueError, match="trained on pairs of texts, and here is one text"):
        session.predict(["a film"])


def test_a_folder_that_lacks_something_says_so(exporter, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx"):
        OnnxEarlyExitModel.from_pretrained(tmp_path)
    exporter.write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer=tokenizer"):
        OnnxEarlyExitModel.from_pretrained(tmp_path).predict(["a film"])


def test_a_missing_package_names_the_extra(model, tmp_path, monkeypatch):
    import badge_peft.utils.extras as needs

    monkeypatch.setattr(needs, "find_spec", lambda name: None if name.startswith("onnx") else object())
    for action in (
        lambda: export_onnx(model, tmp_path / "x"),
        lambda: export_full_depth(model, tmp_path / "x.onnx"),
        lambda: OnnxEarlyExitModel.from_pretrained(tmp_path),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"badge-peft\[onnx\]"):
            action()


# ------------------------------------------------------------------------------- one export over another in one folder


def test_weights_graph_and_facts_are_of_one_model(exporter, model, folder):
    facts = json.loads((folder / "early_exit.json").read_text())
    assert facts["weights_hash"] == model.base_model.weights_hash()
    (inside,) = onnx.load(folder / "model.onnx").metadata_props
    assert inside.key == "early_exit.json" and json.loads(inside.value) == facts


def test_what_calibrate_recorded_of_other_weights_is_left_out(exporter, model):
    rule = {"threshold": 1.0, "calibration": {"rows": 9, "weights_hash": model.base_model.weights_hash()}}
    cut, exporter = exporter.pieces, OnnxExporter(model, rule)
    exporter.pieces = cut
    assert exporter._metadata(False, None)["early_exit"]["calibration"]["rows"] == 9
    exporter.hashes = {"": "of other weights"}
    assert exporter._metadata(False, None)["early_exit"]["calibration"] is None


def test_an_export_that_ends_at_any_moment_leaves_the_old_one_or_the_new_one(exporter, folder, tmp_path, monkeypatch):
    """Every step of putting the files in place ends it once."""
    places = {"old": tmp_path / "old", "new": folder}
    exporter.write(places["old"], int8=True)

    def state(target):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = OnnxEarlyExitModel.from_pretrained(target).config
        (name,) = (
            name for name, place in places.items() if config == json.loads((place / "early_exit.json").read_text())
        )
        assert (target / "model.onnx").read_bytes() == (places[name] / "model.onnx").read_bytes()
        return name

    states = []
    for steps in range(len(os.listdir(folder)) + 1):
        target = Path(shutil.copytree(places["old"], tmp_path / f"{steps}"))
        done = []

        def replace(*paths, replace=os.replace, done=done, steps=steps):
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(replace(*paths))

        monkeypatch.setattr(os, "replace", replace)
        with contextlib.suppress(KeyboardInterrupt):
            exporter.write(target, tokenizer=make_tokenizer())
        monkeypatch.undo()
        states.append(state(target))
    assert states == sorted(states, reverse=True) and set(states) == {"old", "new"}


def test_parts_of_two_exports_are_noticed(folder, tmp_path):
    target = Path(shutil.copytree(folder, tmp_path / "x"))
    facts = json.loads((target / "early_exit.json").read_text())
    (target / "early_exit.json").write_text(json.dumps({**facts, "labels": ["a", "b", "c"]}))  # an edit is meant
    assert OnnxEarlyExitModel.from_pretrained(target).labels == ["a", "b", "c"]
    (target / "early_exit.json").write_text(json.dumps({**facts, "id": "another", "labels": ["a", "b", "c"]}))
    with pytest.warns(UserWarning, match="belongs to another model than the model.onnx in its folder"):
        assert OnnxEarlyExitModel.from_pretrained(target).config == facts
    shutil.copy(folder / "early_exit.json", target)
    (target / "tokenizer.json").write_text((target / "tokenizer.json").read_text().replace("film", "movie"))
    with pytest.raises(ValueError, match="not the one that was exported with model.onnx"):
        OnnxEarlyExitModel.from_pretrained(target).predict("a film")
    (target / "early_exit.json").write_text(json.dumps({**facts, "tokenizer_files": None}))
    assert OnnxEarlyExitModel.from_pretrained(target).predict("a film")


@pytest.mark.skipif(torch.__version__ < "2.10.dev0", reason="it cannot trace a decoder's masks")
def test_a_decoder(tmp_path):
    """Causal masks, rotary positions, and the last token: that which is not padding, whatever the mask says."""
    model = make_badge(base=make_decoder("llama", num_hidden_layers=1), exit_layers=[0, 1])
    export_onnx(model, tmp_path, early_exit_config={"policy": "entropy"})
    session = OnnxEarlyExitModel.from_pretrained(tmp_path)
    padded = make_batch(5, 9)
    whole = {**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}
    for batch in (padded, make_batch(5, 9, side="left"), whole):
        rule = mixed_rule(exits_of(model, batch), [0, 1])
        out = session(**{name: tensor.numpy() for name, tensor in batch.items()}, threshold=rule["threshold"])
        wanted = early_exit_forward(model, **batch, **rule)
        assert out.exit_layer.tolist() == wanted.exit_layer.tolist() and len(set(out.exit_layer.tolist())) == 2
        np.testing.assert_allclose(out.logits, wanted.logits.numpy(), atol=1e-4)


def test_a_decoder_needs_a_torch_that_can_trace_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))
    model = make_badge(base=make_decoder("llama", num_hidden_layers=1), exit_layers=[0, 1])
    with pytest.raises(ValueError, match=r"torch 2\.9\.1\+cpu cannot trace.* 2\.10 or newer"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
