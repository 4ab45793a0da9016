"""The parts of `benchmarks/paper.py`: one grid of runs, a store of their results, and a report made from the store."""
