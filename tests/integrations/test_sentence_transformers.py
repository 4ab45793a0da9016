"""`accelerate`: the real CrossEncoder keeps its rank, its scores and its predict, and exits early."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from badge_peft.integrations.sentence_transformers import accelerate
from tests.models import blocks_of, make_badge, make_model
from tests.ranking.pairs import QUERY, all_scores, expected, make_documents, make_ranker, pair_tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")
DOCUMENTS = make_documents(21)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a cross-encoder on disk; `adapter`, calibrated for three; `plain`, not calibrated."""
    folder = tmp_path_factory.mktemp("cross")
    make_model(num_labels=1).save_pretrained(folder / "base")
    pair_tokenizer().save_pretrained(folder / "base")
    model = make_ranker()
    model.save_pretrained(folder / "plain")
    spread = all_scores(model, pair_tokenizer(), QUERY, DOCUMENTS)[:, :, 0].std(dim=0) * 0.5
    model.set_early_exit_config({"policy": "top_k", "top_k": 3, "parameters": {"margins": spread.tolist()}})
    model.save_pretrained(folder / "adapter")
    return folder


def cross_encoder(place: Path, **fields: Any) -> Any:
    return sentence_transformers.CrossEncoder(str(place / "base"), device="cpu", **fields)


def test_rank_is_as_before_and_runs_fewer_blocks(place: Path) -> None:
    encoder = cross_encoder(place)
    full = encoder.rank(QUERY, DOCUMENTS)
    predicted = encoder.predict([(QUERY, document) for document in DOCUMENTS])
    reranker = accelerate(encoder, place / "adapter")
    scores = all_scores(reranker.model, pair_tokenizer(), QUERY, DOCUMENTS)
    best, stops = expected(scores, [1, 2, 3], reranker.badge.get_early_exit_config(), 3)
    rows: list[int] = []
    for block in blocks_of(reranker.model):
        block.base_layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = encoder.rank(QUERY, DOCUMENTS, top_k=3, return_documents=True)
    assert sum(rows) == int(stops.sum()) < 3 * len(DOCUMENTS)
    assert [answer["corpus_id"] for answer in found] == best
    by_id = {answer["corpus_id"]: answer["score"] for answer in full}
    assert [a["score"] for a in found] == pytest.approx([by_id[i] for i in best], abs=1e-5)  # with its sigmoid
    assert all(0 < a["score"] < 1 for a in found) and found[0]["text"] == DOCUMENTS[best[0]]
    assert (encoder.predict([(QUERY, document) for document in DOCUMENTS]) == predicted).all()


def test_what_only_full_depth_knows_is_left_to_it(place: Path) -> None:
    encoder = cross_encoder(place)
    full = encoder.rank(QUERY, DOCUMENTS)
    reranker = accelerate(encoder, place / "adapter")
    assert encoder.rank(QUERY, DOCUMENTS) == full
    if "device" in inspect.signature(type(encoder).rank).parameters:  # sentence-transformers 6
        assert encoder.rank(QUERY, DOCUMENTS, top_k=3, device="cpu") == full[:3]

    assert encoder.rank(QUERY, [], top_k=3) == []
    assert encoder.rank(" ", DOCUMENTS, top_k=3) == encoder.rank(" ", DOCUMENTS)[:3]
    copied = pickle.loads(pickle.dumps(encoder))  # as a pool of processes does
    assert copied.rank(QUERY, DOCUMENTS, top_k=3) == encoder.rank(QUERY, DOCUMENTS, top_k=3)
    raw = encoder.rank(QUERY, DOCUMENTS, top_k=3, activation_fn=torch.nn.Identity(), batch_size=5)
    again = reranker.rank(QUERY, DOCUMENTS, 3, activation=torch.nn.Identity())
    assert [a["corpus_id"] for a in raw] == [a["corpus_id"] for a in again]
    assert [a["score"] for a in raw] == pytest.approx([a["score"] for a in again], abs=1e-5)


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cross_encoder is a str: give a sentence_transformers\.CrossEncoder"):
        accelerate("base", place / "adapter")
    encoder = cross_encoder(place)
    with pytest.raises(ValueError, match="not calibrated for ranking"):
        accelerate(encoder, place / "plain")
    make_badge("bert", make_model(num_labels=2)).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="num_labels"):
        accelerate(cross_encoder(place), tmp_path / "two")
