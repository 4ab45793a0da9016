"""What is refused before any time is spent on a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from badge_peft.workflows.base_model import Base
from badge_peft.workflows.labels import LabelSet
from badge_peft.workflows.settings import DemoSettings, ExitOptions, Goal, TrainColumns, TrainingOptions, TrainSettings
from badge_peft.workflows.validate import check_settings, check_training, with_output_dir
from tests.models import make_model

SINGLE, REGRESSION = "single_label_classification", "regression"


def settings(goal: dict[str, Any] | None = None, out: Path | str = "out", **exits: Any) -> TrainSettings:
    return TrainSettings(output_dir=Path(out), goal=Goal(**(goal or {})), exits=ExitOptions(**exits))


def check(problem_type: str = SINGLE, **goal_and_exits: Any) -> None:
    base = Base(make_model(), LabelSet(["a", "b", "c"], problem_type), [])
    assert check_training(settings(**goal_and_exits), base, labeled=True, eval_rows=100)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody can make a folder")
@pytest.mark.parametrize("where", ["/proc/self/nope", "/proc/self/nope/deeper"])
def test_a_folder_that_cannot_be_made(where, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"output_dir='{where}' cannot be written"):
        with_output_dir(settings(out=where), "model")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        with_output_dir(settings(out=tmp_path / "file" / "out"), "model")
    with_output_dir(settings(out=tmp_path / "a" / "b"), "model")
    assert not (tmp_path / "a").exists()  # nothing has been written


@pytest.mark.parametrize(
    ("group", "field"),
    [
        (TrainingOptions, {"adapter_lr": 0.0}),
        (TrainingOptions, {"epochs": 0}),
        (TrainColumns, {"eval_share": 1.0}),
        (Goal, {"confidence": 1.0}),
        (DemoSettings, {"max_length": 2}),
        (DemoSettings, {"seed": -1}),
        (DemoSettings, {"max_score_drop": 1.5}),
    ],
)
def test_settings_name_what_is_wrong(group: type, field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))}="):
        group(**field)


def test_policies_that_cannot_work() -> None:
    check_settings(settings({"policy": "fixed_depth"}))
    with pytest.raises(ValueError, match="policy='learned' needs learn_to_exit"):
        check_settings(settings({"policy": "learned"}))
    check_settings(settings({"policy": "learned"}, learn_to_exit=True))
    for name in ("max_prob", "entropy", "confident_patience"):
        with pytest.raises(ValueError, match=f"policy='{name}' is not allowed for regression.*patience"):
            check(REGRESSION, goal={"policy": name})
        check(goal={"policy": name})


def test_a_speed_that_no_policy_reaches() -> None:
    check(goal={"target_blocks_saved": 2 / 3})
    check(goal={"target_blocks_saved": 0.9}, exit_layers="0-3")
    with pytest.raises(
        ValueError, match="target_blocks_saved=0.7 cannot be reached: the first exit is at block 1 of 3"
    ):
        check(goal={"target_blocks_saved": 0.7})
    with pytest.raises(ValueError, match="the first exit is at block 2 of 3"):
        check(goal={"target_blocks_saved": 0.5}, exit_layers="2-")
