"""What the page does when somebody types or moves a slider: values in, HTML out. No gradio here."""

from __future__ import annotations

from typing import Any

from badge_peft.app import html
from badge_peft.app.explain import explain
from badge_peft.app.knobs import knobs, turned
from badge_peft.app.reader import Reader
from badge_peft.app.tradeoff import TradeOffView
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.text import describe
from badge_peft.model import get_badge_model
from badge_peft.workflows.adapter_dir import Adapter

HINT = "Type a text and press Answer: each exit is shown as it comes, and where the rule stops."


class Callbacks:
    """One adapter behind a page.

    Args:
        adapter: From `open_adapter`.
        folder: Where it was opened from.
        rule: How it stops; from `resolve_policy_config`.

    Attributes:
        knobs: The parameters that the rule has, in the order in which their values are given below.
    """

    def __init__(self, adapter: Adapter, folder: str, rule: EarlyExitConfig) -> None:
        labels = adapter.labels
        self.adapter, self.folder = adapter, folder
        self.rule = build_policy(rule).resolve(len(labels.names), labels.problem_type)
        self.reader = Reader(adapter)
        self.tradeoff = TradeOffView(folder, self.rule)
        exits = get_badge_model(adapter.model).exit_layers()
        self.knobs = knobs(self.rule, exits, len(labels.names), labels.problem_type, self.tradeoff.widest)

    def answer(self, text: str | None, pair: str | None, *values: Any) -> str:
        """The explanation of a text, or what is wrong with it; `values` are those of the knobs."""
        try:
            rule = turned(self.rule, self.knobs, values)
            read = self.reader.read(text, pair)
            found = explain(read.reading, rule)
        except ValueError as error:
            return html.error(str(error))
        notes = []
        if read.all_tokens > read.tokens:
            notes.append(
                f"The text has {read.all_tokens:,} tokens, and the model reads {read.tokens:,}: what is behind them "
                "was cut, as badge-peft predict cuts it."
            )
        return html.explanation(found, self.adapter.labels.names, text or "", pair, notes)

    def moved(self, text: str | None, pair: str | None, *values: Any) -> str:
        """As `answer`; while there is no text yet, a hint."""
        if not (text or "").strip():
            return html.hint(HINT)
        return self.answer(text, pair, *values)

    def curve(self, *values: Any) -> str:
        """The trade-off, with the point at which the knobs stand."""
        try:
            return self.tradeoff.show(turned(self.rule, self.knobs, values))
        except ValueError as error:
            return html.error(str(error))

    def describe(self, *values: Any) -> str:
        """The rule in a line."""
        try:
            return describe(turned(self.rule, self.knobs, values))
        except ValueError as error:
            return str(error)
