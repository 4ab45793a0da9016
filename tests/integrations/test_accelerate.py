"""Two processes do what one does: the same training, the same scores, every row once, every file written once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integrations import together
from tests.integrations.launch import fork, launch
from tests.training.runs import make, make_trainer

pytestmark = pytest.mark.slow

# AdamW takes a step of the learning rate (1e-4) even where a gradient is rounding alone, as those of key biases are
TOLERANCE = {"joint, adamw": 5e-4}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize(
    "by",
    [
        pytest.param(
            "fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="forks are safe on Linux alone")
        ),
        pytest.param("torchrun", marks=pytest.mark.exhaustive),
    ],
)
def test_two_processes_do_what_one_does(by: str, tmp_path: Path) -> None:
    """One launch for all that is checked here: a launch takes longer than the checks."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    both.mkdir()
    alone.mkdir()
    if by == "fork":
        fork(together.main, both)
    else:
        launch("tests.integrations.together", both, by=by)
    expected, one = together.work(alone)
    tensors = [load_file(both / f"{rank}.safetensors") for rank in range(2)]
    facts = [json.loads((both / f"{rank}.json").read_text()) for rank in range(2)]

    # both processes have the same, bit for bit, and it is what one process has
    assert tensors[0].keys() == tensors[1].keys() == expected.keys()
    assert [key for key, value in tensors[0].items() if not torch.equal(value, tensors[1][key])] == []
    same = {key: torch.equal(tensors[0][key], value) for key, value in expected.items() if "collected: " in key}
    assert len(same) == 14 and all(same.values()), same  # the batches are the same ones
    far = {}
    for key, value in expected.items():
        name = key.partition(":")[0]
        if not torch.allclose(tensors[0][key], value, rtol=1e-4, atol=TOLERANCE.get(name, 1e-5)):
            far[key] = float((tensors[0][key] - value).abs().max())
    assert far == {}, f"{sorted({key.partition(':')[0] for key in far})} differ: {far}"
    check_trainings([found["trainings"] for found in (*facts, one)])

    # evaluation: thirteen rows, none lost and none twice
    assert expected["trainer: predictions"].shape == (13, 3)
    assert facts[0]["scores"] == facts[1]["scores"]
    for found in (*facts, one):
        found["scores"].pop("eval_loss")  # in Trainer's mean of it, the rows that fill the last batch count
    assert facts[0]["scores"] == pytest.approx(one["scores"], abs=1e-6)
    assert len({facts[0]["scores"][f"eval_exit_{m}"] for m in (1, 2, 3)}) > 1

    # early stopping decides alike
    assert [found["early stopping"] for found in (*facts, one)] == [{"step": 2, "best": "checkpoint-1"}] * 3

    # every row once in every epoch, between the two
    for number, epoch in enumerate(zip(*(found["epochs"] for found in facts), strict=True)):
        assert sorted(epoch[0] + epoch[1]) == list(range(32)), f"epoch {number}: {epoch}"
    assert len({tuple(epoch) for epoch in facts[0]["epochs"]}) == 3

    # what one process has for the other
    told = {"told": "by process 0 of 2", "failure": "as process 0 found", "gathered": [0, 0, 1]}
    assert [found["shared"] for found in facts] == [{**told, "main": True}, {**told, "main": False}]

    check_answers(facts, one["answers"])

    # files: by the first process alone, but for what each remembers of its random numbers
    assert len(facts[0]["written"]) > 10
    assert [path for path in facts[1]["written"] if Path(path).name != "rng_state_1.pth"] == []
    best = load_file(both / "two stages, full" / "stage1" / "best" / "adapter_model.safetensors")
    reference = load_file(alone / "two stages, full" / "stage1" / "best" / "adapter_model.safetensors")
    assert best.keys() == reference.keys()
    for key, value in reference.items():
        torch.testing.assert_close(best[key], value, rtol=1e-4, atol=1e-5)


def check_trainings(found: list[dict[str, Any]]) -> None:
    """Both processes and the one alone took as many steps, chose the same best, and something has moved."""
    for name in together.TRAININGS:
        runs = [trainings[name] for trainings in found]
        assert all(run["changed"] for run in runs), name
        assert len({run["steps"] for run in runs}) == 1, name
        assert runs[0]["best"] == runs[1]["best"] == pytest.approx(runs[2]["best"]), name


def check_answers(facts: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """The first process has the answers of one process alone; the other has read nothing and got nothing."""
    first, other = (found["answers"] for found in facts)
    counts = {f"{n} texts": n for n in (0, 1, 8, 13)}
    assert {name: len(alone[name]) for name in counts} == counts
    assert {name: first[name] for name in counts} == {name: alone[name] for name in counts}
    assert len({answer["exit_layer"] for answer in alone["13 texts"]}) > 1
    assert first["first of many"] == alone["first of many"] != other["first of many"] is None
    assert first["broken"] == ["line 6 is no text", 4]  # all that was there before a batch with the broken line
    assert other["broken"] == ["line 6 is no text", 0]
    assert all(other[name] == [] for name in counts) and other["read"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="Trainer finds the other process by itself where there are GPUs")
def test_a_trainer_that_knows_of_one_process_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    trainer = make_trainer(tmp_path, make(), use_cpu=False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 processes were started.*use_cpu=True"):
        trainer.train()
