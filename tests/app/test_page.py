"""The gradio page: its parts, its endpoints through a real client, and what the command refuses."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from badge_peft.workflows.predict import predict
from tests.app.conftest import Make, opened, save_adapter
from tests.app.test_callbacks import blocks, said, values
from tests.cli.conftest import Cli, one_line

# ---------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A page that is being served from this process: a client of it, and its callbacks."""
    pytest.importorskip("gradio", reason="gradio is not installed (pip install -e '.[dev]')")
    from gradio_client import Client

    from badge_peft.app.page import build_page

    callbacks = opened(save_adapter(tmp_path_factory.mktemp("page"), logits=40))
    page = build_page(callbacks)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    try:
        yield Client(address, verbose=False), callbacks
    finally:
        page.close()


def test_the_endpoints_are_the_callbacks(served: tuple[Any, Any]) -> None:
    client, callbacks = served
    for text in ("the film was good", "a very dull plot", "<b>story</b>"):
        for tau, t in ((0.2, 1), (1.0, 1), (1.0, 3)):
            page = client.predict(text, "", tau, t, api_name="/answer")
            assert page == callbacks.answer(text, "", tau, t) == client.predict(text, "", tau, t, api_name="/moved")
            rule = {"threshold": tau, "patience": t}
            (expected,) = predict(callbacks.adapter, [(text, None)], callbacks.rule.of(callbacks.rule, **rule))
            assert ("answers", expected["exit_layer"]) in blocks(page)
            assert said(page, "bx-answer").startswith(expected["label"])
    assert "threshold=0.7, patience=2" in client.predict(0.7, 2, api_name="/rule")
    assert "threshold=0.7, patience=2" in client.predict(0.7, 2, api_name="/curve")
    assert list(client.predict(api_name="/reset")) == values(callbacks)


@pytest.mark.parametrize(
    ("rule", "labels"),
    [
        ({}, ["tau, the threshold", "t, how many must agree"]),
        ({"policy": "patience"}, ["t, how many must agree"]),
        ({"policy": "entropy"}, ["tau, the threshold"]),
        ({"policy": "fixed_depth", "depth": 2}, ["the block that answers"]),
        ({"policy": "never"}, []),
    ],
    ids=str,
)
def test_a_page_has_the_sliders_of_its_rule(make: Make, rule: dict[str, Any], labels: list[str]) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (pip install -e '.[dev]')")
    from badge_peft.app.page import build_page

    parts = build_page(opened(make(), **rule)).config["components"]
    moved = [part["props"]["label"] for part in parts if part["type"] in ("slider", "radio")]
    assert moved == labels


@pytest.mark.parametrize(
    ("columns", "visible"), [(None, True), ('{"text": "a", "text_pair": null}', False), ('{"text_pair": "b"}', True)]
)
def test_the_second_text_is_asked_where_it_may_be_needed(make: Make, columns: str | None, visible: bool) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (pip install -e '.[dev]')")
    from badge_peft.app.page import build_page

    adapter = make()
    if columns is not None:
        (adapter / "report.json").write_text(f'{{"columns": {columns}}}')
    parts = build_page(opened(adapter)).config["components"]
    (pair,) = [part for part in parts if part["props"].get("elem_id") == "pair"]
    assert pair["props"]["visible"] is visible


# -------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("package", ["gradio", "matplotlib"])
def test_a_missing_package_names_the_extra(cli: Cli, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    one_line(cli("app", "nowhere", fails=True), package, "pip install 'badge-peft[app]'")


def test_what_the_command_refuses(make: Make, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (pip install -e '.[dev]')")
    adapter = make()
    (tmp_path / "file").write_text("")
    one_line(cli("app", tmp_path, fails=True), "holds no adapter")
    one_line(cli("app", tmp_path / "no" / "where", fails=True), "there is no folder")
    one_line(cli("app", tmp_path / "file", fails=True), "is a file")
    one_line(cli("app", adapter, "--policy", "luck", fails=True), "policy='luck'")
    one_line(cli("app", adapter, "--policy", "fixed_depth", fails=True), "depth")
    one_line(cli("app", adapter, "--device", "abacus", fails=True), "abacus")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one_line(cli("app", adapter, "--port", port, fails=True), str(port))
