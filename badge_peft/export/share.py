"""Weights that occur in several branches are stored once, in the main graph (ALBERT runs one block M times)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

from onnx import GraphProto, TensorProto

Key = tuple[int, tuple[int, ...], bytes]
LEAST = 1024  # bytes; small constants stay where they are read


def share_weights(graph: GraphProto) -> None:
    """Moves equal tensors of `graph` and of the branches of its `If` nodes to `graph`, in place."""
    branches = [graph, *_branches(graph)]
    counts = Counter(_key(t) for g in branches for t in g.initializer if len(t.raw_data) >= LEAST)
    kept: dict[Key, TensorProto] = {}
    for branch in branches:
        stay: list[TensorProto] = []
        new_names: dict[str, str] = {}
        for tensor in branch.initializer:
            key = _key(tensor) if len(tensor.raw_data) >= LEAST else None
            if key is None or counts[key] == 1:
                stay.append(_copy(tensor))
                continue
            if key not in kept:
                kept[key] = _copy(tensor)
            new_names[tensor.name] = kept[key].name
        if new_names:
            del branch.initializer[:]
            branch.initializer.extend(stay)
            for node in branch.node:
                node.input[:] = [new_names.get(name, name) for name in node.input]
    graph.initializer.extend(kept.values())


def _branches(graph: GraphProto) -> Iterator[GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g


def _copy(tensor: TensorProto) -> TensorProto:
    new = TensorProto()
    new.CopyFrom(tensor)
    return new


def _key(tensor: TensorProto) -> Key:
    return tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest()
