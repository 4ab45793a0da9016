"""A page to look at: where one text stops, and why. What `badge-peft app` shows."""

from __future__ import annotations
