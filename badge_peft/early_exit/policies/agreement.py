"""A learned agreement: a small logistic model per exit says how far its answer is to be trusted. Beyond the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.agreement_features import LIMIT, features
from badge_peft.early_exit.policies.base import Array
from badge_peft.early_exit.policies.evidence import Evidence, Quantity
from badge_peft.early_exit.policies.nodes import ExitNodes, Value
from badge_peft.early_exit.policies.threshold import ThresholdPolicy
from badge_peft.early_exit.registry import register_policy
from badge_peft.utils.checks import is_number
from badge_peft.utils.problem import Regression

_NAMES = frozenset(("exits", "coefficients", "intercepts", "problem_type", "reference"))


@register_policy
class AgreementPolicy(ThresholdPolicy):
    """Stop where the predicted probability that the answer is right (or the same as the reference exit's) reaches the
    threshold.

    Each exit has a logistic regression on a few features of the exits' logits so far: its entropy, largest probability
    and margin, its divergences from earlier exits (the numbers of DGE), how many of them gave the same label, and how
    sure the last one was. `calibrate` fits it in seconds on stored logits; its numbers are `config.parameters`. The
    reference is the exit that is best on that data, and no row goes beyond it. For regression the model predicts
    |y_m - y_reference|, and a row stops *below* the threshold.

    Kin: the consistency classifier of Schuster et al., "Consistent Accelerated Inference via Confident Adaptive
    Transformers", 2021. Default threshold: 0.95; regression: 0.1.
    """

    name = "agreement"
    needs_fit = True

    def __init__(self, config: EarlyExitConfig | dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        fitted = self.config.parameters
        if not fitted:
            raise ValueError(
                "policy='agreement' has to be fitted first: use calibrate(exit_logits, policy='agreement', ...) "
                "and pass on the config that it returns."
            )
        missing = _NAMES - set(fitted)
        if missing:
            raise ValueError(
                f"the parameters of policy='agreement' lack {', '.join(sorted(missing))}: calibrate again."
            )
        self.fitted = fitted
        self.stops_above = fitted["problem_type"] != Regression.name

    @classmethod
    def check_config(cls, config: EarlyExitConfig) -> None:
        """Refuses parameters that no `calibrate` has written."""
        fitted = config.parameters or {}
        if not _NAMES <= set(fitted):
            return  # to be fitted, or refused when it is built
        exits, rows = fitted["exits"], fitted["coefficients"]
        whole = isinstance(exits, list) and isinstance(rows, list) and isinstance(fitted["intercepts"], list)
        if (
            not whole
            or not len(exits) == len(rows) == len(fitted["intercepts"])
            or not all(isinstance(row, list) and row for row in rows)
            or not all(map(is_number, (*exits, *fitted["intercepts"], *chain.from_iterable(rows))))
            or not is_number(fitted["reference"])
        ):
            raise ValueError(
                "the parameters of policy='agreement' are not as calibrate writes them, numbers for each exit: "
                "calibrate again."
            )
        if config.min_exit is not None and config.min_exit > fitted["reference"]:
            raise ValueError(
                f"min_exit={config.min_exit} is deeper than exit {fitted['reference']}, beyond which no row goes with "
                "policy='agreement': it was the best on the data that it was fitted on. Ask for less, or take another "
                "policy."
            )

    @property
    def max_exit(self) -> int | None:
        """The reference, or what the config has before it: for deeper exits nothing was fitted."""
        cap, reference = self.config.max_exit, self.fitted["reference"]
        return reference if cap is None else min(cap, reference)

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: probability; for regression the predicted difference."""
        weights = np.array(self.fitted["coefficients"][j], dtype=np.float32)
        # a sum, not a matrix product: a row's result must not depend on its neighbors
        linear = (features(history, j) * weights).sum(axis=-1) + np.float32(self.fitted["intercepts"][j])
        if not self.stops_above:
            return linear
        return np.float32(1) / (np.float32(1) + np.exp(-np.clip(linear, -LIMIT, LIMIT)))

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 0.95 if self.stops_above else 0.1

    def largest_score(self, num_labels: int, problem_type: str, widest: float | None) -> float:
        return 1.0 if self.stops_above else widest or 1.0

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses parameters that were fitted on other exits or another kind of problem."""
        super().check(exits, num_labels, problem_type)
        fitted = self.fitted
        if list(exits) != list(fitted["exits"]) or fitted["problem_type"] != problem_type:
            raise ValueError(
                f"policy='agreement' was fitted for {fitted['problem_type']} with exits at blocks {fitted['exits']}, "
                f"but the model does {problem_type} with exits at {list(exits)}: calibrate again."
            )

    @classmethod
    def fit(
        cls, config: EarlyExitConfig, history: ExitHistory, labels: Tensor | None, reference: int
    ) -> EarlyExitConfig:
        """With labels the target is "this exit is right"; without, it is "this exit says what the reference says". For
        regression it is the distance from the reference's value. Parameters that are there already stay."""
        if config.parameters is not None:
            return config
        from badge_peft.early_exit.policies.agreement_fit import fitted_parameters  # scikit-learn, for this alone

        cap = reference if config.max_exit is None else config.max_exit
        return replace(config, max_exit=cap, parameters=fitted_parameters(history, labels, reference))

    def quantity(self, problem_type: str) -> Quantity:
        if not self.stops_above:
            return Quantity("predicted distance", "d")
        what = "right" if self.fitted.get("target") == "correct" else "full depth's"
        return Quantity(f"predicted probability that the answer is {what}", "P")

    def evidence(self, history: ExitHistory, j: int) -> Evidence | None:
        """None at an exit that always answers: nothing was fitted for it."""
        return None if self.is_final(history.exits, j) else super().evidence(history, j)

    def score_nodes(self, at: ExitNodes) -> Value:
        """[n]: probability; for regression the predicted difference."""
        columns = _regression_nodes(at) if not self.stops_above else _class_nodes(at)
        stacked = at.op("Concat", *(at.op("Unsqueeze", column, at.ints([1])) for column in columns), axis=1)  # [n, F]
        clipped = _clipped(at, stacked)
        weighted = at.total(at.op("Mul", clipped, at.floats(self.fitted["coefficients"][at.index])))
        linear = at.op("Add", weighted, at.floats(self.fitted["intercepts"][at.index]))
        return at.op("Sigmoid", _clipped(at, linear)) if self.stops_above else linear


def _class_nodes(at: ExitNodes) -> list[Value]:
    """The columns of `_class_features`; the divergences in units of the largest entropy."""
    unit, tiny = at.floats(at.scale), at.floats(1e-6)
    log_p = at.log_probs()  # [n, W]
    sure = at.confidence(log_p)
    complement = at.op("Max", at.op("Sub", at.floats(1), sure), tiny)
    here, label = at.represent("ce"), at.represent("label")  # [n, 1, W]
    columns = [
        at.op("Div", at.entropy(log_p), unit),
        sure,
        at.op("Log", at.op("Div", at.op("Max", sure, tiny), complement)),
        at.margin(log_p, sure),
    ]
    earlier, labels = at.kept("history"), at.kept("labels")
    if earlier is not None and labels is not None:
        before = _last(at, earlier)  # [n, 1, W]
        divergences = at.op("Div", at.divergence("ce", here, earlier), unit)  # [n, j]
        same = at.as_float(at.op("Equal", at.divergence("label", label, labels), at.floats(0)))
        columns += [
            _reduced(at, "ReduceMin", divergences),
            at.op("Squeeze", _last(at, divergences), at.ints([1])),
            _reduced(at, "ReduceMean", divergences),
            at.op("Squeeze", at.op("Div", at.divergence("kl", here, before), unit), at.ints([1])),
            _reduced(at, "ReduceMean", same),
            at.confidence(at.op("Squeeze", before, at.ints([1]))),
        ]
    at.append("history", here)
    at.append("labels", label)
    return columns


def _regression_nodes(at: ExitNodes) -> list[Value]:
    """The columns of `_regression_features`."""
    here, earlier = at.represent("ce"), at.kept("history")
    columns = [at.op("ReduceMean", at.logits, at.ints([-1]), keepdims=0)]
    if earlier is not None:
        apart = at.divergence("ce", here, earlier)  # [n, j]
        columns += [
            _reduced(at, "ReduceMin", apart),
            at.op("Squeeze", _last(at, apart), at.ints([1])),
            _reduced(at, "ReduceMean", apart),
            _reduced(at, "ReduceMax", apart),
        ]
    at.append("history", here)
    return columns


def _clipped(at: ExitNodes, values: Value) -> Value:
    return at.op("Clip", values, at.floats(-LIMIT), at.floats(LIMIT))


def _reduced(at: ExitNodes, kind: str, values: Value) -> Value:
    """Over axis 1, which goes."""
    return at.op(kind, values, at.ints([1]), keepdims=0)


def _last(at: ExitNodes, values: Value) -> Value:
    """The last entry of axis 1, which stays."""
    return at.op("Gather", values, at.ints([-1]), axis=1)
