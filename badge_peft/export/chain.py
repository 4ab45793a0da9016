"""The early-exit graph: a flat chain of `If`, one per block, which hands a stub on or computes the block.

    embeddings -> If(done) {} else {block 1, exit 1, decision} -> If(done) {} else {block 2, ...} -> ... -> answers

Nothing nests, so that the runtime packs each block's weights once, when it loads the file. Blocks behind the exit are
not computed: their branch hands on the answers, and empty stubs in place of the states.

With `compact`, rows that have answered are taken out of the states and of everything that has a row per input;
without, they go along until all have answered, and their answers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from badge_peft.export.graph import BOOL, FLOAT, INT64, Graph
from badge_peft.export.nodes import State
from badge_peft.export.policies import Decision

#: Puts a block into a graph: the graph, names of states, shared tensors and inputs -> those of its results.
Insert = Callable[[Graph, dict[str, str]], dict[str, str]]


@dataclass
class Stage:
    """One link of the chain.

    Args:
        block: Its number; 0 is the embeddings.
        insert: Adds its nodes.
        reads: Names of what it reads beside `hidden`.
        exit_index: Place of its exit among the exits, None where there is none (or nobody asks).
        last: Whether everybody answers here.
    """

    block: int
    insert: Insert
    reads: Sequence[str]
    exit_index: int | None
    last: bool


class Chain:
    """Puts stages into a graph one after another.

    Args:
        graph: The main graph; it has the inputs.
        decision: The policy.
        outer: What stages may read: name -> value.
        per_row: Which of them have one row per input.
        compact: Whether rows that have answered are taken out.
        batch: int64 scalar, B.
        hidden_size: d.
        threshold: In the unit of the policy's signal.
        patience: int64 scalar.
    """

    def __init__(
        self,
        graph: Graph,
        decision: Decision,
        outer: dict[str, str],
        per_row: set[str],
        *,
        compact: bool,
        batch: str,
        hidden_size: int,
        threshold: str,
        patience: str,
    ) -> None:
        self.graph = graph
        self.decision = decision
        self.outer = outer
        self.per_row = per_row
        self.compact = compact
        self.hidden_size = hidden_size
        self.threshold, self.patience = threshold, patience
        self.state = State()
        k = decision.num_labels
        shape = graph.op("Concat", graph.op("Reshape", batch, graph.ints([1])), graph.ints([k]), axis=0)
        #: Everything that is carried from stage to stage beside `state`: name -> (value, type).
        self.carried: dict[str, tuple[str, int]] = {
            "answer": (graph.op("Expand", graph.floats(0), shape), FLOAT),
            "exit_layer": (graph.op("Expand", graph.ints(-1), graph.op("Reshape", batch, graph.ints([1]))), INT64),
        }
        if compact:
            rows = graph.op("Range", graph.ints(0), batch, graph.ints(1))
            self.carried["rows"] = (rows, INT64)
        self.done: str | None = None  # known behind the first exit

    def start(self, hidden: str, logits: str | None, uncertainty: str | None, index: int | None, last: bool) -> None:
        """The embeddings' states [B, S, d], and the answers of exit 0 where there is one."""
        self.carried["hidden"] = (hidden, FLOAT)
        if logits is not None and index is not None:
            self._answer(self.graph, dict(self.carried), logits, uncertainty, index, 0, last)

    def add(self, stage: Stage) -> None:
        """One more block."""
        if self.done is None:  # nobody can have answered
            self._block(self.graph, stage)
            return
        before, states_before, done = dict(self.carried), dict(self.state.values), self.done
        branch = Graph(f"block{stage.block}")
        self._block(branch, stage)
        now = {**self.carried, **{name: (v, self.state.types[name]) for name, v in self.state.values.items()}}
        now["done"] = (self.done, BOOL)
        if stage.last:  # nobody reads anything else
            now = {name: now[name] for name in ("answer", "exit_layer")}
        old = {**{name: v for name, (v, _) in before.items()}, **states_before, "done": done}
        changed = {name: value for name, value in now.items() if value[0] != old.get(name)}
        names = {name: self.graph.fresh(f"block{stage.block}_{name}") for name in changed}
        skip = self._skip(stage, {name: dtype for name, (_, dtype) in changed.items()}, old)
        self.graph.choose(done, skip, branch.branch(list(changed.values())), list(names.values()))
        for name, value in names.items():
            if name == "done":
                self.done = value
            elif name in self.carried:
                self.carried[name] = (value, self.carried[name][1])
            else:
                self.state.values[name] = value

    @property
    def answer(self) -> str:
        """[B, K]."""
        return self.carried["answer"][0]

    @property
    def exit_layer(self) -> str:
        """[B]."""
        return self.carried["exit_layer"][0]

    # ---------------------------------------------------------------------------------------------------------- inside

    def _block(self, g: Graph, stage: Stage) -> None:
        values = {"hidden": self.carried["hidden"][0]}
        for name in stage.reads:
            value = self.outer[name]
            if self.compact and self.done is not None and name in self.per_row:
                value = g.op("Gather", value, self.carried["rows"][0], axis=0)
            values[name] = value
        made = stage.insert(g, values)
        if "hidden" in made:
            self.carried["hidden"] = (made["hidden"], FLOAT)
        if stage.exit_index is not None:
            self._answer(
                g,
                dict(self.carried),
                made["logits"],
                made.get("uncertainty"),
                stage.exit_index,
                stage.block,
                stage.last,
            )

    def _answer(
        self,
        g: Graph,
        carried: dict[str, tuple[str, int]],
        logits: str,
        uncertainty: str | None,
        index: int,
        block: int,
        last: bool,
    ) -> None:
        """Asks the policy, and notes the answers of the rows that stop."""
        stops: str | None = None
        if not last:
            stops = self.decision.stops(g, index, logits, uncertainty, self.state, self.threshold, self.patience)
            if stops is None or not self.decision.may_stop(index):
                return
        store = self._store_rows if self.compact else self._store_all
        self.carried = store(g, carried, logits, stops, block)

    def _store_all(
        self, g: Graph, carried: dict[str, tuple[str, int]], logits: str, stops: str | None, block: int
    ) -> dict[str, tuple[str, int]]:
        answer, exit_layer = carried["answer"][0], carried["exit_layer"][0]
        newly = g.op("Less", exit_layer, g.ints(0))
        if stops is not None:
            newly = g.op("And", newly, stops)
        carried["answer"] = (g.op("Where", g.op("Unsqueeze", newly, g.ints([1])), logits, answer), FLOAT)
        exit_layer = g.op("Where", newly, g.ints(block), exit_layer)
        carried["exit_layer"] = (exit_layer, INT64)
        least = g.op("ReduceMin", exit_layer, g.ints([0]), keepdims=0)
        self.done = g.op("GreaterOrEqual", least, g.ints(0))
        return carried

    def _store_rows(
        self, g: Graph, carried: dict[str, tuple[str, int]], logits: str, stops: str | None, block: int
    ) -> dict[str, tuple[str, int]]:
        rows = carried["rows"][0]
        if stops is None:
            leaving, said = rows, logits
        else:
            leaving, said = g.op("Compress", rows, stops, axis=0), g.op("Compress", logits, stops, axis=0)
        places = g.op("Unsqueeze", leaving, g.ints([1]))
        carried["answer"] = (g.op("ScatterND", carried["answer"][0], places, said), FLOAT)
        number = g.op("Expand", g.ints(block), g.op("Shape", leaving))
        carried["exit_layer"] = (g.op("ScatterND", carried["exit_layer"][0], places, number), INT64)
        if stops is None:
            self.done = g.op("Identity", g.constant(True, BOOL))
            return carried
        going = g.op("Not", stops)
        for name in ("hidden", "rows"):
            value, dtype = carried[name]
            carried[name] = (g.op("Compress", value, going, axis=0), dtype)
        self.state.values = {name: g.op("Compress", value, going, axis=0) for name, value in self.state.values.items()}
        self.done = g.op("Equal", g.op("Size", carried["rows"][0]), g.ints(0))
        return carried

    def _skip(self, stage: Stage, outputs: dict[str, int], old: dict[str, str]) -> onnx.GraphProto:
        """The branch for when all have answered: the answers as they are, stubs for everything else."""
        g = Graph(f"skip{stage.block}")
        results = []
        for name, dtype in outputs.items():
            if name in ("answer", "exit_layer"):
                value = old[name]
            else:
                value = g.constant(True, BOOL) if name == "done" else self._stub(g, name, dtype)
            results.append((g.op("Identity", value), dtype))
        return g.branch(results)

    def _stub(self, g: Graph, name: str, dtype: int) -> str:
        """An empty value of the right rank: the runtime knows the ranks of what comes out of an `If`."""
        shapes = {"hidden": (0, 0, self.hidden_size), "rows": (0,)}
        shape = shapes.get(name) or (0,) * self.state.axes[name]
        return g.constant(np.zeros(shape), dtype)
