"""Exports in less time: torch takes seconds to translate a block, and the tests' blocks are mostly alike."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils import _pytree as pytree

_CUTS: dict[Any, Any] = {}


@functools.cache
def share_translations() -> None:
    """From here on, whatever computes the same in two exports of this process is translated to ONNX once, as are like
    blocks of one model; and torch lists its translations once."""
    from badge_peft.export import trace

    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    except ImportError:  # another torch has it in another place, and takes longer
        pass
    to_onnx = trace.to_onnx
    known: dict[str, dict[str, Any]] = {}

    def shared(module: Any, inputs: Any, dynamic_shapes: Any, names: Any, output_names: Any, _: Any = None) -> Any:
        tensors = [(tensor.dtype, tensor.shape) for tensor in pytree.tree_leaves(inputs)]
        own = known.setdefault(f"{tensors} {dynamic_shapes}", {})
        return to_onnx(module, inputs, dynamic_shapes, names, output_names, own)

    trace.to_onnx = functools.wraps(to_onnx)(shared)


@contextmanager
def one_cut(of: Hashable) -> Iterator[None]:
    """Inside of it one model is exported and no other, that which `of` names: it is cut into pieces of ONNX where the
    exits that are read are others than before, and else at the first time alone."""
    from badge_peft.export import trace

    export_blocks = trace.export_blocks

    def kept(badge: Any, read: Any, progress: bool = False) -> Any:
        key = of, repr(read)
        if key not in _CUTS:
            _CUTS[key] = export_blocks(badge, read, progress)
        return _CUTS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "export_blocks", kept)
        yield
