"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_json(path: str | Path, data: Any, indent: int = 2) -> None:
    """`write_text` with `data` as JSON."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` in UTF-8: a reader sees the file that was there before or the new one. Links are followed, and a
    file that is replaced keeps its mode.

    Raises:
        OSError: it cannot be written; what was there is as before.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
