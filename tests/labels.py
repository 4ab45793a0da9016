"""Names of parametrized tests that are the same in every process, which the parallel runner needs."""

from __future__ import annotations

import re


def label(value: object) -> str:
    """`str(value)` with the members of every set in order."""
    return re.sub(r"\{([^{}:]*)\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", str(value))
