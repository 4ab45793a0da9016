"""The trade-off picture: what is in it, and that drawing it changes nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import pytest

from badge_peft import evaluate_policy, sweep
from badge_peft.evaluation.plots import plot_tradeoff
from badge_peft.evaluation.tradeoff import TradeOff
from tests.evaluation.logits import plausible

POLICIES = [{"policy": "divergence", "patience": 1}, {"policy": "divergence", "divergence": "kl"}, "patience"]


@pytest.fixture(scope="module")
def tradeoff() -> TradeOff:
    return sweep(plausible(rows=200, exits=4), POLICIES, points=5)


def test_one_line_per_curve_and_a_legend(tradeoff: TradeOff) -> None:
    axes = plot_tradeoff(tradeoff).axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["DGE t=1", "DGE-kl", "patience", "fixed depth"]
    for line in axes.get_lines():
        name = next(n for n in tradeoff.names if n.replace("divergence", "DGE").replace("_", " ") == line.get_label())
        curve = tradeoff.curve(name)
        assert list(line.get_xdata()) == [point.blocks_saved for point in curve]
        assert list(line.get_ydata()) == [point.score for point in curve]


def test_only_fixed_depth_is_dashed_and_curves_can_be_told_apart(tradeoff: TradeOff) -> None:
    lines = plot_tradeoff(tradeoff).axes[0].get_lines()
    assert [line.get_label() for line in lines if line.get_linestyle() == "--"] == ["fixed depth"]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == len(lines)


def test_axes_are_in_per_cent(tradeoff: TradeOff) -> None:
    axes = plot_tradeoff(tradeoff, title="tiny").axes[0]
    assert axes.xaxis.get_major_formatter()(0.5) == "50%"
    assert axes.yaxis.get_major_formatter()(0.925) == "92.5%"
    assert "%" in axes.get_xlabel() and axes.get_ylabel() == "accuracy (%)"
    assert axes.get_title() == "tiny"


def test_a_correlation_is_not_in_per_cent() -> None:
    axes = plot_tradeoff(sweep(plausible(rows=50), ["patience"], metric="matthews")).axes[0]
    assert axes.get_ylabel() == "matthews"
    assert "%" not in axes.yaxis.get_major_formatter()(0.5)


def test_the_chosen_setting_is_marked(tradeoff: TradeOff) -> None:
    point = evaluate_policy(plausible(rows=200, exits=4), {"policy": "divergence", "threshold": 0.5, "patience": 1})
    star = plot_tradeoff(tradeoff, chosen=point).axes[0].get_lines()[-1]
    assert (star.get_label(), star.get_marker()) == ("calibrated", "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([point.blocks_saved], [point.score])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_it_writes_the_format_that_the_name_says(tradeoff: TradeOff, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    plot_tradeoff(tradeoff, path)
    start = path.read_bytes()[:200]
    assert {"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}[suffix] in start or b"<?xml" in start


def test_nothing_global_changes(tradeoff: TradeOff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # where another test has imported it
    before = matplotlib.rcParams.copy()  # as it is: to ask it for the backend imports pyplot
    plot_tradeoff(tradeoff, tmp_path / "picture.svg")
    assert matplotlib.rcParams.copy() == before and "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_error_names_the_extra(tradeoff: TradeOff, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"badge-peft\[plots\]"):
        plot_tradeoff(tradeoff)


def test_no_points() -> None:
    with pytest.raises(ValueError, match="no points"):
        plot_tradeoff(TradeOff([], "accuracy", 3))
