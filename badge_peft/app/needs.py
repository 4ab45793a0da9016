"""Says which extra is missing, before anything is loaded."""

from __future__ import annotations

from badge_peft.utils.extras import require


def need_gradio() -> None:
    """For the page.

    Raises:
        ModuleNotFoundError: gradio or matplotlib is not installed.
    """
    require("app", "gradio", "matplotlib")
