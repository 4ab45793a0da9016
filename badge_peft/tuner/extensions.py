"""Where a library that puts modules of its own into base models joins in. The tuner knows of none;
`badge_peft/integrations/adapters.py` is one, and is asked only about the models that it has prepared."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle

from badge_peft.tuner.config import BadgeConfig


class ModelExtension:
    """What a library has put on a base model, as far as BADGE must know. This one is of a plain model: nothing."""

    def applies_to(self, model: nn.Module) -> bool:
        """Whether the library has prepared `model`."""
        return True

    def check(self, model: nn.Module, config: BadgeConfig) -> None:
        """Refuses, with a ValueError, what `config` cannot be put on."""

    def setup(self, model: nn.Module) -> str | None:
        """What of the library takes part in a pass, and how, in words that are stored with exits; None: nothing."""
        return None

    def check_saved(self, model: nn.Module, setup: str | None) -> None:
        """Refuses, with a ValueError, a model whose `setup` is not the one with which exits were trained. Each
        extension is asked, whether it applies to `model` or not."""

    def head_labels(self, model: nn.Module) -> tuple[int | None, str | None]:
        """Labels and problem type of the library's own head; (None, None) where the model's config has them."""
        return None, None

    def takes_part(self, model: nn.Module) -> Callable[[str], bool]:
        """Whether a parameter, by name, is part of a pass."""
        return lambda name: True

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Registers the library's hooks on a base model whose blocks have just been wrapped."""
        return []

    def check_compilable(self, model: nn.Module) -> None:
        """Refuses, with a ValueError, blocks that `torch.compile` cannot take."""

    def check_exportable(self, model: nn.Module) -> None:
        """Refuses, with a ValueError, what has no ONNX form."""


_PLAIN = ModelExtension()
_KNOWN: list[ModelExtension] = []


def register_extension(extension: ModelExtension) -> None:
    """Makes `extension` known; once for each kind."""
    if not any(type(known) is type(extension) for known in _KNOWN):
        _KNOWN.append(extension)


def check_saved(model: nn.Module, setup: str | None) -> None:
    """Asks each extension."""
    for extension in _KNOWN:
        extension.check_saved(model, setup)


def extension_of(model: nn.Module) -> ModelExtension:
    """The extension that has prepared `model`, or one that asks nothing."""
    return next((extension for extension in _KNOWN if extension.applies_to(model)), _PLAIN)
