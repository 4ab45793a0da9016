"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest

from badge_peft.utils.files import install, write_json, write_text


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, None, "ä"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, None, "ä"]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_half_of_a_surrogate_pair_is_a_question_mark(tmp_path):
    """JSON can hold one, in a name that a hostile config has, and UTF-8 cannot."""
    write_text(tmp_path / "README.md", "a\ud800b")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "a?b"


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


def make_folder(place, names):
    place.mkdir()
    for name in names:
        (place / name).write_text(f"{name} of {place.name}")
    return place


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_several_files_are_put_in_place_together(tmp_path, monkeypatch):
    source, folder = make_folder(tmp_path / "source", "abc"), make_folder(tmp_path / "folder", "bx")
    (folder / "b").chmod(0o640)
    order = []
    monkeypatch.setattr(
        os, "replace", lambda old, new, replace=os.replace: (order.append(new.name), replace(old, new))
    )
    install(source, folder, last=("b", "a", "nothing"))
    assert order == ["c", "b", "a"]
    assert contents(folder) == {**{name: f"{name} of source" for name in "abc"}, "x": "x of folder"}
    assert stat.S_IMODE((folder / "b").stat().st_mode) == 0o640


def test_a_copy_that_fails_puts_nothing_in_place(tmp_path, monkeypatch):
    source, folder = make_folder(tmp_path / "source", "ab"), make_folder(tmp_path / "folder", "ab")

    def full(old, new, copyfile=shutil.copyfile):
        if old.name == "b":
            raise OSError("no space left on device")
        return copyfile(old, new)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space"):
        install(source, folder)
    assert contents(folder) == {"a": "a of folder", "b": "b of folder"}


def test_what_a_killed_process_left_is_removed_later(tmp_path):
    old, new, other = (tmp_path / f".{letter * 32}.{name}" for letter, name in (("a", "x"), ("b", "x"), ("c", "y")))
    for file in (old, new, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (0, 0))
    write_json(tmp_path / "x", {})
    assert {p.name for p in tmp_path.iterdir()} == {"x", new.name, other.name}


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    source, folder = make_folder(tmp_path / "source", "a"), tmp_path / "new" / "folder"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda *paths: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(OSError, match="no space"):
            install(source, folder)
    assert os.listdir(tmp_path / "new") == []
    install(source, folder)
    assert os.listdir(tmp_path / "new") == ["folder"] and contents(folder) == contents(source)


def test_a_temporary_file_of_another_process_that_is_gone_again_is_no_error(tmp_path):
    (tmp_path / f".{'0' * 32}.a.json").symlink_to(tmp_path / "nothing")
    write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
