"""The pages of the documentation as tests see them: their code blocks, links and headings."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))

_FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n+)?^```(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"(?<!\!)\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        kind: The language behind the fence.
        code: What stands in it.
        line: Of the page, where the code starts.
        skipped: Whether `<!-- not run: ... -->` stands before it.
    """

    kind: str
    code: str
    line: int
    skipped: bool


def blocks(page: Path, kind: str = "python") -> list[Block]:
    """The fenced blocks of a language, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(kind, m["code"], text.count("\n", 0, m.start("code")) + 1, (m["mark"] or "").startswith("not run: "))
        for m in _FENCE.finditer(text)
        if m["kind"] == kind
    ]


def run(page: Path, space: dict[str, object]) -> dict[str, object]:
    """Runs a page's Python in one session that starts with the names in `space`; tracebacks show the page's lines."""
    for block in blocks(page):
        if not block.skipped:
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), space)
    return space


def prose(page: Path) -> str:
    """The page with empty lines in place of its fenced blocks."""
    return _FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Where the page's links lead."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What a link into the page may name: its headings as slugs, a second one of a name with `_1`."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        slug = name = slugify(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        number = 0
        while name in found:
            number += 1
            name = f"{slug}_{number}"
        found.add(name)
    return found


def slugify(heading: str) -> str:
    """A heading's anchor, as Python-Markdown makes it."""
    plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
