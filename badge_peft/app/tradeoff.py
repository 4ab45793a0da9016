"""The adapter's trade-off on its evaluation data, from what `badge-peft train` left in its folder."""

from __future__ import annotations

import io
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

from badge_peft.app import render
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.base import describe
from badge_peft.evaluation import ExitLogits, evaluate_policy, sweep
from badge_peft.evaluation.plots import plot_tradeoff
from badge_peft.evaluation.tradeoff import TradeOff, default_policies
from badge_peft.hub import LOGITS
from badge_peft.model_card import PICTURE, read_report
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.evaluate import measure, stored_logits

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
        self.folder = Path(folder)
        self.own = own
        self.logits: ExitLogits | None = None
        self.trouble = f"there is no file {self.folder / LOGITS}."
        if not (self.folder / LOGITS).exists():
            return
        try:
            logits = stored_logits(folder)
        except (OSError, ValueError) as error:
            self.trouble = str(error)
            return
        self.logits = logits
        self.scored = logits.labeled()
        self.metric = str(read_report(folder).get("metric") or problem_of(logits.kind).default_metric)
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
        picture that lies in the folder, and the command that makes them."""
        if self.logits is None:
            command = f"badge-peft evaluate {shlex.quote(str(self.folder))} DATA --save-logits "
            command += shlex.quote(str(self.folder / LOGITS))
            picture = self.folder / PICTURE
            source = render.data_url(picture.read_bytes(), "png") if picture.is_file() else ""
            return render.macros.no_tradeoff(self.trouble, command, PICTURE, source)
        figure = self._draw(rule)
        return render.macros.tradeoff(measure(self.logits, rule, self.metric), describe(rule), LOGITS, figure)

    def curves(self, rule: EarlyExitConfig) -> TradeOff:
        """The fixed depths, the usual rules, and the family of `rule`: its threshold open, all else as it is."""
        return self._curves(rule.policy, rule.patience, rule.depth)

    def _sweep(self, policy: str, patience: int | None, depth: int | None) -> TradeOff:
        kind = self.scored.kind
        families: list[Any] = [name for name in default_policies(kind) if name != policy]
        own = build_policy(EarlyExitConfig.of(self.own, patience=patience, depth=depth)).opened(kind)
        if own is not None:
            families.insert(0, own)
        return sweep(self.scored, families, POINTS, self.metric)

    def _draw(self, rule: EarlyExitConfig) -> str:
        """The picture of `plot_tradeoff`, with the rule at the start and the present one marked, as a URL."""
        start, present = (evaluate_policy(self.scored, config, self.metric) for config in (self.own, rule))
        figure = plot_tradeoff(self.curves(rule), chosen={"the starting policy": start, "as set here": present})
        out = io.BytesIO()
        figure.savefig(out, format="svg")
        return render.data_url(out.getvalue(), "svg+xml")
