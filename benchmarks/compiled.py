"""What `compile_blocks` saves: exits with compiled blocks, against eager ones and the stock model compiled alike.

    python benchmarks/compiled.py                               # about 90 minutes on 2 free cores; needs g++
    python benchmarks/compiled.py --sizes h384 --rows 1         # about 15 minutes
    python benchmarks/compiled.py --docs docs/results/compiled.md   # measures nothing: the page from the file

A cell is a model, a batch size and a length; each is stored as it is measured, and a second run measures what is
missing. `--quick` tries the benchmark itself on a tiny model in a few minutes (compiling takes its time).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from latency_parts import environment
from latency_parts.compiled_page import page
from latency_parts.compiled_runs import has_compiler, measure_cell
from latency_parts.forced import build
from latency_parts.settings import SIZES
from latency_parts.store import Store, read

RESULTS = "runs/compiled.json"
FULL = {
    "sizes": ["BERT-base", "h384"],
    "rows": [1, 32],
    "lengths": [16, 64, 128],
    "exits": [2, 6, 12],
    "rounds": 20,
    "threads": 2,
}
QUICK = {"sizes": ["tiny"], "rows": [1, 3], "lengths": [8], "exits": [2, 4], "rounds": 2, "threads": 1}
_SEED = 0  # of the weights, in `forced.build`; the tokens of rows that leave at block k have seed k


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    for name, default in (QUICK if options.quick else FULL).items():
        setattr(options, name, getattr(options, name) or default)
    path = options.json or ("runs/compiled-quick.json" if options.quick else RESULTS)
    if options.docs is None:
        if options.backend == "inductor" and not has_compiler():
            print("inductor needs a C++ compiler: apt-get install g++", file=sys.stderr)
            return 1
        measure(options, Store(path, options.quick))
    text = page(read(path))
    if options.docs is None:
        print(text)
        return 0
    Path(options.docs).parent.mkdir(parents=True, exist_ok=True)
    Path(options.docs).write_text(text, encoding="utf-8")
    return 0


def measure(options: argparse.Namespace, store: Store) -> None:
    """Measures and stores what the file does not have."""
    torch.set_num_threads(options.threads)
    for name in options.sizes:
        forced = None
        for rows in options.rows:
            for length in options.lengths:
                key = f"{name}/B={rows}/S={length}"
                if key in store.sections:
                    continue
                forced = forced or build(SIZES[name], options.lengths)
                exits = [k for k in options.exits if k <= forced.size.blocks]
                where = environment.describe(options.threads, "cpu")
                start = time.perf_counter()
                cell = measure_cell(forced, rows, length, exits, options.rounds, 2, options.backend)
                seconds = round(time.perf_counter() - start, 1)
                store.add(key, {"environment": where, "took_s": seconds, "seed": _SEED, **cell})
                print(f"{key}: {seconds:.0f} s", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", help=f"the file of the results (default: {RESULTS})")
    parser.add_argument("--docs", metavar="FILE", help="measure nothing: write the page from the file of the results")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: BERT-base h384")
    parser.add_argument("--rows", type=int, nargs="+", help="rows of a batch (default: 1 32)")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens per row (default: 16 64 128)")
    parser.add_argument("--exits", type=int, nargs="+", help="blocks at which rows leave (default: 2 6 12)")
    parser.add_argument("--rounds", type=int, help="of every cell (default: 20)")
    parser.add_argument("--threads", type=int, help="of torch (default: 2)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; another one is to try the benchmark")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: says nothing about speed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
