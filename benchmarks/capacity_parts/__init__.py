"""Parts of `benchmarks/capacity.py`."""

from __future__ import annotations
