"""The page of a decoder's exits, from the file of the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latency_parts.tables import markdown

#: Of AdaInfer, on other models and data: the mean, and the largest saving, on sentiment.
_PUBLISHED = "17.8% on average and up to 43% on sentiment"


def page(data: Mapping[str, Any]) -> str:
    """Markdown."""
    sections = data["sections"]
    scores = {key.split("/")[1]: found for key, found in sections.items() if key.startswith("scores/")}
    times = {key.split("/")[1]: found for key, found in sections.items() if key.startswith("time/")}
    first = next(iter(scores.values()))
    environment, settings = first["environment"], first["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    numbers = ", ".join(
        f"{name} {' / '.join(f'{n:,}' for n in found['rows'].values())}" for name, found in scores.items()
    )
    return f"""# A decoder as a classifier

SmolLM2-135M (30 blocks, width 576; weights dequantized from 4 bits), frozen, read at the last token of a text.

{_headline(scores, times)}

AdaInfer (Fan et al., "Not All Layers of LLMs Are Necessary During Inference", 2024), which also leaves the model as it
is, reports {_PUBLISHED}, of larger models prompted for the task, with their own head and without trained exits.

Made by

```bash
python benchmarks/decoders.py SmolLM2-135M {" ".join(f"{name}={name}" for name in scores)} {_options(settings, first)}
python benchmarks/decoders.py SmolLM2-135M {" ".join(f"{name}={name}" for name in scores)} --time N
python benchmarks/decoders.py --docs docs/results/decoders.md
```

on {environment["date"]}: {environment["cpu"]}; Python {environment["python"]}, {versions}. One seed. Rows of training
/ validation / test: {numbers}.

## Accuracy per exit, on test rows

{markdown(_per_exit(scores))}

## What a bypass, and the logits of the exit before, add

Mean and best of all exits, and the score with a share of the blocks saved by `max_prob`; thresholds are chosen on the
validation rows. The last form is the one that the rest of this page is about.

{markdown(_forms(scores))}

## What is saved within one point

`calibrate(policy="auto", max_score_drop=0.01)` chooses on the validation rows. Time is that of a text alone, float32,
against the same model at full depth without exits.

{markdown(_saved(scores, times))}
"""


def _headline(scores: Mapping[str, Any], times: Mapping[str, Any]) -> str:
    found = []
    for name, own in scores.items():
        timed = f" and {times[name]['time_saved']:.0%} of the time" if name in times else ""
        lost = 100 * (own["best"] - own["score"])
        found.append(f"{name}: {own['layer_speedup']:.0%} of the blocks{timed} saved for {lost:.1f} points")
    return f"**{'; '.join(found)}.**"


def _per_exit(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    first = next(iter(scores.values()))
    blocks = [m for m in first["exit_layers"] if m in (1, 2) or m % 3 == 0]
    lines = []
    for name, own in scores.items():
        known = dict(zip(own["exit_layers"], own["per_exit"], strict=True))
        lines.append([name, *(f"{100 * known[m]:.1f}" for m in blocks), f"{100 * own['avg']:.1f}"])
    return ["", *map(str, blocks), "S-avg"], lines


def _forms(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [name, form, *(f"{100 * value:.1f}" for value in (own["avg"], own["best"], *own["saved"].values()))]
        for name, found in scores.items()
        for form, own in found["forms"].items()
    ]
    goals = next(iter(next(iter(scores.values()))["forms"].values()))["saved"]
    return ["", "exits", "S-avg", "S-best", *(f"{float(goal):.0%} saved" for goal in goals)], lines


def _saved(scores: Mapping[str, Any], times: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for name, own in scores.items():
        timed = times.get(name)
        clock = ["-"] * 3
        if timed is not None:
            clock = [
                f"{timed['full_ms']:.0f}",
                f"{timed['mean_ms']:.0f}",
                f"{timed['time_saved']:.1%} ({timed['layer_speedup']:.1%} of the blocks, {timed['rows']} texts)",
            ]
        policy = own["policy"]["policy"]
        values = [f"{100 * own[key]:.1f}" for key in ("best", "score")]
        lines.append([name, policy, *values, f"{own['layer_speedup']:.1%}", *clock])
    heads = ["", "policy", "best exit", "with early exits", "blocks saved", "full depth, ms", "early exits, ms"]
    return [*heads, "time saved"], lines


def _options(settings: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    rows = f"--rows {first['rows']['train']}"
    return f"{rows} --epochs {settings['epochs']} --lr {settings['lr']}{' --bf16' if settings['bf16'] else ''}"
