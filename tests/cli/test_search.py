"""`badge-peft train --trials`: settings that are searched, stored, gone on with, and then trained with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from badge_peft import ExitLogits, exit_scores, sweep
from badge_peft.training.preflight import TrainingStopped
from badge_peft.workflows import plans, search
from badge_peft.workflows import train as workflow
from badge_peft.workflows.settings import ExitOptions, Goal, SearchOptions, TrainingOptions, TrainSettings
from tests.cli.conftest import FAST, Cli, invoke, one_line

pytest.importorskip("optuna")

PLAIN = ExitOptions()


def train(cli: Cli, place: Path, out: Path, *options: Any, **kwargs: Any) -> Any:
    return cli("train", place / "model", place / "rows.csv", "--output-dir", out, *FAST, *options, **kwargs)


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def weights_of(out: Path) -> str:
    return str(json.loads((out / "adapter_config.json").read_text())["weights_hash"])


@pytest.mark.slow
def test_the_best_settings_are_found_and_trained_with(place: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a"
    told = train(cli, place, out, "--trials", 4)
    report = report_of(out)
    found = report["search"]
    assert found["trials"] == 4 and found["for"] == "score" and found["rows"] == round(0.2 * report["train_rows"])
    assert found["value"] >= found["given"] and told.output.count("trial ") == 4 and "trial 4 of 4" in told.output
    assert {"trials.journal", "trials.png", "adapter_model.safetensors"} < {path.name for path in out.iterdir()}
    names = {"adapter_lr", "r", "activation", "exit_weights"}
    assert found["best"].keys() == names and found["best"] == {name: report["settings"][name] for name in names}
    assert report["states"]["kept"]
    # as if they had been given
    options = [str(x) for name, value in found["best"].items() for x in (f"--{name.replace('_', '-')}", value)]
    train(cli, place, tmp_path / "b", *options)
    assert weights_of(tmp_path / "b") == weights_of(out)


@pytest.mark.slow
def test_a_search_goes_on(place: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the form of exits that the clock chose, which it might choose otherwise now."""
    out, original = tmp_path / "a", search.train_exits
    calls: list[Any] = []
    forms: list[Any] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        if len(calls) == 2:
            raise TrainingStopped("training stopped: for this test")
        return original(*arguments, **options)

    def chosen(base: Any, rows: Any, eval_rows: Any, tokenizer: Any, settings: TrainSettings, *others: Any) -> Any:
        forms.append(settings)
        form = replace(settings.exits, exit_pooling="cls" if len(forms) == 1 else "mean", exit_type="linear")
        return replace(settings, exits=form), [{"exit_pooling": form.exit_pooling}]

    monkeypatch.setattr(search, "train_exits", interrupted)
    monkeypatch.setattr(plans, "choose_form", chosen)
    monkeypatch.setattr(workflow, "form_table", lambda *_: "")
    done = invoke("train", place / "model", place / "rows.csv", "--output-dir", out, *FAST, "--trials", 4)
    assert done.exit_code == 130 and [path.name for path in out.iterdir()] == ["trials.journal"]
    told = train(cli, place, out, "--trials", 4)
    assert len(calls) == 5 and "trial 3 of 4" in told.output and "trial 2 of 4" not in told.output
    assert report_of(out)["search"]["trials"] == 4
    train(cli, place, out, "--trials", 4, "--overwrite")  # all are there
    assert len(calls) == 5 and len(forms) == 1 and report_of(out)["forms"] == [{"exit_pooling": "cls"}]
    assert json.loads((out / "adapter_config.json").read_text())["exit_pooling"] == "cls"
    again = train(cli, place, out, "--trials", 4, "--overwrite", "--seed", 1, fails=True)
    one_line(again, "holds the trials of another")
    weights = place / "model" / "model.safetensors"
    kept = weights.read_bytes()
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    try:  # a model that was trained again, in its place
        one_line(train(cli, place, out, "--trials", 4, "--overwrite", fails=True), "holds the trials of another model")
    finally:
        weights.write_bytes(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backbone", "lora"), "trials=2 is not allowed with backbone='lora'"),
        (("--no-cache-states",), "trials=2 is not allowed with no_cache_states"),
        (("--for", "fame"), "for='fame' is not allowed: it must be one of score, speed"),
        (("--for", "speed", "--target-blocks-saved", 0.5), "for='speed' looks for the most blocks saved"),
        (("--exit-weights", "[0,0]"), "exit_weights=[0, 0] is not allowed"),
        (("--exit-weights", "late"), "exit_weights='late' is not allowed"),
    ],
)
def test_what_cannot_be_searched(
    options: tuple[Any, ...], message: str, place: Path, cli: Cli, tmp_path: Path
) -> None:
    one_line(train(cli, place, tmp_path / "a", "--trials", 2, *options, fails=True), message)
    assert not (tmp_path / "a").exists()


def test_a_search_that_goes_on_draws_anew(tmp_path: Path) -> None:
    settings = TrainSettings(output_dir=tmp_path)
    asked: Any = SimpleNamespace(settings=settings, _identity="the same", choices=search.choices(settings, True))
    asked._rate = lambda: 0.0025
    drawn = []
    for _ in range(2):
        study = search.Search._study(asked)
        trial = study.ask()
        drawn.append(search.Search.suggest(asked, trial))
        study.tell(trial, 0.5)
    assert drawn[0] != drawn[1]


def test_a_first_trial_that_fails_is_an_error(
    place: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **options: Any) -> None:
        raise TrainingStopped("training stopped: for this test")

    monkeypatch.setattr(search, "train_exits", stopped)
    one_line(train(cli, place, tmp_path / "a", "--trials", 2, fails=True), "training stopped: for this test")


def make_logits(seed: int, margin: float) -> ExitLogits:
    """Three exits, the deeper the better; the larger the margin the better each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (60,), generator=generator)
    logits = torch.randn(60, 3, 3, generator=generator)
    logits[torch.arange(60), :, labels] += margin * torch.tensor([0.5, 1.0, 1.5])
    return ExitLogits(logits, labels)


def test_worth_for_speed() -> None:
    """The blocks saved at the score of the first trial's best exit, less the drop; short of it, by how much."""
    first, better, worse = make_logits(0, 1.5), make_logits(1, 3.0), make_logits(2, 0.2)
    settings = TrainSettings(
        output_dir=Path("-"), search=SearchOptions(trials=3, search_for="speed"), goal=Goal(max_score_drop=0.02)
    )
    attrs: dict[str, Any] = {}
    study = SimpleNamespace(user_attrs=attrs, set_user_attr=attrs.__setitem__)
    searching = SimpleNamespace(settings=settings, metric="accuracy")
    worth = [search.Search._worth(searching, study, found) for found in (first, better, worse)]  # type: ignore[arg-type]
    target = exit_scores(first).best - 0.02
    assert attrs == {"target": target}
    for found, value in zip((first, better, worse), worth, strict=True):
        points = sweep(found).points
        saved = [point.blocks_saved for point in points if point.score >= target]
        assert value == pytest.approx(max(saved) if saved else max(p.score for p in points) - target)
    assert worth[1] > worth[0] >= 0 > worth[2]
    scored = SimpleNamespace(settings=TrainSettings(output_dir=Path("-")), metric="accuracy")
    assert search.Search._worth(scored, study, first) == exit_scores(first).avg  # type: ignore[arg-type]


def test_what_is_searched() -> None:
    def names(exits: ExitOptions = PLAIN, learns: bool = True, **training: Any) -> set[str]:
        settings = TrainSettings(output_dir=Path("-"), exits=exits, training=TrainingOptions(**training))
        found = search.choices(settings, learns)
        given = {name: values[0] for name, values in found.items()}
        assert search.settings_of(settings, given).exits == settings.exits
        return set(found)

    whole = {"r", "activation", "exit_weights", "objective"}
    assert names() == names(adapter_lr=0.2, exit_weights="[1,1,1]") == whole
    assert names(learns=False) == names(ExitOptions(keep_head=True)) == whole - {"objective"}
    assert names(ExitOptions(exit_type="past_future", final_exit="exit")) == whole - {"objective"}
    assert names(ExitOptions(placement="none")) == {"exit_weights", "objective"}
    assert names(objective="single_exit", depth=1) == {"r", "activation"}
