"""The version of this package."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def package_version() -> str:
    """The version of badge_peft that is installed."""
    try:
        return version("badge-peft")
    except PackageNotFoundError:  # used from a source tree that is not installed
        return "unknown"
