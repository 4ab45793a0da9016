"""A real headless Chromium, and a real `badge-peft app` process for it to look at."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from badge_peft.cli.main import main

Process: Any = multiprocessing.get_context("fork").Process
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT = 60.0  # seconds, for what takes a second or two
START = 300.0  # seconds, for a process that imports torch, transformers and gradio, on a machine with other work


def missing() -> str | None:
    """What is not installed of all that the browser's tests need, in words; None where they can run."""
    packages = [name for name in ("gradio", "selenium") if find_spec(name) is None]
    if packages:
        return f"the package {packages[0]} is not installed (pip install -e '.[dev]')"
    if not any(map(shutil.which, BROWSERS)):
        return f"no browser is installed ({', '.join(BROWSERS)})"
    return None if shutil.which("chromedriver") else "chromedriver is not installed (Debian's chromium-driver)"


@contextmanager
def served(adapter: Path | str, *options: str) -> Iterator[str]:
    """`badge-peft app` in a process of its own, a fork of this one that need not import anything; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = Process(target=_serve, args=(log, ["app", str(adapter), "--port", str(port), *options]), daemon=True)
        process.start()
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, process, log)
            yield address
        finally:
            process.terminate()
            process.join(20)
            process.kill()
            process.join()


def _serve(log: Any, arguments: list[str]) -> None:
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))
    main(arguments)


@contextmanager
def chromium(width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """A headless browser with a window of this size."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-proxy-server",
    ):
        options.add_argument(argument)
    options.add_argument(f"--window-size={width},{height}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page as somebody uses it.

    Args:
        driver: From `chromium`.
        address: From `served`.
    """

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        driver.get(address)
        self.find("#text textarea")

    def find(self, selector: str) -> Any:
        """The first element of a CSS selector, once it is there."""
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, WAIT)
        return waiting.until(lambda d: next(iter(d.find_elements(By.CSS_SELECTOR, selector)), None))

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements of a CSS selector, at one moment."""
        script = "return [...document.querySelectorAll(arguments[0])].map(found => found.innerText.trim())"
        return self.driver.execute_script(script, selector)

    def until(self, selector: str, wanted: Callable[[str], bool]) -> str:
        """The text of an element, once `wanted` holds of it."""
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, WAIT)
        return waiting.until(lambda _: next(filter(wanted, self.texts(selector)), None))

    def ask(self, text: str) -> None:
        """Types a text and presses the button; ready when the answer to this text is there."""
        box = self.find("#text textarea")
        box.clear()
        box.send_keys(text)
        self.find("#answer").click()
        self.until("#exits .bx-text", lambda said: said == f"“{text}”")

    def tab(self, name: str) -> None:
        """Opens a tab."""
        from selenium.webdriver.common.by import By

        next(b for b in self.driver.find_elements(By.CSS_SELECTOR, "button[role=tab]") if b.text == name).click()


def _wait_for(address: str, process: Any, log: Any) -> None:
    ask = build_opener(ProxyHandler({}))
    end = time.monotonic() + START
    while time.monotonic() < end and process.is_alive():
        try:
            ask.open(address, timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"badge-peft app did not answer at {address}: {log.read().decode(errors='replace')}")
