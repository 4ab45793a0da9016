"""SIGKILL at random moments leaves the old state or the new one. `nox -s reliability` kills 200 times."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from badge_peft import load_pretrained
from badge_peft.training.stages import newest_checkpoint
from badge_peft.utils.files import install
from badge_peft.workflows.adapter_dir import read_config
from badge_peft.workflows.evaluate import stored_logits
from tests.cli.conftest import FAST, ROWS, invoke, save_classifier
from tests.models import exits_of, make_batch, make_model, shake, trained
from tests.texts import write_csv
from tests.training.runs import make, make_trainer, weights


def undisturbed(work: Callable[[], object]) -> float:
    """Runs `work` in a process of its own, to the end. Returns the seconds it took."""
    start = time.perf_counter()
    if not _finishes(work, None):
        raise RuntimeError("the work fails even where nothing kills it")
    return time.perf_counter() - start


def kill_at_random(
    prepare: Callable[[], object],
    work: Callable[[], object],
    state: Callable[[], str],
    times: int,
    seed: int = 0,
    early: float = 3,
) -> Counter[str]:
    """Kills `work` `times` times.

    Args:
        prepare: Brings the folder into its old state; before each.
        work: What is killed: it brings the folder into its new state.
        state: What the folder is in afterwards: `old`, `new`, or what is wrong with it.
        times: How often.
        seed: Of the moments, in the time that the work takes.
        early: With 1 all of them are alike; with more, more of them are early, as weights are written before cards,
            and with less late, as they are written after a training.

    Returns:
        How often the folder was in which state.
    """
    prepare()
    whole = undisturbed(work)
    if state() != "new":
        return Counter({f"after the whole work: {state()}": 1})
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    # the first is killed as it starts: on a machine that slows down or speeds up, some have to come in time
    for moment in (0.0, *(whole * draw.random() ** early for _ in range(times - 1))):
        prepare()
        _finishes(work, moment)
        found[state()] += 1
    return found


def _finishes(work: Callable[[], object], seconds: float | None) -> bool:
    """Whether `work` comes to its end, in a fork that is killed after `seconds` (None: never)."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:  # the parent must not go on twice
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
TIMES = int(os.environ.get("BADGE_PEFT_KILLS", "5"))


def check(found: Counter[str]) -> None:
    assert set(found) <= {"old", "new"}, found
    assert found.total() == TIMES and found["old"] > 0  # some came in time


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, texts, and two adapters that `badge-peft train` made of them: `old` and `new`."""
    folder = tmp_path_factory.mktemp("place")
    save_classifier(folder / "model")
    write_csv(folder / "rows.csv", ROWS)
    for name in ("old", "new"):
        train(folder, folder / name, name)
    return folder


def train(place: Path, out: Path, name: str) -> None:
    """The training that gives the adapter `name`, into a folder that may have another."""
    settings = ("--overwrite", "--keep-head", *FAST, "--seed", 1 if name == "old" else 2)
    result = invoke("train", place / "model", place / "rows.csv", "--output-dir", out, *settings)
    assert result.exit_code == 0, result.output


@cache
def parts_of(adapter: Path) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor]:
    """Exits of a batch, rule and stored exit logits of an adapter that stays as it is."""
    exits = exits_of(load_pretrained(str(adapter)), BATCH)
    return exits, read_config(adapter)["early_exit"], stored_logits(adapter).logits


def adapter_state(folder: Path, place: Path) -> str:
    """Which adapter of `place` a folder holds; what is measured must be of the same one, or refused."""
    exits = exits_of(load_pretrained(str(folder)), BATCH)
    for name in ("old", "new"):
        wanted, rule, logits = parts_of(place / name)
        if torch.equal(exits, wanted):
            break
    else:
        return "a mixture of weights"
    if read_config(folder)["early_exit"] != rule:
        return f"{name} with another rule"
    try:
        found = stored_logits(folder)
    except ValueError:
        return name  # said to be of other weights
    return name if torch.equal(found.logits, logits) else f"{name} with other logits"


BATCH = {name: value % 20 + 5 if name == "input_ids" else value for name, value in make_batch().items()}


def test_save(tmp_path):
    models = {"old": trained(placement="block"), "new": trained(placement="ffn", exit_pooling="mean")}
    shake(models["new"], seed=9)
    batch = make_batch()
    answers = {name: exits_of(model, batch) for name, model in models.items()}

    def state() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = exits_of(PeftModel.from_pretrained(make_model(), tmp_path).eval(), batch)
        return next((name for name, wanted in answers.items() if torch.equal(found, wanted)), "a mixture")

    check(
        kill_at_random(
            lambda: models["old"].save_pretrained(tmp_path),
            lambda: models["new"].save_pretrained(tmp_path),
            state,
            TIMES,
        )
    )


def restore(source: Path, target: Path) -> None:
    """Makes `target` a copy of `source`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


@pytest.mark.parametrize("over", ["an adapter", pytest.param("nothing", marks=pytest.mark.exhaustive)])
def test_train(over, place, tmp_path):
    out = tmp_path / "out"

    def state() -> str:
        if over == "nothing" and not (out / "adapter_config.json").exists():
            weights_alone = (out / "adapter_model.safetensors").exists()
            return "weights without a config" if weights_alone else "old"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return adapter_state(out, place)

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if over == "an adapter":
            shutil.copytree(place / "old", out)

    check(kill_at_random(prepare, lambda: train(place, out, "new"), state, TIMES, early=0.5))


def test_calibrate(place, tmp_path):
    out, rules = tmp_path / "out", {"old": read_config(place / "old")["early_exit"]}
    command = ("calibrate", out, "--policy", "entropy", "--target-blocks-saved", 0.4)
    restore(place / "old", out)
    invoke(*command)
    rules["new"] = read_config(out)["early_exit"]

    def state() -> str:
        load_pretrained(str(out))
        found = read_config(out)["early_exit"]
        return next((name for name, rule in rules.items() if rule == found), "a mixture")

    check(kill_at_random(lambda: restore(place / "old", out), lambda: invoke(*command), state, TIMES, early=1))


def test_predict(place, tmp_path):
    """What the file holds are whole lines, the first of those that it was to hold."""
    out = tmp_path / "answers.jsonl"
    command = ("predict", place / "old", place / "rows.csv", "--batch-size", 4)
    wanted = invoke(*command).stdout.splitlines(keepends=True)
    assert len(wanted) == len(ROWS)

    def work() -> None:
        with out.open("w", encoding="utf-8") as file:
            answers_to(file, command)

    def state() -> str:
        found = out.read_text(encoding="utf-8").splitlines(keepends=True)
        if found != wanted[: len(found)]:
            return "a line that is cut or wrong"
        return "new" if len(found) == len(wanted) else "old"

    check(kill_at_random(lambda: out.write_text(""), work, state, TIMES, early=1))


def answers_to(file, command) -> None:
    """Runs a command of `badge-peft` with `file` as its standard output."""
    from badge_peft.cli.main import main

    sys.stdout = file  # of a fork
    main([str(word) for word in command])


def test_export(place, tmp_path):
    """An export puts its files into the folder at the end, when they have been tried elsewhere."""
    names = ("old", "new")
    out = tmp_path / "out"

    def state() -> str:
        found = {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith(".")}
        whole = {name: {p.name: p.read_bytes() for p in (place / name).iterdir()} for name in names}
        return next((name for name in names if found == whole[name]), "a mixture")

    check(kill_at_random(lambda: restore(place / "old", out), lambda: install(place / "new", out), state, TIMES))


def test_a_training_resumes_from_the_newest_whole_checkpoint(tmp_path):
    """To the weights of a training that nothing killed; `old` where it was killed before its first checkpoint."""
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    options |= {"optim": "adamw_torch", "lr_scheduler_type": "linear"}
    out, whole = tmp_path / "out", make()
    make_trainer(tmp_path / "whole", whole, **options).train()

    def state() -> str:
        if newest_checkpoint(out) is None:
            return "old"
        model = make()
        make_trainer(out, model, **options).train(resume_from_checkpoint=True)
        found, wanted = weights(model), weights(whole)
        return "new" if all(torch.equal(found[name], wanted[name]) for name in wanted) else "other weights"

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    check(kill_at_random(prepare, lambda: make_trainer(out, make(), **options).train(), state, TIMES, early=1))
