"""Commands of `badge-peft`, one after the other, in each of several processes: starting these takes longer.

Run with a file, a JSON list of command lines, and a folder, in which each process leaves `<rank>.json`: what each of
its commands printed, and how often `badge-peft` ended the process group. The standard input is the launcher's.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from badge_peft.utils import distributed
from tests.cli.conftest import invoke


def main(commands: Path, folder: Path) -> None:
    """What one of several processes runs."""
    distributed.init_process_group()
    rank = distributed.rank_world()[0]
    shutdown, ends = distributed.shutdown, []
    distributed.shutdown = lambda: ends.append(rank)
    results = [dataclasses.asdict(invoke(*command, input=None)) for command in json.loads(commands.read_text())]
    (folder / f"{rank}.json").write_text(json.dumps({"results": results, "ends": len(ends)}))
    shutdown()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
