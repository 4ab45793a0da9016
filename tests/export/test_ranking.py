"""A query in one ONNX file: the graph against `replay`, and `OnnxReranker` against `EarlyExitReranker`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.policies import build_policy
from badge_peft.export import OnnxEarlyExitModel, OnnxReranker, export_onnx
from badge_peft.ranking import EarlyExitReranker
from tests.decoders import make_decoder
from tests.early_exit.reference import REGRESSION
from tests.export.table import TableGraph
from tests.models import make_badge
from tests.ranking.pairs import QUERY, all_scores, make_documents, make_ranker, pair_tokenizer

EXITS = 5
RULES: list[dict[str, Any]] = [
    {"parameters": {"margins": [0.5, 0.4, 0.25, 0.125, 0.0]}},
    {"parameters": {"margins": [1.0, None, 0.0, 0.5, 0.0]}, "min_exit": 2},
    {"parameters": {"margins": [0.5] * 5}, "max_exit": 4, "decide_every": 2},
]


@cache
def graph(number: int) -> Any:
    return TableGraph({"policy": "top_k", "top_k": 3, **RULES[number]}, EXITS, 1, REGRESSION)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.sampled_from(range(len(RULES))),
    st.integers(1, 30),
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([None, np.nan, np.inf, -np.inf]),
    st.booleans(),
)
def test_the_graph_is_replay(
    number: int, rows: int, seed: int, top_k: int, factor: float, odd: float | None, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, 1, 1)) + rng.normal(size=(rows, EXITS, 1)) * np.linspace(1, 0.1, EXITS)[:, None]
    scores = (scores.round() if ties else scores).astype(np.float32)
    if odd is not None:
        scores[rng.random(scores.shape) < 0.15] = odd
    rule = {"policy": "top_k", **RULES[number], "top_k": top_k, "threshold": factor}
    wanted = build_policy(rule).replay(scores).numpy()
    answers, exits = graph(number)(scores, factor, top_k)
    np.testing.assert_array_equal(exits, wanted)
    np.testing.assert_array_equal(answers[:, 0], scores[np.arange(rows), exits - 1, 0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A calibrated ranker, and the folder with its graph."""
    folder = tmp_path_factory.mktemp("onnx")
    model, tokenizer = make_ranker(blocks=2, exit_layers=[0, 1, 2], exit_pooling="mean"), pair_tokenizer()
    spread = all_scores(model, tokenizer, QUERY, make_documents(20))[:, :, 0].std(dim=0) * 0.5
    model.set_early_exit_config({"policy": "top_k", "top_k": 3, "parameters": {"margins": spread.tolist()}})
    export_onnx(model, folder, tokenizer=tokenizer)
    return model, folder


@pytest.mark.parametrize("count", [1, 2, 4, 70])  # in slices of 8
def test_it_ranks_as_in_pytorch(exported: tuple[Any, Path], count: int) -> None:
    model, folder = exported
    early, file = EarlyExitReranker(model, pair_tokenizer()), OnnxReranker.from_pretrained(folder, threads=1)
    documents = make_documents(count, seed=count)
    for threshold in (None, 0.0, 3.0):
        fields = {} if threshold is None else {"threshold": threshold}
        wanted = early.rank(QUERY, documents, 3, True, **fields)
        found = file.rank(QUERY, documents, 3, True, threshold=threshold)
        assert [a["corpus_id"] for a in found] == [a["corpus_id"] for a in wanted]
        assert [a["text"] for a in found] == [a["text"] for a in wanted]
        assert [a["score"] for a in found] == pytest.approx([a["score"] for a in wanted], abs=1e-4)
    assert file.rank(QUERY, documents) == file.rank(QUERY, documents, 3)
    assert file.rank(QUERY, documents, 1) == file.rank(QUERY, documents, 3)[:1]
    with pytest.warns(UserWarning, match="calibrated for top_k=3, and 10 are requested") as caught:
        assert len(file.rank(QUERY, documents, 10)) == min(10, count)
    assert caught[0].filename == __file__


def test_more_than_the_memory_holds_is_ranked_in_parts(exported: tuple[Any, Path], monkeypatch: Any) -> None:
    """No call holds more; the best are those of full depth as long as none is lost, and the report is of all."""
    model, folder = exported
    documents, sizes, call = make_documents(60, seed=3), [], OnnxEarlyExitModel.__call__
    whole = OnnxReranker.from_pretrained(folder, threads=1)
    hidden = whole.model.config["hidden_size"]
    assert hidden == model.config.hidden_size

    def counted(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        rows, length = np.shape(input_ids)
        sizes.append(rows * length * (16 * hidden + 4 * length))
        return call(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(OnnxEarlyExitModel, "__call__", counted)
    expected, least = whole.rank(QUERY, documents, 3, threshold=100.0), sizes.pop()
    for limit in (0, least // 4):
        sizes.clear()
        parts = OnnxReranker.from_pretrained(folder, threads=1, max_state_bytes=limit)
        answers, report = parts.rank(QUERY, documents, 3, threshold=100.0, return_report=True)
        assert [a["corpus_id"] for a in answers] == [a["corpus_id"] for a in expected]
        assert [a["score"] for a in answers] == pytest.approx([a["score"] for a in expected], abs=1e-5)
        assert report.candidates == len(report.exit_layer) == 60 and (report.exit_layer == 2).all()
        assert len(sizes) == 60 if limit == 0 else 1 < len(sizes) < 20 and max(sizes) <= limit
    _, early = whole.rank(QUERY, documents, 3, return_report=True)
    answers, report = parts.rank(QUERY, documents, 3, return_report=True)
    assert early.blocks_run <= report.blocks_run < 120 and len(answers) == 3
    with pytest.raises(ValueError, match="max_state_bytes=-1 is not allowed"):
        OnnxReranker.from_pretrained(folder, max_state_bytes=-1)


def test_what_a_file_changes_is_counted_query_by_query(exported: tuple[Any, Path], tmp_path: Path) -> None:
    """A candidate by itself never leaves."""
    model, _ = exported
    tokenizer, early = pair_tokenizer(), EarlyExitReranker(model, pair_tokenizer())
    queries = {QUERY: make_documents(20, seed=1), "the plot": make_documents(15, seed=2)}
    pairs = [(query, text) for query, texts in queries.items() for text in texts]
    mixed = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    rows = Dataset.from_dict(dict(tokenizer([q for q, _ in mixed], [text for _, text in mixed])))
    rows = rows.add_column("groups", [query for query, _ in mixed])
    exits = [early.rank(query, texts, 3, return_report=True)[1].exit_layer for query, texts in queries.items()]
    changes = export_onnx(model, tmp_path, tokenizer=tokenizer, examples=rows).changes
    assert changes.rows == 35 and changes.same_exit == 1 and changes.same_answer < 1e-4
    mean = np.concatenate(exits).mean()
    assert changes.mean_exit == changes.mean_exit_before == pytest.approx(mean) and 0 < mean < 1.9


def test_the_report(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    file = OnnxReranker.from_pretrained(folder, threads=1)
    documents = [*make_documents(12, seed=5), "film " * 600]
    early = EarlyExitReranker(model, pair_tokenizer(), max_length=file.model.config["max_length"])
    answers, report = file.rank(QUERY, documents, 3, return_report=True)
    _, wanted = early.rank(QUERY, documents, 3, return_report=True)
    assert answers == file.rank(QUERY, documents, 3) and report.cut == wanted.cut == 1
    assert (report.candidates, report.num_blocks, report.blocks_run) == (13, 2, wanted.blocks_run)
    assert report.left == wanted.left and report.exit_layer.tolist() == wanted.exit_layer.tolist()
    assert report.blocks_saved == wanted.blocks_saved


def test_the_graph_alone(exported: tuple[Any, Path]) -> None:
    """As a service without Python has it: `top_k` and a factor go in, `scores` [N] and `exit_layer` [N] come out."""
    model, folder = exported
    documents, tokenizer = make_documents(20, seed=9), pair_tokenizer()
    columns = tokenizer([QUERY] * 20, documents, padding=True, return_token_type_ids=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {name: columns[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    given = {"top_k": np.asarray(4, np.int64), "threshold": np.asarray(2, np.float32)}
    scores, exits = session.run(["scores", "exit_layer"], {**feed, **given})
    rows = {name: torch.from_numpy(value) for name, value in feed.items()}
    wanted = model.early_exit_forward(**rows, top_k=4, threshold=2.0)
    assert scores.shape == exits.shape == (20,) and exits.tolist() == wanted.exit_layer.tolist()
    np.testing.assert_allclose(scores, wanted.logits[:, 0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.exhaustive) for c in ("modernbert-mean", "deberta-v2", "albert")]
)
def test_slices_on_other_backbones(case: str, tmp_path: Path) -> None:
    """Shared masks and angles are cut with their rows: those of ModernBERT differ from block to block."""
    model, tokenizer, documents = make_ranker(case, 2, exit_pooling="mean"), pair_tokenizer(), make_documents(40)
    tokenizer.model_max_length = 36
    scores = all_scores(model, tokenizer, QUERY, documents, 36)[:, :, 0]
    model.set_early_exit_config({"policy": "top_k", "top_k": 5, "parameters": {"margins": scores.std(dim=0).tolist()}})
    export_onnx(model, tmp_path, tokenizer=tokenizer)
    wanted = EarlyExitReranker(model, tokenizer, max_length=36).rank(QUERY, documents, 5, return_report=True)
    found = OnnxReranker.from_pretrained(tmp_path, threads=1).rank(QUERY, documents, 5, return_report=True)
    assert [a["corpus_id"] for a in found[0]] == [a["corpus_id"] for a in wanted[0]]
    assert [a["score"] for a in found[0]] == pytest.approx([a["score"] for a in wanted[0]], abs=1e-3)
    assert found[1].exit_layer.tolist() == wanted[1].exit_layer.tolist() and 0 < found[1].left[1] < 40


def test_the_file_says_what_it_is(exported: tuple[Any, Path]) -> None:
    _, folder = exported
    model = OnnxEarlyExitModel.from_pretrained(folder, threads=1)
    assert model.config["top_k"] == 3
    names = {entry.name for entry in model.session.get_inputs() + model.session.get_overridable_initializers()}
    assert {"top_k", "threshold"} <= names and "patience" not in names
    card = (folder / "README.md").read_text()
    assert "| `top_k` | int64 scalar" in card and "OnnxReranker" in card and "patience" not in card
    assert "`scores` [batch]" in card


def test_what_is_refused(exported: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = exported
    file = OnnxReranker.from_pretrained(folder, threads=1)
    with pytest.raises(ValueError, match="documents is empty"):
        file.rank(QUERY, [])
    with pytest.raises(ValueError, match="top_k=0 is not allowed"):
        file.rank(QUERY, ["a"], 0)
    with pytest.raises(ValueError, match=r"patience=2 is not allowed: the policy in the file reads top_k"):
        file.model(np.ones((2, 5)), patience=2)
    with pytest.raises(ValueError, match="ranks the candidates of a query: use OnnxReranker"):
        file.model.predict(["a"])
    plain = OnnxEarlyExitModel(folder, None, {"early_exit": {"policy": "never"}})
    with pytest.raises(ValueError, match="exported with policy='never', which ranks nothing"):
        OnnxReranker(plain)


@pytest.mark.skipif(torch.__version__ < "2.10.dev0", reason="it cannot trace a decoder's masks")
@pytest.mark.parametrize("masked", [False, True])
def test_what_a_decoders_head_reads_is_not_cut_off(masked: bool, tmp_path: Path) -> None:
    """The last token that is not padding, whatever the mask says."""
    base = make_decoder("llama", num_hidden_layers=1, num_labels=1)
    model = make_badge(base=base, exit_layers=[0, 1]).eval()
    model.set_early_exit_config({"policy": "top_k", "top_k": 3, "parameters": {"margins": [0.5, 0.0]}})
    export_onnx(model, tmp_path)
    ids = torch.randint(5, 99, (12, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([6, 5, 6, 4, 5, 3] * 2)[:, None]
    batch = {"input_ids": ids, "attention_mask": (torch.arange(9) < lengths if masked else ids > 0).long()}
    out = OnnxEarlyExitModel.from_pretrained(tmp_path)(**{k: v.numpy() for k, v in batch.items()}, top_k=12)
    with torch.no_grad():
        np.testing.assert_allclose(out.logits, model(**batch).logits.numpy(), atol=1e-4)
