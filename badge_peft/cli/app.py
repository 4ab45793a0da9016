"""`badge-peft app`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from badge_peft.cli import options as shared
from badge_peft.workflows.settings import PolicyOverrides


def app(
    adapter: shared.Adapter,
    /,
    *,
    host: Annotated[
        str, Parameter(help="Address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, Parameter(validator=Number(gte=1, lte=65535), help="Default: the first free one from 7860 on.")
    ] = None,
    share: Annotated[
        bool, Parameter(help="Also make a public link, through gradio's servers: all texts pass them.")
    ] = False,
    overrides: shared.Overrides = PolicyOverrides(),
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Open a page in the browser that shows where a text stops, and why.

    Type a text: each exit's distribution is shown as it comes, with the numbers that the policy looks at, and sliders
    move its threshold and patience. A second tab has the trade-off on the adapter's evaluation data. Needs the extra
    app: pip install 'badge-peft[app]'.
    """
    from badge_peft.utils.extras import require

    require("app", "gradio", "matplotlib")
    from badge_peft.app.page import Callbacks, build_page, launch
    from badge_peft.workflows.adapter_dir import open_adapter
    from badge_peft.workflows.predict import resolve_policy_config

    opened = open_adapter(adapter, base_model, device)
    config = resolve_policy_config(opened, **vars(overrides))
    launch(build_page(Callbacks(opened, adapter, config)), host, port, share)
