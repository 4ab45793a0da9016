"""`badge-peft app`."""

from __future__ import annotations

from typing import Annotated

import typer

from badge_peft.cli import options as shared
from badge_peft.cli.errors import told_plainly


def app(
    adapter: shared.AdapterArgument,
    host: Annotated[
        str,
        typer.Option(help="Address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in."),
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    share: Annotated[
        bool,
        typer.Option("--share", help="Also make a public link, through gradio's servers: all texts pass them."),
    ] = False,
    policy: shared.OwnPolicy = None,
    threshold: shared.OwnThreshold = None,
    patience: shared.OwnPatience = None,
    depth: shared.OwnDepth = None,
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Open a page in the browser that shows where a text stops, and why.

    Type a text: each exit's distribution is shown as it comes, with the numbers
    that the exit rule looks at, and sliders move the rule's threshold and
    patience. A second tab has the trade-off on the adapter's evaluation data.
    Needs the extra app: pip install 'badge-peft[app]'.
    """
    with told_plainly():
        from badge_peft.app.needs import need_gradio

        need_gradio()
        from badge_peft.app.callbacks import Callbacks
        from badge_peft.app.page import build_page, launch
        from badge_peft.workflows import exit_rule, open_adapter

        opened = open_adapter(adapter, base_model, device)
        rule = exit_rule(opened, policy=policy, threshold=threshold, patience=patience, depth=depth)
        launch(build_page(Callbacks(opened, adapter, rule)), host, port, share)
