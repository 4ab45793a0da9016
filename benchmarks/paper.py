"""Reruns the BADGE paper's comparisons: Tables 1, 2, 3 and 6 and Figure 2, from one YAML file.

    python benchmarks/paper.py run benchmarks/paper_small.yaml --data-dir DATA --model-dir MODELS --out runs/paper
    python benchmarks/paper.py report benchmarks/paper_small.yaml --out runs/paper --docs docs/results/paper/small.md

`run` searches the learning rates that are missing, then trains; killed, it goes on where it was. `report` writes
tables and figures from whatever is stored. Of a grid on frozen backbones, `headline` writes the short page that
compares forms of exits, and `policies` measures what `policy="auto"` costs against the best single policy.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from paper_grid.headline import write_headline
from paper_grid.loop import Loop, state
from paper_grid.plan import plan
from paper_grid.regret import write_policies
from paper_grid.report import write_report
from paper_grid.settings import Settings, load_settings
from paper_grid.store import Store
from paper_grid.training import Workshop


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 when a run has failed."""
    options = _parser().parse_args(arguments)
    settings = load_settings(options.config)
    store = Store(options.out)
    config = f"benchmarks/{options.config.name}"
    if options.command == "run":
        return _run(settings, store, options, sys.argv[1:] if arguments is None else arguments)
    if options.command == "report":
        written = write_report(settings, store, options.docs, config, not options.no_figures)
    elif options.command == "headline":
        written = write_headline(settings, store, options.docs, options.picture, config)
    else:
        written = [write_policies(settings, store, options.json, options.docs, config)]
    print(*written, sep="\n")
    return 0


def _run(settings: Settings, store: Store, options: argparse.Namespace, arguments: list[str]) -> int:
    runs = [run for run in plan(settings) if run.matches(options.only)]
    if not runs:
        raise SystemExit(f"--only {options.only!r} matches no run of {options.config}: see --dry-run without it.")
    if options.dry_run:
        done, todo = state(settings, runs, store)
        print(*(f"done  {text}" for text in done), *(f"to do {text}" for text in todo), sep="\n")
        print(f"{len(done)} done, {len(todo)} to do")
        return 0
    if options.workers > 1:  # the same command in processes that share the store
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--workers", "1"]
        return max(process.wait() for process in [subprocess.Popen(command) for _ in range(options.workers)])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loop = Loop(settings, store, Workshop(settings, store, options.data_dir, options.model_dir).run)
    loop.go(runs)
    if loop.failed:
        print(f"{len(loop.failed)} failed:", *loop.failed.values(), sep="\n  ", file=sys.stderr)
    return 1 if loop.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report", "headline", "policies"):
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("config", type=Path, help="the grid, such as benchmarks/paper_small.yaml")
        command.add_argument("--out", default="runs/paper", help="the store of results")
        page = {
            "report": "paper/small.md",
            "headline": "paper.md",
            "policies": "paper/policies.md",
        }.get(name)
        if page:
            command.add_argument("--docs", type=Path, default=Path("docs/results", page), help="the page")
    run, report, headline, policies = (commands.choices[name] for name in ("run", "report", "headline", "policies"))
    run.add_argument("--data-dir", help="the folder with one folder of JSON lines per task")
    run.add_argument("--model-dir", help="the folder with one folder per backbone that is on disk")
    run.add_argument("--only", metavar="PATTERN", help="part of a run's label or group, or a shell pattern")
    run.add_argument("--dry-run", action="store_true", help="say what is there and what is missing")
    run.add_argument("--threads", type=int, help="of torch, per process")
    run.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes; one per core with --threads 1 is the fastest",
    )
    report.add_argument("--no-figures", action="store_true", help="leave out Figure 2: sweeps take a while")
    headline.add_argument("--picture", type=Path, help="also draw the first task, as this PNG file")
    policies.add_argument("--json", type=Path, default=Path("runs/policies.json"), help="kept measurements")
    return parser


if __name__ == "__main__":
    sys.exit(main())
