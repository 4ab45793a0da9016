"""The policies by name. A config checks names against it, and the class of each policy adds itself."""

from __future__ import annotations

from typing import Any, TypeVar

Policy = TypeVar("Policy", bound=type[Any])

#: The classes by the names that `EarlyExitConfig(policy=...)` takes, in the order in which `policy="auto"` tries them.
POLICIES: dict[str, type[Any]] = {}
_TAKEN = "auto"  # what `calibrate` calls all of them


def register_policy(policy: Policy) -> Policy:
    """Class decorator that makes a policy known by its `name`: to configs, and to everything that takes one.

    A class that is defined again, as a cell of a notebook does, takes the place of the first.

    Raises:
        ValueError: the class has no name of its own, or the name of another policy.
    """
    name = vars(policy).get("name")
    if not isinstance(name, str) or not name or name == _TAKEN:
        raise ValueError(f"{policy.__name__}.name={name!r} is not allowed: a policy needs a name of its own.")
    other = POLICIES.get(name, policy)
    if (other.__module__, other.__qualname__) != (policy.__module__, policy.__qualname__):
        raise ValueError(
            f"{policy.__name__}.name={name!r} is the name of {other.__module__}.{other.__qualname__} already: choose "
            "another one."
        )
    POLICIES[name] = policy
    return policy


def check_policy_name(name: Any, *others: str) -> None:
    """Refuses what is no policy's name, nor one of `others`.

    Raises:
        ValueError: with the names there are.
    """
    if not isinstance(name, str) or name not in (*POLICIES, *others):
        raise ValueError(
            f"policy={name!r} is not allowed: it must be one of {', '.join((*others, *POLICIES))}. A policy of your "
            "own is known once the module with its `register_policy` has been imported."
        )
