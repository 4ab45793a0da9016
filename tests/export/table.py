"""Decisions alone as a graph: the states of a row are the table of its exits' logits, and block m reads entry m."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from badge_peft.early_exit.policies import build_policy
from badge_peft.export.chain import Chain, Stage
from badge_peft.export.graph import FLOAT, INT64, IR_VERSION, OPSET, Graph
from badge_peft.export.policies import Decision


class TableGraph:
    """A session that answers [B, E, K] logits as a policy would have it, exits at blocks 1..E."""

    def __init__(self, rule: dict[str, Any], exits: int, num_labels: int, problem_type: str, compact: bool) -> None:
        decision = Decision(build_policy(rule), list(range(1, exits + 1)), num_labels, problem_type)
        self.default, unit = decision.threshold()
        main = Graph("main")
        batch = main.op("Squeeze", main.op("Shape", "table", start=0, end=1))
        limit = main.op("Mul", "threshold", main.floats(unit)) if unit != 1 else "threshold"
        chain = Chain(
            main,
            decision,
            {"doubts": "doubts"},
            {"doubts"},
            compact=compact,
            batch=batch,
            hidden_size=num_labels,
            threshold=limit,
            patience="patience",
        )
        chain.start("table", None, None, None, False)
        for j in range(exits):
            if decision.reads(j):
                chain.add(Stage(j + 1, self._insert(j), ["doubts"], j, decision.is_last(j)))
            if decision.is_last(j):
                break
        main.op("Identity", chain.answer, output="logits")
        main.op("Identity", chain.exit_layer, output="exit_layer")
        graph = helper.make_graph(
            main.nodes,
            "table",
            [
                helper.make_tensor_value_info("table", FLOAT, ["b", exits, num_labels]),
                helper.make_tensor_value_info("doubts", FLOAT, ["b", exits]),
                helper.make_tensor_value_info("threshold", FLOAT, []),
                helper.make_tensor_value_info("patience", INT64, []),
            ],
            [
                helper.make_tensor_value_info("logits", FLOAT, ["b", num_labels]),
                helper.make_tensor_value_info("exit_layer", INT64, ["b"]),
            ],
            main.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options)

    @staticmethod
    def _insert(j: int) -> Any:
        def insert(g: Graph, values: dict[str, str]) -> dict[str, str]:
            return {
                "logits": g.op("Gather", values["hidden"], g.ints(j), axis=1),
                "uncertainty": g.op("Gather", values["doubts"], g.ints(j), axis=1),
            }

        return insert

    def __call__(
        self, logits: np.ndarray, threshold: float | None, patience: int, doubts: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(answers [B, K], exit_layer [B])."""
        feed = {
            "table": logits,
            "doubts": np.zeros(logits.shape[:2], np.float32) if doubts is None else doubts,
            "threshold": np.asarray(self.default if threshold is None else threshold, dtype=np.float32),
            "patience": np.asarray(patience, dtype=np.int64),
        }
        answers, exit_layer = self.session.run(["logits", "exit_layer"], feed)
        return answers, exit_layer
