"""Takes the picture of docs/app.md, after `make demo`:

    python -m tests.app.screenshot demo_out/exits "It starts slowly, but the last hour is a joy to watch." \\
        docs/img/app.png

Options of `badge-peft app` may follow. Choose a text that the model gets right and that stops between first and last.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

from tests.app.browser import Page, chromium, missing, served


def screenshot(adapter: str, text: str, out: Path, *options: str) -> None:
    """Writes a picture of the page after it has answered `text`, with 128 colors: the size is that of a document."""
    from PIL import Image

    with served(adapter, *options) as address, chromium(1200, 1120) as driver:
        page = Page(driver, address)
        page.ask(text)
        time.sleep(1)  # until the button has its usual color again
        picture = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").quantize(128).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    if missing() is not None:
        sys.exit(missing())
    screenshot(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
