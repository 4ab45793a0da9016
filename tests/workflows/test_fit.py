"""How exits that rank are trained, below the command line (`tests/cli/test_ranking.py`)."""

from __future__ import annotations

import pytest

from badge_peft.workflows import fit
from badge_peft.workflows.settings import TrainingOptions
from tests.models import make_badge, make_model
from tests.ranking.pairs import pair_tokenizer


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_a_batch(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is one item of each of them."""
    trained = []
    monkeypatch.setattr(fit, "_run", lambda trainer, _: trained.append(trainer))
    monkeypatch.setattr(fit.distributed, "rank_world", lambda: (0, processes))
    model = make_badge("bert", make_model(num_labels=1), train_head=False)
    queries = [f"query {i // 3}" for i in range(24)]
    fit.train_rankings(model, [{"input_ids": [1]}] * 24, pair_tokenizer(), TrainingOptions(batch_size=6), queries)
    (trainer,) = trained
    assert {len(item) for item in trainer.train_dataset} == {6 // processes}
