"""What Ray Serve is told of replicas, and what a failed start says."""

from __future__ import annotations

import pytest

pytest.importorskip("ray", reason="the extra `serve` is not installed")
pytestmark = pytest.mark.slow  # Ray takes seconds to import

from badge_peft.serving.run import last_error, most_replicas, replica_options  # noqa: E402
from badge_peft.serving.settings import ServiceSettings  # noqa: E402


def test_a_fixed_number_of_replicas():
    settings = ServiceSettings("x", replicas=3, threads=2)
    options = replica_options(settings)
    assert options["num_replicas"] == 3 and options["ray_actor_options"] == {"num_cpus": 2}
    assert options["max_ongoing_requests"] > settings.limits.waiting_rows and most_replicas(settings) == 3


def test_autoscaling_is_rays_own_and_counts_on_full_batches():
    settings = ServiceSettings("x", batch_size=16, autoscaling={"min_replicas": 2, "max_replicas": 5})
    options = replica_options(settings)
    wanted = {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 16}
    assert options["autoscaling_config"] == wanted and "num_replicas" not in options
    assert most_replicas(settings) == 5
    own = ServiceSettings("x", autoscaling={"max_replicas": 2, "target_ongoing_requests": 3})
    assert replica_options(own)["autoscaling_config"]["target_ongoing_requests"] == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_replica": 2}, "no field 'max_replica'.*max_replicas"),
        ({"max_replicas": 0}, "max_replicas: .*greater"),
        ({"min_replicas": 3, "max_replicas": 2}, "not allowed.*greater than or equal to min_replicas"),
    ],
)
def test_autoscaling_that_ray_does_not_take(given, message):
    with pytest.raises(ValueError, match=message):
        replica_options(ServiceSettings("x", autoscaling=given))


def test_a_failed_start_says_what_failed():
    message = """Deploying application badge-peft failed: Failed to update the deployments ['Service'].
    Traceback (most recent call last):
      File "x.py", line 3, in load
    OSError: there is no base model at /nowhere: name it with --base-model.
    Replica gone."""
    assert last_error(message) == "there is no base model at /nowhere: name it with --base-model."
    assert last_error("it took too long\nto start") == "it took too long to start"
