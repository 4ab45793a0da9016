"""The gradio page, and what it does when a user types or moves a slider: values in, HTML out."""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from badge_peft.app import render
from badge_peft.app.controls import apply, controls_of
from badge_peft.app.explain import explain
from badge_peft.app.tradeoff import TradeOffView
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.base import describe
from badge_peft.evaluation.collect import collect_exit_logits
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.model import get_badge_model
from badge_peft.utils.texts import whole
from badge_peft.workflows.adapter_dir import Adapter
from badge_peft.workflows.encode import encode_texts

if TYPE_CHECKING:
    from gradio import Blocks

EXAMPLE = "a fine film, though its end is a little flat"
HINT = "Type a text and press Answer: each exit is shown as it comes, and where the policy stops."
MOST_CHARACTERS = 20_000
_KEPT = 32  # texts whose exits are kept, so that a moved slider runs no model


class Callbacks:
    """One adapter behind a page. No gradio here.

    Args:
        adapter: From `open_adapter`.
        folder: Where it was opened from.
        rule: How it stops; from `Adapter.early_exit_config`.

    Attributes:
        controls: Of the rule's parameters, in the order in which their values are given below.
        pairs: Whether the adapter was trained on pairs of texts; None where nothing was recorded.
    """

    def __init__(self, adapter: Adapter, folder: str, rule: EarlyExitConfig) -> None:
        labels = adapter.labels
        self.adapter = adapter
        self.folder = folder
        self.rule = build_policy(rule).resolve(len(labels.names), labels.problem_type)
        self.tradeoff = TradeOffView(folder, self.rule)
        exits = get_badge_model(adapter.model).exit_layers()
        self.controls = controls_of(self.rule, exits, len(labels.names), labels.problem_type, self.tradeoff.widest)
        self.pairs = adapter.columns.get("text_pair") is not None if adapter.columns else None
        self._kept = lru_cache(maxsize=_KEPT)(self._read)

    def answer(self, text: str | None, pair: str | None, *values: Any) -> str:
        """The explanation of a text, or what is wrong with it; `values` are those of the controls."""
        text, pair = text or "", pair or ""
        try:
            rule = apply(self.rule, self.controls, values)
            self._check(text, pair)
            exit_logits, cut = self._kept(text, pair if pair.strip() else None)
            found = explain(exit_logits, rule)
        except ValueError as error:
            return render.macros.error(str(error))
        return render.explanation(found, self.adapter.labels.names, (text, pair), cut)

    def moved(self, text: str | None, pair: str | None, *values: Any) -> str:
        """As `answer`; while there is no text yet, a hint."""
        if not (text or "").strip():
            return render.macros.hint(HINT)
        return self.answer(text, pair, *values)

    def curve(self, *values: Any) -> str:
        """The trade-off, with the point at which the controls stand."""
        try:
            return self.tradeoff.show(apply(self.rule, self.controls, values))
        except ValueError as error:
            return render.macros.error(str(error))

    def describe(self, *values: Any) -> str:
        """The rule in a line."""
        try:
            return describe(apply(self.rule, self.controls, values))
        except ValueError as error:
            return str(error)

    def _check(self, text: str, pair: str) -> None:
        """Refuses no text, no second text for an adapter of pairs, and a text too long for a page."""
        if not text.strip():
            raise ValueError("there is no text: type one.")
        if self.pairs and not pair.strip():
            raise ValueError("this adapter was trained on pairs of texts: type the second one, too.")
        for what, value in (("text", text), ("second text", pair)):
            if len(value) > MOST_CHARACTERS:
                raise ValueError(
                    f"the {what} has {len(value):,} characters: this page takes {MOST_CHARACTERS:,} at most. Shorten "
                    "it, or answer it with `badge-peft predict`."
                )

    def _read(self, text: str, pair: str | None) -> tuple[ExitLogits, str]:
        """What all exits say, and what to say of a text that is longer than what the model reads: encoded, and so cut,
        as `badge-peft predict` encodes it."""
        tokenizer = self.adapter.tokenizer
        text = whole(text)
        pair = None if pair is None else whole(pair)
        encoded = encode_texts([text], None if pair is None else [pair], tokenizer)
        row = {name: values[0] for name, values in encoded.items()}
        tokens = len(tokenizer(text, pair, verbose=False)["input_ids"])
        read = len(row["input_ids"])
        cut = (
            f"The text has {tokens:,} tokens, and the model reads {read:,}: the rest was cut, as "
            "badge-peft predict cuts it."
        )
        return collect_exit_logits(self.adapter.model, [row]), cut if tokens > read else ""


def build_page(callbacks: Callbacks) -> Blocks:
    """The page of one adapter: a text with its exits in one tab, the trade-off in the other, the rule's sliders beside
    both. The sliders are those that the rule has. Its endpoints are `answer`, `moved`, `curve` and `rule`."""
    import gradio as gr

    start = [control.value for control in callbacks.controls]
    with gr.Blocks(title="badge_peft", analytics_enabled=False) as page:
        gr.HTML(render.macros.title(Path(callbacks.folder).name))
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                text = gr.Textbox(label="Text", lines=3, max_lines=8, elem_id="text", placeholder=EXAMPLE)
                label = "Second text" if callbacks.pairs else "Second text (for adapters of pairs)"
                visible = callbacks.pairs is not False
                pair = gr.Textbox(label=label, lines=2, max_lines=8, elem_id="pair", visible=visible)
                button = gr.Button("Answer", variant="primary", elem_id="answer")
                said = callbacks.describe(*start)
                rule = gr.Textbox(said, label="Policy", interactive=False, elem_id="rule")
                sliders: list[Any] = []
                for control in callbacks.controls:
                    common = {"value": control.value, "label": control.label, "elem_id": control.field}
                    if control.choices:
                        sliders.append(gr.Radio(control.choices, **common))
                    else:
                        sliders.append(gr.Slider(control.low, control.high, step=control.step, **common))
                reset = gr.Button("Back to the starting policy", size="sm", elem_id="reset", visible=bool(sliders))
            with gr.Column(scale=5, min_width=420):
                with gr.Tab("This text"):
                    shown = gr.HTML(render.macros.hint(HINT), elem_id="exits")
                with gr.Tab("Trade-off"):
                    curve = gr.HTML(callbacks.curve(*start), elem_id="curve")
        inputs = [text, pair, *sliders]
        gr.on([button.click, text.submit, pair.submit], callbacks.answer, inputs, shown, api_name="answer")
        if sliders:
            latest = {"trigger_mode": "always_last", "show_progress": "hidden"}  # while a slider is dragged
            moved = [slider.change for slider in sliders]
            gr.on(moved, callbacks.moved, inputs, shown, api_name="moved", **latest)
            gr.on(moved, callbacks.curve, sliders, curve, api_name="curve", **latest)
            gr.on(moved, callbacks.describe, sliders, rule, api_name="rule", **latest)
            reset.click(lambda: start if len(start) > 1 else start[0], None, sliders, api_name="reset")
    return page


def launch(page: Blocks, host: str, port: int | None, share: bool) -> None:
    """Serves the page until it is stopped, at the first free port from 7860 on where none is given; `share` makes a
    public link, too, through gradio's servers. Texts are kept nowhere, not in the browser either."""
    # gradio 6 came to keep a history of runs in the browser; releases before that do not know the argument
    history = {"run_history": False} if "run_history" in signature(page.launch).parameters else {}
    page.launch(server_name=host, server_port=port, share=share, ssr_mode=False, **history)
