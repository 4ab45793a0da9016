"""`badge-peft train`: one command from a model and a file of texts to a calibrated adapter."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import badge_peft
from badge_peft import ExitLogits, MultiExitTrainer, collect_exit_logits, load_pretrained
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.data import TextDataset, read_examples
from badge_peft.workflows.encode import encode
from badge_peft.workflows.evaluate import compare_with_checkpoint
from badge_peft.workflows.settings import Columns
from badge_peft.workflows.splits import hold_out
from tests.cli.conftest import FAST, ROWS, Cli, one_line, save_classifier
from tests.models import make_model
from tests.texts import make_tokenizer, sentences, write_csv


def test_full_depth_of_a_deployed_checkpoint_is_kept_bit_for_bit(place: Path, trained: Path) -> None:
    deployed = AutoModelForSequenceClassification.from_pretrained(place / "model").eval()
    model = load_pretrained(str(trained))
    batch = AutoTokenizer.from_pretrained(trained)([text for text, _ in ROWS], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = deployed(**batch).logits
        assert torch.equal(model(**batch).logits, before)
        never = model.early_exit_forward(**batch, policy="never")
        assert torch.equal(model(**batch).exit_logits[:, -1], before)
    assert torch.equal(never.logits, before)
    report = json.loads((trained / "report.json").read_text())
    assert report["full_depth_is_checkpoint"] == {"rows": 24, "equal": True, "largest_difference": 0.0}


def test_the_saved_adapter_is_the_one_that_was_trained(trained: Path) -> None:
    stored, opened = ExitLogits.load(trained / "exit_logits.safetensors"), open_adapter(trained, device="cpu")
    held_out = hold_out(read_examples(trained.parent / "texts.txt", training=True), 0.2, seed=0)[1]
    again = collect_exit_logits(opened.model, encode(held_out, opened.tokenizer))
    assert torch.equal(stored.logits, again.logits)


def test_a_model_that_has_changed_is_noticed(place: Path, trained: Path) -> None:
    opened = open_adapter(trained)
    rows = encode(read_examples(place / "texts.txt"), opened.tokenizer)
    assert compare_with_checkpoint(opened.model, str(place / "model"), rows)["equal"] is True
    with torch.no_grad():
        opened.model.get_base_model().classifier.bias[0] += 1e-6
    found = compare_with_checkpoint(opened.model, str(place / "model"), rows)
    assert found["equal"] is False and 0 < found["largest_difference"] < 1e-4


def test_the_folder_holds_all_that_is_promised(place: Path, trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "report.json"} < names
    assert {"exit_logits.safetensors", "tradeoff.png"} < names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) or name.startswith("checkpoint") for name in names)
    assert (trained / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((trained / "adapter_config.json").read_text())
    hashes = {config["weights_hash"], config["early_exit"]["calibration"]["weights_hash"]}
    hashes |= {json.loads((trained / "report.json").read_text())["weights_hash"]}
    assert hashes == {ExitLogits.load(trained / "exit_logits.safetensors").weights_hash}
    assert config["early_exit"]["calibration"]["labels"] == "full depth's own answers"
    assert config["early_exit"]["calibration"]["rows"] == 24
    assert Path(config["base_model_name_or_path"]) == (place / "model").resolve()
    logits = ExitLogits.load(trained / "exit_logits.safetensors")
    assert logits.logits.shape == (24, 3, 2) and logits.labels is None
    report = json.loads((trained / "report.json").read_text())
    assert report["learned_from"] == "the model's own answers" and report["labels"] == "full depth's own answers"
    assert report["train_rows"] == 96 and report["rows"] == 24 and report["per_exit"][-1] == 1.0
    assert report["latency"]["rows"] == 3 and report["latency"]["p50_ms"] > 0
    assert sum(report["early_exit"]["rows_stopped"]) == 24
    head = [name for name in load_file(trained / "adapter_model.safetensors") if "classifier" in name]
    assert not head


def test_the_card_says_what_the_report_says(trained: Path) -> None:
    report, card = json.loads((trained / "report.json").read_text()), (trained / "README.md").read_text()
    assert "| exit after block | accuracy against full depth | rows it answers |" in card
    answered = [f"{count / 24:.1%}" for count in report["early_exit"]["rows_stopped"]]
    for m, score, share in zip(report["exit_layers"], report["per_exit"], answered, strict=True):
        assert f"| {m} | {score:.1%} | {share} |" in card
    assert f"| {report['latency']['full_depth_p50_ms']:.2f} ms | {report['latency']['p50_ms']:.2f} ms |" in card
    assert "![Score against speed-up](tradeoff.png)" in card and "full depth answers as before, bit for bit" in card


def test_labels_are_learned_by_the_names_of_the_model(place: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a"
    renamed = write_csv(tmp_path / "r.csv", [(t, y.upper()) for t, y in ROWS], columns=("message", "verdict"))
    told = cli(
        "train", place / "model", renamed, "--label-column", "verdict", "--output-dir", out, "--keep-head", *FAST
    )
    report = json.loads((out / "report.json").read_text())
    assert report["learned_from"] == "labels" and report["labels"] == "given"
    assert report["columns"] == {"text": "message", "text_pair": None, "label": "verdict"}
    assert "bit for bit" in told.output
    truth = {text: ("bad", "good").index(label) for text, label in ROWS}
    rows = read_examples(renamed, Columns(label_column="verdict"), training=True)
    held = hold_out(rows, 0.2, seed=0)[1]
    assert ExitLogits.load(out / "exit_logits.safetensors").labels.tolist() == [truth[t] for t in held.texts]


def test_the_same_seed_gives_the_same_adapter(place: Path, cli: Cli, tmp_path: Path) -> None:
    train = ("train", place / "model", place / "rows.csv", "--keep-head", "--max-rows", 60, *FAST)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        cli(*train, "--output-dir", tmp_path / name, "--seed", seed)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_exits_pool_as_a_sentence_encoder_does(place: Path, cli: Cli, tmp_path: Path) -> None:
    encoder, classifier = tmp_path / "encoder", tmp_path / "classifier"
    AutoModel.from_pretrained(place / "model").save_pretrained(encoder)
    shutil.copytree(place / "model", classifier)
    make_tokenizer().save_pretrained(encoder)
    for folder in (encoder, classifier):
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')

    def pooling(model: Path, *more: str) -> str:
        out = tmp_path / "out"
        told = cli("train", model, place / "rows.csv", "--output-dir", out, "--overwrite", *FAST, *more).output
        found = json.loads((out / "adapter_config.json").read_text())["exit_pooling"]
        assert ("a sentence encoder: exits pool by" in told) is (model == encoder)
        assert model == classifier or f"exits pool by {found!r}" in told
        return str(found)

    assert pooling(encoder) == "mean"
    assert pooling(encoder, "--exit-pooling", "cls") == "cls"
    assert pooling(classifier) == "mean"  # too few rows for a trial


def test_an_encoder_without_a_head_gets_one(place: Path, cli: Cli, tmp_path: Path) -> None:
    encoder, out = tmp_path / "encoder", tmp_path / "a"
    AutoModel.from_pretrained(place / "model").save_pretrained(encoder)
    make_tokenizer().save_pretrained(encoder)
    told = cli("train", encoder, place / "rows.csv", "--output-dir", out, "--exit-layers", "0-3", *FAST)
    assert "checkpoint" not in told.output
    opened = open_adapter(out)
    assert opened.labels.names == ["bad", "good"] and opened.badge.config_of().final_exit == "exit"
    assert opened.model.base_model.exit_layers() == [0, 1, 2, 3]
    answer = json.loads(cli("predict", out, input="a fine film\n").stdout)
    assert answer["label"] in ("bad", "good")
    one_line(
        cli("train", encoder, place / "rows.csv", "--output-dir", tmp_path / "b", "--keep-head", fails=True), "head"
    )
    one_line(cli("train", encoder, place / "texts.txt", "--output-dir", tmp_path / "b", fails=True), "--label-column")


def test_regression_on_pairs_of_texts(cli: Cli, tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "m", names=("value",))
    data, out = tmp_path / "pairs.csv", tmp_path / "a"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "second", "label"))
        writer.writerows((text, ROWS[-i][0], len(text) / 7) for i, (text, _) in enumerate(ROWS))
    cli("train", model, data, "--text-pair-column", "second", "--output-dir", out, "--keep-head", *FAST)
    report = json.loads((out / "report.json").read_text())
    assert report["metric"] == "pearson" and report["problem_type"] == "regression"
    assert report["full_depth_is_checkpoint"]["equal"] is True
    answers = [json.loads(line) for line in cli("predict", out, data, "--policy", "never").stdout.splitlines()]
    assert [a["text_pair"] for a in answers[:3]] == [ROWS[0][0], ROWS[-1][0], ROWS[-2][0]]
    deployed = AutoModelForSequenceClassification.from_pretrained(model).eval()
    for answer in answers[:3]:
        batch = make_tokenizer()(answer["text"], answer["text_pair"], return_tensors="pt")
        assert answer["value"] == pytest.approx(deployed(**batch).logits.item(), abs=1e-4)
    (out / "report.json").unlink()  # as a repository of the Hub has none here
    one_line(cli("predict", out, input="a film\n", fails=True), "pairs")
    one_line(cli("predict", out, write_csv(tmp_path / "one.csv", ROWS[:2]), fails=True), "trained on pairs of texts")
    classify = badge_peft.pipeline(model=str(out))
    assert classify({"text": "a film", "text_pair": "a plot"})["exit_layer"] > 0
    for one in ("a film", {"text": "a film"}):
        with pytest.raises(ValueError, match="trained on pairs of texts, and here is one text"):
            classify(one)


def test_exits_that_have_learned_nothing_are_told_first_and_not_used(place: Path, cli: Cli, tmp_path: Path) -> None:
    labeled = [(f"{text} {i}", "bad" if i % 20 else "good") for i, (text, _) in enumerate(ROWS)]  # whatever it says
    odd = write_csv(tmp_path / "odd.csv", labeled)
    out = tmp_path / "a"
    train = ("train", place / "model", odd, "--output-dir", out, "--keep-head", "--adapter-lr", 1e-9)
    told = cli(*train, *FAST).stdout.split("\n\n")
    assert told[1].startswith("WARNING: no exit is better than always answering 'bad' (which scores")
    report = json.loads((out / "report.json").read_text())
    assert report["constant_answer"]["beaten"] is False and report["early_exit"]["blocks_saved"] == 0
    assert json.loads((out / "adapter_config.json").read_text())["early_exit"]["policy"] == "never"
    assert "| exit after block | accuracy |" in (out / "README.md").read_text()


def test_a_model_whose_exits_cannot_work_stays_as_it_was(cli: Cli, tmp_path: Path) -> None:
    """Its blocks scatter texts, so that what it answers can be read behind the last one alone."""
    model = make_model("bert", num_labels=2)
    with torch.no_grad():
        for weights in model.base_model.encoder.parameters():
            weights.mul_(30 if weights.dim() > 1 else 1)
        model.classifier.bias.zero_()
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with (tmp_path / "texts.txt").open("w", encoding="utf-8") as file:
        file.writelines(f"{text}\n" for text, _ in sentences(400))
    told = cli("train", tmp_path / "base", tmp_path / "texts.txt", "--output-dir", tmp_path / "out").stdout
    assert "WARNING: Early exits are not worth it here" in told and "policy 'never'" in told
    config = load_pretrained(str(tmp_path / "out")).get_early_exit_config()
    assert config.policy == "never" and config.calibration["time_saved"] == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Early exits are not worth it here" in card
    answers = cli("predict", tmp_path / "out", tmp_path / "texts.txt").stdout.splitlines()
    assert {json.loads(line)["exit_layer"] for line in answers} == {3}


def test_a_label_of_the_evaluation_rows_alone_counts_as_wrong(place: Path, cli: Cli, tmp_path: Path) -> None:
    encoder, out = tmp_path / "encoder", tmp_path / "a"
    AutoModel.from_pretrained(place / "model").save_pretrained(encoder)
    make_tokenizer().save_pretrained(encoder)
    other = write_csv(tmp_path / "other.csv", [*ROWS[:20], ("odd film", "odd"), ("odd plot", "odd")])
    told = cli("train", encoder, place / "rows.csv", "--eval-data", other, "--output-dir", out, *FAST).output
    assert "2 of 22 rows to score have a label that the model does not know ('odd')" in told
    report = json.loads((out / "report.json").read_text())
    assert (report["rows"], report["rows_of_unknown_label"]) == (22, 2) and max(report["per_exit"]) <= 20 / 22


def test_a_training_that_is_not_finite_saves_nothing(place: Path, cli: Cli, tmp_path: Path) -> None:
    train = ("train", place / "model", place / "rows.csv", "--output-dir", tmp_path / "a", *FAST)
    one_line(cli(*train, "--adapter-lr", 1e38, fails=True), "training stopped: the loss of step", "learning rate")
    assert not (tmp_path / "a").exists()


def test_a_separate_file_is_calibrated_on(place: Path, cli: Cli, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS[:20]]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines))
    train = ("train", place / "model", place / "rows.csv", "--output-dir", tmp_path / "a", "--keep-head", *FAST)
    cli(*train, "--eval-data", tmp_path / "eval.jsonl", "--target-blocks-saved", 0.3, "--policy", "divergence")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["rows"] == 20 and report["train_rows"] == 100  # the twenty texts do not train
    assert report["early_exit"]["blocks_saved"] >= 0.3


@pytest.mark.parametrize(("backbone", "objective"), [("lora", "joint"), ("full", "two_stage")])
def test_other_backbones(backbone: str, objective: str, place: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a"
    options = ("--backbone", backbone, "--objective", objective, "--max-rows", 40, *FAST)
    cli("train", place / "model", place / "rows.csv", "--output-dir", out, *options)
    report = json.loads((out / "report.json").read_text())
    assert report["full_depth_is_checkpoint"] is None


def test_a_batch_is_that_of_all_gpus(place: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer gives each GPU that it sees `per_device_train_batch_size` rows."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    sizes, step = [], MultiExitTrainer.training_step

    def counted(self: MultiExitTrainer, model: Any, inputs: Any, *args: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return step(self, model, inputs, *args)

    monkeypatch.setattr(MultiExitTrainer, "training_step", counted)
    data = ("train", place / "model", place / "rows.csv", "--output-dir", tmp_path / "a", "--exit-pooling", "cls")
    cli(*data, *FAST, "--batch-size", 16, "--no-cache-states")
    assert sizes == [16] * 6


def test_what_comes_before_the_training_runs_on_its_device(
    place: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials are no matter for the CPU beside a GPU, of which `meta` stands here."""

    def form(base: Any, *args: Any) -> None:
        raise ValueError(f"trials on {base.model.device}")

    monkeypatch.setattr("badge_peft.workflows.plans.choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr("badge_peft.workflows.plans.choose_form", form)
    out = tmp_path / "a"
    one_line(cli("train", place / "model", place / "rows.csv", "--output-dir", out, fails=True), "trials on meta")


def test_a_goal_out_of_reach_is_refused_before_the_training(place: Path, cli: Cli, tmp_path: Path) -> None:
    train = ("train", place / "model", place / "texts.txt", "--output-dir", tmp_path / "a", "--keep-head", *FAST)
    one_line(cli(*train, "--target-blocks-saved", 0.99, fails=True), "0.99", "at most 0.667")
    one_line(cli(*train, "--max-score-drop", 0.001, "--confidence", 0.95, fails=True), "24 evaluation rows", "7984")
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{model}", "{place}/nothing.csv"), ("no file", "nothing.csv")),
        (("{place}/nothing", "{csv}"), ("no model", "nothing")),
        (("{model}", "{tmp}/broken.jsonl"), ("broken.jsonl", "cannot be read")),
        (("{model}", "{tmp}/wrong.csv", "--keep-head"), ("'no', 'yes'", "'bad', 'good'", "--unlabeled")),
        (("{model}", "{tmp}/numbers.csv", "--keep-head"), ("'7'", "0 to 1")),
        (("{tmp}/mute", "{csv}", "--keep-head"), ("tokenizer", "--tokenizer")),
        (("{model}", "{txt}", "--no-keep-head"), ("--keep-head", "--label-column")),
        (("{model}", "{txt}", "--keep-head", "--backbone", "lora"), ("--backbone frozen",)),
        (("{model}", "{txt}", "--keep-head", "--objective", "alternating"), ("'alternating'", "needs labels")),
        (("{model}", "{txt}", "--keep-head", "--distillation", "0.5"), ("distillation=0.5", "needs labels")),
        (("{model}", "{csv}", "--exit-type", "past_future", "--objective", "two_stage"), ("'two_stage'", "'joint'")),
        (("{model}", "{csv}", "--keep-head", "--placement", "side"), ("placement='side'", "mhsa")),
        (("{model}", "{csv}", "--keep-head", "--exit-layers", "2-1"), ("exit_layers='2-1'", "0-12")),
        (("{model}", "{csv}", "--keep-head", "--exit-layers", "9"), ("block 9", "has 3")),
        (("{model}", "{csv}", "--keep-head", "--metric", "pearson"), ("'pearson'", "accuracy")),
        (("{model}", "{csv}", "--keep-head", "--policy", "best"), ("policy='best'", "auto")),
        (("{model}", "{csv}", "--max-score-drop", "0.1", "--target-blocks-saved", "0.5"), ("one of them",)),
        (("{model}", "{csv}", "--keep-head", "--final-exit", "exit"), ("final_exit='exit'",)),
        (("{model}", "{csv}", "--keep-head", "--depth", "2"), ("depth=2", "single_exit")),
    ],
)
def test_wrong_input_is_told_in_a_line_and_writes_nothing(
    arguments: tuple[str, ...], words: tuple[str, ...], place: Path, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "broken.jsonl").write_text("{no\n")
    write_csv(tmp_path / "wrong.csv", [(t, {"good": "yes", "bad": "no"}[y]) for t, y in ROWS])
    write_csv(tmp_path / "numbers.csv", [(t, str(7 * len(y) - 21)) for t, y in ROWS])
    (tmp_path / "mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place / "model" / name, tmp_path / "mute")
    names = {"model": place / "model", "csv": place / "rows.csv", "txt": place / "texts.txt"}
    names |= {"place": place, "tmp": tmp_path}
    given = [argument.format(**names) for argument in arguments]
    one_line(cli("train", *given, "--output-dir", tmp_path / "out", fails=True), *words)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(place: Path, adapter: Path, cli: Cli) -> None:
    train = ("train", place / "model", place / "texts.txt", "--keep-head", *FAST)
    before = (adapter / "report.json").read_bytes()
    one_line(cli(*train, "--output-dir", adapter, fails=True), "not empty", "--overwrite")
    assert (adapter / "report.json").read_bytes() == before
    one_line(cli(*train, "--output-dir", place / "model", "--overwrite", fails=True), "holds a model")
    cli(*train, "--output-dir", adapter, "--overwrite")
    assert (adapter / "report.json").read_bytes() != before
    one_line(cli("train", adapter, place / "texts.txt", "--output-dir", adapter / "b", fails=True), "holds an adapter")


def test_no_text_is_in_both_parts() -> None:
    rows = TextDataset(["a film", "A  film", "b", "c", "d", "e", "a film"])
    train, held = hold_out(rows, 0.4, seed=1)
    assert len(train) + len(held) == 7
    assert not set(train.keys()) & set(held.keys())
    with pytest.raises(ValueError, match="too few"):
        hold_out(TextDataset(["one"]), 0.5, seed=0)
