"""What was measured, as text for a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies.base import describe
from badge_peft.evaluation import ExitLogits, evaluate_policy, sweep
from badge_peft.evaluation.plots import plot_tradeoff
from badge_peft.evaluation.tradeoff import TradeOff
from badge_peft.model_card import PERCENTAGES
from badge_peft.workflows.columns import Names
from badge_peft.workflows.labels import LabelSet


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    ruler = "  ".join("-" * width for width in widths)

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), ruler, *map(line, rows)])


def measured_table(report: dict[str, Any]) -> str:
    """One line per exit: its score on all rows, and how many rows the policy lets it answer."""
    metric = report["metric"]
    rows = report["rows"]
    stopped = report["early_exit"]["rows_stopped"]
    lines = [
        [_exit_name(number, report["num_blocks"]), show(value, metric), f"{count / rows:.1%}"]
        for number, value, count in zip(report["exit_layers"], report["per_exit"], stopped, strict=True)
    ]
    return text_table(["exit after", f"{_metric_name(report)}, all rows", "rows it answers"], lines)


def summary(report: dict[str, Any]) -> str:
    """S-avg, S-best and the policy, in a few lines."""
    metric = report["metric"]
    early = report["early_exit"]
    same = early["answers_as_full_depth"]
    lines = [
        f"S-avg {show(report['s_avg'], metric)}, S-best {show(report['s_best'], metric)} "
        f"({_metric_name(report)}, {report['rows']} rows)",
        f"policy: {describe(EarlyExitConfig.of(early['config']))}",
        f"  {_metric_name(report)} {show(early['score'], metric)}; at full depth "
        f"{show(report['full_depth_score'], metric)}",
        f"  {early['mean_exit']:.2f} of {report['num_blocks']} blocks per row on average: "
        f"{early['blocks_saved']:.1%} of the blocks saved",
    ]
    expected = (report.get("calibration") or {}).get("time_saved")
    if expected is not None:
        lines[-1] += f", {expected:.1%} of the time expected"
    relevance = report.get("relevance")
    if relevance is not None:
        k = relevance["top_k"]
        lines += [
            f"  {name.upper().replace('NDCG', 'nDCG')}@{k} {relevance[name]:.3f}; at full depth "
            f"{relevance['full_depth_' + name]:.3f} ({relevance['queries']} queries with a relevant candidate)"
            for name in ("ndcg", "mrr")
        ]
    unknown = report["rows_of_unknown_label"]
    if unknown:
        lines.append(f"  {unknown} of the rows have a label that the model does not know and count as errors")
    if same is not None and report["labels"] == "given":
        lines.append(f"  {same:.1%} of the rows get the answer that full depth gives")
    return "\n".join(lines)


def tasks_table(report: dict[str, Any]) -> str:
    """One line per task: its scores, and the blocks that it would run alone."""
    lines = []
    for task, own in report["tasks"].items():
        early = own["early_exit"]
        metric = own["metric"]
        score, full = (show(value, metric) for value in (early["score"], own["full_depth_score"]))
        lines.append([task, str(own["rows"]), _metric_name(own), score, full, f"{early['mean_exit']:.2f}"])
    return text_table(["task", "rows", "metric", "early exit", "full depth", "blocks, alone"], lines)


def tasks_summary(report: dict[str, Any]) -> str:
    """What one pass for all tasks runs."""
    return (
        f"one pass for {len(report['tasks'])} tasks: {report['mean_blocks']:.2f} of {report['num_blocks']} blocks per "
        f"row on average, {report['blocks_saved']:.1%} less than a full pass for each task"
    )


def warning(report: dict[str, Any]) -> str:
    """What has to be read before any result: exits that are not worth it, or know nothing; else nothing."""
    constant = report["constant_answer"]
    notes = [f"WARNING: {note}" for note in report.get("notes", ())]
    columns = ", ".join(repr(name) for name in report["columns"].values() if name)
    if constant is not None and not constant["beaten"]:
        notes.append(
            f"WARNING: no exit is better than always answering {constant['answer']!r} (which scores "
            f"{show(constant['score'], report['metric'])}), so full depth is chosen. Are {columns} the right columns? "
            "Else train on more rows, longer, or with another --adapter-lr."
        )
    elif constant is not None:
        scores = zip(report["exit_layers"], report["per_exit"], strict=True)
        weak = [str(m) for m, value in scores if value <= constant["score"]]
        if weak:
            notes.append(
                f"WARNING: exit {', '.join(weak)} is no better than always answering {constant['answer']!r}: these "
                "blocks know little of the labels where the exits read. Try --exit-pooling mean, or leave them out "
                "with --exit-layers."
            )
    return "".join(f"{note}\n\n" for note in notes)


def tradeoff_table(found: TradeOff, against_full_depth: bool) -> str:
    """One line per setting of every policy: what it would cost and save."""
    lines = [
        [
            point.name,
            describe(point.config),
            f"{point.mean_exit:.2f}",
            f"{point.blocks_saved:.1%}",
            show(point.score, found.metric),
        ]
        for curve in found.names
        for point in found.curve(curve)
    ]
    score = found.metric + (" against full depth" if against_full_depth else "")
    return text_table(["policy", "setting", "mean exit", "blocks saved", score], lines)


def show(value: float, metric: str) -> str:
    """A score as it is usually read."""
    return f"{value:.1%}" if metric in PERCENTAGES else f"{value:.3f}"


def _metric_name(report: dict[str, Any]) -> str:
    name = report["metric"].replace("_", " ")
    return name if report["labels"] == "given" else f"{name} against full depth"


def _exit_name(number: int, num_blocks: int) -> str:
    if number == 0:
        return "the embeddings (0)"
    return f"block {number}" + (" (full depth)" if number == num_blocks else "")


def latency_line(latency: dict[str, Any]) -> str:
    """One line for a terminal."""
    return (
        f"  latency ({latency['rows']} rows, one at a time, {latency['device']}, {latency['threads']} threads): "
        f"p50 {latency['p50_ms']:.2f} ms, p95 {latency['p95_ms']:.2f} ms; the model without exits "
        f"{latency['full_depth_p50_ms']:.2f} and {latency['full_depth_p95_ms']:.2f} ms: "
        f"{latency['time_saved']:.1%} of the time saved"
    )


def bench_table(report: dict[str, Any]) -> str:
    """One line per runner, or per way to answer all tasks."""
    unit = "text" if report["batch_size"] == 1 else f"batch of {report['batch_size']}"
    header = ["", f"p50 ms per {'query' if 'queries' in report else unit}", "p95 ms", "texts/s"]
    metric = report.get("metric")
    header += ["mean exit", metric.replace("_", " "), "as full depth"] if metric else ["blocks per text"]
    lines = []
    for row in report["results"]:
        line = [row["name"], f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}", f"{row['examples_per_s']:.1f}"]
        if metric is None:
            lines.append([*line, f"{row['blocks']:.2f}"])
            continue
        score = row["score"]
        same = row["answers_as_full_depth"]
        line += [f"{row['mean_exit']:.2f}", "-" if score is None else show(score, metric)]
        lines.append([*line, "-" if same is None else f"{same:.1%}"])
    return text_table(header, lines)


def bench_summary(report: dict[str, Any]) -> str:
    """How it was measured, in a few lines."""
    where = report["device"] if report["device"] != "cpu" else "the CPU"
    texts = "texts" if "queries" not in report else f"candidates of {report['queries']} queries"
    timed_onnx = any("ONNX" in row["name"] for row in report["results"])
    onnx = ", ONNX Runtime on the CPU without spinning" if timed_onnx else ""
    return (
        f"policy: {describe(EarlyExitConfig.of(report['rule']))}\n"
        f"{report['rows']} {texts}, batch size {report['batch_size']}, {report['threads']} threads each, in turn; "
        f"PyTorch on {where}{onnx}; the tokenizer's time is not in it"
    )


def draw(exit_logits: ExitLogits, chosen: EarlyExitConfig, metric: str, path: Path, title: str) -> bool:
    """Draws the usual policies and, with a star, the chosen one; False where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return False
    scored = exit_logits.labeled()
    if exit_logits.labels is None:
        title += ", scored against full depth's answers"
    plot_tradeoff(
        sweep(scored, metric=metric),
        path,
        title,
        chosen=evaluate_policy(scored, chosen, metric),
    )
    return True


def form_table(forms: Iterable[dict[str, Any]], metric: str) -> str:
    """One line for each form, the best first."""
    lines = [
        [
            describe_form(form),
            f"{show(form['per_exit'][0], metric)} ... {show(form['per_exit'][-2], metric)}",
            show(form["score"], metric),
            f"{form['blocks_saved']:.1%}",
            f"{form['time_saved']:.1%}",
            "" if i else "kept",
        ]
        for i, form in enumerate(forms)
    ]
    return text_table(
        ["exits tried", "first ... last exit", "early " + metric, "blocks saved", "time saved", ""], lines
    )


def describe_form(form: dict[str, Any]) -> str:
    """`mean, linear, exit 0, logits carried`."""
    layers = form["exit_layers"]
    parts = [form["exit_pooling"], form["exit_type"]]
    parts += ["from exit 0"] if layers and layers[0] == 0 else []
    parts += [f"{form['carry']} carried"] if form["carry"] else []
    return ", ".join(parts)


def data_line(train: int, held_out: int, labels: LabelSet, columns: Names, learns_labels: bool) -> str:
    """What is learned, and from how many rows."""
    names = labels.names
    what = f"{len(names)} labels ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    what = "values" if labels.problem_type == "regression" else what
    what = what.replace("labels", "tags of tokens", 1) if labels.tokens else what
    source = f"column {columns.get('label')!r}" if learns_labels else "the model's answers"
    pair = columns.get("text_pair")
    texts = "" if pair is None else f"; pairs of texts from columns {columns['text']!r} and {pair!r}"
    return f"{train} rows to train on, {held_out} to evaluate and calibrate on; {what}, learning from {source}{texts}"


def checks(report: dict[str, Any]) -> str:
    """What was checked and timed after the training, as lines."""
    lines = []
    same = report["full_depth_is_checkpoint"]
    latency = report["latency"]
    if latency is not None:
        lines.append(latency_line(latency))
    if same is not None and same["equal"]:
        lines.append(f"full depth answers as the checkpoint, bit for bit (checked on {same['rows']} rows)")
    elif same is not None:
        lines.append(f"WARNING: full depth DIFFERS from the checkpoint, by up to {same['largest_difference']:.3g}")
    return "\n".join(lines)
