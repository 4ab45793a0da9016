"""The parts of `benchmarks/latency.py`: what early exits cost and save on the clock."""
