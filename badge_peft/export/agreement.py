"""The policy `agreement` in ONNX nodes; the features are those of `early_exit/policies/agreement.py`."""

from __future__ import annotations

from badge_peft.early_exit.policies import AgreementPolicy
from badge_peft.export.distributions import Distributions, total
from badge_peft.export.graph import FLOAT, Graph
from badge_peft.export.state import Answers

_LIMIT = 50.0  # as early_exit/policies/agreement.py


def agreement(at: Answers, policy: AgreementPolicy, of: Distributions, scale: float) -> str:
    """[n] bool: the rows of which the fitted model says that they may stop here.

    Args:
        at: The exit.
        policy: With its fitted numbers.
        of: The task.
        scale: Largest entropy, nats.
    """
    g = at.graph
    fitted = policy.config.parameters
    assert fitted is not None  # the policy has checked
    columns = _regression_features(at, of) if of.regression else _class_features(at, of, scale)
    stacked = g.op("Concat", *(g.op("Unsqueeze", column, g.ints([1])) for column in columns), axis=1)  # [n, F]
    clipped = g.op("Clip", stacked, g.floats(-_LIMIT), g.floats(_LIMIT))
    weighted = total(g, g.op("Mul", clipped, g.floats(fitted["coefficients"][at.index])))
    linear = g.op("Add", weighted, g.floats(fitted["intercepts"][at.index]))
    if not policy.stops_above:
        return g.op("Less", linear, at.threshold)
    chance = g.op("Sigmoid", g.op("Clip", linear, g.floats(-_LIMIT), g.floats(_LIMIT)))
    return g.op("GreaterOrEqual", chance, at.threshold)


def _class_features(at: Answers, of: Distributions, scale: float) -> list[str]:
    """Each [n]; the divergences in units of `scale`."""
    g, state, unit = at.graph, at.state, at.graph.floats(scale)
    tiny = g.floats(1e-6)
    log_p = of.log_probs(g, at.logits)  # [n, W]
    sure = of.confidence(g, log_p)
    doubt = g.op("Max", g.op("Sub", g.floats(1), sure), tiny)
    here = g.op("Unsqueeze", log_p, g.ints([1]))  # [n, 1, W]
    label, label_type = of.represent(g, "label", at.logits)
    label = g.op("Unsqueeze", label, g.ints([1]))
    columns = [
        g.op("Div", of.entropy(g, log_p), unit),
        sure,
        g.op("Log", g.op("Div", g.op("Max", sure, tiny), doubt)),
        _margin(g, of, log_p, sure),
    ]
    history, labels = state.values.get("history"), state.values.get("labels")
    if history is not None and labels is not None:
        before = _entry(g, history, -1)  # [n, 1, W]
        divergences = g.op("Div", of.compare(g, "ce", here, history), unit)  # [n, j]
        differ = of.compare(g, "label", label, labels)
        same = g.op("Cast", g.op("Equal", differ, g.floats(0)), to=FLOAT)  # all labels, where there are many
        columns += [
            _reduced(g, "ReduceMin", divergences),
            g.op("Squeeze", _entry(g, divergences, -1), g.ints([1])),
            _reduced(g, "ReduceMean", divergences),
            g.op("Squeeze", g.op("Div", of.compare(g, "kl", here, before), unit), g.ints([1])),
            _reduced(g, "ReduceMean", same),
            of.confidence(g, g.op("Squeeze", before, g.ints([1]))),
        ]
    _append(at, "history", history, here, FLOAT)
    _append(at, "labels", labels, label, label_type)
    return columns


def _regression_features(at: Answers, of: Distributions) -> list[str]:
    g, state = at.graph, at.state
    here = g.op("Unsqueeze", of.represent(g, "ce", at.logits)[0], g.ints([1]))
    columns = [g.op("ReduceMean", at.logits, g.ints([-1]), keepdims=0)]
    history = state.values.get("history")
    if history is not None:
        apart = of.compare(g, "ce", here, history)  # [n, j]
        last = g.op("Squeeze", _entry(g, apart, -1), g.ints([1]))
        columns += [
            _reduced(g, "ReduceMin", apart),
            last,
            _reduced(g, "ReduceMean", apart),
            _reduced(g, "ReduceMax", apart),
        ]
    _append(at, "history", history, here, FLOAT)
    return columns


def _margin(g: Graph, of: Distributions, log_p: str, sure: str) -> str:
    if of.many_labels:
        return g.op("Sub", g.op("Mul", g.floats(2), sure), g.floats(1))
    values = g.fresh("TopK")
    g.ops("TopK", [log_p, g.ints([2])], [values, g.fresh("TopK_places")], axis=-1)
    top = g.op("Exp", values)  # [n, 2]
    return g.op("Squeeze", g.op("Sub", _entry(g, top, 0), _entry(g, top, 1)), g.ints([1]))


def _reduced(g: Graph, kind: str, values: str) -> str:
    """Over axis 1, which goes."""
    return g.op(kind, values, g.ints([1]), keepdims=0)


def _entry(g: Graph, values: str, index: int) -> str:
    """The entry `index` of axis 1, which stays."""
    return g.op("Gather", values, g.ints([index]), axis=1)


def _append(at: Answers, name: str, before: str | None, value: str, dtype: int) -> None:
    at.state.put(name, value if before is None else at.graph.op("Concat", before, value, axis=1), dtype)
