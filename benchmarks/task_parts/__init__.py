"""Parts of `benchmarks/tasks.py`, `benchmarks/stack.py` and `benchmarks/decoders.py`."""
