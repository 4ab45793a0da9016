"""What the page says: the answers are those of `predict`, wrong input is told plainly, texts are escaped."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from badge_peft.app.page import HINT, MOST_CHARACTERS, Callbacks
from badge_peft.evaluation import evaluate_policy
from badge_peft.hub import LOGITS
from badge_peft.workflows.data import TextDataset
from badge_peft.workflows.evaluate import evaluate_adapter, stored_logits
from badge_peft.workflows.predict import predict
from tests.app.conftest import BLOCKS, Make, opened
from tests.cli.conftest import Cli
from tests.early_exit.reference import MULTI, REGRESSION
from tests.texts import make_tokenizer, sentences, write_csv

TEXTS = [text for text, _ in sentences(12)]


def values(callbacks: Callbacks, **changes: Any) -> list[Any]:
    """Where the controls stand, with some moved."""
    return [changes.get(control.field, control.value) for control in callbacks.controls]


def said(page: str, name: str) -> str:
    """The text of the element of a class."""
    (found,) = re.findall(rf'class="{name}"[^>]*>(.*?)</', page)
    return unescape(found)


def blocks(page: str) -> list[tuple[str, int]]:
    """State and block of each exit on the page."""
    return [(state, int(block)) for state, block in re.findall(r'class="bx-exit (\w+)" data-block="(\d+)"', page)]


def mistake(page: str) -> str:
    """The one error that a page tells."""
    (found,) = re.findall(r'role="alert">(.*?)</div>', page)
    assert not blocks(page)
    return unescape(found)


RULES: list[dict[str, Any]] = [
    {},
    {"policy": "patience"},
    {"policy": "entropy", "threshold": 0.3},
    {"policy": "max_prob"},
    {"policy": "confident_patience"},
    {"policy": "learned", "threshold": 0.5},
    {"policy": "fixed_depth", "depth": 2},
    {"policy": "never"},
]


@pytest.fixture
def adapter(make: Make) -> Path:
    return make(learn_to_exit=True, exit_layers=[0, 1, 2, 3, 5])


# ---------------------------------------------------------------------------------------------------------- the answer


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_answer_and_exit_are_those_of_predict(adapter: Path, rule: dict[str, Any]) -> None:
    callbacks = opened(adapter, **rule)
    exits = set()
    for text in TEXTS:
        (expected,) = predict(callbacks.adapter, [(text, None)], callbacks.rule)
        page = callbacks.answer(text, None, *values(callbacks))
        assert said(page, "bx-answer") == f"{expected['label']} ({expected['score']:.1%})"
        name = {0: "embeddings", BLOCKS: f"block {BLOCKS} (full depth)"}
        assert said(page, "bx-stop") == name.get(expected["exit_layer"], f"block {expected['exit_layer']}")
        assert said(page, "bx-saved").startswith(f"{BLOCKS - expected['exit_layer']} of {BLOCKS} blocks saved")
        assert [block for _, block in blocks(page)] == [0, 1, 2, 3, 5]
        assert ("answers", expected["exit_layer"]) in blocks(page)
        exits.add(expected["exit_layer"])
    assert len(exits) > 1 or rule.get("policy") in ("never", "fixed_depth")


def test_several_labels_and_values(make: Make) -> None:
    several = opened(make(names=tuple("abcdefghi"), kind=MULTI))
    value = opened(make(names=("score",), kind=REGRESSION))
    for text in TEXTS[:4]:
        (expected,) = predict(several.adapter, [(text, None)])
        page = several.answer(text, None, *values(several))
        chosen = ", ".join(expected["labels"]) or "no label"
        assert said(page, "bx-answer") == f"{chosen} (least sure label {expected['score']:.1%})"
        assert ("answers", expected["exit_layer"]) in blocks(page) and "4 more" in page
        (expected,) = predict(value.adapter, [(text, None)])
        page = value.answer(text, None, *values(value))
        assert float(said(page, "bx-answer")) == pytest.approx(expected["value"], rel=1e-3)
        assert ("answers", expected["exit_layer"]) in blocks(page) and "distance" in page


def test_a_pair(make: Make) -> None:
    adapter = make()
    (adapter / "report.json").write_text('{"columns": {"text": "a", "text_pair": "b", "label": "c"}}')
    callbacks = opened(adapter)
    assert callbacks.pairs is True
    (expected,) = predict(callbacks.adapter, [("the film", "a plot")])
    page = callbacks.answer("the film", "a plot", *values(callbacks))
    assert ("answers", expected["exit_layer"]) in blocks(page) and "“a plot”" in page
    assert "type the second one" in mistake(callbacks.answer("the film", " ", *values(callbacks)))


# --------------------------------------------------------------------------------------------------------- wrong input


def test_wrong_input(adapter: Path) -> None:
    callbacks = opened(adapter)
    start = values(callbacks)
    for text in ("", "  \n", None):
        assert "there is no text" in mistake(callbacks.answer(text, None, *start))
        assert HINT in unescape(callbacks.moved(text, None, *start))
    long = "film " * MOST_CHARACTERS
    assert f"{len(long):,} characters" in mistake(callbacks.answer(long, None, *start))
    assert "second text" in mistake(callbacks.answer("film", long, *start))
    for wrong in (values(callbacks, patience=0), values(callbacks, threshold=None), values(callbacks, threshold="x")):
        assert mistake(callbacks.answer("a film", None, *wrong))
        assert mistake(callbacks.curve(*wrong)) and callbacks.describe(*wrong)
    untrained = opened(adapter, policy="learned")
    assert blocks(untrained.answer("a film", None, *values(untrained)))


def test_a_rule_that_the_adapter_cannot_follow(make: Make) -> None:
    with pytest.raises(ValueError, match="needs an adapter with an LTE layer"):
        opened(make(), policy="learned")


def test_a_long_text_is_cut_and_the_page_says_so(adapter: Path) -> None:
    callbacks = opened(adapter)
    page = callbacks.answer("film " * 100, None, *values(callbacks))
    assert "The text has 102 tokens, and the model reads 40" in page and blocks(page)
    assert "tokens" not in callbacks.answer("film", None, *values(callbacks))


class Tags(HTMLParser):
    """The tags and attributes of a page, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_texts_and_labels_are_escaped(make: Make) -> None:
    evil, names = "<img src=x onerror=alert(1)>\"'", ("<script>alert(2)</script>", '"><a onclick=x>')
    callbacks = opened(make(names=names))
    start = values(callbacks)
    plain, page = Tags(callbacks.answer("film", "film", *start)), Tags(callbacks.answer(evil, evil, *start))
    assert page.tags == plain.tags and page.attributes == plain.attributes
    assert not page.tags & {"img", "script", "a"} and not any(name.startswith("on") for name in page.attributes)
    assert page.texts.count(f"“{evil}”") == 2
    assert all(page.texts.count(name) >= BLOCKS for name in names)
    for wrong in (evil, f"{evil}{' ' * MOST_CHARACTERS}"):
        told = Tags(callbacks.answer(wrong, None, *values(callbacks, threshold=wrong)))
        assert not told.tags & {"img", "script", "a"}


# ------------------------------------------------------------------------------------------------------- the trade-off


def test_the_point_on_the_curve(make: Make) -> None:
    adapter = make(logits=60)
    callbacks = opened(adapter)
    logits = stored_logits(adapter)
    seen = set()
    for tau, t in ((0.05, 1), (0.6, 1), (0.6, 3)):
        page = callbacks.curve(tau, t)
        point = evaluate_policy(logits, {"threshold": tau, "patience": t})
        cells = [f"{point.score:.1%}", f"{point.mean_exit:.2f}", f"{point.blocks_saved:.1%}"]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page and "data:image/svg+xml" in page
        assert f"threshold={tau}, patience={t}" in page
        seen.add(point.mean_exit)
        curves = callbacks.tradeoff.curves(callbacks.rule)
        assert {"fixed_depth", "divergence t=1", "patience", "entropy", "max_prob"} == set(curves.names)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("rule", "curve"),
    [
        ({"policy": "entropy"}, "entropy"),
        ({"policy": "patience", "patience": 3}, "patience"),
        ({"policy": "confident_patience"}, "confident_patience t=2"),
        ({"policy": "learned"}, "learned"),
        ({"policy": "fixed_depth", "depth": 3}, "fixed_depth"),
        ({"policy": "never"}, "fixed_depth"),
    ],
    ids=str,
)
def test_every_rule_has_its_curve(make: Make, rule: dict[str, Any], curve: str) -> None:
    callbacks = opened(make(logits=30, learn_to_exit=True), **rule)
    assert "data:image/svg+xml" in callbacks.curve(*values(callbacks))
    assert curve in callbacks.tradeoff.curves(callbacks.rule).names


def test_regression_has_a_curve_and_a_slider_as_wide_as_its_values(make: Make) -> None:
    adapter = make(logits=30, names=("score",), kind=REGRESSION)
    callbacks = opened(adapter)
    assert "pearson" in callbacks.curve(*values(callbacks))
    logits = stored_logits(adapter).logits[..., 0]
    widest = float((logits.amax(1) - logits.amin(1)).max())
    assert callbacks.controls[0].high == pytest.approx(max(widest, 0.125), rel=0.05)


def test_without_logits_the_command_is_named_and_makes_them(make: Make, cli: Cli, tmp_path: Path) -> None:
    adapter = make()
    callbacks = opened(adapter)
    page = callbacks.curve(*values(callbacks))
    assert "<img" not in page
    command = unescape(re.findall(r"<code>(.*?)</code>", page)[0]).split()
    assert command[:2] == ["badge-peft", "evaluate"]
    data = write_csv(tmp_path / "rows.csv", sentences(30))
    make_tokenizer().save_pretrained(adapter)
    cli(*[data if word == "DATA" else word for word in command[1:]])
    (adapter / LOGITS).rename(adapter / "elsewhere")
    (adapter / "tradeoff.png").write_bytes(b"\x89PNG")  # as train leaves it
    assert "data:image/png;base64,iVBORw==" in opened(adapter).curve(*values(callbacks))
    (adapter / "elsewhere").rename(adapter / LOGITS)
    assert "data:image/svg+xml" in opened(adapter).curve(*values(callbacks))


def test_logits_that_are_not_the_adapters(make: Make) -> None:
    other = make(names=("a", "b", "c"))
    adapter = make(logits=10)
    (adapter / LOGITS).rename(other / LOGITS)
    callbacks = opened(other)
    page = unescape(callbacks.curve(*values(callbacks)))
    assert "There is no curve" in page and "2 outputs" in page and "badge-peft evaluate" in page
    (other / LOGITS).write_bytes(b"no safetensors")
    callbacks = opened(other)
    assert "holds no exit logits" in unescape(callbacks.curve(*values(callbacks)))


def test_scores_without_labels_are_against_full_depth(make: Make) -> None:
    adapter = make(logits=20)
    logits = stored_logits(adapter)
    logits.labels = None
    logits.save(adapter / LOGITS)
    callbacks = opened(adapter)
    page = callbacks.curve(*values(callbacks))
    assert "scored against full depth" in unescape(page) and "<td>100.0%</td>" in page


def test_evaluate_and_the_page_agree(make: Make) -> None:
    """What the page says of the stored logits is what `badge-peft evaluate` says of the same rows."""
    callbacks = opened(make(logits=40))
    rows = sentences(40)
    names = [label for _, label in rows]
    texts = TextDataset([text for text, _ in rows], None, names, None, {"text": "text", "label": "label"}, "x")
    report, _ = evaluate_adapter(callbacks.adapter, texts)
    page = callbacks.curve(*values(callbacks))
    for block, score, count in zip(
        report["exit_layers"], report["per_exit"], report["early_exit"]["rows_stopped"], strict=True
    ):
        name = f"block {block}" + (" (full depth)" if block == BLOCKS else "")
        assert f"<td>{name}</td><td>{score:.1%}</td><td>{count / 40:.1%}</td>" in page
