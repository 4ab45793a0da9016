"""`pipeline`: transformers' text classification, each text with the exit that answered it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)

import badge_peft
from badge_peft import BadgeConfig, bundle
from badge_peft.pipelines import EarlyExitPipeline
from tests.models import make_badge, make_model, shake
from tests.texts import make_tokenizer, save_base, sentences
from tests.thresholds import in_a_gap

TEXTS = [text for text, _ in sentences(12)]


def save(folder: Path, case: str = "bert", num_labels: int = 2, **fields: Any) -> Path:
    """An adapter in `folder/adapter` for a base with a tokenizer in `folder/base`; it stops at several exits."""
    path = save_base(folder / "base", case, num_labels)
    base = AutoModelForSequenceClassification.from_pretrained(path)
    torch.manual_seed(0)
    model = get_peft_model(base, BadgeConfig(**{"r": 4, "exit_layers": [0, 1, 2, 3], **fields})).eval()
    shake(model)
    batch = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**batch).exit_logits
    if num_labels > 1 and fields.get("problem_type") is None:
        model.set_early_exit_config(in_a_gap({"policy": "max_prob"}, logits, [0, 1, 2, 3]))
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def classify(adapter: Path) -> EarlyExitPipeline:
    return badge_peft.pipeline("text-classification", model=str(adapter), batch_size=4)


def by_hand(model: Any, text: str, pair: str | None = None, **rule: Any) -> tuple[torch.Tensor, int]:
    """Logits [K] of a text, and the block that it stopped at."""
    batch = make_tokenizer()(text, pair, return_tensors="pt", return_token_type_ids=False)
    out = model.early_exit_forward(**batch, **rule)
    return out.logits[0], int(out.exit_layer)


def test_each_answer_is_that_of_the_model(classify: EarlyExitPipeline) -> None:
    found: Any = classify(TEXTS)
    assert isinstance(classify, TextClassificationPipeline) and len({a["exit_layer"] for a in found}) >= 3
    for text, answer in zip(TEXTS, found, strict=True):
        logits, number = by_hand(classify.model, text)
        assert answer.keys() == {"label", "score", "exit_layer"}
        assert answer["exit_layer"] == number and answer["label"] == f"LABEL_{int(logits.argmax())}"
        assert answer["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


@pytest.mark.parametrize("case", ["bert", "distilbert", "roberta", "modernbert-mean"])
def test_at_full_depth_it_is_transformers_own(case: str, tmp_path: Path) -> None:
    """Text by text, with every form of input and answer that transformers has."""
    adapter = save(tmp_path, case, num_labels=3, train_head=False)
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = 32  # RoBERTa counts positions from behind the padding token
    base: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    theirs = TextClassificationPipeline(model=base, tokenizer=tokenizer, device=-1)
    ours = badge_peft.pipeline(model=str(adapter), tokenizer=tokenizer, policy="never", device=-1)
    pair: Any = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    inputs: list[Any] = [TEXTS[0], TEXTS[:5], pair, [pair, {"text": TEXTS[2], "text_pair": TEXTS[3]}]]
    for given in inputs:
        for options in ({}, {"top_k": 2}, {"top_k": None}, {"function_to_apply": "none"}, {"batch_size": 3}):
            compare(ours(given, **options), theirs(given, **options))  # type: ignore[arg-type]
    long = " ".join(TEXTS)
    compare(ours(long, truncation=True), theirs(long, truncation=True))  # type: ignore[arg-type]
    lazily = [*ours(text for text in TEXTS)]
    assert lazily == ours(TEXTS)


def compare(found: Any, expected: Any) -> None:
    """The same answers, but for `exit_layer`, which ours have and which says block 3."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            compare(one, other)
    else:
        assert found.pop("exit_layer") == 3
        assert found == {**expected, "score": pytest.approx(expected["score"], abs=1e-5)}


def test_rules_of_the_pipeline_and_of_a_call(adapter: Path) -> None:
    classify = badge_peft.pipeline(model=str(adapter), batch_size=3, min_exit=1, threshold=0.0)
    assert [a["exit_layer"] for a in classify(TEXTS)] == [1] * 12
    assert [a["exit_layer"] for a in classify(TEXTS, threshold=2.0)] == [3] * 12
    assert [a["exit_layer"] for a in classify(TEXTS, threshold=2.0, max_exit=2)] == [2] * 12
    assert [a["exit_layer"] for a in classify(TEXTS)] == [1] * 12
    patient: Any = classify(TEXTS, early_exit_config={"policy": "patience"}, patience=1)
    for text, answer in zip(TEXTS, patient, strict=True):
        rule = {"policy": "patience", "patience": 1}
        assert answer["exit_layer"] == by_hand(classify.model, text, **rule)[1]
    capped = badge_peft.pipeline(model=str(adapter), threshold=0.2, max_exit=2)
    assert capped.model.get_early_exit_config().policy == "max_prob"
    sure: Any = capped(TEXTS, policy="entropy")  # at its own threshold, which is no probability
    for text, answer in zip(TEXTS, sure, strict=True):
        assert answer["exit_layer"] == by_hand(capped.model, text, early_exit_config={"policy": "entropy"})[1]
    assert [a["exit_layer"] for a in capped(TEXTS, policy="never")] == [3] * 12
    for wrong, message in (({"patience": 0}, "patience=0"), ({"policy": "luck"}, "policy='luck'")):
        with pytest.raises(ValueError, match=message):
            classify(TEXTS, **wrong)
        with pytest.raises(ValueError, match=message):
            badge_peft.pipeline(model=str(adapter), **wrong)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "function"),
    [("regression", 1, lambda x: x), ("multi_label_classification", 3, torch.sigmoid)],
)
def test_problem_types(problem_type: str, num_labels: int, function: Any, tmp_path: Path) -> None:
    """The adapter's, where the base model's config says nothing."""
    classify = badge_peft.pipeline(model=str(save(tmp_path, num_labels=num_labels, problem_type=problem_type)))
    assert classify.model.config.problem_type is None
    logits, number = by_hand(classify.model, TEXTS[0])
    [answers] = classify([TEXTS[0]], top_k=None)
    scores = sorted((float(s) for s in function(logits)), reverse=True)
    assert [a["score"] for a in answers] == pytest.approx(scores, abs=1e-5)
    assert {a["exit_layer"] for a in answers} == {number}


def test_a_loaded_model(adapter: Path) -> None:
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(adapter.parent / "base"), adapter
    ).train()
    classify = badge_peft.pipeline("sentiment-analysis", model=model)
    assert classify.model is model and not model.training and classify.device == model.device
    assert classify("a fine film")[0]["exit_layer"] in range(4)


def test_where_the_tokenizer_comes_from(adapter: Path, tmp_path: Path) -> None:
    classify = badge_peft.pipeline(model=str(adapter))
    assert classify.tokenizer is not None and classify.tokenizer.name_or_path == str(adapter.parent / "base")
    other = make_tokenizer()
    other.save_pretrained(tmp_path / "other")
    for given in (tmp_path / "other", str(tmp_path / "other"), AutoTokenizer.from_pretrained(tmp_path / "other")):
        classify = badge_peft.pipeline(model=adapter, tokenizer=given)
        assert classify.tokenizer is not None and classify.tokenizer.name_or_path == str(tmp_path / "other")
    model = make_badge()
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="no tokenizer in any place that the adapter names: pass tokenizer"):
        badge_peft.pipeline(model=model)
    other.save_pretrained(tmp_path / "adapter")
    beside = badge_peft.pipeline(model=tmp_path / "adapter", model_kwargs={"base_model": make_model()})
    assert beside.tokenizer is not None and beside.tokenizer.name_or_path == str(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer in .*empty"):
        badge_peft.pipeline(model=adapter, tokenizer=tmp_path / "empty")


def test_what_is_refused(adapter: Path) -> None:
    with pytest.raises(ValueError, match="task='ner' is not allowed for this adapter.*'text-classification'"):
        badge_peft.pipeline("ner", model=str(adapter))
    with pytest.raises(ValueError, match="task='fill-mask' is not allowed"):
        badge_peft.pipeline("fill-mask", model=str(adapter))
    with pytest.raises(ValueError, match="model=None is not allowed: give an adapter's folder"):
        badge_peft.pipeline("text-classification")
    lora = get_peft_model(make_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ValueError, match="carries no BADGE adapter"):
        badge_peft.pipeline(model=lora, tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match="no argument 'treshold': did you mean 'threshold'"):
        badge_peft.pipeline(model=str(adapter))("a film", treshold=0.5)


@pytest.mark.parametrize("fields", [{"num_labels": 3}, {"num_labels": 2, "final_exit": "exit"}], ids=str)
def test_labels_have_the_names_of_the_adapter_however_it_was_made(fields: dict[str, Any], tmp_path: Path) -> None:
    named = make_badge(label_names=["a", "b", "c"][: fields["num_labels"]], **fields)
    named.save_pretrained(tmp_path)
    beside = make_badge()
    beside.load_adapter(tmp_path, "named")
    beside.set_adapter("named")
    loaded = badge_peft.load_pretrained(tmp_path, base_model=make_model())
    for model in (named, beside.eval(), loaded):
        found: Any = badge_peft.pipeline(model=model, tokenizer=make_tokenizer())(TEXTS[0], top_k=None)
        assert {answer["label"] for answer in found} == set(named.base_model.label_names())
        assert model.config.num_labels == 3  # the base model's own head has as many


# ---------------------------------------------------------------------------------------------------------- many tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three adapters for one base model, with labels and problem types of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds: dict[str, dict[str, Any]] = {
        "mood": {"label_names": ["bad", "good"]},
        "topics": {"num_labels": 4, "final_exit": "exit", "problem_type": "multi_label_classification"},
        "degree": {"num_labels": 1, "final_exit": "exit", "problem_type": "regression"},
    }
    path = save_base(folder / "base", num_labels=2)
    for name, fields in kinds.items():
        model: Any = get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(path), BadgeConfig(r=4, exit_layers=[0, 1, 2], **fields)
        )
        shake(model.eval())
        rule = {"policy": "patience", "patience": 1, "threshold": 0.5}
        model.set_early_exit_config({"policy": "fixed_depth", "depth": 2} if name == "topics" else rule)
        model.save_pretrained(str(folder / name))
    return {name: str(folder / name) for name in kinds}


@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"top_k": 1}, {"function_to_apply": "none"}], ids=str)
def test_many_tasks_are_the_pipelines_of_each(tasks: dict[str, str], options: dict[str, Any]) -> None:
    together = badge_peft.pipeline("text-classification", model=tasks, batch_size=5, tokenizer=make_tokenizer())
    found: Any = together(TEXTS, **options)
    one: Any = together(TEXTS[0], **options)
    assert (one[0] if isinstance(one, list) else one).keys() == tasks.keys()
    for name, place in tasks.items():
        alone: Any = badge_peft.pipeline(model=place, batch_size=5, tokenizer=make_tokenizer())(TEXTS, **options)
        for answer, want in zip(found, alone, strict=True):
            ours, theirs = answer[name], want
            if isinstance(theirs, dict):
                ours, theirs = [ours], [theirs]
            for one_answer, wanted in zip(ours, theirs, strict=True):
                assert one_answer == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-5)}


def test_a_bundle_and_a_loaded_model(tasks: dict[str, str], tmp_path: Path) -> None:
    model = badge_peft.load_pretrained(tasks)
    badge_peft.save_tasks(model, tmp_path / "bundle", tokenizer=make_tokenizer())
    found: list[Any] = [
        badge_peft.pipeline(model=str(tmp_path / "bundle"))(TEXTS),
        badge_peft.pipeline(model=model, tokenizer=make_tokenizer(), tasks=list(tasks))(TEXTS),
    ]
    assert list(found[0][0]) == list(tasks) and found[0] == found[1]
    some: Any = badge_peft.pipeline(model=model, tokenizer=make_tokenizer(), tasks=["degree"])(TEXTS)
    assert [list(answer) for answer in some] == [["degree"]] * len(TEXTS)
    alone: Any = badge_peft.pipeline(model=model, tokenizer=make_tokenizer())(TEXTS[0])
    assert alone[0].keys() == {"label", "score", "exit_layer"}  # the active adapter


@pytest.mark.parametrize("name", ["mood", "default"])
def test_a_bundle_of_one_task_answers_as_from_the_hub(
    name: str, tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--user--bundle"
    folder = cached / "snapshots" / "0123"
    badge_peft.save_tasks(badge_peft.load_pretrained({name: tasks["mood"]}), folder, tokenizer=make_tokenizer())
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    monkeypatch.setattr(bundle, "snapshot_download", lambda *args, **kwargs: str(folder))
    options: Any = {"tokenizer": make_tokenizer(), "model_kwargs": {"cache_dir": tmp_path, "local_files_only": True}}
    found = badge_peft.pipeline(model="user/bundle", **options)(TEXTS)
    assert found == badge_peft.pipeline(model=str(folder), tokenizer=make_tokenizer())(TEXTS)
    assert [list(answer) for answer in found] == [[name]] * len(TEXTS)


def test_rules_for_all_tasks_or_for_each(tasks: dict[str, str]) -> None:
    classify = badge_peft.pipeline(model=tasks, tokenizer=make_tokenizer(), policy="fixed_depth", depth=1)
    assert {a["exit_layer"] for a in classify(TEXTS[0])[0].values()} == {1}
    each: Any = classify(TEXTS[0], early_exit_config={"mood": {"policy": "never"}}, depth=2)
    assert {name: a["exit_layer"] for name, a in each[0].items()} == {"mood": 3, "topics": 2, "degree": 2}
    each = badge_peft.pipeline(model=tasks, tokenizer=make_tokenizer())(
        TEXTS[0], early_exit_config={"mood": {"policy": "never"}, "topics": {"policy": "fixed_depth", "depth": 1}}
    )
    assert each[0]["mood"]["exit_layer"] == 3 and each[0]["topics"]["exit_layer"] == 1
    with pytest.raises(ValueError, match="'other', which is no task"):
        classify(TEXTS[0], early_exit_config={"other": {"policy": "never"}})
    with pytest.raises(ValueError, match="no adapter 'other'"):
        badge_peft.pipeline(model=classify.model, tokenizer=make_tokenizer(), tasks=["other"])


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def token_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that labels tokens, for a base model with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    names = dict(enumerate(("O", "B-x", "I-x", "B-y")))
    torch.manual_seed(0)
    base = AutoModelForTokenClassification.from_config(
        make_model(num_labels=4, id2label=names, label2id={name: i for i, name in names.items()}).config
    )
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    base = AutoModelForTokenClassification.from_pretrained(folder / "base")
    model = get_peft_model(base, BadgeConfig(task_type="TOKEN_CLS", r=4, train_head=False)).eval()
    shake(model)
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tokens_at_full_depth_are_transformers_own(token_adapter: Path, strategy: str, batch_size: int) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    base: Any = AutoModelForTokenClassification.from_pretrained(token_adapter.parent / "base").eval()
    options: Any = {"aggregation_strategy": strategy, "batch_size": batch_size}
    theirs: Any = TokenClassificationPipeline(model=base, tokenizer=tokenizer, device=-1, **options)(TEXTS)
    ours: Any = badge_peft.pipeline(
        "token-classification", model=str(token_adapter), tokenizer=tokenizer, policy="never", device=-1, **options
    )(TEXTS)
    assert sum(map(len, ours)) > 0
    for found, expected in zip(ours, theirs, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert one.pop("exit_layer") == 3
            assert one == {**other, "score": pytest.approx(other["score"], abs=1e-5)}


def test_tokens_stop_by_themselves(token_adapter: Path) -> None:
    classify = badge_peft.pipeline("ner", model=str(token_adapter), ignore_labels=[], policy="entropy", threshold=1.0)
    tokenizer = make_tokenizer()
    for text in TEXTS[:4]:
        batch = tokenizer(text, return_tensors="pt", return_token_type_ids=False, return_special_tokens_mask=True)
        out = classify.model.early_exit_forward(**batch, policy="entropy", threshold=1.0)
        found: Any = classify(text)
        assert [entity["exit_layer"] for entity in found] == out.token_exit_layer[0, 1:-1].tolist()
    with pytest.raises(ValueError, match="task='text-classification' is not allowed for this adapter.*'token-class"):
        badge_peft.pipeline(model=str(token_adapter))


def test_tokens_have_the_labels_of_the_adapter(token_adapter: Path) -> None:
    for fields in ({}, {"num_labels": 2, "final_exit": "exit"}):
        base = AutoModelForTokenClassification.from_pretrained(token_adapter.parent / "base")
        names = ["O", "B-a", "I-a", "B-b"][: fields.get("num_labels", 4)]
        model = get_peft_model(base, BadgeConfig(task_type="TOKEN_CLS", r=4, label_names=names, **fields)).eval()
        if fields:
            with pytest.raises(ValueError, match="the labels O, B-a, but .* has 4 others: set id2label"):
                badge_peft.pipeline("ner", model=model, tokenizer=make_tokenizer())
        else:
            tag = badge_peft.pipeline("ner", model=model, tokenizer=make_tokenizer(), ignore_labels=[])
            found: Any = tag(TEXTS[0])
            assert {entity["entity"] for entity in found} <= set(names)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("O", "B-x", "I-x", "E-x", "S-x"), [("x", 0, 3), ("x", 3, 4), ("x", 4, 6)]),
        (("O", "B-x", "I-x", "L-x", "U-x"), [("x", 0, 3), ("x", 3, 4), ("x", 4, 6)]),
        (("O", "ADJ", "-LRB-", "B-", "X"), [(tag, i, i + 1) for i, tag in enumerate("ADJ -LRB- B- X ADJ B-".split())]),
    ],
)
def test_words_are_joined_as_their_tags_say(
    token_adapter: Path, names: tuple[str, ...], expected: list[tuple[str, int, int]]
) -> None:
    """By entities in each scheme; words whose tags name none stay alone."""
    base = AutoModelForTokenClassification.from_pretrained(
        token_adapter.parent / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    fields: Any = {"final_exit": "exit", "label_names": list(names), "num_labels": 5}
    model = get_peft_model(base, BadgeConfig(task_type="TOKEN_CLS", r=4, **fields)).eval()
    tag = badge_peft.pipeline("ner", model=model, tokenizer=make_tokenizer(), aggregation_strategy="first")
    said = [names[i] for i in (1, 2, 3, 4, 1, 3)]
    words = [{"entity": name, "score": 1.0, "word": "a", "start": i, "end": i + 1} for i, name in enumerate(said)]
    found = tag.group_entities(words)
    assert [(entity["entity_group"], entity["start"], entity["end"]) for entity in found] == expected


@pytest.mark.parametrize("batch_size", [1, 4])
def test_windows_of_a_long_text_are_transformers_own(token_adapter: Path, batch_size: int) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names, tokenizer.model_max_length = ["input_ids", "attention_mask"], 16
    base: Any = AutoModelForTokenClassification.from_pretrained(token_adapter.parent / "base").eval()
    options: Any = {"aggregation_strategy": "simple", "batch_size": batch_size, "stride": 4, "device": -1}
    text = " ".join(TEXTS)
    theirs: Any = TokenClassificationPipeline(model=base, tokenizer=tokenizer, **options)(text)
    tag = badge_peft.pipeline("ner", model=str(token_adapter), tokenizer=tokenizer, policy="never", **options)
    ours: Any = tag(text)
    assert [{**entity, "exit_layer": 3} for entity in theirs] == [
        {**entity, "score": pytest.approx(entity["score"], abs=1e-5)} for entity in ours
    ]
    assert len(ours) > 1 and {e["exit_layer"] for e in tag(text, policy="fixed_depth", depth=1)} == {1}
