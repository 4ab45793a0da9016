"""What would keep every replica from starting is said before anything starts."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("pydantic", reason="the extra `serve` is not installed")

from badge_peft.early_exit.config import EarlyExitConfig  # noqa: E402
from badge_peft.evaluation import calibrate  # noqa: E402
from badge_peft.serving.settings import (
    ServiceSettings,  # noqa: E402
    check_settings,  # noqa: E402
)
from tests.evaluation.logits import SINGLE, plausible  # noqa: E402


def write(folder, name, **facts) -> str:
    (folder / name).write_text(json.dumps(facts))
    return str(folder)


def test_an_adapter_whose_curve_is_stored(tmp_path):
    config = calibrate(plausible(), "entropy", target_blocks_saved=0.4)
    place = write(tmp_path, "adapter_config.json", early_exit=config.to_dict())
    check_settings(ServiceSettings(place, target=0.1, max_score_drop=0.05))
    unlike = write(tmp_path, "adapter_config.json", early_exit=_harder(config).to_dict())
    with pytest.raises(ValueError, match="cannot be kept"):
        check_settings(ServiceSettings(unlike, target=0.1))


def _harder(config: EarlyExitConfig) -> EarlyExitConfig:
    """The same with a full depth that no point of the curve comes near to."""
    record = {**(config.calibration or {}), "full_depth_score": 2.0}
    return EarlyExitConfig.of({**config.to_dict(), "calibration": record})


def test_what_has_no_curve(tmp_path):
    place = write(tmp_path, "adapter_config.json", early_exit=None)
    check_settings(ServiceSettings(place))  # nothing is asked for
    with pytest.raises(ValueError, match="calibrate the adapter again"):
        check_settings(ServiceSettings(place, target=0.1))


@pytest.mark.parametrize("goal", [{"target": 1e-300}, {"target": 1e9}, {"max_score_drop": 5}])
def test_a_goal_that_no_service_has(goal):
    with pytest.raises(ValueError, match="is not allowed"):
        check_settings(ServiceSettings("someone/adapter", **goal))


def test_a_repository_is_checked_by_the_replicas():
    check_settings(ServiceSettings("someone/adapter", target=0.1))


def test_many_tasks(tmp_path):
    with pytest.raises(ValueError, match="one adapter"):
        check_settings(ServiceSettings({"a": "x", "b": "y"}, target=0.1))
    with pytest.raises(ValueError, match="one adapter"):
        check_settings(
            ServiceSettings(write(tmp_path, "early_exit.json", tasks={"a": {}, "b": {}}), onnx=True, target=0.1)
        )


def test_tags_of_tokens_are_no_answers_to_texts(tmp_path):
    folders = []
    for name, kind in (("intent", "SEQ_CLS"), ("pii", "TOKEN_CLS")):
        (tmp_path / name).mkdir()
        folders.append(write(tmp_path / name, "adapter_config.json", task_type=kind))
    bundle = write(tmp_path, "tasks.json", tasks={"intent": "intent", "pii": "pii"})
    file = write(tmp_path, "early_exit.json", inputs=["input_ids", "special_tokens_mask"])
    for settings, who in (
        (ServiceSettings(folders[1]), "the adapter: "),
        (ServiceSettings({"intent": folders[0], "pii": folders[1]}), "^pii: "),
        (ServiceSettings(bundle), "^pii: "),
        (ServiceSettings(file, onnx=True), "the adapter: "),
    ):
        with pytest.raises(ValueError, match=f"{who}.*whole texts"):
            check_settings(settings)
    check_settings(ServiceSettings(folders[0]))


def test_a_file_that_cannot_follow_the_curve(tmp_path):
    config = calibrate(plausible(), "entropy", target_blocks_saved=0.4)
    facts = {"early_exit": config.to_dict(), "threshold": 0.1, "num_labels": 3, "num_blocks": 12}
    place = write(tmp_path, "early_exit.json", **facts, problem_type=SINGLE)
    check_settings(ServiceSettings(place, onnx=True, target=0.1, max_score_drop=0.05))
    depths = calibrate(plausible(), {"policy": "fixed_depth", "depth": 6}, target_blocks_saved=0.4)
    place = write(tmp_path, "early_exit.json", **{**facts, "early_exit": depths.to_dict()}, problem_type=SINGLE)
    with pytest.raises(ValueError, match="depth=.* is fixed in the file"):
        check_settings(ServiceSettings(place, onnx=True, target=0.1, max_score_drop=0.05))
