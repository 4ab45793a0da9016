"""What comes from other libraries, none of which is imported here."""

from __future__ import annotations

from badge_peft.integrations.adapterhub import from_adapterhub

__all__ = ["from_adapterhub"]
