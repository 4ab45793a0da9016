"""EarlyExitReranker: against replay and the stock model, within its bounds, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.readers import ExitReader
from badge_peft.ranking import EarlyExitReranker, calibrate_ranking, segments
from badge_peft.ranking.slices import slice_bounds
from tests.decoders import make_decoder
from tests.models import CASES, blocks_of, make_badge, make_model, one_of_each_kind
from tests.texts import WORDS

from .pairs import QUERY, all_scores, expected, make_documents, make_ranker, pair_tokenizer

DOCUMENTS = make_documents(23)
IN_SEGMENTS = {"max_state_bytes": 0}  # as where the candidates do not fit into memory together
RANKERS: dict[Any, Any] = {}


def top_k(k: int, scores: torch.Tensor, share: float = 0.5, **fields: Any) -> EarlyExitConfig:
    """Margins so wide that some leave at each exit and others do not."""
    spread = scores[:, :, 0].std(dim=0) * share
    return EarlyExitConfig(policy="top_k", top_k=k, parameters={"margins": spread.tolist()}, **fields)


def ranker(case: str = "bert", **fields: Any) -> Any:
    key = (case, *fields.items())
    if key not in RANKERS:
        RANKERS[key] = make_ranker(case, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()})
    return RANKERS[key]


def check(model: Any, documents: list[str], config: EarlyExitConfig, tokenizer: Any = None, **fields: Any) -> Any:
    """One ranking against the replay of full depth; returns its report."""
    tokenizer = tokenizer or pair_tokenizer()
    scores, exits = all_scores(model, tokenizer, QUERY, documents), model.exit_layers()
    best, stops = expected(scores, exits, config, config.top_k)
    model.set_early_exit_config(config)
    found, report = EarlyExitReranker(model, tokenizer, **fields).rank(
        QUERY, documents, top_k=config.top_k, return_report=True
    )
    assert report.exit_layer.tolist() == stops.tolist()
    assert [answer["corpus_id"] for answer in found] == best
    end = exits.index(int(stops.max()))
    assert [a["score"] for a in found] == pytest.approx(scores[best, end, 0].tolist(), abs=2e-5)
    assert report.blocks_run == stops.sum() and report.candidates == len(documents)
    return report


@pytest.mark.parametrize(
    "fields", [{"batch_size": 1}, {"batch_size": 5}, {"batch_size": 5, **IN_SEGMENTS}, {"batch_size": 100}], ids=str
)
@pytest.mark.parametrize("case", one_of_each_kind(CASES))
def test_a_ranking_is_the_replay_of_full_depth(case: str, fields: dict[str, int]) -> None:
    model = ranker(case)
    config = top_k(3, all_scores(model, pair_tokenizer(), QUERY, DOCUMENTS))
    report = check(model, DOCUMENTS, config, **fields)
    assert 0 < report.blocks_saved < 1 and len(set(report.exit_layer.tolist())) > 1


@pytest.mark.parametrize("fields", [{}, IN_SEGMENTS], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_ranks(family: str, fields: dict[str, int]) -> None:
    """It would keep keys and values, and its head reads the last token that is not the padding token."""
    model = make_badge(family, make_decoder(family, num_labels=1), train_head=False)
    documents, tokenizer = [*make_documents(9), "good bad [PAD]", "[PAD]"], pair_tokenizer(end="")
    config = top_k(3, all_scores(model, tokenizer, QUERY, documents))
    report = check(model, documents, config, tokenizer, batch_size=4, **fields)
    assert len(set(report.exit_layer.tolist())) > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"exit_layers": (0, 1, 2, 3)},
        {"exit_layers": (2, 3), "final_exit": "exit"},
        {"exit_pooling": "mean"},
        {"exit_type": "mha", "exit_layers": (0, 2, 3)},
        {"placement": "mhsa", "exit_pooling": "mean"},
        {"exit_type": "past_future", "final_exit": "exit"},
        {"carry": "logits", "exit_layers": (0, 1, 2, 3)},
        {"carry": "logits", "exit_layers": (1, 2, 3), "final_exit": "exit", "exit_pooling": "mean"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "rule", [{}, {"min_exit": 2}, {"decide_every": 2}, {"max_exit": 2}, {"threshold": 2.0}], ids=str
)
def test_any_exits_and_any_rule(rule: dict[str, Any], fields: dict[str, Any]) -> None:
    model = ranker(**fields)
    config = top_k(3, all_scores(model, pair_tokenizer(), QUERY, DOCUMENTS), **rule)
    check(model, DOCUMENTS, config, batch_size=7)
    check(model, DOCUMENTS, config, batch_size=7, **IN_SEGMENTS)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 31), st.sampled_from([0.0, 0.3, 1.0, 3.0]))
def test_any_number_of_candidates(count: int, k: int, batch_size: int, share: float) -> None:
    model = ranker(exit_layers=(0, 1, 2, 3))
    documents = make_documents(count, seed=count)
    scores = all_scores(model, pair_tokenizer(), QUERY, documents)
    spread = (scores[:, :, 0].amax(dim=0) - scores[:, :, 0].amin(dim=0)) * 0.2 * share
    config = EarlyExitConfig(policy="top_k", top_k=k, parameters={"margins": (spread + 1e-4).tolist()})
    report = check(model, documents, config, batch_size=batch_size)
    assert (report.exit_layer == 3).sum() >= min(k, count)


def test_without_margins_it_is_the_stock_model() -> None:
    model, tokenizer = ranker(), pair_tokenizer()
    stock = make_model(num_labels=1)
    model.set_early_exit_config({"policy": "top_k", "top_k": 5, "parameters": {"margins": [None] * 3}})
    found = EarlyExitReranker(model, tokenizer, batch_size=6).rank(QUERY, DOCUMENTS, 5, return_documents=True)
    with torch.no_grad():
        alone = [stock(**tokenizer(QUERY, d, return_tensors="pt")).logits.item() for d in DOCUMENTS]
    want = sorted(range(len(alone)), key=lambda n: -alone[n])[:5]
    assert [a["corpus_id"] for a in found] == want
    assert [a["score"] for a in found] == pytest.approx([alone[n] for n in want], abs=1e-5)
    assert [a["text"] for a in found] == [DOCUMENTS[n] for n in want]
    predicted = EarlyExitReranker(model, tokenizer, batch_size=6).predict([(QUERY, d) for d in DOCUMENTS])
    assert predicted.dtype == np.float32 and predicted.tolist() == pytest.approx(alone, abs=1e-5)
    assert EarlyExitReranker(model, tokenizer).predict((QUERY, DOCUMENTS[2])) == pytest.approx(alone[2], abs=1e-5)
    everything = EarlyExitReranker(model, tokenizer).rank(QUERY, DOCUMENTS, top_k=None)
    assert [a["corpus_id"] for a in everything] == sorted(range(len(alone)), key=lambda n: -alone[n])
    squashed = EarlyExitReranker(model, tokenizer, activation=torch.sigmoid)
    assert squashed.rank(QUERY, DOCUMENTS, 5)[0]["score"] == pytest.approx(1 / (1 + np.exp(-max(alone))), abs=1e-5)
    assert squashed.predict((QUERY, DOCUMENTS[2])) == pytest.approx(1 / (1 + np.exp(-alone[2])), abs=1e-5)


def test_no_more_rows_than_asked_for_are_ever_in_a_block() -> None:
    model = make_ranker(exit_layers=[0, 1, 2, 3])
    config = top_k(4, all_scores(model, pair_tokenizer(), QUERY, DOCUMENTS))
    seen: list[tuple[int, int, int]] = []  # block, rows, positions
    for number, block in enumerate(blocks_of(model), start=1):
        block.base_layer.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: seen.append(
                (number, *(args[0] if args else kwargs["hidden_states"]).shape[:2])
            ),
            with_kwargs=True,
        )
    tokenizer = pair_tokenizer()
    model.set_early_exit_config(config)
    lengths = {len(tokenizer(QUERY, d).input_ids) for d in DOCUMENTS}
    for memory in (2**33, 0):  # 8 GiB is no size that an option may not have
        reranker = EarlyExitReranker(model, tokenizer, batch_size=4, max_state_bytes=memory)
        seen.clear()
        _, report = reranker.rank(QUERY, DOCUMENTS, 4, return_report=True)
        first = 0 if memory else 4  # exit 0 runs one block, once, to learn what a block returns
        assert max(rows for _, rows, _ in seen) <= 4
        assert report.blocks_run <= sum(rows for _, rows, _ in seen) <= report.blocks_run + first
        assert {s for _, _, s in seen} <= lengths  # as long as the longest of the slice
        assert report.left == {m: int((report.exit_layer > m).sum()) for m in (0, 1, 2, 3)}


def test_slices_are_full_again_when_candidates_have_left() -> None:
    """Eight rows at most in a block: as many calls of each block as what is left needs, none of them by a half."""
    model, tokenizer, documents = ranker(), pair_tokenizer(), [f"film {word}" for word in (WORDS * 40)[:40]]
    scores = all_scores(model, tokenizer, QUERY, documents)
    model.set_early_exit_config(top_k(3, scores))
    calls: list[tuple[int, int]] = []
    hooks = [
        block.base_layer.register_forward_pre_hook(lambda _, args, m=m: calls.append((m, len(args[0]))))
        for m, block in enumerate(blocks_of(model), start=1)
    ]
    _, report = EarlyExitReranker(model, tokenizer, batch_size=8).rank(QUERY, documents, 3, return_report=True)
    for hook in hooks:
        hook.remove()
    assert 8 < report.left[1] < 40
    for m, rows in ((1, 40), (2, report.left[1]), (3, report.left[2])):
        assert sorted(n for number, n in calls if number == m) == [rows % 8] * (rows % 8 > 0) + [8] * (rows // 8)


def test_a_model_that_works_between_its_blocks_sees_the_states() -> None:
    model, tokenizer = make_ranker(exit_layers=[0, 1, 2, 3]), pair_tokenizer()
    blocks_of(model)[1].register_forward_hook(
        lambda _, __, out: 1.5 * out if torch.is_tensor(out) else (1.5 * out[0],)
    )
    config = top_k(3, all_scores(model, tokenizer, QUERY, DOCUMENTS))
    for _ in range(2):
        report = check(model, DOCUMENTS, config, batch_size=5)
        assert 0 < report.blocks_saved < 1


def test_exits_that_decide_nothing_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = ranker(exit_layers=(0, 1, 2, 3)), pair_tokenizer()
    read: list[int] = []
    monkeypatch.setattr(
        ExitReader,
        "read",
        lambda self, block, m, frame, own=ExitReader.read: [read.append(m), own(self, block, m, frame)][1],
    )
    reranker = EarlyExitReranker(model, tokenizer)
    for memory in (2**33, 0):  # 8 GiB is no size that an option may not have
        reranker.max_state_bytes = memory
        model.set_early_exit_config({"policy": "top_k", "top_k": 3, "parameters": {"margins": [None, 9.0, None, 0.0]}})
        read.clear()
        reranker.rank(QUERY, DOCUMENTS, 3)
        assert set(read) == {1}
        read.clear()
        _, report = reranker.rank(QUERY, DOCUMENTS[:3], 3, return_report=True)
        assert not read and report.left == {1: 3, 3: 0} and report.blocks_saved == 0


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 4), st.sampled_from([0, 5, 50]))
def test_slices_cost_least(lengths: list[int], most: int, call: int) -> None:
    lengths = sorted(lengths, reverse=True)

    def cost(bounds: Any) -> int:
        return sum((end - start) * lengths[start] + call for start, end in bounds)

    def every(start: int) -> Any:
        if start == len(lengths):
            yield []
        for end in range(start + 1, min(start + most, len(lengths)) + 1):
            yield from ([(start, end), *rest] for rest in every(end))

    found = slice_bounds(np.array(lengths), most, call)
    assert found in list(every(0)) and cost(found) == min(map(cost, every(0)))


def test_states_in_a_file_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_COPIES", 10**9)  # segments, whatever fits
    for dtype, fields in ((torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"carry": "logits"})):
        model = copy.deepcopy(ranker(exit_pooling="mean", **fields)).to(dtype)
        config = top_k(3, all_scores(model, pair_tokenizer(), QUERY, DOCUMENTS).float())
        model.set_early_exit_config(config)
        rankings = [
            EarlyExitReranker(model, pair_tokenizer(), batch_size=5, max_state_bytes=n).rank(QUERY, DOCUMENTS, 3)
            for n in (0, 2**30)
        ]
        assert rankings[0] == rankings[1]


def test_calibrated_on_its_own_scores_it_keeps_the_top_k() -> None:
    model, tokenizer = ranker(exit_layers=(0, 1, 2, 3)), pair_tokenizer()
    queries = {f"{QUERY} {word}": make_documents(15, seed=i) for i, word in enumerate(("plot", "cast", "end"))}
    scores = torch.cat([all_scores(model, tokenizer, q, d) for q, d in queries.items()])[:, :, 0]
    config = calibrate_ranking(scores, [q for q, d in queries.items() for _ in d], top_k=4, keep=1.0)
    model.set_early_exit_config(config)
    reranker = EarlyExitReranker(model, tokenizer)
    for query, documents in queries.items():
        early, full = (reranker.rank(query, documents, 4, full_depth=f) for f in (False, True))
        assert [a["corpus_id"] for a in early] == [a["corpus_id"] for a in full]


def test_other_numbers_than_the_calibrated() -> None:
    model, tokenizer = ranker(), pair_tokenizer()
    scores = all_scores(model, tokenizer, QUERY, DOCUMENTS)
    model.set_early_exit_config(top_k(5, scores))
    reranker = EarlyExitReranker(model, tokenizer)
    five, report = reranker.rank(QUERY, DOCUMENTS, 5, return_report=True)
    assert reranker.rank(QUERY, DOCUMENTS, 2) == five[:2]
    with pytest.warns(UserWarning, match=r"calibrated for top_k=5, and 8 are requested.*Calibrate with top_k=8"):
        assert len(reranker.rank(QUERY, DOCUMENTS, 8)) == 8
    with pytest.warns(UserWarning, match="top_k=5"):
        assert len(reranker.rank(QUERY, DOCUMENTS, 100)) == len(DOCUMENTS)
    _, wider = reranker.rank(QUERY, DOCUMENTS, 5, return_report=True, threshold=3.0)
    assert wider.blocks_run > report.blocks_run
    assert reranker.rank(QUERY, DOCUMENTS[:1], 5)[0]["corpus_id"] == 0


def test_a_model_that_has_been_trained_meanwhile_ranks_without_dropout() -> None:
    model = make_ranker()
    reranker = EarlyExitReranker(model, pair_tokenizer())
    before = reranker.rank(QUERY, DOCUMENTS, 3, full_depth=True)
    model.train()
    assert reranker.rank(QUERY, DOCUMENTS, 3, full_depth=True) == before
    model.train()
    assert reranker.predict([(QUERY, DOCUMENTS[before[0]["corpus_id"]])]) == pytest.approx(
        before[0]["score"], abs=1e-5
    )


def test_documents_that_are_cut_are_counted() -> None:
    model, tokenizer = ranker(), pair_tokenizer()
    model.set_early_exit_config({"policy": "top_k", "top_k": 2, "parameters": {"margins": [1.0] * 3}})
    fits, just, longer = ("film " * n for n in (4, 5, 6))
    reranker = EarlyExitReranker(model, tokenizer, max_length=len(tokenizer(QUERY, just).input_ids))
    _, report = reranker.rank(QUERY, [fits, just, longer, longer * 3], 2, return_report=True)
    assert report.cut == 2
    assert EarlyExitReranker(model, tokenizer).max_length == 40


def test_from_pretrained(tmp_path: Any) -> None:
    model, tokenizer = make_ranker(), pair_tokenizer()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model(num_labels=1).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.set_early_exit_config(top_k(3, all_scores(model, tokenizer, QUERY, DOCUMENTS)))
    model.save_pretrained(adapter)
    want = EarlyExitReranker(model, tokenizer).rank(QUERY, DOCUMENTS, 3)
    loaded = EarlyExitReranker.from_pretrained(adapter, batch_size=8)
    found = loaded.rank(QUERY, DOCUMENTS, 3)
    assert [a["corpus_id"] for a in found] == [a["corpus_id"] for a in want] and loaded.batch_size == 8
    assert [a["score"] for a in found] == pytest.approx([a["score"] for a in want], abs=1e-5)
    for file in base.glob("tok*"):
        file.unlink()
    with pytest.raises(ValueError, match="there is no tokenizer"):
        EarlyExitReranker.from_pretrained(adapter)
    assert EarlyExitReranker.from_pretrained(adapter, tokenizer=tokenizer).rank(QUERY, DOCUMENTS, 3)


def test_scores_that_are_not_finite_are_told() -> None:
    model = make_ranker()
    with torch.no_grad():
        blocks_of(model)[0].badge_exit["default"]["1"].linear.bias.fill_(torch.nan)
    model.set_early_exit_config({"policy": "top_k", "top_k": 2, "parameters": {"margins": [0.1] * 3}})
    with pytest.warns(UserWarning, match="23 of 23 candidates had scores that are NaN"):
        _, report = EarlyExitReranker(model, pair_tokenizer()).rank(QUERY, DOCUMENTS, 2, return_report=True)
    assert report.left[1] == 23


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": " "}, "query=' ' is empty or no text"),
        ({"query": None}, "query=None is empty or no text"),
        ({"documents": []}, "documents is empty"),
        ({"documents": "one text"}, "documents is one string"),
        ({"documents": ["a", 3]}, "document 1 is int, not a text"),
        ({"documents": None}, "documents is NoneType: give a list of texts"),
        ({"documents": {"a": 1}}, "documents is dict: give a list of texts"),
        ({"top_k": 0}, "top_k=0 is not allowed"),
        ({"threshold": -1.0}, r"threshold=-1\.0 is not allowed"),
        ({"policies": "top_k"}, "EarlyExitConfig has no field policies"),
    ],
)
def test_calls_that_cannot_be_meant(arguments: dict[str, Any], message: str) -> None:
    model = ranker()
    model.set_early_exit_config({"policy": "top_k", "parameters": {"margins": [1.0] * 3}})
    with pytest.raises(ValueError, match=message):
        EarlyExitReranker(model, pair_tokenizer()).rank(**{"query": QUERY, "documents": DOCUMENTS, **arguments})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "pairs is empty"),
        (None, "pairs is NoneType: give a list of pairs"),
        ("a text", "pairs is str: give a list of pairs"),
        ([("a", "b"), ("a",)], r"pair 1 is \('a',\): a pair is a query and a document"),
    ],
)
def test_pairs_that_are_none(pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyExitReranker(ranker(), pair_tokenizer()).predict(pairs)


def test_models_that_cannot_rank() -> None:
    tokenizer = pair_tokenizer()
    with pytest.raises(ValueError, match="carries no BADGE adapter"):
        EarlyExitReranker(make_model(num_labels=1), tokenizer)
    with pytest.raises(ValueError, match="the model has 2 outputs"):
        EarlyExitReranker(make_badge("bert", make_model(num_labels=2)), tokenizer)
    with pytest.raises(ValueError, match="tokenizer is None"):
        EarlyExitReranker(ranker(), None)
    for name in ("batch_size", "max_length"):
        with pytest.raises(ValueError, match=f"{name}=0 is not allowed"):
            EarlyExitReranker(ranker(), tokenizer, **{name: 0})


def test_an_adapter_that_was_not_calibrated_says_how() -> None:
    model = make_ranker()
    reranker = EarlyExitReranker(model, pair_tokenizer())
    with pytest.raises(ValueError, match=r"not calibrated for ranking.*calibrate_ranking.*full_depth=True"):
        reranker.rank(QUERY, DOCUMENTS)
    full, report = reranker.rank(QUERY, DOCUMENTS, 3, full_depth=True, return_report=True)
    assert len(full) == 3 and report.blocks_saved == 0.0
