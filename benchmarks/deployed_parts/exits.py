"""Runs `badge-peft train` as a user would: the command, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# The form of the paper: linear exits on the first token behind a bypass at every block, and its policy.
PLAIN = ["--exit-pooling", "cls", "--exit-type", "linear", "--exit-layers", "1-", "--carry", "none"]
PLAIN += ["--policy", "divergence"]


def train_exits(model: Path, data: Path, out: Path, seed: int, plain: bool, threads: int) -> None:
    """Writes an adapter, and beside it what the command printed and took.

    Args:
        model: Folder of the classifier.
        data: Folder with train.jsonl and validation.jsonl.
        out: Folder of the adapter.
        seed: Of the exits.
        plain: The paper's form in place of no option at all.
        threads: Of torch.
    """
    part = out.with_name(out.name + ".part")  # what stands under its own name is finished
    shutil.rmtree(part, ignore_errors=True)
    options = ["--seed", str(seed), "--output-dir", str(part), *(PLAIN if plain else [])]
    command = [str(Path(sys.executable).with_name("badge-peft")), "train", str(model), str(data), *options]
    start = time.perf_counter()
    limits = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **limits}, check=False)
    log = out.with_name(out.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"{done.stdout}\n{done.stderr}\n{time.perf_counter() - start:.1f} s\n", encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: see {log}.")
    os.rename(part, out)
