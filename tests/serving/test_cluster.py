"""`badge-peft serve --address` on a Ray cluster as `ray start` makes one: an ONNX file with `--autoscaling`, then, at
the same port, a ranking adapter."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ray = pytest.importorskip("ray", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from badge_peft import EarlyExitConfig, load_pretrained  # noqa: E402
from badge_peft.export import OnnxEarlyExitModel, export_onnx  # noqa: E402
from badge_peft.ranking import EarlyExitReranker  # noqa: E402
from tests.serving.adapters import save_adapter  # noqa: E402
from tests.serving.running import Running, at_once, free_port, together  # noqa: E402
from tests.texts import make_tokenizer, sentences  # noqa: E402

pytestmark = pytest.mark.exhaustive  # a minute and more: nox -s serve
TEXTS = [text for text, _ in sentences(24, seed=5)]
RULE = EarlyExitConfig(policy="entropy", threshold=0.6)
#: Seconds that a process may take which imports torch, 10 seconds of a core: each start is some of them in a row.
SLOW = 400
#: Of all processes here. Ray asks for a token where one is there: these have one of their own.
AUTH = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_worker_niceness": "0",  # as docs/serving.md has it: nice workers get a 30th of a core that others use, too
}
SCALING = (
    '{"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 0.5, '
    '"metrics_interval_s": 0.2, "look_back_period_s": 1}'
)


@contextmanager
def started(**environment):
    """The address of a cluster that is this test's own: `ray stop` would end all others on the machine, too."""
    port = str(free_port())
    place = tempfile.mkdtemp(prefix="ray")  # short, or its sockets' names are too long
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", port]
    command += ["--num-cpus", "3", "--temp-dir", place, "--include-dashboard", "false", "--disable-usage-stats"]
    with Path(place, "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **AUTH, **environment})
    end = time.monotonic() + SLOW
    try:
        while "Ray runtime started" not in (said := Path(place, "log").read_text()):
            assert process.poll() is None and time.monotonic() < end, said[-3000:]
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(SLOW)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def address():
    with started() as found:
        yield found


@pytest.fixture(scope="module")
def port():
    return free_port()


def refused_start(adapter, address, port, **environment):
    """What the command says that does not start."""
    command = [sys.executable, "-m", "badge_peft.cli", "serve", str(adapter), "--address", address]
    whole = {**os.environ, **AUTH, **environment}
    done = subprocess.run([*command, "--port", str(port)], capture_output=True, text=True, env=whole, timeout=SLOW)
    assert done.returncode == 1, done.stderr[-3000:]
    return done.stderr.splitlines()[-1]


def answers(predicted):
    return [(one["label"], one["exit_layer"]) for one in predicted]


def test_a_file_on_replicas_that_come_with_the_load(address, port, tmp_path):
    adapter = save_adapter(tmp_path)
    export_onnx(load_pretrained(str(adapter)), tmp_path / "file", tokenizer=make_tokenizer(), early_exit_config=RULE)
    alone = OnnxEarlyExitModel.from_pretrained(tmp_path / "file", threads=1)
    options = ("--onnx", "--address", address, "--autoscaling", SCALING, "--batch-size", "2")
    # a path from where the command runs, and not from where Ray was started
    running = Running(tmp_path, "file", *options, port=port, **AUTH)
    try:
        assert answers(running.predict(TEXTS).json()) == answers(alone.predict(TEXTS))
        assert running.info()["back_end"] == "onnx"
        refused = running.predict(TEXTS[:1], max_exit=1)
        assert refused.status_code == 400 and "fixed in an ONNX file" in refused.text
        refused = running.change(early_exit={"policy": "max_prob"})
        assert refused.status_code == 400 and "fixed in the file" in refused.text
        assert running.change(early_exit={"policy": "never"}).json()["on_all_replicas"] is True
        assert {one["exit_layer"] for one in running.predict(TEXTS).json()} == {3}

        said = refused_start(adapter, address, port)
        assert "there is a service on this cluster already: end it first" in said

        # a second replica comes, and answers at the setting in force
        expected = answers(alone.predict(TEXTS, threshold=0.68))
        state = running.change(early_exit={"policy": "entropy", "threshold": 0.68}).json()
        assert state["early_exit"]["default"]["threshold"] == 0.68 and len(state["replicas"]) == 1
        found, end = [], time.monotonic() + SLOW
        while len(running.info()["policy"]["replicas"]) < 2:
            assert time.monotonic() < end
            found += together([lambda: running.predict(TEXTS)] * 8)
        found += together([lambda: running.predict(TEXTS)] * 8)
        assert all(answers(one.json()) == expected for one in found)

        threads, results = at_once([lambda: running.predict(TEXTS)] * 6)
        time.sleep(0.02)
        code = running.stop()
        for thread in threads:
            thread.join()
        assert code == 0, running.log.read_text()[-3000:]
        assert all(answers(one.json()) == expected for one in results if one.status_code == 200)
        assert any(one.status_code == 200 for one in results)
    finally:
        running.kill()


def test_candidates_are_ranked_where_the_other_service_was(address, port, tmp_path):
    adapter = save_adapter(tmp_path, num_labels=1)
    rule = EarlyExitConfig(policy="top_k", top_k=3, parameters={"margins": [0.01, 0.005, None]})
    model = load_pretrained(str(adapter))
    model.set_early_exit_config(rule)
    model.save_pretrained(adapter)
    alone = EarlyExitReranker.from_pretrained(adapter)
    said = refused_start(adapter, address, free_port())
    assert f"listens at 127.0.0.1:{port} on this cluster: give --host 127.0.0.1 --port {port}" in said
    running = Running(tmp_path, str(adapter), "--address", address, port=port, **AUTH)
    try:

        def ask(i: int, **more):
            texts = TEXTS[i + 1 : i + 9]
            return running.client.post("/rerank", json={"query": TEXTS[i], "texts": texts, "top_k": 3, **more})

        for i, one in enumerate(together([lambda i=i: ask(i) for i in range(8)])):
            best, report = alone.rank(TEXTS[i], TEXTS[i + 1 : i + 9], top_k=3, return_report=True)
            assert [item["index"] for item in one.json()] == [item["corpus_id"] for item in best]
            assert [item["score"] for item in one.json()] == pytest.approx([item["score"] for item in best], abs=1e-5)
        named = ask(0, return_text=True).json()
        assert [item["text"] for item in named] == [TEXTS[item["index"] + 1] for item in named]
        refused = running.predict(TEXTS[:2])
        assert refused.status_code == 400 and "use /rerank" in refused.text
        assert ask(0, query="").status_code == 400 and ask(0, texts=[]).status_code == 422

        exits = [alone.rank(TEXTS[i], TEXTS[i + 1 : i + 9], 3, return_report=True)[1].exit_layer for i in range(8)]
        exits.append(exits[0])
        blocks = float(sum(own.sum() for own in exits))

        def counted() -> bool:
            text = running.client.get("/metrics").text
            said = [f'badge_requests_total{{path="/rerank",status="{status}"}}' for status in (200, 400, 422)]
            return f'badge_blocks_total{{task="default"}} {blocks}' in text and all(line in text for line in said)

        running.wait_for(counted, 30)
        assert running.stop() == 0, running.log.read_text()[-3000:]
    finally:
        running.kill()


ACTORS = """
import sys, time, ray
from ray import serve
from badge_peft.serving.application import build
from badge_peft.serving.run import start_serve

def until(what, *wanted):
    end = time.monotonic() + float(sys.argv[3])
    while True:
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        counts = tuple(sum(part in name for name in names) for part in ("governor", "badge-peft#Service"))
        if counts == wanted:
            return
        assert time.monotonic() < end, (what, names)
        time.sleep(0.5)

ray.init(sys.argv[1], namespace="serve", log_to_driver=False)
start_serve("127.0.0.1", int(sys.argv[2]))
if sys.argv[4:]:
    for size in (8, 16):
        serve.run(build({"adapter": sys.argv[4], "batch_size": size}), name="badge-peft")
    until("one service has one governor", 1, 1)
    serve.delete("badge-peft")
until("nothing is left", 0, 0)
assert "badge-peft" not in serve.status().applications
"""


def check_actors(address, port, *arguments):
    command = [sys.executable, "-c", ACTORS, address, str(port), str(SLOW), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **AUTH}, timeout=3 * SLOW)
    assert done.returncode == 0, done.stderr[-3000:]


def test_another_deployment_and_the_end_leave_no_actor(address, port, tmp_path):
    check_actors(address, port, str(save_adapter(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_is_interrupted_leaves_nothing_on_the_cluster(address, port, tmp_path, number):
    command = [sys.executable, "-m", "badge_peft.cli", "serve", str(save_adapter(tmp_path)), "--address", address]
    whole = {**os.environ, **AUTH}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file, env=whole)
    end = time.monotonic() + SLOW
    while not replicas(address):
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(SLOW) in (130, 15), log.read_text()[-3000:]
    said = log.read_text()
    assert "serving at" not in said and "Traceback" not in said, said
    check_actors(address, port)


def replicas(address):
    """Whether a replica of the service has been started."""
    return any(
        "badge-peft:Service" in " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
        if os.getpid() in [parent.pid for parent in process.parents()]
    )


def test_a_cluster_that_obeys_everybody_is_joined_by_name_alone(tmp_path):
    adapter, port = save_adapter(tmp_path), free_port()
    with started(RAY_AUTH_MODE="disabled") as address:
        said = refused_start(adapter, address, port)
        assert f"the cluster at {address} needs no token" in said and "RAY_AUTH_MODE=disabled" in said
        running = Running(
            tmp_path, str(adapter), "--address", address, port=port, **{**AUTH, "RAY_AUTH_MODE": "disabled"}
        )
        assert running.predict(TEXTS[:1]).status_code == 200
        assert running.stop() == 0
