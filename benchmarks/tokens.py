"""Token classification: entity F1 against blocks and time saved, on data with tokens and tags.

    python benchmarks/tokens.py --model MODEL --data FOLDER --out runs/tokens --docs docs/results/tokens.md

FOLDER has train.jsonl, validation.jsonl and test.jsonl, rows of `tokens` and `tags`. Adapters that are in `--out` are
not trained again, so that a second run measures time alone. Validation rows choose every setting, test rows score it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from latency_parts.environment import describe
from latency_parts.tables import markdown

from badge_peft import EarlyExitConfig, collect_exit_logits, evaluate_policy, exit_scores, measure_latency
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.base import describe as describe_rule
from badge_peft.evaluation.selection import SETTINGS
from badge_peft.evaluation.tradeoff import search
from badge_peft.model_card import REPORT
from badge_peft.workflows.adapter_dir import open_adapter
from badge_peft.workflows.goal import Goal
from badge_peft.workflows.settings import ExitOptions, TrainColumns, TrainingOptions, TrainSettings
from badge_peft.workflows.train import train_adapter

METRIC = "entity_f1"
GOALS = (0.1, 0.25, 0.33, 0.5, 0.66)
KINDS = ("frozen", "full")


def _best_at(points: list[Any], goal: float) -> Any:
    """The best score at a share of blocks saved of at least `goal`; of equal ones the fastest."""
    return max((p for p in points if p.layer_speedup >= goal), key=lambda p: (p.score, p.layer_speedup))


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    stored = options.out / "tokens.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    for kind in options.backbones:
        folder = options.out / ("adapter" if kind == "frozen" else f"adapter_{kind}")
        if not (folder / REPORT).exists():
            train(kind, folder, options)
        found[kind] = measure(folder, options)
        stored.write_text(json.dumps(found, indent=1))
    found["environment"] = describe(options.threads, "cpu")
    found["data"], found["model"] = (
        options.data.name,
        Path(options.model).name if options.name is None else options.name,
    )
    stored.write_text(json.dumps(found, indent=1))
    text = page(found, options)
    if options.docs:
        options.docs.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def train(kind: str, folder: Path, options: argparse.Namespace) -> None:
    """An adapter, as `badge-peft train` makes it."""
    settings = TrainSettings(
        output_dir=folder,
        max_length=options.max_length,
        latency=0,
        columns=TrainColumns(eval_data=str(options.data / "validation.jsonl")),
        exits=ExitOptions(backbone=kind, r=options.r, exit_layers="0-"),
        training=TrainingOptions(
            epochs=options.epochs[KINDS.index(kind)], adapter_lr=options.adapter_lr, batch_size=options.batch_size
        ),
        goal=Goal(policy="auto", max_score_drop=0.01),
    )
    train_adapter(str(options.model), str(options.data / "train.jsonl"), settings)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Scores of an adapter on test rows: of its exits, of its own rule, and of the best rule for each share of blocks
    saved; and the time of some rows with these rules, where it is asked for."""
    adapter = open_adapter(folder, device="cpu")
    rows = {name: adapter.encode(adapter.read(options.data / f"{name}.jsonl")) for name in ("validation", "test")}
    logits = {name: collect_exit_logits(adapter.model, part, 64) for name, part in rows.items()}
    rules = {"within a point": EarlyExitConfig.of(adapter.early_exit_config(), calibration=None)}
    points = search(logits["validation"], "auto", SETTINGS, METRIC)  # as `calibrate` does, once for all goals
    fastest = max(point.layer_speedup for point in points)
    rules |= {f"{goal:.0%} saved": _best_at(points, goal).config for goal in GOALS if goal <= fastest}
    test, measured = logits["test"], []
    for name, rule in rules.items():
        point = evaluate_policy(test, rule, METRIC)
        stops = build_policy(rule).replay(test).numpy()
        found = {"rule": name, "setting": describe_rule(rule), "config": rule.to_dict(), "score": point.score}
        found |= {"saved": point.layer_speedup, "saved_by_tokens": 1 - float(stops.mean()) / test.depth}
        measured.append(found)
    if options.rows:
        chosen_rows = rows["test"].select(range(min(options.rows, len(rows["test"]))))
        for found in measured:
            timed = measure_latency(adapter.model, chosen_rows, found["config"])
            found["time"] = {
                "saved": timed.speedup_paper,
                "blocks_saved": timed.layer_speedup,
                "p50_ms": timed.p50_ms,
                "full_p50_ms": timed.full_depth_p50_ms,
                "rows": len(timed),
            }
    report = json.loads((folder / REPORT).read_text())
    return {
        "points": measured,
        "exits": test.exits,
        "per_exit": exit_scores(test, METRIC).per_exit,
        "accuracy": exit_scores(test).per_exit,
        "validation": exit_scores(logits["validation"], METRIC).per_exit,
        "texts": len(test.units),
        "tokens": len(test),
        "num_blocks": test.depth,
        "trained": report["trainable_parameters"],
        "epochs": report["settings"]["epochs"],
        "adapter_lr": report["settings"]["adapter_lr"],
        "r": report["settings"]["r"],
    }


def page(found: dict[str, Any], options: argparse.Namespace) -> str:
    """The results page."""
    kinds = [kind for kind in KINDS if kind in found]
    lines = ["# Token classification", ""]
    lines += [_headline(found, kinds), ""]
    for kind in kinds:
        own = found[kind]
        best = max(own["per_exit"])
        header = ["setting, chosen on validation rows", "entity F1", "against the best exit", "blocks saved"]
        header += ["time saved"] if "time" in own["points"][0] else []
        table = [header]
        for point in own["points"]:
            row = [f"{point['rule']}: {point['setting']}", f"{point['score']:.1%}"]
            row += [f"{100 * (point['score'] - best):+.1f}", f"{point['saved']:.1%}"]
            table.append(row + ([f"{point['time']['saved']:.1%}"] if "time" in point else []))
        lines += [f"## {_names(kind)}", "", _exits_line(own), "", markdown((table[0], table[1:])), ""]
    lines += [_reading(found, kinds), "", "## How it was measured", "", _how(found, kinds, options), ""]
    return "\n".join(_wrapped(line) for line in lines)


def _wrapped(text: str) -> str:
    """Paragraphs in lines of a page; tables and commands as they are."""
    parts = text.split("\n\n")
    return "\n\n".join(p if p.startswith(("|", "#", "```")) else textwrap.fill(p, 119) for p in parts)


def _names(kind: str) -> str:
    return {"frozen": "Backbone frozen", "full": "Backbone trained with the exits"}[kind]


def _exits_line(own: dict[str, Any]) -> str:
    exits = ", ".join(f"{m}: {score:.1%}" for m, score in zip(own["exits"], own["per_exit"], strict=True))
    return (
        f"Entity F1 of each exit on {own['texts']:,} test texts ({own['tokens']:,} tokens): {exits}. Token accuracy "
        f"of the last: {own['accuracy'][-1]:.1%}. {own['trained']:,} parameters are trained, "
        f"{own['epochs']} epochs."
    )


def _headline(found: dict[str, Any], kinds: list[str]) -> str:
    parts = []
    for kind in kinds:
        own = found[kind]
        full, chosen = own["per_exit"][-1], own["points"][0]
        clock = f" and {chosen['time']['saved']:.1%} of the time" if "time" in chosen else ""
        parts.append(
            f"{_names(kind).lower()}: entity F1 {full:.1%} at full depth; the setting that `badge-peft train` chose "
            f"scores {chosen['score']:.1%} and saves {chosen['saved']:.1%} of the blocks{clock}"
        )
    data = found["data"].upper().replace("WNUT17", "WNUT-17")
    return f"{data}, {found['model']}; {'; '.join(parts)}."


def _reading(found: dict[str, Any], kinds: list[str]) -> str:
    """What the tables say."""
    point = next(p for p in found[kinds[0]]["points"] if p["saved"] > 0 or p is found[kinds[0]]["points"][-1])
    return (
        "A text leaves with its last token. With the first of these rules that saves anything "
        f"({point['setting']}) the average token has its answer after {1 - point['saved_by_tokens']:.0%} of the "
        f"blocks, the average text leaves after {1 - point['saved']:.0%}: the difference is what the hardest token of "
        "a text costs.\n\n"
        "Published neighbors, on other data and models: TOKEE and SENTEE (Li et al., 2021: Accelerating BERT "
        "Inference for Sequence Labeling via Early-Exit, ACL) save up to 66 to 75% of the cost on entities, parts of "
        "speech and Chinese words, with models of 12 blocks that are trained together with their exits. SENTEE "
        "lets whole texts leave, as here; TOKEE copies the states of tokens that have left, which changes what "
        "the others see."
    )


def _how(found: dict[str, Any], kinds: list[str], options: argparse.Namespace) -> str:
    environment = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    settings = "; ".join(
        f"{kind}: {found[kind]['epochs']} epochs, r = {found[kind]['r']}, learning rate {found[kind]['adapter_lr']}"
        for kind in kinds
    )
    timed = next((p["time"] for kind in kinds for p in found[kind]["points"] if "time" in p), None)
    clock = (
        " Time was not measured in this run."
        if timed is None
        else f" Time: {timed['rows']} test texts, one at a time, in turn with the model without exits "
        f"(median {timed['full_p50_ms']:.1f} ms)."
    )
    return (
        "```bash\npython benchmarks/tokens.py --model MODEL --data FOLDER "
        f"--backbones {' '.join(kinds)}{' --rows 0' if timed is None else ''} --docs docs/results/tokens.md\n"
        f"```\n\nOne seed (0). {settings}. Settings for a share of blocks are the best of policy `auto` on the "
        f"validation rows, *within a point* is what `badge-peft train` chose there. F1 is that of `seqeval`.{clock} "
        f"{environment['cpu']}, {environment['threads']} thread(s), load {environment['load_1min']}; Python "
        f"{environment['python']}, {versions}; {environment['date']}."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an encoder")
    parser.add_argument("--name", help="of the model, on the page")
    parser.add_argument("--data", type=Path, required=True, help="folder with train, validation and test.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/tokens"), help="adapters and measurements")
    parser.add_argument("--docs", type=Path, help="write the page here; default: print it")
    parser.add_argument("--backbones", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--epochs", type=int, nargs=2, default=[12, 4], help="of a frozen backbone and a trained one")
    parser.add_argument("--adapter-lr", type=float, default=0.005)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=200, help="test texts to time; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
