"""A learned agreement: a small logistic model per exit says how far its answer is to be trusted. Beyond the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies.base import Array, max_entropy
from badge_peft.early_exit.policies.threshold import ThresholdPolicy

_LIMIT = np.float32(50)  # features are clipped here: beyond it they say nothing new


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

    def __init__(self, config: EarlyExitConfig | dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        fitted = self.config.parameters
        if not fitted:
            raise ValueError(
                "policy='agreement' has to be fitted first: use calibrate(exit_logits, policy='agreement', ...) "
                "and pass on the config that it returns."
            )
        missing = {"exits", "coefficients", "intercepts", "problem_type", "reference"} - set(fitted)
        if missing:
            raise ValueError(
                f"the parameters of policy='agreement' lack {', '.join(sorted(missing))}: calibrate again."
            )
        # a policy's class says it elsewhere; here it depends on what was fitted
        self.stops_above = fitted["problem_type"] != "regression"  # type: ignore[misc]
        if self.config.max_exit is None:
            self.config = replace(self.config, max_exit=fitted["reference"])

    def score(self, history: ExitHistory, j: int) -> Array:
        """[n]: probability; for regression the predicted difference."""
        assert self.config.parameters is not None
        weights = np.array(self.config.parameters["coefficients"][j], dtype=np.float32)
        # a sum, not a matrix product: a row's result must not depend on its neighbours
        linear = (features(history, j) * weights).sum(axis=-1) + np.float32(self.config.parameters["intercepts"][j])
        if not self.stops_above:
            return linear
        return np.float32(1) / (np.float32(1) + np.exp(-np.clip(linear, -_LIMIT, _LIMIT)))

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        """See the class."""
        return 0.1 if problem_type == "regression" else 0.95

    def check(self, exits: Sequence[int], num_labels: int, problem_type: str) -> None:
        """Refuses parameters that were fitted on other exits or another kind of problem."""
        super().check(exits, num_labels, problem_type)
        fitted = self.config.parameters or {}
        if list(exits) != list(fitted["exits"]) or fitted["problem_type"] != problem_type:
            raise ValueError(
                f"policy='agreement' was fitted for {fitted['problem_type']} with exits at blocks {fitted['exits']}, "
                f"but the model does {problem_type} with exits at {list(exits)}: calibrate again."
            )


def features(history: ExitHistory, j: int) -> Array:
    """[n, F]: what the model of exit j (index) reads, from the exits up to j; F is smaller for the first exit.

    All are finite for any logits, and none depends on the other rows.
    """
    if history.problem_type == "regression":
        columns = _regression_features(history, j)
    else:
        columns = _class_features(history, j)
    return np.clip(np.stack(columns, axis=-1), -_LIMIT, _LIMIT)


def _class_features(history: ExitHistory, j: int) -> list[Array]:
    scale = np.float32(max_entropy(history.num_labels, history.problem_type))
    sure = history.confidence(j)
    doubt = np.maximum(1 - sure, np.float32(1e-6))
    columns = [history.entropy(j) / scale, sure, np.log(np.maximum(sure, np.float32(1e-6)) / doubt), history.margin(j)]
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
