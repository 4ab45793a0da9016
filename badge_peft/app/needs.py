"""Says which extra is missing, before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec


def need_gradio() -> None:
    """For the page.

    Raises:
        ModuleNotFoundError: gradio or matplotlib is not installed.
    """
    missing = [name for name in ("gradio", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the page needs {' and '.join(missing)}, which the extra `app` installs: pip install 'badge-peft[app]'",
            name=missing[0],
        )
