"""`build_page`: the gradio page. What is behind it is in `callbacks.py`, how it looks in `html.py`."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from badge_peft.app import html
from badge_peft.app.callbacks import HINT, Callbacks
from badge_peft.app.knobs import Knob

if TYPE_CHECKING:
    from gradio import Blocks
    from gradio.components import Component

EXAMPLE = "a fine film, though its end is a little flat"


def build_page(callbacks: Callbacks) -> Blocks:
    """The page of one adapter: a text with its exits in one tab, the trade-off in the other, the rule's sliders beside
    both. The sliders are those that the rule has.

    Args:
        callbacks: Of the adapter.

    Returns:
        To `launch`. Its endpoints are `answer`, `moved`, `curve` and `rule`.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    import gradio as gr

    pairs = callbacks.reader.pairs
    start = [knob.value for knob in callbacks.knobs]
    with gr.Blocks(title="badge_peft", analytics_enabled=False) as page:
        gr.HTML(html.title(Path(callbacks.folder).name))
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                text = gr.Textbox(label="Text", lines=3, max_lines=8, elem_id="text", placeholder=EXAMPLE)
                pair = gr.Textbox(
                    label="Second text" if pairs else "Second text (for adapters of pairs)",
                    lines=2,
                    max_lines=8,
                    visible=pairs is not False,
                    elem_id="pair",
                )
                button = gr.Button("Answer", variant="primary", elem_id="answer")
                rule = gr.Textbox(
                    value=callbacks.describe(*start), label="Exit rule", interactive=False, elem_id="rule"
                )
                sliders = [_slider(knob) for knob in callbacks.knobs]
                reset = gr.Button("Back to the rule at the start", size="sm", elem_id="reset", visible=bool(sliders))
            with gr.Column(scale=5, min_width=420):
                with gr.Tab("This text"):
                    shown = gr.HTML(html.hint(HINT), elem_id="exits")
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
    """Serves the page until it is stopped; texts are kept nowhere, not in the browser either.

    Args:
        page: From `build_page`.
        host: Address to listen at.
        port: None takes the first free one from 7860 on.
        share: Also make a public link, through gradio's servers.

    Raises:
        OSError: the port is taken.
    """
    # gradio 6 came to keep a history of runs in the browser; releases before that do not know the argument
    history = {"run_history": False} if "run_history" in signature(page.launch).parameters else {}
    page.launch(server_name=host, server_port=port, share=share, ssr_mode=False, **history)


def _slider(knob: Knob) -> Component:
    import gradio as gr

    if knob.choices is not None:
        return gr.Radio(list(knob.choices), value=int(knob.value), label=knob.label, elem_id=knob.field)
    return gr.Slider(knob.low, knob.high, knob.value, step=knob.step, label=knob.label, elem_id=knob.field)
