"""The JSON file of the results: one section per experiment, size and device, written whenever a shape is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from badge_peft.utils.files import write_json

FORMAT = 2  # 1 knew no limit


class Store:
    """Sections by `experiment/size/device`; each has `environment`, `seconds`, `rows`, and `cells`, the shapes in it.

    Args:
        path: The file.
        quick: Whether a tiny model is measured: its numbers and real ones never stand in one file.
        keep: Merge into the file if there is one; False starts a new one.

    Raises:
        ValueError: the file is of another kind.
    """

    def __init__(self, path: str | Path, quick: bool = False, keep: bool = True) -> None:
        self.path = Path(path)
        self.data: dict[str, Any] = {"format": FORMAT, "quick": quick, "sections": {}}
        if keep and self.path.exists():
            self.data = read(self.path)
            if self.data["quick"] != quick:
                kind = "of --quick" if self.data["quick"] else "of real sizes"
                raise ValueError(f"{self.path} holds results {kind}: name another file with --json.")

    @property
    def sections(self) -> dict[str, Any]:
        """What has been measured."""
        return self.data["sections"]

    def add(self, key: str, section: dict[str, Any]) -> None:
        """Takes a section in; a reader sees the old file or the new one."""
        self.sections[key] = section
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.data, indent=1)


def read(path: str | Path) -> dict[str, Any]:
    """The contents of a file that `Store` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no file {file}: measure first.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{file} is not of this benchmark: it has no format {FORMAT}.")
    return data
