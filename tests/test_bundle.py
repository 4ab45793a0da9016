"""Bundles: the adapters of many tasks as one folder, saved, loaded and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig, bundle, load_pretrained, pipeline, save_tasks
from tests.models import make_batch, make_model, shake
from tests.texts import make_tokenizer, save_base


def save_task(folder: Path, name: str, seed: int = 0, **fields: Any) -> str:
    """An adapter in `folder/name` for the base model in `folder/base`, made apart from all others; its path."""
    base = str(folder / "base")
    if not Path(base).exists():
        save_base(folder / "base", num_labels=2)
    labels = fields.get("num_labels", 2) if fields.get("final_exit") != "exit" else 2
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    adapted: Any = get_peft_model(model, BadgeConfig(r=4, **fields)).eval()
    shake(adapted, seed=seed)
    shake(adapted, seed=seed, only=".modules_to_save.")
    adapted.save_pretrained(str(folder / name))
    return str(folder / name)


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, str]:
    """Four tasks with heads and exits of all kinds, in an order in which the first cannot be loaded first."""
    return {
        "intent": save_task(tmp_path, "intent", 1, num_labels=5, final_exit="exit", label_names=list("abcde")),
        "mood": save_task(tmp_path, "mood", 2, num_labels=4),  # with a trained head of its own
        "stock": save_task(tmp_path, "stock", 3, train_head=False),
        "score": save_task(tmp_path, "score", 4, num_labels=1, final_exit="exit", problem_type="regression"),
    }


def check(model: Any, tasks: dict[str, str]) -> None:
    """Each task answers as its adapter does, loaded alone."""
    out = model.early_exit_forward(**make_batch(), tasks=list(tasks), policy="patience", threshold=0.05)
    for name, place in tasks.items():
        want = load_pretrained(place).early_exit_forward(**make_batch(), policy="patience", threshold=0.05)
        assert out[name].exit_layer.tolist() == want.exit_layer.tolist()
        torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)


def test_adapters_from_anywhere_on_one_base_model(tasks: dict[str, str]) -> None:
    model = load_pretrained(tasks)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.active_adapter == "intent"
    check(model, tasks)
    badge: Any = model.base_model
    assert badge.label_names("intent") == list("abcde") and badge.label_names("mood")[3] == "LABEL_3"


def test_a_bundle_is_saved_and_loaded(tasks: dict[str, str], tmp_path: Path) -> None:
    folder = save_tasks(load_pretrained(tasks), tmp_path / "bundle", tokenizer=make_tokenizer())
    assert (folder / "tokenizer_config.json").exists()
    (tmp_path / "moved").symlink_to(folder)
    found = bundle.find_tasks(tmp_path / "moved")
    assert found is not None and list(found) == list(tasks)
    check(load_pretrained(str(tmp_path / "moved")), tasks)
    some = save_tasks(load_pretrained(tasks), tmp_path / "some", ["score", "mood"])
    assert list(load_pretrained(str(some)).peft_config) == ["score", "mood"]
    assert json.loads((some / "tasks.json").read_text()) == {"tasks": {"score": "score", "mood": "mood"}}


def test_an_adapter_that_is_called_default(tasks: dict[str, str], tmp_path: Path) -> None:
    folder = save_tasks(load_pretrained(tasks["stock"]), tmp_path / "bundle")
    assert (folder / "default" / "adapter_config.json").exists()
    check(load_pretrained(str(folder)), {"default": tasks["stock"]})


def test_a_file_that_names_other_folders_and_repositories(tasks: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    named = {"mood": tasks["mood"], "other": "user/repo"}
    (tmp_path / "b" / "tasks.json").write_text(json.dumps({"tasks": named}))
    assert bundle.find_tasks(tmp_path / "b") == named
    assert bundle.find_tasks(tmp_path) is None
    (tmp_path / "b" / "tasks.json").write_text("[]")
    with pytest.raises(
        ValueError, match='tasks.json cannot be read.*{"tasks": {"intent": "folder", "pii": "user/repo'
    ):
        load_pretrained(str(tmp_path / "b"))


def test_a_bundle_of_the_hub(tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tasks(load_pretrained(tasks), tmp_path / "bundle")
    asked: list[Any] = []

    def download(repo: str, allow_patterns: Any = None, **others: Any) -> str:
        asked.append((repo, allow_patterns, others))
        return str(folder)

    monkeypatch.setattr(bundle, "snapshot_download", download)
    check(load_pretrained("user/bundle", revision="v1", local_files_only=True), tasks)
    options = {"revision": "v1", "local_files_only": True}
    assert asked == [("user/bundle", "tasks.json", options), ("user/bundle", None, options)]
    monkeypatch.setattr(bundle, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'user/none'"):
        load_pretrained("user/none", local_files_only=True)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_one_revision_of_many_repositories_is_refused() -> None:
    with pytest.raises(ValueError, match="revision='v1' is not allowed with the repositories of many tasks"):
        load_pretrained({"intent": "user/intent", "pii": "user/pii"}, revision="v1")
    with pytest.raises(ValueError, match="revision='v1' is not allowed"):
        pipeline(model={"intent": "user/intent", "pii": "user/pii"}, revision="v1")


def test_other_base_models(tasks: dict[str, str], tmp_path: Path) -> None:
    other = save_task(tmp_path / "elsewhere", "other", final_exit="exit")
    with pytest.raises(
        ValueError, match="'stock' is for the base model .*base, and 'other' for .*elsewhere.*base_model"
    ):
        load_pretrained({"stock": tasks["stock"], "other": other})
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    check(load_pretrained({"stock": tasks["stock"], "other": other}, base_model=base), {"stock": tasks["stock"]})
    different = make_model(seed=1, num_labels=2)
    with pytest.raises(ValueError, match="made for another backbone"):
        load_pretrained({"stock": tasks["stock"], "other": other}, base_model=different)


def test_other_tokenizers(tasks: dict[str, str]) -> None:
    make_tokenizer().save_pretrained(tasks["stock"])
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(tasks["mood"])
    load_pretrained({name: tasks[name] for name in ("stock", "mood")})  # a limit is not another tokenizer
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tasks["mood"])
    with pytest.raises(ValueError, match="'stock' and 'mood' have different tokenizers"):
        load_pretrained({name: tasks[name] for name in ("stock", "mood")})


def test_adapters_that_cannot_share_a_pass(tasks: dict[str, str], tmp_path: Path) -> None:
    inside = save_task(tmp_path, "inside", backbone="lora")
    with pytest.raises(ValueError, match="task 'inside' has backbone='lora'.*train it with backbone='frozen'"):
        load_pretrained({"stock": tasks["stock"], "inside": inside})
    model: Any = load_pretrained(inside)
    with pytest.raises(ValueError, match="'default' has backbone='lora'"):
        save_tasks(model, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    lora = get_peft_model(make_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    lora.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="task 'plain' is a .*LORA adapter, not a BADGE one"):
        load_pretrained({"stock": tasks["stock"], "plain": str(tmp_path / "plain")})
    pairs, single = ({"text": "a", "text_pair": name, "label": None} for name in ("b", None))
    paired = save_task(tmp_path, "paired", data_columns=pairs)
    one = save_task(tmp_path, "one", data_columns=single)
    load_pretrained({"stock": tasks["stock"], "paired": paired})  # of which one does not say
    with pytest.raises(ValueError, match="'paired' was trained on pairs of texts and 'one' on single ones"):
        load_pretrained({"one": one, "paired": paired})
    with pytest.raises(ValueError, match="there are no tasks"):
        load_pretrained({})


@pytest.mark.parametrize("names", [[], ["default", "default"]])
def test_names_that_cannot_be_saved(tasks: dict[str, str], tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ValueError, match="give names of adapters, each once"):
        save_tasks(load_pretrained(tasks["stock"]), tmp_path / "bundle", names)
