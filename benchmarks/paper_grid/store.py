"""Where results are kept: one folder per run, which appears whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from badge_peft.evaluation import ExitLogits
from badge_peft.utils.files import write_json
from paper_grid.plan import key_of

RESULT = "run.json"


class Store:
    """The folder given by `--out`, made when something is written."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def folder(self, settings: dict[str, Any]) -> Path:
        """Where a run with these settings (learning rates among them) is or will be."""
        parts = (settings["task"], settings["backbone"], settings["mode"], settings["method"], f"s{settings['seed']}")
        kind = "trials" if settings["purpose"] == "search" else "runs"
        return self.root / kind / f"{'-'.join(parts)}-{key_of(settings)}"

    def read(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The `run.json` of a finished run, or None."""
        path = self.folder(settings) / RESULT
        return json.loads(path.read_text()) if path.is_file() else None

    def logits(self, settings: dict[str, Any], split: str) -> ExitLogits:
        """The stored exit logits of `validation` or `test`."""
        return ExitLogits.load(self.folder(settings) / f"{split}.safetensors")

    def write(self, settings: dict[str, Any], result: dict[str, Any], logits: dict[str, ExitLogits]) -> Path:
        """Writes a finished run. If another process was faster, its result stays."""
        target = self.folder(settings)
        with self.scratch() as folder:
            for split, one in logits.items():
                one.save(folder / f"{split}.safetensors")
            write_json(folder / RESULT, {"key": key_of(settings), "settings": settings, **result})
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(folder, target)
            except OSError:
                if not (target / RESULT).is_file():
                    raise
        return target

    @contextmanager
    def claim(self, settings: dict[str, Any]) -> Iterator[bool]:
        """Whether this process may make the run: False while another process of this machine is at it. The claim ends
        with the process that holds it, however that ends."""
        folder = self.root / ".claims"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / key_of(settings)).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the same disk that is gone afterwards, also when the run fails."""
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".unfinished-",
            dir=self.root,
            ignore_cleanup_errors=True,
        ) as folder:
            yield Path(folder)
