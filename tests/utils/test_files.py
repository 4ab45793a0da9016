"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import stat

import pytest

from badge_peft.utils.files import write_json


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, None, "ä"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, None, "ä"]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_new_file_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    write_json(tmp_path / "a.json", {})
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_replaced_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "a.json", tmp_path / "link.json"
    target.write_text("{}")
    target.chmod(0o640)
    link.symlink_to(target)
    write_json(link, {"b": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"b": 1}
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_what_was_there_stays_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"old": 1}')
    with pytest.raises(TypeError):
        write_json(path, {"b": object()})
    assert path.read_text() == '{"old": 1}' and os.listdir(tmp_path) == ["a.json"]
