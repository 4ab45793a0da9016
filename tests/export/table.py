"""Decisions alone as a graph: the states of a row are the table of its exits' logits, and block m reads entry m."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from badge_peft.early_exit.policies import build_policy
from badge_peft.export.chain import Chain
from badge_peft.export.graph import FLOAT, Graph
from badge_peft.export.pieces import ALONE, FOLLOWING
from badge_peft.export.policies import Decision


def session_of(graph: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options)


class TableGraph:
    """A session that answers [B, E, K] logits as a policy would have it, exits at blocks 1..E."""

    def __init__(self, rule: dict[str, Any], exits: int, num_labels: int, problem_type: str) -> None:
        decision = Decision(build_policy(rule), list(range(1, exits + 1)), num_labels, problem_type)
        self.default = decision.threshold
        self.count_name = decision.count_name
        inputs = [ir.val("table", FLOAT, ["b", exits, num_labels]), ir.val("doubts", FLOAT, ["b", exits])]
        chain = Chain({ALONE: decision}, inputs, {"table", "doubts"})
        chain.add(0, [self._piece(None, exits, num_labels)])
        for j in range(exits):
            if decision.reads(j):
                chain.add(j + 1, [self._piece(j, exits, num_labels)])
            if decision.policy.is_final(decision.exits, j):
                break
        model = chain.model()
        onnx.checker.check_model(model)
        self.session = session_of(model)

    @staticmethod
    def _piece(j: int | None, exits: int, num_labels: int) -> ir.Graph:
        """Block j + 1, which reads entry j of the states; None: the embeddings, whose states are the table."""
        g = Graph(f"piece{j}")
        table = ir.val("table" if j is None else "hidden", FLOAT, ["b", exits, num_labels])
        doubts = ir.val("doubts", FLOAT, ["b", exits])
        if j is None:
            outputs = {FOLLOWING: g.shaped(g.op("Identity", table), ["b", exits, num_labels])}
        else:
            outputs = {
                "logits": g.op("Gather", table, g.ints(j), axis=1),
                "uncertainty": g.op("Gather", doubts, g.ints(j), axis=1),
            }
        g.body.inputs.extend([table, doubts])
        for name, value in outputs.items():
            value.name = name
            g.body.outputs.append(value)
        return g.body

    def __call__(
        self, logits: np.ndarray, threshold: Any, patience: int, doubts: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(answers [B, K], exit_layer [B])."""
        feed = {
            "table": logits,
            "doubts": np.zeros(logits.shape[:2], np.float32) if doubts is None else doubts,
            "threshold": np.asarray(self.default if threshold is None else threshold, dtype=np.float32),
            self.count_name: np.asarray(patience, dtype=np.int64),
        }
        answers, exit_layer = self.session.run(["logits", "exit_layer"], feed)
        return answers, exit_layer
