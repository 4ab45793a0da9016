"""`load_pretrained`: base and adapter in one call, from a local folder; `push_to_hub`: an adapter with its card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig, load_pretrained, push_to_hub
from tests.models import make_badge, make_batch, make_model
from tests.texts import make_tokenizer

RULE = {"policy": "divergence", "threshold": 0.7, "patience": 2}


def save(folder: Path, named: bool = True, **fields: Any) -> PeftModel:
    """A base model in `folder/base` and an adapter for it in `folder/adapter`; the model that was saved."""
    make_model().save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    model = get_peft_model(base, BadgeConfig(task_type="SEQ_CLS", early_exit=RULE, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".badge_" in name or ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter))
    if not named:
        model.peft_config["default"].base_model_name_or_path = None
        base.__dict__["name_or_path"] = ""
    model.save_pretrained(str(folder / "adapter"))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, PeftModel]:
    return str(tmp_path / "adapter"), save(tmp_path)


def exits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch()).exit_logits


def test_it_loads_the_base_that_the_adapter_names(saved: tuple[str, PeftModel]) -> None:
    path, before = saved
    model = load_pretrained(path)
    assert torch.equal(exits(model), exits(before))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    places = Path(path), Path(path).parent / "base"
    assert torch.equal(exits(load_pretrained(places[0], base_model=places[1])), exits(before))
    out, expected = (m.early_exit_forward(**make_batch()) for m in (model, before))
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.exit_layer, expected.exit_layer)
    assert model.get_early_exit_config().threshold == 0.7
    assert load_pretrained(path, dtype=torch.bfloat16).base_model.model.dtype == torch.bfloat16


def test_labels_are_those_of_the_adapter_until_it_is_taken_off(tmp_path: Path) -> None:
    save(tmp_path, label_names=["a", "b", "c"])
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    before = base.config.to_dict()
    model = load_pretrained(str(tmp_path / "adapter"), base_model=base)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.unload().config.to_dict() == before
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    trained = [parameter.requires_grad_() for parameter in base.parameters()]
    with pytest.raises(ValueError, match="holds no weights of an adapter"):
        load_pretrained(str(tmp_path / "adapter"), base_model=base)
    assert base.config.to_dict() == before and all(parameter.requires_grad for parameter in trained)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_base_of_ones_own(saved: tuple[str, PeftModel], tmp_path: Path, loaded: bool) -> None:
    path, before = saved
    moved = tmp_path / "elsewhere"
    (tmp_path / "base").rename(moved)
    base = AutoModelForSequenceClassification.from_pretrained(moved) if loaded else str(moved)
    assert torch.equal(exits(load_pretrained(path, base_model=base)), exits(before))


def test_a_head_that_no_exit_reads_may_have_any_size(tmp_path: Path) -> None:
    make_model(num_labels=2).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, BadgeConfig(final_exit="exit", exit_pooling="mean"))
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = load_pretrained(str(tmp_path / "adapter"))
    assert exits(loaded).shape[-1] == 5
    assert torch.equal(exits(loaded), exits(model.eval()))


def test_no_report_on_a_head_that_no_exit_reads(tmp_path: Path) -> None:
    save(tmp_path)
    make_model().base_model.save_pretrained(tmp_path / "base")
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(listener)
    try:
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        assert "classifier" in "".join(said)
        said.clear()
        load_pretrained(str(tmp_path / "adapter"))
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert said == []


def test_for_more_training_and_under_another_name(saved: tuple[str, PeftModel]) -> None:
    model = load_pretrained(saved[0], is_trainable=True, adapter_name="film")
    assert list(model.peft_config) == ["film"]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".film." in name for name in trainable)


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_pretrained(str(tmp_path))
    lora = get_peft_model(make_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="LORA adapter, not a BADGE one"):
        load_pretrained(str(tmp_path / "lora"))
    save(tmp_path, named=False)
    with pytest.raises(ValueError, match="does not name its base model: pass base_model"):
        load_pretrained(str(tmp_path / "adapter"))


def test_another_base_is_refused(saved: tuple[str, PeftModel]) -> None:
    with pytest.raises(ValueError, match="another backbone"):
        load_pretrained(saved[0], base_model=make_model(seed=1))


# ---- to the Hub, which is a mock


class Hub:
    """What `push_to_hub` asks of the Hub; the uploaded files, by name, are kept in `pushed`."""

    def __init__(self, license: str | None = None, readme: str | None = None) -> None:
        self.license, self.readme = license, readme
        self.pushed: dict[str, bytes] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, token: Any = None) -> Hub:
        self.calls.append(("token", {"token": token}))
        return self

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        self.calls.append(("create_repo", kwargs))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def model_info(self, repo_id: str, **kwargs: Any) -> Any:
        self.calls.append(("model_info", {"repo_id": repo_id, **kwargs}))
        if self.license is None:
            raise OSError("no network")
        return SimpleNamespace(card_data=ModelCardData(license=self.license))

    def create_commit(self, operations: list[Any], **kwargs: Any) -> str:
        self.calls.append(("create_commit", kwargs))
        for operation in operations:
            content = operation.path_or_fileobj
            self.pushed[operation.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        return "commit"

    def file_exists(self, repo_id: str, name: str, **kwargs: Any) -> bool:
        return self.readme is not None

    def download(self, repo_id: str, name: str, local_dir: str, **kwargs: Any) -> str:
        assert self.readme is not None
        Path(local_dir, name).write_text(self.readme)
        return str(Path(local_dir, name))

    def card(self) -> ModelCard:
        return ModelCard(self.pushed["README.md"].decode())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(license="apache-2.0")
    monkeypatch.setattr("badge_peft.hub.HfApi", fake)
    monkeypatch.setattr("badge_peft.hub.hf_hub_download", fake.download)
    return fake


def test_a_model_goes_up_with_its_card(saved: tuple[str, PeftModel], hub: Hub) -> None:
    model = saved[1]
    model.peft_config["default"].base_model_name_or_path = "google-bert/bert-base-uncased"
    pushed: Any = push_to_hub(model, "exits", tokenizer=make_tokenizer(), private=True, token="secret", revision="dev")
    assert pushed == "commit"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= hub.pushed.keys()
    data = hub.card().data
    assert data.license == "apache-2.0" and data.base_model == "google-bert/bert-base-uncased"
    assert 'load_pretrained("me/exits")' in hub.card().text
    calls = dict(hub.calls)
    assert calls["token"] == {"token": "secret"} and calls["create_repo"] == {"private": True, "exist_ok": True}
    assert calls["create_commit"]["repo_id"] == "me/exits" and calls["create_commit"]["revision"] == "dev"


def test_what_somebody_wrote_on_the_hub_stays(saved: tuple[str, PeftModel], hub: Hub) -> None:
    hub.license, hub.readme = None, "---\nlicense: mit\n---\n# Ours\n"
    push_to_hub(saved[1], "exits")
    assert "# Ours" in hub.card().text and hub.card().data.license == "mit"
    assert "badge" in (hub.card().data.tags or [])


def test_a_hub_that_is_out_of_order_loses_nobody_a_card(saved: tuple[str, PeftModel], monkeypatch: Any) -> None:
    """The real client, which cannot find out whether there is one."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("500 Server Error")

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", fail)
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: SimpleNamespace(repo_id="me/exits"))
    monkeypatch.setattr(HfApi, "create_commit", lambda *args, **kwargs: pytest.fail("a commit"))
    with pytest.raises(OSError):  # older clients keep the function elsewhere, and find no network
        push_to_hub(saved[1], "exits", token="x")


def test_one_adapter_of_several(saved: tuple[str, PeftModel], hub: Hub) -> None:
    model = saved[1]
    model.add_adapter("other", BadgeConfig(r=2))
    push_to_hub(model, "exits", adapter_name="other")
    assert hub.pushed.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(hub.pushed["adapter_config.json"])["r"] == 2 and "r = 2" in hub.card().text
    model.set_adapter("other")
    push_to_hub(model, "exits")
    assert json.loads(hub.pushed["adapter_config.json"])["r"] == 2


def test_a_folder_goes_up_whole(saved: tuple[str, PeftModel], hub: Hub, tmp_path: Path) -> None:
    folder = Path(saved[0])
    (folder / "report.json").write_text("{}")
    hub.readme = "# not asked for"
    push_to_hub(folder, "exits")
    assert {"README.md", "report.json", "adapter_model.safetensors"} <= hub.pushed.keys()
    assert 'load_pretrained("me/exits")' in hub.card().text and "license" not in hub.card().data.to_dict()


def test_only_files_that_we_write_go_up(saved: tuple[str, PeftModel], hub: Hub) -> None:
    folder = Path(saved[0])
    make_tokenizer().save_pretrained(folder)
    ours = {path.name for path in folder.iterdir()} | {"report.json", "tradeoff.png", "exit_logits.safetensors"}
    for name in ours - {path.name for path in folder.iterdir()}:
        (folder / name).write_text("{}")
    for name in (
        *("checkpoint-8/optimizer.pt", "stage1/best/training_args.bin", "sub/.env", "sub/tokenizer.json"),
        *("optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", ".hidden", "notes.txt"),
        *("adapter_model.bin", "second/adapter_model.safetensors"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"secret")
    named = push_to_hub(folder, "exits", dry_run=True)
    push_to_hub(folder, "exits")
    assert set(named) == hub.pushed.keys() == ours


def test_a_link_is_not_followed(saved: tuple[str, PeftModel], hub: Hub, tmp_path: Path) -> None:
    folder = Path(saved[0])
    (tmp_path / "secret").write_text("secret")
    for name in ("x.txt", "report.json"):
        (folder / name).symlink_to(tmp_path / "secret")
        if name == "x.txt":
            assert name not in push_to_hub(folder, "exits", dry_run=True)
    with pytest.raises(ValueError, match="report.json is a link"):
        push_to_hub(folder, "exits")
    assert not hub.calls


def test_a_report_goes_up_without_local_paths(saved: tuple[str, PeftModel], hub: Hub) -> None:
    folder = Path(saved[0])
    report = {
        "model": "/home/ann/my models/bert",
        "data": "C:\\Users\\ann\\rows.csv",
        "evaluation": "held out of C:\\Users\\ann\\rows.csv",
        "settings": {"output_dir": "/home/ann/my models/bert/exits", "tokenizer": None, "eval_data": "org/data"},
        "label_names": ["/", "a"],
        "per_exit": [0.5, 1.0],
    }
    (folder / "report.json").write_text(json.dumps(report))
    push_to_hub(folder, "exits")
    assert json.loads(hub.pushed["report.json"]) == {
        "model": "bert",
        "data": "rows.csv",
        "evaluation": "held out of rows.csv",
        "settings": {"output_dir": "exits", "tokenizer": None, "eval_data": "org/data"},
        "label_names": ["/", "a"],
        "per_exit": [0.5, 1.0],
    }
    assert json.loads((folder / "report.json").read_text()) == report


@pytest.mark.parametrize("kind", ["model", "folder"])
def test_a_dry_run_names_the_files_that_would_go_up(
    kind: str, saved: tuple[str, PeftModel], hub: Hub, tmp_path: Path
) -> None:
    model = saved[1]
    model.save_pretrained(str(tmp_path))
    for name in ("checkpoint-2/optimizer.pt", "training_args.bin", ".git/HEAD"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    named = push_to_hub(model if kind == "model" else tmp_path, "exits", dry_run=True)
    assert not hub.calls and not hub.pushed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    push_to_hub(model if kind == "model" else tmp_path, "exits")
    assert named == sorted(name for name in hub.pushed if not name.startswith(".git/"))


def test_what_is_no_adapter_is_not_pushed(saved: tuple[str, PeftModel], hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapter: it has no adapter_config.json"):
        push_to_hub(tmp_path, "exits")
    with pytest.raises(ValueError, match="has no adapter 'nobody'"):
        push_to_hub(saved[1], "exits", adapter_name="nobody")
    with pytest.raises(ValueError, match="BertForSequenceClassification has no adapter"):
        push_to_hub(make_model(), "exits")
    lora = get_peft_model(make_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ValueError, match="holds a .*LORA adapter"):
        push_to_hub(lora, "exits")
    assert not hub.calls


def test_a_base_model_that_is_refused_keeps_its_label_names(tmp_path: Path) -> None:
    make_badge(label_names=["a", "b", "c"]).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    base = make_model()
    before = dict(base.config.id2label)
    with pytest.raises(ValueError, match="cannot be read"):
        load_pretrained(str(tmp_path), base_model=base)
    assert base.config.id2label == before and not hasattr(base, "peft_config")


def test_a_revision_reaches_the_adapters_files(saved: tuple[str, PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository whose files have been downloaded before, as far as PEFT can see."""
    seen = []

    def download(repo_id: str, filename: str, revision: str | None = None, **kwargs: Any) -> str:
        seen.append((repo_id, revision))
        return str(Path(saved[0], filename))

    monkeypatch.setattr("peft.config.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda *args, **kwargs: True)
    model = load_pretrained("me/exits", revision="v1", base_model=make_model())
    assert torch.equal(exits(model), exits(saved[1]))
    assert set(seen) == {("me/exits", "v1")}
