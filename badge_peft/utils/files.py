"""Files that are there whole or not at all; and what can only be a file."""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

_LEFT_BEHIND = 3600.0  # seconds after which a temporary file is of a process that was killed


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


def write_json(path: str | Path, data: Any, indent: int = 2) -> None:
    """`write_text` with `data` as JSON."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` in UTF-8, as `replacing` does; what UTF-8 cannot hold is a question mark."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file, or folder, to write beside `path`, which takes its place at the end: a reader sees what was there
    before or the new one. Links are followed, and a file that is replaced keeps its mode."""
    target = Path(path).resolve()
    temporary = _beside(target)
    try:
        yield temporary
        _finish(temporary, target)
        os.replace(temporary, target)
    except BaseException:
        _remove(temporary)
        raise


def install(source: Path, folder: Path, last: Sequence[str] = ()) -> None:
    """Puts the files of `source` into `folder`, which is made, in the place of those of the same names.

    All of them are written beside their places first, and then renamed, one right after the other: on a full disk, or
    in a process that is killed while it writes, `folder` stays as it was. Files in `last` are renamed after all
    others, in this order."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as temporary:
            temporary.mkdir()
            install(source, temporary)
        return
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    names = [name for name in names if name not in last] + [name for name in last if name in names]
    places = {_beside(folder / name): folder / name for name in names}
    try:
        for temporary, target in places.items():
            shutil.copyfile(source / target.name, temporary)
            _finish(temporary, target)
        for temporary, target in places.items():
            os.replace(temporary, target)
    except BaseException:
        for temporary in places:
            temporary.unlink(missing_ok=True)
        raise


def _beside(target: Path) -> Path:
    """A new name in the folder of `target`, with its suffix; what was left behind under such names is removed."""
    for file in target.parent.glob(f".{'[0-9a-f]' * 32}.{glob.escape(target.name)}"):
        with suppress(FileNotFoundError):  # another process has put it in its place meanwhile
            if time.time() - file.lstat().st_mtime > _LEFT_BEHIND:
                _remove(file)
    return target.with_name(f".{uuid4().hex}.{target.name}")


def _remove(path: Path) -> None:
    """Removes a file or a folder, which need not be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _finish(temporary: Path, target: Path) -> None:
    """Makes sure that `temporary` is on the disk, with the mode of the file whose place it takes."""
    if temporary.is_file():
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    if target.exists():
        shutil.copymode(target, temporary)
