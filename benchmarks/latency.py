"""What early exits cost and save on the clock: PyTorch, ONNX Runtime and int8, against the same model without exits.

    python benchmarks/latency.py                                 # everything, about 25 minutes on 2 free cores
    python benchmarks/latency.py --only exits,batch --sizes h384 --rounds 30
    python benchmarks/latency.py --resume                        # what the file does not have yet
    python benchmarks/latency.py --docs docs/results/speed.md    # measures nothing: the page from the file

Results are saved as each shape ends. `--quick` tries the benchmark itself on a tiny model in a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from latency_parts.settings import EXPERIMENTS, ONNX, QUICK, SIZES, Settings
from latency_parts.store import Store, read

RESULTS = "runs/latency.json"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    path = options.json or ("runs/latency-quick.json" if options.quick else RESULTS)
    if options.docs is not None:
        from latency_parts.page import write_page

        print(write_page(read(path), options.docs))
        return 0
    settings = _settings(options)
    store = Store(path, settings.quick, keep=options.resume or bool(options.only or options.sizes))
    _measure(settings, options, store)

    from latency_parts.page import targets_text

    print(f"{targets_text(store.data)}\n\n{path}")
    return 0


def _measure(settings: Settings, options: argparse.Namespace, store: Store) -> None:
    import torch
    from latency_parts.loop import has_onnx, measure

    torch.set_num_threads(settings.threads)
    experiments = options.only or list(EXPERIMENTS)
    devices = options.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    left = [] if has_onnx() else [name for name in experiments if name in ONNX]
    if left:
        print(f"not measured, as they need pip install 'badge-peft[onnx]': {', '.join(left)}", flush=True)
    print(f"{settings.threads} threads for torch and for every ONNX Runtime session; sessions do not spin", flush=True)
    chosen = [name for name in experiments if name not in left]
    with tempfile.TemporaryDirectory() as temporary:
        measure(settings, chosen, devices, store, Path(options.cache or temporary), options.resume)


def _settings(options: argparse.Namespace) -> Settings:
    settings = (QUICK if options.quick else Settings()).with_rounds(options.rounds)
    given = {"sizes": options.sizes, "lengths": options.lengths, "threads": options.threads}
    return dataclasses.replace(settings, **{name: value for name, value in given.items() if value})


def _names(allowed: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        wrong = [name for name in names if name not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)} is not allowed: choose from {', '.join(allowed)}.")
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be a whole number of at least 1.")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Experiments:\n" + "\n".join(f"  {name:14} {text}" for name, text in EXPERIMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", help=f"the file of the results (default: {RESULTS})")
    parser.add_argument("--docs", metavar="FILE", help="measure nothing: write the page from the file of the results")
    rest = "the rest of the file stays"
    several = {"metavar": "NAME,..."}
    parser.add_argument("--only", type=_names(EXPERIMENTS), help=f"these experiments; {rest}", **several)
    parser.add_argument("--sizes", type=_names(SIZES), help=f"of {', '.join(SIZES)}; {rest}", **several)
    parser.add_argument("--devices", type=_names(("cpu", "cuda")), help="default: those that there are", **several)
    parser.add_argument("--lengths", type=_positive, nargs="+", help="tokens per row, batch 1 (default: 16 64 128)")
    parser.add_argument("--rounds", type=_positive, help="of every experiment (default: its own)")
    parser.add_argument("--threads", type=_positive, help="of torch and of each session (default: 2)")
    parser.add_argument("--resume", action="store_true", help="measure only what the file does not have")
    parser.add_argument("--cache", metavar="FOLDER", help="keep exported ONNX files here; what is there is used")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: says nothing about speed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
