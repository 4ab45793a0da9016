"""The PEFT tuner: blocks, bypasses and exits, and what a saved adapter holds."""
