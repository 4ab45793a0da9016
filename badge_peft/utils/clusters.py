"""What is said where a Ray cluster cannot be reached, by a service and by batch scoring."""

from __future__ import annotations


def no_cluster(address: str, error: Exception) -> str:
    """The message, with the remedies.

    Args:
        address: That was given.
        error: Ray's.
    """
    return (
        f"there is no Ray cluster at {address} ({error}): start one (`ray start --head`), or leave --address out. A "
        "cluster that was started with a token is reached with RAY_AUTH_MODE=token and the same token in "
        "~/.ray/auth_token."
    )
