"""Token classification: entity F1 against blocks and time saved, on data with tokens and tags.

    python benchmarks/tokens.py MODEL FOLDER                       # about 15 minutes on a free core
    python benchmarks/tokens.py --docs docs/results/tokens.md      # measures nothing: the page from the file

FOLDER has train.jsonl, validation.jsonl and test.jsonl, rows of `tokens` and `tags`. An adapter that is in `--out` is
not trained again. Validation rows choose every setting, test rows score it.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from common import Results, calibrated, describe, machine, markdown, parser, run

from badge_peft import EarlyExitConfig, collect_exit_logits, evaluate_policy, exit_scores, measure_latency
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.base import describe as describe_policy
from badge_peft.model_card import REPORT
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.settings import ExitOptions, Goal, TrainColumns, TrainingOptions, TrainSettings
from badge_peft.workflows.train import train_adapter

METRIC = "entity_f1"
GOALS = (0.1, 0.25, 0.33, 0.5, 0.66)


def measure(options: argparse.Namespace, results: Results) -> None:
    """Trains where there is no adapter, and measures."""
    if not (options.out / REPORT).exists():
        train(options)
    about = {"model": options.name or Path(options.model).name, "data": Path(options.data).name}
    results.keep("tokens", {"environment": describe(options.threads), **about, **score(options)})


def train(options: argparse.Namespace) -> None:
    """An adapter on a frozen backbone, as `badge-peft train` makes it."""
    settings = TrainSettings(
        output_dir=options.out,
        max_length=options.max_length,
        latency=0,
        columns=TrainColumns(eval_data=str(Path(options.data, "validation.jsonl"))),
        exits=ExitOptions(backbone="frozen", r=options.r, exit_layers="0-"),
        training=TrainingOptions(epochs=options.epochs, adapter_lr=options.adapter_lr, batch_size=options.batch_size),
        goal=Goal(policy="auto", max_score_drop=0.01),
    )
    train_adapter(str(options.model), str(Path(options.data, "train.jsonl")), settings)


def score(options: argparse.Namespace) -> dict[str, Any]:
    """Scores of an adapter on test rows: of its exits, of its own policy, and of the best policy for each share of
    blocks saved; and the time of some rows with these."""
    adapter = open_adapter(options.out, device="cpu")
    rows = {name: adapter.encode(adapter.read(Path(options.data, f"{name}.jsonl"))) for name in ("validation", "test")}
    logits = {name: collect_exit_logits(adapter.model, part, 64) for name, part in rows.items()}
    test = logits["test"]
    validation = logits["validation"]
    policies = {"within a point": EarlyExitConfig.of(adapter.early_exit_config(), calibration=None)}
    goals = [goal for goal in GOALS if goal <= 1 - test.exits[0] / test.depth]
    for goal in goals:
        policies[f"{goal:.0%} saved"] = calibrated(validation, "auto", target_blocks_saved=goal, metric=METRIC)
    timed_rows = rows["test"].select(range(min(options.rows, len(rows["test"]))))
    points = []
    for name, config in policies.items():
        point = evaluate_policy(test, config, METRIC)
        stops = build_policy(config).replay(test).numpy()
        timed = measure_latency(adapter.model, timed_rows, config)
        points.append(
            {
                "name": name,
                "setting": describe_policy(config),
                "score": point.score,
                "saved": point.blocks_saved,
                "saved_by_tokens": 1 - float(stops.mean()) / test.depth,
                "time_saved": timed.time_saved,
                "full_p50_ms": timed.full_depth_p50_ms,
                "timed_rows": len(timed),
            }
        )
    report = json.loads((options.out / REPORT).read_text())
    return {
        "points": points,
        "exits": test.exits,
        "per_exit": exit_scores(test, METRIC).per_exit,
        "accuracy": exit_scores(test).per_exit,
        "texts": len(test.units),
        "tokens": len(test),
        "trained": report["trainable_parameters"],
        "settings": {name: report["settings"][name] for name in ("epochs", "adapter_lr", "r")},
    }


def page(results: Results) -> str:
    """Markdown."""
    own = results["tokens"]
    points = own["points"]
    best = max(own["per_exit"])
    where = own["environment"]
    lines = [
        [f"{p['name']}: {p['setting']}", f"{p['score']:.1%}", f"{100 * (p['score'] - best):+.1f}"]
        + [f"{p['saved']:.1%}", f"{p['time_saved']:.1%}"]
        for p in points
    ]
    header = ["setting, chosen on validation rows", "entity F1", "against the best exit", "blocks saved", "time saved"]
    exits = ", ".join(f"{m}: {score:.1%}" for m, score in zip(own["exits"], own["per_exit"], strict=True))
    first = next((p for p in points if p["saved"] > 0), points[-1])
    settings = own["settings"]
    parts = [
        "# Token classification",
        f"{own['data'].upper().replace('WNUT17', 'WNUT-17')}, {own['model']}; backbone frozen: entity F1 "
        f"{own['per_exit'][-1]:.1%} at full depth; the setting that `badge-peft train` chose scores "
        f"{points[0]['score']:.1%} and saves {points[0]['saved']:.1%} of the blocks and {points[0]['time_saved']:.1%} "
        "of the time.",
        "## Backbone frozen",
        f"Entity F1 of each exit on {own['texts']:,} test texts ({own['tokens']:,} tokens): {exits}. Token accuracy "
        f"of the last: {own['accuracy'][-1]:.1%}. {own['trained']:,} parameters are trained, "
        f"{settings['epochs']} epochs.",
        markdown(header, lines),
        f"A text leaves with its last token. With the first of these policies that saves anything "
        f"({first['setting']}) the average token has its answer after {1 - first['saved_by_tokens']:.0%} of the "
        f"blocks, the average text leaves after {1 - first['saved']:.0%}: the difference is what the hardest token of "
        "a text costs.",
        "Published neighbors, on other data and models: TOKEE and SENTEE (Li et al., 2021: Accelerating BERT "
        "Inference for Sequence Labeling via Early-Exit, ACL) save up to 66 to 75% of the cost on entities, parts of "
        "speech and Chinese words, with models of 12 blocks that are trained together with their exits. SENTEE "
        "lets whole texts leave, as here; TOKEE copies the states of tokens that have left, which changes what "
        "the others see.",
        "## How it was measured",
        "```bash\npython benchmarks/tokens.py MODEL FOLDER\n"
        "python benchmarks/tokens.py --docs docs/results/tokens.md\n```",
        f"One seed (0), r = {settings['r']}, learning rate {settings['adapter_lr']}. Settings for a share of blocks "
        "are the best of policy `auto` on the validation rows, *within a point* is what `badge-peft train` chose "
        f"there. F1 is that of `seqeval`. Time: {points[0]['timed_rows']} test texts, one at a time, in turn with the "
        f"model without exits (median {points[0]['full_p50_ms']:.1f} ms). {machine(where)}; load "
        f"{where['load_1min']}; {where['date']}.",
    ]
    return "\n\n".join(p if p[0] in "|#`" else textwrap.fill(p, 119) for p in parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parser(__doc__, "runs/tokens.json", threads=1)
    options.add_argument("model", nargs="?", help="folder of an encoder")
    options.add_argument("data", nargs="?", help="folder with train, validation and test.jsonl")
    options.add_argument("--name", help="of the model, on the page")
    options.add_argument("--out", type=Path, default=Path("runs/tokens"), help="the adapter")
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--adapter-lr", type=float, default=0.005)
    options.add_argument("--r", type=int, default=32)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--max-length", type=int, default=128)
    options.add_argument("--rows", type=int, default=200, help="test texts to time")
    return run(options.parse_args(arguments), measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
