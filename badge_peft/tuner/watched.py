"""`Watched`: whether modules still are what they were when something was made of their weights."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import Tensor, nn


class Watched:
    """Modules of which copies were made. These are good as long as the same modules hold the same tensors, nothing has
    been written into them, and a call of a module does no more than its class says.

    It is asked at every block of a call, so that what it goes through lies side by side.
    """

    def __init__(self) -> None:
        self._holders: list[dict[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []  # what each holder had under its key; None: nothing
        self._hooks: list[dict[Any, Any]] = []
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._places: list[int] = []
        self._storages: list[Tensor] = []  # keep what was read there, so that nothing else takes its place in memory

    def entry(self, holder: dict[Any, Any], key: Any) -> Any:
        """Watches which object `holder` has under `key`, and returns it."""
        value = holder.get(key)
        self._holders.append(holder)
        self._keys.append(key)
        self._values.append(value)
        return value

    def path(self, module: nn.Module, path: str) -> None:
        """Watches which submodule lies at `path`."""
        for name in path.split("."):
            module = self.entry(module._modules, name)

    def calls(self, module: nn.Module) -> None:
        """Watches whether a call of `module` does more than its class says: hooks, or a forward of its own."""
        state = module.__dict__
        self._hooks += [state["_forward_hooks"], state["_forward_pre_hooks"]]
        self.entry(state, "forward")

    def parameters(self, module: nn.Module) -> None:
        """Watches which parameters `module` has itself, and what is in them."""
        for name in module._parameters:
            value = self.entry(module._parameters, name)
            if value is not None:
                self._tensors.append(value)
                self._versions.append(value._version)
                self._places.append(value.data_ptr())
                self._storages.append(value.data)

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return (
            all(map(is_, map(dict.get, self._holders, self._keys), self._values))
            and not any(self._hooks)
            and [tensor._version for tensor in self._tensors] == self._versions
            # `model.half()` and `model.to("cuda")` put another storage into a tensor, and its version stays
            and [tensor.data_ptr() for tensor in self._tensors] == self._places
        )
