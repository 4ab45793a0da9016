"""Whole workflows, from files to files: what the commands of `badge-peft` do, as functions."""

from __future__ import annotations
