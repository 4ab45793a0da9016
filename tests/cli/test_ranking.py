"""`badge-peft train --task ranking`, and the other commands on the adapter that it makes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from badge_peft import ExitLogits, load_pretrained
from badge_peft.early_exit.policies import build_policy
from badge_peft.integrations.bm25 import retrieve
from badge_peft.ranking import EarlyExitReranker, calibrate_ranking
from badge_peft.workflows.data import read_examples
from badge_peft.workflows.folders import predict_folder
from badge_peft.workflows.predict import Answering
from badge_peft.workflows.settings import Columns, Goal, TrainColumns
from badge_peft.workflows.splits import read_training_data
from tests.cli.conftest import Cli, one_line, save_classifier
from tests.models import make_model
from tests.ranking.pairs import make_documents, pair_tokenizer

pytestmark = pytest.mark.usefixtures("one_translation")
QUERIES, CANDIDATES = 15, 12
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs badge-peft[onnx]",
)
WORDS = ("film", "plot", "story", "cast", "end")


def write_pairs(path: Path, first: int = 0, queries: int = QUERIES, **more: Any) -> Path:
    """Candidates of queries from number `first` on; the queries' texts are not all different, their ids are."""
    lines = []
    for query in range(first, first + queries):
        text = f"was the {WORDS[query % 5]} {WORDS[query // 5 % 5]}"
        for i, document in enumerate(make_documents(CANDIDATES, seed=query)):
            lines.append(
                {"query_id": f"q{query}", "query": text, "document": document, "label": int(i % 5 == 0), **more}
            )
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    """`model`, `pairs.jsonl`, `other.jsonl` and the adapter `reranker` that the command made. Do not change them."""
    folder = tmp_path_factory.mktemp("ranking")
    make_model(num_labels=1).save_pretrained(folder / "model")
    pair_tokenizer().save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / "other.jsonl", 20, 4)
    told = cli(
        *("train", folder / "model", folder / "pairs.jsonl", "--task", "ranking", "--output-dir", folder / "reranker"),
        *("--top-k", 3, "--keep", 0.6, "--epochs", 2, "--exit-layers", "0-", "--batch-size", 16),
    ).output
    (folder / "told.txt").write_text(told)
    return folder


def test_the_report(ranked: Path) -> None:
    report = json.loads((ranked / "reranker" / "report.json").read_text())
    assert (report["task"], report["queries"], report["train_queries"]) == ("ranking", 3, 12)
    assert (report["rows"], report["train_rows"]) == (3 * CANDIDATES, 12 * CANDIDATES)
    assert report["full_depth_is_checkpoint"]["equal"] and report["per_exit"][-1] == 1.0
    assert report["early_exit"]["score"] >= 0.6 and 0 < report["early_exit"]["blocks_saved"] < 1
    assert report["columns"] == {"text": "query", "text_pair": "document", "label": "label", "query_id": "query_id"}
    assert set(report["relevance"]) >= {"ndcg", "full_depth_ndcg", "mrr", "full_depth_mrr"}
    config = json.loads((ranked / "reranker" / "adapter_config.json").read_text())
    assert (config["exit_pooling"], config["carry"]) == ("mean", None)
    told = (ranked / "told.txt").read_text()
    for part in (f"{12 * CANDIDATES} candidates of 12 queries", "policy: top_k, top_k=3", "nDCG@3", "MRR@3"):
        assert part in told
    assert "top k kept against full depth" in told and "full depth answers as the checkpoint, bit for bit" in told


def test_the_adapter_ranks_and_full_depth_is_the_models(ranked: Path) -> None:
    model = load_pretrained(str(ranked / "reranker"))
    config = model.get_early_exit_config()
    assert (config.policy, config.top_k) == ("top_k", 3) and config.calibration["keep"] == 0.6
    stored = ExitLogits.load(ranked / "reranker" / "exit_logits.safetensors")
    assert stored.groups is not None and stored.exits == [0, 1, 2, 3]
    again = calibrate_ranking(stored, top_k=3, keep=0.6)
    assert again.parameters == config.parameters
    tokenizer, documents = pair_tokenizer(), make_documents(7)
    found = EarlyExitReranker.from_pretrained(ranked / "reranker").rank("was the film", documents, 7, full_depth=True)
    stock = AutoModelForSequenceClassification.from_pretrained(ranked / "model").eval()
    with torch.no_grad():
        for answer in found:
            batch = tokenizer("was the film", documents[answer["corpus_id"]], return_tensors="pt")
            assert answer["score"] == pytest.approx(stock(**batch).logits.item(), abs=1e-5)


def test_the_card(ranked: Path) -> None:
    card = (ranked / "reranker" / "README.md").read_text()
    assert "EarlyExitReranker.from_pretrained" in card and "top_k=3" in card and "pipeline(" not in card
    assert f"Chosen on {3 * CANDIDATES} rows, the candidates of 3 queries: top k kept against full depth" in card
    assert "On queries that did not choose the margins" in card and "nDCG" in card


def test_a_card_with_a_bound(ranked: Path, tmp_path: Path) -> None:
    model = load_pretrained(str(ranked / "reranker"))
    stored = ExitLogits.load(ranked / "reranker" / "exit_logits.safetensors")
    stored = replace(
        stored, labels=None, logits=stored.logits[:, -1:].expand_as(stored.logits)
    )  # exits that know it all
    config = calibrate_ranking(stored, top_k=3, keep=0.2, confidence=0.5)
    model.set_early_exit_config(config)
    model.save_pretrained(tmp_path)
    assert "With a confidence of 0.5, at least 20.0% of new queries" in (tmp_path / "README.md").read_text()


def test_calibrate(ranked: Path, tmp_path: Path, cli: Cli) -> None:
    adapter = Path(shutil.copytree(ranked / "reranker", tmp_path / "reranker"))
    told = cli("calibrate", adapter, "--top-k", 1, "--keep", 1.0).output
    config = load_pretrained(str(adapter)).get_early_exit_config()
    assert (config.top_k, config.calibration["keep"], config.calibration["queries"]) == (1, 1.0, 3)
    assert "policy: top_k, top_k=1" in told
    cli("calibrate", adapter, ranked / "other.jsonl", "--top-k", 2)
    config = load_pretrained(str(adapter)).get_early_exit_config()
    assert (config.top_k, config.calibration["queries"], config.calibration["keep"]) == (2, 4, 0.95)
    for path, k in ((adapter, 2), (adapter / "exit_logits.safetensors", 10)):
        assert f"top_k={k}" in cli("sweep", path, "--points", 2).output
    cli("calibrate", adapter)
    assert load_pretrained(str(adapter)).get_early_exit_config().top_k == 2
    before = (adapter / "adapter_config.json").read_bytes()
    one_line(cli("calibrate", adapter, "--max-score-drop", 0.1, fails=True), "not for ranking", "keep")
    one_line(
        cli("calibrate", adapter, "--policy", "entropy", fails=True), "policy='entropy' is not allowed for ranking"
    )
    assert (adapter / "adapter_config.json").read_bytes() == before


def test_evaluate_and_sweep(ranked: Path, tmp_path: Path, cli: Cli) -> None:
    cli(
        "evaluate",
        ranked / "reranker",
        ranked / "other.jsonl",
        "--json",
        tmp_path / "e.json",
        "--save-logits",
        tmp_path / "l",
    )
    report = json.loads((tmp_path / "e.json").read_text())
    stored = ExitLogits.load(tmp_path / "l")
    stops = build_policy(load_pretrained(str(ranked / "reranker")).get_early_exit_config()).replay(stored)
    assert report["early_exit"]["mean_exit"] == pytest.approx(stops.double().mean().item())
    assert report["queries"] == 4 and sum(report["early_exit"]["rows_stopped"]) == 4 * CANDIDATES
    told = cli("sweep", ranked / "reranker", "--top-k", 2, "--points", 5, "--json", tmp_path / "s.json").output
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["metric"] == "top_k_kept" and {p["name"] for p in found["points"]} == {"fixed_depth", "top_k"}
    points = [p for p in found["points"] if p["name"] == "top_k"]
    assert all(p["top_k"] == 2 for p in points) and len(points) <= 5
    assert points[0]["blocks_saved"] <= points[-1]["blocks_saved"] and "top_k=2" in told


def test_predict_ranks_each_query(ranked: Path, cli: Cli) -> None:
    lines = cli("predict", ranked / "reranker", ranked / "other.jsonl").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 4 * CANDIDATES
    reranker = EarlyExitReranker.from_pretrained(ranked / "reranker")
    for start in range(0, len(answers), CANDIDATES):
        part = answers[start : start + CANDIDATES]
        best = reranker.rank(part[0]["text"], [a["text_pair"] for a in part], 3)
        for place, wanted in enumerate(best, start=1):
            answer = part[wanted["corpus_id"]]
            assert answer["rank"] == place and answer["value"] == pytest.approx(wanted["score"], abs=1e-4)
        assert all((a["rank"] is None) == (a["exit_layer"] < 3) for a in part)
    wide = cli("predict", ranked / "reranker", ranked / "other.jsonl", "--policy", "never").stdout.splitlines()
    assert all("rank" not in json.loads(line) for line in wide)
    one_line(cli("predict", ranked / "reranker", "-", input="was the film\n", fails=True), "pairs of texts")


def test_predict_goes_by_the_query_id(ranked: Path, cli: Cli, tmp_path: Path) -> None:
    """Two queries of one text, and one query of two texts."""
    rows = [json.loads(line) for line in (ranked / "other.jsonl").read_text().splitlines()]
    one, two = rows[:CANDIDATES], rows[CANDIDATES : 2 * CANDIDATES]
    same = [{**row, "query": one[0]["query"]} for row in two]
    file = tmp_path / "rows.jsonl"

    def answers(rows: list[dict[str, Any]], *options: Any, **fields: Any) -> Any:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        told = cli("predict", ranked / "reranker", file, *options, **fields)
        return told if fields else [json.loads(line) for line in told.stdout.splitlines()]

    alone = answers(one) + answers(same)
    assert answers(one + same) == alone and [a["rank"] for a in alone].count(1) == 2
    renamed = [{"nr": row["query_id"], "query": row["query"], "document": row["document"]} for row in one + same]
    assert answers(renamed, "--query-id-column", "nr") == alone
    for mixed in (
        [row for pair in zip(one, two, strict=True) for row in pair],
        [{**row, "query_id": None} for row in one + two + one],
    ):
        one_line(answers(mixed, fails=True), "again, after rows of others", "Sort the rows", "--query-id-column")


@pytest.mark.usefixtures("without_ray")
def test_files_are_ranked_query_by_query(ranked: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    shutil.copy(ranked / "other.jsonl", tmp_path / "pairs" / "other.jsonl")
    (tmp_path / "pairs" / "none.jsonl").write_text("")
    predict_folder(tmp_path / "pairs", tmp_path / "out", Answering(str(ranked / "reranker"), batch_size=4))
    lines = cli("predict", ranked / "reranker", ranked / "other.jsonl", "--batch-size", 4).stdout.splitlines()
    found = pq.read_table(tmp_path / "out" / "other.jsonl.parquet")
    assert found.to_pylist() == [json.loads(line) for line in lines]
    assert pq.read_schema(tmp_path / "out" / "none.jsonl.parquet") == found.schema


@pytest.mark.parametrize("onnx", [False, pytest.param(True, marks=[needs_onnx, pytest.mark.exhaustive])])
def test_bench(ranked: Path, tmp_path: Path, cli: Cli, onnx: bool) -> None:
    arguments = ("--rows", 20, "--threads", 1, "--json", tmp_path / "b.json", *([] if onnx else ["--no-onnx"]))
    told = cli("bench", ranked / "reranker", ranked / "other.jsonl", *arguments).output
    report = json.loads((tmp_path / "b.json").read_text())
    assert (report["queries"], report["rows"], report["batch_size"]) == (2, 2 * CANDIDATES, 32)
    stock, early, *others = report["results"]
    assert stock["score"] == 1.0 and stock["mean_exit"] == 3.0 and early["mean_exit"] < 3.0
    assert len(others) == 4 * onnx
    if onnx:
        full, graph, *int8 = others
        assert (full["score"], full["mean_exit"]) == (1.0, 3.0)
        assert graph["mean_exit"] == pytest.approx(early["mean_exit"]) and graph["score"] == early["score"]
        assert int8[0]["mean_exit"] == 3.0 and 0 <= int8[1]["mean_exit"] <= 3.0
    assert "p50 ms per query" in told and "candidates of 2 queries" in told


def test_queries_are_in_one_part_alone(tmp_path: Path) -> None:
    path = str(write_pairs(tmp_path / "pairs.jsonl"))
    for share, max_rows in ((0.2, None), (0.5, 100)):
        train, held = read_training_data(
            path, TrainColumns(eval_share=share, max_rows=max_rows), seed=1, by_query=True
        )
        assert not set(train.queries()) & set(held.queries())
        for part in (train, held):  # whole queries
            assert all(part.queries().count(query) == CANDIDATES for query in set(part.queries()))
    other = str(write_pairs(tmp_path / "other.jsonl", 3, 2))
    train, held = read_training_data(path, TrainColumns(eval_data=other), 0, by_query=True)
    assert set(held.queries()) == {"q3", "q4"} and not set(train.texts) & set(held.texts)
    plain = read_examples(path, Columns(query_id_column="label"))
    assert set(plain.queries()) == {"0", "1"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backbone", "lora"), ("backbone='lora' is not for ranking",)),
        (("--final-exit", "exit"), ("final_exit",)),
        (("--objective", "two_stage"), ("objective='two_stage'", "leave it out")),
        (("--exit-type", "past_future"), ("past_future",)),
        (("--metric", "pearson"), ("metric='pearson' is not for ranking",)),
        (("--target-blocks-saved", 0.5), ("not for ranking", "keep")),
        (("--confidence", 0.95), ("there are 3 queries", "takes at least")),
        (("--text-pair-column", "nothing"), ("no text-pair column 'nothing'",)),
    ],
)
def test_what_is_refused(
    ranked: Path, tmp_path: Path, cli: Cli, options: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    train = ("train", ranked / "model", ranked / "pairs.jsonl", "--task", "ranking", "--output-dir", tmp_path / "x")
    one_line(cli(*train, "--epochs", 1, *options, fails=True), *words)
    assert not (tmp_path / "x").exists()


def test_other_models_data_and_tasks_are_refused(ranked: Path, tmp_path: Path, cli: Cli) -> None:
    two = save_classifier(tmp_path / "two")
    pair_tokenizer().save_pretrained(two)
    out = ("--task", "ranking", "--output-dir", tmp_path / "x")
    one_line(cli("train", two, ranked / "pairs.jsonl", *out, fails=True), "has 2 outputs", "num_labels=1")
    make_model(num_labels=1).base_model.save_pretrained(tmp_path / "encoder")
    pair_tokenizer().save_pretrained(tmp_path / "encoder")
    headless = cli("train", tmp_path / "encoder", ranked / "pairs.jsonl", *out, fails=True)
    one_line(headless, "no trained classification head", "follow the scores of a cross-encoder, so give one")
    (tmp_path / "texts.txt").write_text("a\nb\n")
    one_line(cli("train", ranked / "model", tmp_path / "texts.txt", *out, fails=True), "one text per row")
    plain = ("train", ranked / "model", ranked / "pairs.jsonl", "--output-dir", tmp_path / "x")
    one_line(cli(*plain, "--top-k", 3, fails=True), "top_k and keep are for ranking")
    one_line(cli(*plain, "--policy", "top_k", fails=True), "policy='top_k' ranks the candidates of a query")
    one_line(cli(*plain, "--task", "sorting", fails=True), "task='sorting' is not allowed")
    with pytest.raises(ValueError, match=r"keep=2\.0 is not allowed: it is a share of the queries"):
        Goal(keep=2.0)
    wrong = write_pairs(tmp_path / "wrong.jsonl", 0, 5, label=-2)
    one_line(cli("evaluate", ranked / "reranker", wrong, fails=True), "holds -2 in row 1", "0 for none")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """A file of queries, and one of documents."""
    pytest.importorskip("bm25s")
    queries = [f"was the {a} {b}" for a in WORDS for b in WORDS[:2]]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"query": q}) + "\n" for q in queries))
    documents = [{"document_id": i, "document": d} for i, d in enumerate(make_documents(20))]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    return tmp_path / "queries.jsonl", tmp_path / "corpus.jsonl"


def test_candidates_from_a_corpus(ranked: Path, texts: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    queries, corpus = texts
    train = ("train", ranked / "model", queries, "--task", "ranking", "--output-dir", tmp_path / "reranker")
    told = cli(*train, "--corpus", corpus, "--candidates", 6, "--top-k", 2, "--keep", 0.5, "--epochs", 1).output
    assert "48 candidates of 8 queries to train on, 12 of 2 to evaluate" in told
    report = json.loads((tmp_path / "reranker" / "report.json").read_text())
    assert report["corpus"] == str(corpus) and report["columns"]["text_pair"] == "document"
    again = ("train", ranked / "model", ranked / "pairs.jsonl", "--task", "ranking", "--output-dir", tmp_path / "x")
    one_line(cli(*again, "--corpus", corpus, fails=True), "has pairs already, with 'document' as documents")
    train, held = read_training_data(
        str(queries), TrainColumns(corpus=str(corpus), candidates=6), seed=0, by_query=True
    )
    pairs = [json.loads(line)["document"] for line in corpus.read_text().splitlines()]
    for part in (train, held):
        assert part.pairs is not None and set(part.pairs) <= set(pairs)
        found = retrieve([part.texts[0]], pairs, 6)[0]
        assert part.pairs[:6] == [pairs[place] for place in found]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--candidates", 5), ("candidates says how candidates are found",)),
        (("--corpus", "nowhere.jsonl"), ("there is no file nowhere.jsonl",)),
        (("--corpus", "{corpus}", "--corpus-column", "title"), ("no column 'title'", "document_id, document")),
        (("--corpus", "{corpus}", "--task", "classification"), ("corpus is for ranking",)),
    ],
)
def test_a_corpus_that_is_refused(
    ranked: Path, texts: tuple[Path, Path], tmp_path: Path, cli: Cli, options: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    given = [str(option).format(corpus=texts[1]) for option in options]
    task = () if "--task" in given else ("--task", "ranking")
    one_line(
        cli("train", ranked / "model", texts[0], *task, "--output-dir", tmp_path / "x", *given, fails=True), *words
    )
    assert not (tmp_path / "x").exists()


def test_margins_that_cannot_be_shown_leave_an_adapter_to_calibrate(
    ranked: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no margins could be shown.")

    out = tmp_path / "reranker"
    with monkeypatch.context() as patch:
        patch.setattr("badge_peft.workflows.calibrate.calibrate_ranking", none)
        train = ("train", ranked / "model", ranked / "pairs.jsonl", "--task", "ranking", "--output-dir", out)
        one_line(cli(*train, "--epochs", 1, fails=True), "saved in", "not calibrated", "badge-peft calibrate")
    cli("calibrate", out, "--top-k", 1)
    assert load_pretrained(str(out)).get_early_exit_config().policy == "top_k"


def test_options_of_classification_are_refused(ranked: Path, tmp_path: Path, cli: Cli) -> None:
    adapter, rows = ranked / "reranker", ranked / "other.jsonl"
    one_line(cli("evaluate", adapter, rows, "--metric", "spearman", fails=True), "metric='spearman'")
    one_line(cli("evaluate", adapter, rows, "--latency", 3, fails=True), "latency=3", "badge-peft bench")
    one_line(cli("sweep", adapter, "--metric", "f1", fails=True), "metric='f1'")
    one_line(cli("sweep", adapter, "--policies", "entropy", fails=True), "policies='entropy'")
    one_line(cli("bench", adapter, rows, "--metric", "f1", "--no-onnx", fails=True), "metric='f1'")
    one_line(cli("calibrate", adapter, "--metric", "f1", fails=True), "metric='f1'")


def test_the_page_is_for_texts(ranked: Path, cli: Cli) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (pip install -e '.[dev]')")
    one_line(
        cli("app", ranked / "reranker", fails=True),
        "`badge-peft app` answers texts one by one",
        "ranks the candidates",
    )


def test_an_adapter_is_known_by_its_policy_where_no_report_lies_beside_it(
    ranked: Path, tmp_path: Path, cli: Cli
) -> None:
    adapter = Path(shutil.copytree(ranked / "reranker", tmp_path / "reranker"))
    (adapter / "report.json").unlink()
    cli("calibrate", adapter, ranked / "pairs.jsonl", "--keep", 0.5)
    assert load_pretrained(str(adapter)).get_early_exit_config().calibration["keep"] == 0.5


def test_the_picture_of_another_training_does_not_stay(ranked: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "tradeoff.png").write_bytes(b"of a classifier")
    cli(
        *("train", ranked / "model", ranked / "pairs.jsonl", "--task", "ranking", "--output-dir", tmp_path),
        *("--overwrite", "--top-k", 3, "--keep", 0.2, "--epochs", 1, "--batch-size", 16),
    )
    assert not (tmp_path / "tradeoff.png").exists() and "tradeoff.png" not in (tmp_path / "README.md").read_text()
