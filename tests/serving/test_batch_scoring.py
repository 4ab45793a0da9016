"""Batch scoring on a real Ray: files and datasets, and a process that answers killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytest.importorskip("pandas", reason="the extra `ray` is not installed")

from badge_peft.integrations.ray import predict_dataset  # noqa: E402
from badge_peft.workflows import folders  # noqa: E402
from badge_peft.workflows.adapter_dir import open_adapter  # noqa: E402
from badge_peft.workflows.folders import predict_folder  # noqa: E402
from badge_peft.workflows.predict import Answering, predict  # noqa: E402
from tests.cli.conftest import invoke, one_line  # noqa: E402
from tests.serving.adapters import save_adapter  # noqa: E402
from tests.texts import sentences  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # a Ray cluster takes a minute of two cores
TEXTS = [text for text, _ in sentences(300, seed=3)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_adapter(tmp_path_factory.mktemp("adapter")))


@pytest.fixture(scope="module")
def expected(adapter: str) -> list[dict[str, Any]]:
    return list(predict(open_adapter(adapter), ((text, None) for text in TEXTS), batch_size=2))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with folders.cluster(workers=2):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, texts in {"a": TEXTS, "b": TEXTS[:5], "c": []}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def answering_processes() -> list[psutil.Process]:
    """Those of this test's own Ray."""
    return [p for p in psutil.Process().children(recursive=True) if "MapWorker" in p.name() + " ".join(p.cmdline())]


def test_files_with_a_process_killed(
    adapter: str, expected: Any, folder: Path, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, engine = [], folders.answer_files

    def kills(*arguments: Any) -> Iterator[dict[str, Any]]:
        for chunk in engine(*arguments):
            if not killed:
                victim = answering_processes()[0]
                os.kill(victim.pid, signal.SIGKILL)
                killed.append(victim)
            yield chunk

    monkeypatch.setattr(folders, "answer_files", kills)
    out = tmp_path / "out"
    report = predict_folder(folder, out, Answering(adapter, batch_size=2), workers=2)
    assert (report.files, report.rows) == (3, 305) and not killed[0].is_running()
    assert pq.read_table(out / "a.jsonl.parquet").to_pylist() == expected
    assert pq.read_table(out / "b.jsonl.parquet").to_pylist() == expected[:5]
    assert pq.read_table(out / "c.jsonl.parquet").num_rows == 0


def test_the_command(adapter: str, folder: Path, cluster: None, tmp_path: Path) -> None:
    with (folder / "b.jsonl").open("a") as file:
        file.write("{oh\n")
    command = ("predict", adapter, folder, tmp_path / "out", "--engine", "ray", "--workers", 1)
    one_line(invoke(*command), "b.jsonl", "line 6 is no JSON")
    (folder / "b.jsonl").unlink()
    told = invoke(*command)
    assert told.exit_code == 0 and "1 files with 0 texts" in told.stdout and "1 were answered before" in told.stdout


def test_a_dataset(adapter: str, expected: Any, cluster: None) -> None:
    rows = [{"id": i, "review": text} for i, text in enumerate(TEXTS)]
    found = predict_dataset(ray.data.from_items(rows), adapter, batch_size=2, workers=1).take_all()
    found.sort(key=lambda row: row["id"])
    assert [{**row, "text": row["review"]} for row in found] == [
        {**row, **answer} for row, answer in zip(rows, expected, strict=True)
    ]
    assert predict_dataset(ray.data.from_items([]), adapter).take_all() == []
    never = predict_dataset(ray.data.from_items(rows[:3]), adapter, workers=1, policy="fixed_depth", depth=2)
    assert {row["exit_layer"] for row in never.take_all()} == {2}
    for bad, message in (
        ([{"id": 1, "text": "x", "label": "y"}], "has columns label already"),
        ([{"id": 1, "n": 2}], "cannot tell which column holds the texts"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_dataset(ray.data.from_items(bad), adapter)


@pytest.mark.parametrize(("cores", "workers"), [(1, None), (2, None), (2, 2)])
def test_a_dataset_on_a_machine_of_few_cores(adapter: str, expected: Any, cores: int, workers: int | None) -> None:
    code = f"""
import ray
from badge_peft.integrations.ray import predict_dataset
ray.init("local", num_cpus={cores}, include_dashboard=False, logging_level="ERROR")
rows = ray.data.read_text({str(Path(adapter).parent / "texts")!r})
print(predict_dataset(rows, {adapter!r}, workers={workers}).count())
"""
    (Path(adapter).parent / "texts").write_text("\n".join(TEXTS[:50]))
    environment = {**os.environ, "RAY_worker_niceness": "0"}  # beside other work it takes minutes else
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment)
    assert done.stdout.split()[-1:] == ["50"], done.stderr[-3000:]


@pytest.mark.parametrize(("address", "message"), [(None, "has not started on this"), ("a:1", "no Ray cluster at a:1")])
def test_a_ray_that_does_not_start(address: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: Any, **__: Any) -> None:
        raise Exception("the node timed out")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(OSError, match=message), folders.cluster(address):
        pass
