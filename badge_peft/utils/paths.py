"""Whether a name is of the file system or of the Hub."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def is_local(name: str | Path, suffixes: Collection[str] = ()) -> bool:
    """Whether `name` can only be of the file system. A repository of the Hub is called `name` or `owner/name`."""
    path = Path(name)
    return (
        path.exists()
        or path.is_absolute()
        or str(name).startswith((".", "~"))
        or len(path.parts) > 2
        or path.suffix.lower() in suffixes
    )
