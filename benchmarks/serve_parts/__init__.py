"""The parts of benchmarks/serve.py."""

from __future__ import annotations
