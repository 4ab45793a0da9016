"""The adapter's trade-off on its evaluation data, from what `badge-peft train` left in its folder."""

from __future__ import annotations

import io
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

from badge_peft.app import html
from badge_peft.app.words import block_name
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.text import describe
from badge_peft.evaluation import ExitLogits, evaluate_policy, sweep
from badge_peft.evaluation.plots import plot_tradeoff
from badge_peft.evaluation.tradeoff import TradeOff, default_policies
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.adapter_dir import LOGITS, check_fit, read_report, stored_logits
from badge_peft.workflows.evaluate import default_metric, measure, with_labels
from badge_peft.workflows.plots import PICTURE
from badge_peft.workflows.report import show

POINTS = 20  # of each curve


class TradeOffView:
    """The curve with the point of the present rule, or the word for how to get one.

    Args:
        folder: Of the adapter, or its repository.
        own: The rule at the start, the adapter's own unless the command said another.

    Attributes:
        logits: The stored exit logits; None where there are none that fit.
        trouble: Why there are none.
    """

    def __init__(self, folder: str | Path, own: EarlyExitConfig) -> None:
        self.folder, self.own = str(folder), own
        self.logits: ExitLogits | None = None
        self.trouble = ""
        try:
            logits = self._stored()
            check_fit(self.folder, logits)
        except (OSError, ValueError) as error:
            self.trouble = str(error)
            return
        self.logits = logits
        self.scored = with_labels(logits)
        self.metric = str(read_report(folder).get("metric") or default_metric(logits.problem_type))
        self._curves = lru_cache(maxsize=16)(self._sweep)

    @property
    def widest(self) -> float | None:
        """The largest distance between two exits' values of a row, for regression; None where it is not known."""
        if self.logits is None or problem_of(self.logits.kind).gives_labels:
            return None
        values = self.logits.logits
        return float((values.amax(dim=1) - values.amin(dim=1)).sum(dim=-1).max())

    def show(self, rule: EarlyExitConfig) -> str:
        """HTML: the curves with a mark where `rule` lies and what it costs at each exit; without exit logits the
        picture that lies in the folder, or the command that makes them."""
        if self.logits is None:
            return self._without()
        report = measure(self.logits, rule, self.metric)
        early = report["early_exit"]
        name = self.metric.replace("_", " ")
        given = report["labels"] == "given"
        against = "" if given else ", scored against full depth's own answers"
        said = html.table(
            ["", name, "mean exit", "blocks saved"],
            [
                [
                    f"as set: {describe(rule)}",
                    show(early["score"], self.metric),
                    f"{early['mean_exit']:.2f}",
                    f"{early['layer_speedup']:.1%}",
                ],
                ["full depth", show(report["full_depth_score"], self.metric), f"{self.logits.depth}", "0.0%"],
            ],
        )
        exits = html.table(
            ["exit after", f"{name} on all rows", "rows it answers"],
            [
                [block_name(block, self.logits.depth), show(score, self.metric), f"{count / report['rows']:.1%}"]
                for block, score, count in zip(
                    report["exit_layers"], report["per_exit"], early["rows_stopped"], strict=True
                )
            ],
        )
        about = html.hint_line(f"{report['rows']:,} evaluation rows, stored in {LOGITS}{against}.")
        return html.page(about, self._draw(rule), said, exits)

    def curves(self, rule: EarlyExitConfig) -> TradeOff:
        """The fixed depths, the usual rules, and the family of `rule`: its threshold open, all else as it is."""
        return self._curves(rule.policy, rule.patience, rule.depth)

    def _sweep(self, policy: str, patience: int | None, depth: int | None) -> TradeOff:
        kind = self.scored.kind
        families: list[Any] = [name for name in default_policies(kind) if name != policy]
        present = build_policy(EarlyExitConfig.of(self.own, patience=patience, depth=depth))
        own = present.opened(kind)
        if own is not None:
            families.insert(0, own)
        return sweep(self.scored, families, POINTS, self.metric)

    def _draw(self, rule: EarlyExitConfig) -> str:
        """The picture of `plot_tradeoff`, with the rule at the start and the present one marked."""
        figure = plot_tradeoff(self.curves(rule))
        axes = figure.axes[0]
        marks = (
            (self.own, {"marker": "*", "markersize": 13, "color": "black"}, "the rule at the start"),
            (rule, {"marker": "o", "markersize": 15, "fillstyle": "none", "markeredgewidth": 2.2}, "as set here"),
        )
        for config, style, label in marks:
            point = evaluate_policy(self.scored, config, self.metric)
            look: dict[str, Any] = {"color": "#D55E00", "linestyle": "none", "zorder": 5, **style}
            axes.plot([point.layer_speedup], [point.score], label=label, **look)
        axes.legend(frameon=False, loc="best")
        out = io.BytesIO()
        figure.savefig(out, format="svg")
        return html.picture(out.getvalue(), "svg+xml", "score against the share of blocks saved")

    def _stored(self) -> ExitLogits:
        folder = Path(self.folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is no local folder, and exit logits are read from one.")
        if not (folder / LOGITS).exists():
            raise FileNotFoundError(f"there are no stored exit logits, {LOGITS}, in {self.folder}.")
        return stored_logits(folder)

    def _without(self) -> str:
        folder = shlex.quote(self.folder)
        evaluate = f"badge-peft evaluate {folder} DATA --save-logits {shlex.quote(f'{self.folder}/{LOGITS}')}"
        said = html.note(f"There is no curve to mark a point on: {self.trouble}") + html.command(
            "This command writes the exit logits of a data set into the folder, from which the curve is drawn "
            "(badge-peft train leaves those of its evaluation rows there); then start this page again:",
            evaluate,
        )
        picture = Path(self.folder) / PICTURE
        if not picture.is_file():
            return html.page(said)
        old = html.picture(picture.read_bytes(), "png", "score against the share of blocks saved")
        return html.page(html.hint_line(f"{PICTURE}, as it lies in the folder:"), old, said)
