"""A real browser on a real `badge-peft app`: somebody types a text, moves a slider, and sees the exit change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.predict import predict
from tests.app.browser import Page, chromium, missing, served
from tests.app.conftest import BLOCKS, opened, save_adapter

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"no browser to test the page with: {missing()}"),
    pytest.mark.slow,
]
TEXT = "the film was good and the end is flat"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("browser"), logits=40)


@pytest.fixture(scope="module")
def address(adapter: Path) -> Iterator[str]:
    with served(adapter) as found:
        yield found


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as found:
        yield found


def live(adapter: Path, text: str, **rule: Any) -> dict[str, Any]:
    """What the adapter answers without a page."""
    (found,) = predict(open_adapter(adapter, device="cpu"), [(text, None)], EarlyExitConfig(**rule))
    return found


def stop(block: int) -> str:
    return f"block {block}" + (" (full depth)" if block == BLOCKS else "")


def test_a_slider_moves_the_exit(adapter: Path, address: str, driver: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page = Page(driver, address)
    page.ask(TEXT)
    expected = live(adapter, TEXT)
    assert page.texts("#exits .bx-stop") == [stop(expected["exit_layer"])]
    assert page.texts("#exits .bx-answer") == [f"{expected['label']} ({expected['score']:.1%})"]
    assert len(page.texts("#exits .bx-exit")) == BLOCKS

    tau, t = (control for control in opened(adapter).controls)
    found = []
    for keys, rule in (
        (Keys.HOME, {"threshold": tau.low}),
        (Keys.END, {"threshold": tau.high}),
    ):
        page.find("#threshold input[type=range]").send_keys(keys)
        page.until("#exits .bx-why", lambda said, tau=rule["threshold"]: f"tau = {tau:.4g}\n" in f"{said}\n")
        expected = live(adapter, TEXT, **rule)
        assert page.texts("#exits .bx-stop") == [stop(expected["exit_layer"])]
        assert page.texts("#exits .bx-answer") == [f"{expected['label']} ({expected['score']:.1%})"]
        found.append(expected["exit_layer"])
    assert found[0] == BLOCKS > found[1]

    page.find("#patience input[type=range]").send_keys(Keys.END)
    page.until("#exits .bx-why", lambda said: f"t = {t.high}" in said)
    expected = live(adapter, TEXT, threshold=tau.high, patience=int(t.high))
    assert expected["exit_layer"] > found[1] and page.texts("#exits .bx-stop") == [stop(expected["exit_layer"])]

    page.find("#reset").click()
    expected = live(adapter, TEXT)
    page.until("#exits .bx-why", lambda said: f"tau = {tau.value:.4g}\n" in f"{said}\n" and "t = 1" in said)
    assert page.texts("#exits .bx-stop") == [stop(expected["exit_layer"])]


def test_the_curve_follows_the_slider(adapter: Path, address: str, driver: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page = Page(driver, address)
    page.find("#threshold input[type=range]").send_keys(Keys.HOME)
    page.tab("Trade-off")
    page.until("#curve table", lambda said: "threshold=0, patience=1" in said)
    picture = page.find("#curve img")
    assert picture.is_displayed() and picture.size["height"] > 100
    row = next(line for line in page.texts("#curve tr") if line.startswith("as set"))
    assert row.split()[-2:] == [f"{BLOCKS}.00", "0.0%"]


def test_nothing_that_is_typed_becomes_a_part_of_the_page(address: str, driver: Any) -> None:
    page = Page(driver, address)
    for text in (
        "<img src=x onerror='window.broken=1'> film",
        "<script>window.broken=1</script> plot",
        "${window.broken=1} {{window.broken=1}} cast",
    ):
        page.ask(text)
        assert page.texts("#exits .bx-text") == [f"“{text}”"]
        assert driver.execute_script("return document.querySelectorAll('#exits img, #exits script').length") == 0
    assert driver.execute_script("return window.broken") is None


def test_no_text(address: str, driver: Any) -> None:
    page = Page(driver, address)
    page.find("#answer").click()
    page.until("#exits [role=alert]", lambda said: "there is no text" in said)
