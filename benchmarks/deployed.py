"""Deployed classifiers: fine-tuned by plain Trainer, then given exits by `badge-peft train` without an option.

python benchmarks/deployed.py finetune --data-dir DATA --model-dir MODELS --out runs/deployed
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from deployed_parts.finetune import finetune  # noqa: E402
from paper_grid.models import find_backbone  # noqa: E402
from paper_grid.settings import Backbone  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["finetune"])
    parser.add_argument("--settings", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/deployed"))
    parser.add_argument("--only", nargs="*", default=None, help="task/backbone, such as banking77/minilm")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    settings = yaml.safe_load(args.settings.read_text(encoding="utf-8"))
    torch.set_num_threads(args.threads or settings["threads"])
    for backbone, fields in settings["backbones"].items():
        for name, task in settings["tasks"].items():
            if args.only and f"{name}/{backbone}" not in args.only:
                continue
            folder = args.out / "models" / f"{name}-{backbone}"
            if folder.exists():
                continue
            path = find_backbone(Backbone(**fields), args.model_dir)
            print(f"== {folder.name}", flush=True)
            part = folder.with_name(folder.name + ".part")
            own = {key: value for key, value in task.items() if key in ("epochs", "max_length", "tokens")}
            finetune(path, args.data_dir / name, part, **own, **settings["finetune"])
            os.rename(part, folder)


if __name__ == "__main__":
    main()
