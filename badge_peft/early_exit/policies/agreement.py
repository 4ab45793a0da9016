"""Policies that have learned how far an exit is to be trusted: `agreement`, a small logistic model per exit that is
fitted afterwards, beyond the paper; and `learned` (LTE), a layer that is trained with the exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig, register_policy
from badge_peft.early_exit.divergences import max_entropy
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array
from badge_peft.early_exit.policies.threshold import ThresholdPolicy
from badge_peft.utils.checks import is_number
from badge_peft.utils.problem import Regression, problem_of

LIMIT = np.float32(50)  # features are clipped here: beyond it they say nothing new
TOLERANCE = 1e-8  # of the gradient: where scikit-learn's 1e-4 stops differs from machine to machine
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
        cap = reference if config.max_exit is None else config.max_exit
        return replace(config, max_exit=cap, parameters=fitted_parameters(history, labels, reference))

    def score_nodes(self, at: Any) -> Any:
        """[n]: probability; for regression the predicted difference."""
        columns = _regression_nodes(at) if not self.stops_above else _class_nodes(at)
        stacked = at.op("Concat", *(at.op("Unsqueeze", column, at.ints([1])) for column in columns), axis=1)  # [n, F]
        clipped = _clipped(at, stacked)
        weighted = at.total(at.op("Mul", clipped, at.floats(self.fitted["coefficients"][at.index])))
        linear = at.op("Add", weighted, at.floats(self.fitted["intercepts"][at.index]))
        return at.op("Sigmoid", _clipped(at, linear)) if self.stops_above else linear


@register_policy
class LearnedPolicy(ThresholdPolicy):
    """LTE, learning to exit: stop where the uncertainty that a small trained layer predicts is below the threshold.

    The layer is a linear map with a sigmoid, shared by all exits. `BadgeConfig(learn_to_exit=True)` adds it, and it is
    trained to predict whether the exit is wrong (regression: how far off it is). Source: Xin et al., "BERxiT", 2021.
    Default threshold: 0.1.
    """

    name = "learned"
    reads_uncertainty = True

    def lookback(self) -> int:
        """No exit."""
        return 0

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: predicted uncertainty in [0, 1]."""
        found = history.uncertainty
        self.check_learned(found is not None and not np.isnan(found[j]).any())
        return cast(Array, found)[j]

    def score_nodes(self, at: Any) -> Any:
        """[n]: predicted uncertainty."""
        return at.uncertainty

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 0.1


def _class_nodes(at: Any) -> list[Any]:
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


def _regression_nodes(at: Any) -> list[Any]:
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


def _clipped(at: Any, values: Any) -> Any:
    return at.op("Clip", values, at.floats(-LIMIT), at.floats(LIMIT))


def _reduced(at: Any, kind: str, values: Any) -> Any:
    """Over axis 1, which goes."""
    return at.op(kind, values, at.ints([1]), keepdims=0)


def _last(at: Any, values: Any) -> Any:
    """The last entry of axis 1, which stays."""
    return at.op("Gather", values, at.ints([-1]), axis=1)


def features(history: ExitHistory, j: int) -> Array:
    """[n, F]: what the model of exit j (index) reads, from the exits up to j; F is smaller for the first exit.

    All are finite for any logits, and none depends on the other rows.
    """
    columns = (_class_features if history.problem.gives_labels else _regression_features)(history, j)
    return np.clip(np.stack(columns, axis=-1), -LIMIT, LIMIT)


def _class_features(history: ExitHistory, j: int) -> list[Array]:
    scale = np.float32(max_entropy(history.num_labels, history.problem_type))
    sure = history.confidence(j)
    complement = np.maximum(1 - sure, np.float32(1e-6))
    columns = [
        history.entropy(j) / scale,
        sure,
        np.log(np.maximum(sure, np.float32(1e-6)) / complement),
        history.margin(j),
    ]
    if j:
        earlier = history.to_earlier("ce", j) / scale  # [j, n]
        same = (history.to_earlier("label", j) == 0).mean(axis=0, dtype=np.float32)
        columns += [earlier.min(axis=0), earlier[-1], _mean(earlier), history.to_previous("kl", j) / scale, same]
        columns.append(history.confidence(j - 1))
    return columns


def _regression_features(history: ExitHistory, j: int) -> list[Array]:
    columns = [history.logits[j].mean(axis=-1)]
    if j:
        earlier = history.to_earlier("ce", j)  # |y_j - y_i|: [j, n]
        columns += [earlier.min(axis=0), earlier[-1], _mean(earlier), earlier.max(axis=0)]
    return columns


def _mean(values: Array) -> Array:
    """[j, n] -> [n], added one by one: the order in which numpy sums the first axis depends on n."""
    return sum(values[1:], start=values[0]) / np.float32(len(values))


def fitted_parameters(history: ExitHistory, labels: Tensor | None, reference: int) -> dict[str, Any]:
    """`EarlyExitConfig.parameters` of the policy; see `AgreementPolicy.fit`.

    Args:
        history: Of data that the model was not trained on, all exits seen.
        labels: Of its rows, where there are any.
        reference: Block number of the exit that answers at the latest.
    """
    problem, exits = problem_of(history.problem_type), history.exits
    answers = [problem.predictions(torch.from_numpy(logits)) for logits in history.logits]
    best = answers[exits.index(reference)]
    coefficients, intercepts = [], []
    for j in range(exits.index(reference)):
        x = features(history, j).astype(np.float64)  # in which scikit-learn then fits
        if problem.gives_labels:
            right = answers[j] == (best if labels is None else problem.targets(labels))
            weights, bias = _logistic(x, right if right.ndim == 1 else right.all(axis=1))
        else:
            distance = np.abs(answers[j] - best).reshape(len(best), -1).mean(axis=1)
            weights, bias = _ridge(x, distance)
        coefficients.append([float(f"{w:.7g}") for w in weights])
        intercepts.append(float(f"{bias:.7g}"))
    return {
        "exits": list(exits),
        "reference": reference,
        "target": "agreement" if labels is None else "correct",
        "problem_type": history.problem_type,
        "coefficients": _padded(coefficients, history),
        "intercepts": intercepts + [0.0] * (len(exits) - len(intercepts)),
    }


def _padded(coefficients: list[list[float]], history: ExitHistory) -> list[list[float]]:
    """One list per exit: the reference and deeper exits are never asked, and have zeros."""
    missing = range(len(coefficients), len(history.exits))
    return coefficients + [[0.0] * features(history, j).shape[1] for j in missing]


def _logistic(x: Array, right: Array) -> tuple[Array, float]:
    rate = (right.sum() + 0.5) / (len(right) + 1)
    if right.all() or not right.any():  # nothing to tell apart: the smoothed rate
        return np.zeros(x.shape[1]), float(np.log(rate / (1 - rate)))
    from sklearn.linear_model import LogisticRegression  # takes a second to import, and is needed for this alone
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    model = LogisticRegression(tol=TOLERANCE, max_iter=10_000).fit(scaler.transform(x), right)
    weights = model.coef_[0] / scaler.scale_
    return weights, float(model.intercept_[0] - weights @ scaler.mean_)


def _ridge(x: Array, distance: Array) -> tuple[Array, float]:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    model = Ridge().fit(scaler.transform(x), distance)
    weights = model.coef_ / scaler.scale_
    return weights, float(model.intercept_ - weights @ scaler.mean_)
