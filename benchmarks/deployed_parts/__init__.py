"""Parts of deployed.py: classifiers fine-tuned by plain Trainer, and what `badge-peft train` makes of them."""

from __future__ import annotations
