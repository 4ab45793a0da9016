"""`EarlyExitConfig`: how a model stops. Plain data, saved inside `adapter_config.json`; it knows nothing of models."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from badge_peft.utils.checks import check_choice, check_int, is_number, option, require, to_python, without_removed

Policy = TypeVar("Policy", bound=type[Any])

#: The classes by the names that `EarlyExitConfig(policy=...)` takes, in the order in which `policy="auto"` tries them.
POLICIES: dict[str, type[Any]] = {}
_TAKEN = "auto"  # what `calibrate` calls all of them

DIVERGENCES = ("ce", "kl", "js", "label")
WINDOWS = ("all", "consecutive")
_LISTS = ("exit_layers", "temperature")
_REMOVED: dict[str, tuple[Any, str]] = {
    "normalize": (
        False,
        "Leave it out, and multiply the threshold by ln K (of K independent labels, by K ln 2), or calibrate again.",
    )
}


@dataclass(frozen=True)
class EarlyExitConfig:
    """How an adapter stops: the policy and its parameters. It never changes: `of` and `dataclasses.replace` make
    another one, without `calibration` where the policy differs. Lists and dicts are copied on their way in.

    `None` for `threshold` or `patience` means the documented default of the policy, worked out for the number of
    labels when the policy is built (see `badge_peft.early_exit.policies`); it never means "do not stop".
    Numpy scalars are taken, too, and stored as plain numbers.

    Raises:
        ValueError: a field has a value that is not allowed; the message names field, value and what is allowed.
    """

    policy: str = option("divergence", "The exit policy, by its name in `POLICIES`.")
    divergence: str = option("ce", "S of Eq. 4 for `divergence`: `ce` (the paper's), `kl`, `js` or `label`.")
    threshold: float | list[float] | None = option(
        None,
        "tau of Eq. 3, or the bound of the other policies; a list has one for each exit, the last among them. None: "
        "the policy's default.",
    )
    patience: int | None = option(None, "t of Eq. 3: how many exits must agree. None: the policy's default.")
    window: str = option(
        "all", "`all` earlier exits count (Eq. 3), or `consecutive`: the unbroken run of adjacent ones."
    )
    min_exit: int | None = option(None, "No row stops before this block.")
    max_exit: int | None = option(None, "No row goes past this block.")
    depth: int | None = option(None, "The block that answers, for `fixed_depth`.")
    top_k: int | None = option(None, "How many candidates of a query count, for `top_k`. None: 10.")
    exit_layers: list[int] | None = option(
        None,
        "Blocks at which rows may stop; None: wherever there is an exit. Exits elsewhere are read only where a policy "
        "counts them.",
    )
    decide_every: int = option(
        1,
        "Rows may stop at every k-th exit only (exits k, 2k, ... in their order), and at the last. The "
        "exits between count as earlier exits. On a GPU each decision waits for the device: fewer may be faster.",
    )
    temperature: list[float] | None = option(
        None, "One temperature per exit for `max_prob`; logits are divided by it."
    )
    parameters: dict[str, Any] | None = option(
        None,
        "The fitted numbers of `agreement`, by `calibrate`, and the margins of `top_k`, by `calibrate_ranking`.",
    )
    calibration: dict[str, Any] | None = option(None, "What `calibrate` recorded: data size, score, speed-up, bound.")

    @property
    def resolved_top_k(self) -> int:
        """`top_k`, or what None stands for."""
        return 10 if self.top_k is None else self.top_k

    def __post_init__(self) -> None:
        for name in ("threshold", "patience", "min_exit", "max_exit", "depth", "top_k", "decide_every", *_LISTS):
            self._set(name, _plain(getattr(self, name)))
        check_policy_name(self.policy)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_choice("window", self.window, WINDOWS)
        taus, blocks, temperature = self.threshold, self.exit_layers, self.temperature
        each = taus if isinstance(taus, list) else [0.0 if taus is None else taus]
        rule = "it must be a finite number or None, or a list with a number for each exit"
        require(bool(each) and all(map(is_number, each)), "threshold", taus, rule)
        if taus is not None:
            self._set("threshold", [float(tau) for tau in each] if isinstance(taus, list) else float(taus))
        if blocks is not None:
            numbers = isinstance(blocks, list) and all(type(m) is int and m >= 0 for m in blocks)
            rule = "it must be a list of increasing block numbers, or None"
            require(numbers and sorted(set(blocks)) == blocks != [], "exit_layers", blocks, rule)
        for name in ("patience", "top_k"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("min_exit", "max_exit", "depth"):
            check_int(name, getattr(self, name), at_least=0)
        check_int("decide_every", self.decide_every, at_least=1, optional=False)
        if self.min_exit is not None and self.max_exit is not None and self.min_exit > self.max_exit:
            raise ValueError(
                f"min_exit={self.min_exit} is deeper than max_exit={self.max_exit}: no block could answer."
            )
        if temperature is not None:
            positive = isinstance(temperature, list) and all(is_number(t) and t > 0 for t in temperature)
            require(
                positive and temperature != [], "temperature", temperature, "it must be a list of positive numbers"
            )
            self._set("temperature", [float(t) for t in temperature])
        for name in ("parameters", "calibration"):
            value = getattr(self, name)
            require(value is None or isinstance(value, dict), name, value, "it must be a dict or None")
        if self.calibration is not None:
            settings = self._settings_hash()
            if self.calibration.get("settings", settings) == settings:
                self._set("calibration", _in_order(copy.deepcopy({**self.calibration, "settings": settings})))
            else:  # `dataclasses.replace` or a call's override has changed what was measured
                self._set("calibration", None)
        self._set("parameters", copy.deepcopy(self.parameters))
        POLICIES[self.policy].check_config(self)

    def __hash__(self) -> int:
        # of what tells configs apart as a rule; `==` compares all fields, which a dict among them keeps out of a hash
        taus = tuple(self.threshold) if isinstance(self.threshold, list) else self.threshold
        return hash((self.policy, self.divergence, taus, self.patience, self.window, self.depth))

    def _set(self, name: str, value: Any) -> None:
        """For `__post_init__` alone: a frozen dataclass has no other way to store what it made of a value."""
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, value: EarlyExitConfig | dict[str, Any] | None, **overrides: Any) -> EarlyExitConfig:
        """The config that `value` and keyword `overrides` describe; `value` itself is never changed. What `calibrate`
        recorded is left out where an override changes what it was measured with.

        Another policy than that of `value` takes nothing over from it, not even `min_exit`: a threshold of one policy
        means nothing to another. `policy="never"` never does, so it is full depth whatever `value` says.

        Raises:
            ValueError: `value` is of another type, or a name is not a field.
        """
        if isinstance(value, EarlyExitConfig):
            value = vars(value)
        elif value is not None and not isinstance(value, dict):
            raise ValueError(
                f"an early-exit config must be an EarlyExitConfig, a dict or None, got {type(value).__name__}."
            )
        value, overrides = (without_removed(given or {}, _REMOVED) for given in (value, overrides))
        named = overrides.get("policy")
        other = named is not None and "policy" in value and (named != value["policy"] or named == "never")
        data = overrides if other else {**value, **overrides}
        allowed = [f.name for f in fields(cls)]
        unknown = sorted(map(str, {*value, *overrides} - set(allowed)))
        if unknown:
            raise ValueError(
                f"EarlyExitConfig has no field {', '.join(unknown)}; its fields are {', '.join(allowed)}."
            )
        return cls(**data)

    def _settings_hash(self) -> str:
        """Of the fields that differ from their defaults (a later version may have more), but `calibration`, which says
        what was measured with them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "calibration"}
        settings = {f.name: values[f.name] for f in fields(self) if values.get(f.name) != f.default}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode()).hexdigest()[:16]

    def measured_on(self, weights_hash: str | None) -> EarlyExitConfig:
        """This config for an adapter with these weights: without `calibration` where that was recorded with others. A
        hash that is None, there or here, is not compared."""
        recorded = (self.calibration or {}).get("weights_hash")
        other = None not in (recorded, weights_hash) and recorded != weights_hash
        return replace(self, calibration=None) if other else self

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self)}


def _in_order(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a calibration with its exits by number: PEFT's file has "10" before "2"."""
    scores = record.get("exit_scores")
    if isinstance(scores, dict):
        record["exit_scores"] = {
            number: scores[number] for number in sorted(scores, key=lambda n: (len(str(n)), str(n)))
        }
    return record


def _plain(value: Any) -> Any:
    """An array, a tensor or a tuple as a list, and numpy scalars as numbers; anything else as it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [to_python(x) for x in value] if isinstance(value, (list, tuple)) else value


def register_policy(policy: Policy) -> Policy:
    """Class decorator that makes a policy known by its `name`: to configs, and to everything that takes one.

    A class that is defined again, as a cell of a notebook does, takes the place of the first.

    Raises:
        ValueError: the class does not set `name`, or another policy has it.
    """
    name = vars(policy).get("name")
    if not isinstance(name, str) or not name or name == _TAKEN:
        raise ValueError(f"{policy.__name__}.name={name!r} is not allowed: a policy needs its own name.")
    other = POLICIES.get(name, policy)
    if (other.__module__, other.__qualname__) != (policy.__module__, policy.__qualname__):
        raise ValueError(
            f"{policy.__name__}.name={name!r} is the name of {other.__module__}.{other.__qualname__} already: choose "
            "another one."
        )
    POLICIES[name] = policy
    return policy


def check_policy_name(name: Any, *others: str) -> None:
    """Refuses what is no policy's name, nor one of `others`."""
    if not isinstance(name, str) or name not in (*POLICIES, *others):
        raise ValueError(
            f"policy={name!r} is not allowed: it must be one of {', '.join((*others, *POLICIES))}. A policy of your "
            "own is known once the module with its `register_policy` has been imported."
        )
