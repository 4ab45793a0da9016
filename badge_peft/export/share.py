"""Weights that occur in several branches are stored once, in the main graph (ALBERT runs one block M times)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

from onnx import GraphProto, TensorProto

LEAST = 1024  # bytes; small constants stay where they are read


def share_weights(graph: GraphProto) -> None:
    """Moves equal tensors of `graph` and of the branches of its `If` nodes to `graph`, in place."""
    branches = [graph, *_branches(graph)]
    keys = {id(t): _key(t) for g in branches for t in g.initializer if len(t.raw_data) >= LEAST}
    counts = Counter(keys.values())
    kept: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    moved: list[TensorProto] = []
    for branch in branches:
        new_names: dict[str, str] = {}
        stay = []
        for tensor in branch.initializer:
            key = keys.get(id(tensor))
            if key is None or counts[key] == 1:
                stay.append(tensor)
            elif key in kept:
                new_names[tensor.name] = kept[key]
            else:
                kept[key] = tensor.name
                moved.append(tensor)
        if len(stay) == len(branch.initializer):
            continue
        copies = [_copy(t) for t in stay]
        moved = [_copy(t) for t in moved]  # before their owner forgets them
        del branch.initializer[:]
        branch.initializer.extend(copies)
        for node in branch.node:
            node.input[:] = [new_names.get(name, name) for name in node.input]
    graph.initializer.extend(moved)


def _branches(graph: GraphProto) -> Iterator[GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g


def _copy(tensor: TensorProto) -> TensorProto:
    new = TensorProto()
    new.CopyFrom(tensor)
    return new


def _key(tensor: TensorProto) -> tuple[int, tuple[int, ...], bytes]:
    return tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest()
