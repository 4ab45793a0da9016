from __future__ import annotations

import copy
import pickle
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from peft import PeftType, get_peft_config
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import badge_peft
from badge_peft import BadgeConfig, BadgeModel
from badge_peft.registry import add_peft_type, register


@pytest.fixture(scope="module")
def said(fresh: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh interpreter, in which nothing of ours is imported yet, has to say."""
    path = tmp_path_factory.mktemp("adapter")
    BadgeConfig().save_pretrained(path)
    code = f"""
        import importlib, json, pickle, sys
        from peft import PeftConfig, PeftType, get_peft_config

        found = {{}}
        try:
            PeftConfig.from_pretrained({str(path)!r})
        except KeyError as error:
            found["without the import"] = str(error)
        import badge_peft.tuner.config  # a part of the package registers it all the same
        found["with the import"] = type(PeftConfig.from_pretrained({str(path)!r})).__name__
        first, stored = PeftType.BADGE, pickle.dumps(PeftType.BADGE)
        import badge_peft
        importlib.reload(importlib.import_module("badge_peft.registry"))
        importlib.reload(badge_peft)
        found["imported again"] = [PeftType.BADGE is first, list(PeftType).count("BADGE")]
        for name in [name for name in sys.modules if name.split(".")[0] == "badge_peft"]:
            del sys.modules[name]
        try:
            import badge_peft
        except KeyError as error:
            found["a second copy"] = str(error)
        found["after it"] = [PeftType("BADGE") is first, pickle.loads(stored) is first, list(PeftType).count("BADGE")]
        print(json.dumps(found))
    """
    return fresh(textwrap.dedent(code))


@pytest.mark.parametrize(
    "look_up",
    [
        lambda: PeftType("BADGE"),
        lambda: PeftType["BADGE"],
        lambda: add_peft_type("BADGE"),
        lambda: copy.copy(PeftType.BADGE),
        lambda: copy.deepcopy(PeftType.BADGE),
        lambda: copy.deepcopy({"type": [PeftType.BADGE]})["type"][0],
        lambda: next(t for t in PeftType if t == "BADGE"),
        lambda: BadgeConfig().peft_type,
        *(lambda p=p: pickle.loads(pickle.dumps(PeftType.BADGE, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)),
    ],
)
def test_every_way_to_the_member_gives_the_same_object(look_up):
    assert look_up() is PeftType.BADGE


def test_member_is_as_those_that_peft_defines():
    member, other = PeftType.BADGE, PeftType.LORA
    assert (member.value, member.name) == ("BADGE", "BADGE")
    assert isinstance(member, PeftType) and type(member) is type(other)
    assert member in PeftType and member == "BADGE" and hash(member) == hash("BADGE")
    assert repr(member) == repr(other).replace("LORA", "BADGE")
    assert str(member) == str(other).replace("LORA", "BADGE")
    assert list(PeftType).count(member) == 1
    assert list(PeftType)[-1] is member
    assert list(PeftType.__members__)[-1] == "BADGE"
    assert len(PeftType) == len(set(PeftType)) == len(PeftType.__members__)


def test_peft_knows_the_classes():
    for key in (PeftType.BADGE, "BADGE"):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is BadgeConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is BadgeModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "badge_"
    assert isinstance(get_peft_config({"peft_type": "BADGE", "task_type": "SEQ_CLS"}), BadgeConfig)


def test_registering_again_changes_nothing():
    before = (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING))
    register(BadgeConfig, BadgeModel)
    add_peft_type("BADGE")
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before


def test_name_taken_by_another_package():
    class Other:
        pass

    with pytest.raises(
        KeyError, match=r"already has a method called 'BADGE', registered with badge_peft\.tuner\.config"
    ):
        register(Other, BadgeModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BADGE"] is BadgeConfig


def test_prefix_taken_by_another_method(monkeypatch):
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "BADGE")
    monkeypatch.delitem(PEFT_TYPE_TO_TUNER_MAPPING, "BADGE")
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.LORA, "badge_")
    with pytest.raises(KeyError, match="prefix 'badge_' is already taken by the PEFT method 'LORA'"):
        register(BadgeConfig, BadgeModel)
    assert "BADGE" not in PEFT_TYPE_TO_CONFIG_MAPPING and "BADGE" not in PEFT_TYPE_TO_TUNER_MAPPING


def test_a_fresh_process_knows_badge_once_it_is_imported_and_then_once(said):
    assert said["without the import"] == "'BADGE'" and said["with the import"] == "BadgeConfig"
    assert said["imported again"] == [True, 1]
    # its classes are not those that PEFT already has
    assert "already has a method called 'BADGE'" in said["a second copy"]
    assert said["after it"] == [True, True, 1]


def test_public_names():
    assert all(hasattr(badge_peft, name) for name in badge_peft.__all__)
    assert {"BadgeConfig", "EarlyExitConfig", "early_exit_forward", "load_pretrained"} <= set(badge_peft.__all__)
