"""Reruns the BADGE paper's comparisons: Tables 1, 2, 3 and 6 and Figure 2, from one YAML file.

    python benchmarks/paper.py run benchmarks/paper_small.yaml --data-dir DATA --model-dir MODELS --out runs/paper
    python benchmarks/paper.py report benchmarks/paper_small.yaml --out runs/paper --docs docs/results/paper/small.md

`run` searches the learning rates that are missing, then trains; killed, it goes on where it was. `search` does the
first part alone. `report` writes tables and figures from whatever is stored. Of a grid on frozen backbones, `headline`
writes the short page that compares forms of exits, and `policies` measures what `policy="auto"` costs against the best
single rule.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from paper_grid.loop import Loop, state
from paper_grid.plan import plan
from paper_grid.settings import load_settings
from paper_grid.store import Store

PAGES = {
    "report": "docs/results/paper/small.md",
    "headline": "docs/results/paper.md",
    "policies": "docs/results/paper/policies.md",
}


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 when a run has failed."""
    options = _parser().parse_args(arguments)
    settings, store = load_settings(options.config), Store(options.out)
    if options.command == "report":
        from paper_grid.report import write_report

        for path in write_report(settings, store, options.docs, options.config, not options.no_figures):
            print(path)
        return 0
    if options.command == "headline":
        from paper_grid.headline import write_headline

        picture = Path(options.picture) if options.picture else None
        for path in write_headline(settings, store, Path(options.docs), picture, _name(options.config)):
            print(path)
        return 0
    if options.command == "policies":
        from paper_grid.regret import write_policies

        print(write_policies(settings, store, Path(options.json), Path(options.docs), _name(options.config)))
        return 0
    runs = [run for run in plan(settings) if run.matches(options.only)]
    if not runs:
        raise SystemExit(f"--only {options.only!r} matches no run of {options.config}: see --dry-run without it.")
    if options.dry_run:
        done, todo = state(settings, runs, store)
        print(*(f"done  {text}" for text in done), *(f"to do {text}" for text in todo), sep="\n")
        print(f"{len(done)} done, {len(todo)} to do")
        return 0
    if options.workers > 1 and not (options.command == "search" and options.optuna):
        return _crowd(sys.argv[1:] if arguments is None else arguments, options.workers)
    import torch
    from paper_grid.training import Workshop

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    workshop = Workshop(settings, store, options.data_dir, options.model_dir)
    if options.command == "search" and options.optuna:
        from paper_grid.rates import tuned_name
        from paper_grid.tuning import tune

        for name, run in {tuned_name(run.settings): run for run in reversed(runs)}.items():
            if store.tuned(name) is None:
                print(name, tune(workshop, run, options.trials), flush=True)
        return 0
    loop = Loop(settings, store, workshop.run, options.minutes)
    loop.go(runs, search_only=options.command == "search")
    if loop.failed:
        print(f"{len(loop.failed)} failed:", *loop.failed.values(), sep="\n  ", file=sys.stderr)
    return 1 if loop.failed else 0


def _name(config: str) -> str:
    """The grid, as a page names it."""
    return f"benchmarks/{Path(config).name}"


def _crowd(arguments: list[str], workers: int) -> int:
    """The same command in `workers` processes that share the store."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--workers", "1"]
    started = [subprocess.Popen(command) for _ in range(workers)]
    try:
        return max(process.wait() for process in started)
    finally:
        for process in started:
            process.terminate()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "search what has not been searched, and train what has not been trained"),
        ("search", "only choose learning rates, on validation data"),
        ("report", "write tables and figures from what is stored"),
        ("headline", "write the short page: forms of exits on frozen backbones"),
        ("policies", "measure what policy='auto' costs against the best single rule, and write its page"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help="the grid, such as benchmarks/paper_small.yaml")
        command.add_argument("--out", default="runs/paper", help="the store of results (default: %(default)s)")
        if name in PAGES:
            command.add_argument("--docs", default=PAGES[name], help="the page (default: %(default)s)")
            if name == "report":
                command.add_argument(
                    "--no-figures", action="store_true", help="leave out Figure 2: sweeps take a while"
                )
            if name == "headline":
                command.add_argument("--picture", help="also draw the first task, as this PNG file")
            if name == "policies":
                command.add_argument(
                    "--json", default="runs/policies.json", help="kept measurements (default: %(default)s)"
                )
            continue
        command.add_argument("--data-dir", help="the folder with one folder of JSON lines per task")
        command.add_argument("--model-dir", help="the folder with one folder per backbone that is on disk")
        command.add_argument("--only", metavar="PATTERN", help="part of a run's label or group, or a shell pattern")
        command.add_argument("--dry-run", action="store_true", help="say what is there and what is missing")
        command.add_argument("--threads", type=int, help="of torch, per process (default: its own choice)")
        command.add_argument(
            "--workers",
            type=int,
            default=1,
            help="processes; on small models one per core with --threads 1 is the fastest (default: %(default)s)",
        )
        command.add_argument("--minutes", type=float, help="start nothing after so many")
        if name == "search":
            command.add_argument("--optuna", action="store_true", help="the paper's search space, by optuna")
            command.add_argument("--trials", type=int, default=20, help="of optuna (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
