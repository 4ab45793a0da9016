"""Keeps phrases that readers stumble over out of the pages: `python -m tests.words [PAGE ...]`.

By default README.md and docs/ without docs/results/, whose pages the benchmarks write. Code, in blocks or in line, is
not read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.pages import PAGES, README, ROOT, prose

#: What not to write (a regular expression; a space is any white space), and what to write instead.
INSTEAD = {
    r"all the way": "run every block",
    r"(?:by|off|on) the clock": "in time, latency",
    r"hardly reads?": "name the limit: is mostly English",
    r"(?:are|be|is|was|were)(?: not)? (?:asked|named|refused|said|told)": "who does it: the report gives, raises",
    r"(?<!I\s)(?<!they\s)(?<!you\s)wants?": "need",
    r"behind (?:(?:an?|each|every|the) (?:block|bypass|exit)|it|them)": "after",
    r"beside": "next to, with, compared with",
    r"nobody (?!has)": "no one, or the passive: is disabled",
    r"(?:has|holds?|takes?) no (?:answers?|changes?|name|rows?)": "what it does instead",
    r"(?<!as\sa\s)(?:exit )?rules?": "policy",
    r"(?:candidates?|rows?|texts?) (?:that )?(?:leaves?|left)": "stop",
    r"the answers? of": "predictions",
    r"but for": "except for",
    r"of (?:its|their) own": "its own X",
    r"in no (?:file|format|other)": "unsupported, not in any",
    r"share(?:s|d)? (?:its|their) fate": "are treated alike",
    r"(?:at|by) (?:its|their) word": "without a check",
    r"good for nothing": "no better than",
    r"mend(?:able|ed|ing|s)?": "fix",
    r"what no \w+": "two negatives: say what it does",
}


def found(pages: Iterable[Path]) -> list[str]:
    """`page:line: phrase: what to write instead`, of every phrase of `INSTEAD` in the pages."""
    lines = []
    for page in pages:
        text = re.sub(r"`[^`\n]*`|\]\([^)\s]*\)", lambda code: "_" * len(code[0]), prose(page))
        for phrase, instead in INSTEAD.items():
            for match in re.finditer(rf"\b(?:{phrase})\b".replace(" ", r"\s+"), text, re.IGNORECASE):
                line = text.count("\n", 0, match.start()) + 1
                lines.append(f"{page}:{line}: {' '.join(match[0].split())}: {instead}")
    return lines


if __name__ == "__main__":
    own = [README, *(page for page in PAGES if not page.is_relative_to(ROOT / "docs" / "results"))]
    wrong = found(map(Path, sys.argv[1:]) if len(sys.argv) > 1 else own)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))
