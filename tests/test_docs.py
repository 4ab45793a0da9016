"""The documentation is true: its code runs, its links lead somewhere, its reference names what there is."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
import shlex
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
import peft
import pytest
import torch
import yaml
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import badge_peft
from badge_peft import BadgeConfig, EarlyExitConfig, MultiExitTrainingArguments
from badge_peft.cli.commands import app
from badge_peft.evaluation.confidence import rows_needed
from tests.models import make_model, shake
from tests.pages import PAGES, README, ROOT, anchors, blocks, links, prose, run
from tests.texts import make_tokenizer, sentences, write_csv

DOCS = ROOT / "docs"
# Pages whose code another test runs.
ELSEWHERE = {
    "README.md": "tests/test_readme.py",
    "docs/serving.md": "tests/cli/test_serving_page.py",
    "docs/ranking.md": "tests/ranking/test_page.py",
}
QUICK = (
    *("index", "after-deployment", "choosing", "policies", "calibration", "hub", "faq", "app", "integrations"),
    *("many-tasks", "tokens"),
)
SLOW = ("quickstart", "training", "ablations")  # they train
PUBLIC = (
    "badge_peft",
    "badge_peft.early_exit",
    "badge_peft.early_exit.policies",
    "badge_peft.evaluation",
    "badge_peft.export",
    "badge_peft.integrations",
    "badge_peft.ranking",
    "badge_peft.serving",
    "badge_peft.training",
)
HUB = "google-bert/bert-base-uncased"


def test_the_first_page_lists_every_extra() -> None:
    """With what it is for."""
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), flags=re.DOTALL)
    assert extras is not None
    wanted = set(re.findall(r"^([a-z-]+) = \[", extras[1], flags=re.MULTILINE))
    assert set(re.findall(r"^\| `([a-z-]+)` \| ", (DOCS / "index.md").read_text(), flags=re.MULTILINE)) == wanted


def path_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------------------- the code


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a classifier, an adapter and texts, and what the pages take for granted. Do not change either."""
    folder = tmp_path_factory.mktemp("pages")
    names = {0: "negative", 1: "positive"}
    base = make_model("bert", num_labels=2, id2label=names, label2id={name: i for i, name in names.items()})
    tokenizer = make_tokenizer()
    for part in (base, tokenizer):
        part.save_pretrained(folder / "my-model")
    for part in (make_model("bert", num_labels=2), tokenizer):  # whose labels have no names
        part.save_pretrained(folder / "bert")
    (folder / "path" / "to" / "your").mkdir(parents=True)
    (folder / "path" / "to" / "your" / "classifier").symlink_to("../../../my-model")

    rows = [(text, int(label == "good")) for text, label in sentences(160)]
    parts = {"train": rows[:60], "validation": rows[60:120], "test": rows[120:]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.chdir(folder)
        for name, part in parts.items():
            write_csv(folder / f"{name}.csv", part)  # type: ignore[arg-type]
        data = load_dataset("csv", data_files={name: f"{name}.csv" for name in parts})
        data = data.map(lambda batch: tokenizer(batch["text"]), batched=True)
        model = get_peft_model(AutoModelForSequenceClassification.from_pretrained("my-model"), BadgeConfig(r=4)).eval()
        shake(model)
        for target in ("my-adapter", "my-exits"):
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    batch = tokenizer(["the film was good", "a very dull plot and a poor end"], padding=True, return_tensors="pt")
    return folder, {
        "name": HUB,
        "tokenizer": tokenizer,
        "model": model,
        "batch": batch,
        "train_dataset": data["train"],
        "eval_dataset": data["validation"],
        "test_dataset": data["test"],
        "exit_logits": badge_peft.collect_exit_logits(model, data["validation"]),
    }


@pytest.fixture
def space(made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted, and a working directory with a classifier, an adapter and texts: copies."""
    folder, names = made
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    for auto in (AutoModelForSequenceClassification, AutoTokenizer):
        real = auto.from_pretrained

        def from_pretrained(name: str, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            return real(str(tmp_path / "bert") if name == HUB else name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return {
        name: value if isinstance(value, datasets.Dataset) else copy.deepcopy(value) for name, value in names.items()
    }


@pytest.mark.filterwarnings("ignore:no setting of policy:UserWarning", "error:early_exit_forward in training mode")
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_page_runs_as_printed(name: str, space: dict[str, Any]) -> None:
    after = run(DOCS / f"{name}.md", space)
    if name == "quickstart":
        assert Path("my-adapter", "adapter_config.json").exists()
        assert after["out"].logits.shape == (2, 2) and len(after["report"]) == 50
        assert after["classify"]("a fine film")[0]["label"] in ("negative", "positive")
    if name == "after-deployment":
        assert after["label"] in ("negative", "positive")
    if name == "app":
        live = space["model"].early_exit_forward(**after["text"], policy="divergence", threshold=0.2, patience=1)
        assert after["found"].exit_layer == live.exit_layer.item()


@pytest.mark.parametrize("page", [README, *PAGES], ids=path_of)
def test_every_python_block_is_run_or_says_why_not(page: Path) -> None:
    path = path_of(page)
    for block in blocks(page):
        compile(block.code, f"{path}:{block.line}", "exec")
    if path in ELSEWHERE:
        runner = (ROOT / ELSEWHERE[path]).read_text(encoding="utf-8")
        assert page.name in runner and ("exec(" in runner or "run(" in runner)
        return
    if path in {f"docs/{name}.md" for name in (*QUICK, *SLOW)}:
        return
    left = [f"{path}:{block.line}" for block in blocks(page) if not block.skipped]
    assert not left, f"run these blocks in a test, or put `<!-- not run: why -->` before each: {', '.join(left)}"


def test_every_command_that_is_printed_is_understood() -> None:
    lines = [
        line
        for page in (README, *PAGES)
        for b in blocks(page, "bash")
        for line in b.code.replace("\\\n", " ").split("\n")
    ]
    found = [
        m[1] for line in lines if (m := re.match(r"(?:.*[|/=1] ?|.* -m )?badge(?:-peft|_peft\.cli) ([a-z].*)", line))
    ]
    assert len(found) > 50
    for command in found:
        tokens = shlex.split(re.split(r" > | \| ", command)[0], comments=True)
        app.parse_args(tokens, exit_on_error=False, print_error=False)


# --------------------------------------------------------------------------------------------------------- the links


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *PAGES], ids=path_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    dead = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            dead.append(link)
        elif anchor and anchor not in anchors(target):
            dead.append(f"{link} (there are {', '.join(sorted(anchors(target)))})")
        elif page.is_relative_to(DOCS) and not target.is_relative_to(DOCS):
            dead.append(f"{link} (outside of docs/: the site does not have it)")
    assert not dead, f"{path_of(page)} has dead links: {'; '.join(dead)}"


def test_every_entry_of_the_navigation_exists_and_every_page_is_found() -> None:
    entries = _files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert [entry for entry in entries if not (DOCS / entry).is_file()] == []
    assert len(entries) == len(set(entries))
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    assert [path_of(p) for p in PAGES if p not in linked and p.relative_to(DOCS).as_posix() not in entries] == []


def test_pages_for_users_are_short() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    sections = {name: _files(part) for entry in nav for name, part in entry.items()}
    contributors = sections.pop("For contributors")
    users = [DOCS / file for files in sections.values() for file in files if not file.startswith("api/")]
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in users) <= 16_000
    assert "architecture.md" in contributors and len(users) > 15


def _files(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [file for part in (nav.values() if isinstance(nav, dict) else nav) for file in _files(part)]


def test_the_rooms_of_architecture_are_few_and_exist() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## Which room answers")[2]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", text.partition("\n## ")[0], re.M)[1:]
    package = ROOT / "badge_peft"
    there = [f"/{path.relative_to(package).as_posix()}" + "/" * path.is_dir() for path in package.rglob("*")]
    for question, where in rows:
        named = re.findall(r"`([^`]+)`", where)
        assert named, f"no file answers: {question}"
        assert [name for name in named if not any(path.endswith(f"/{name}") for path in there)] == [], question
    assert 10 < len(rows) <= 20, "merge rows: who asks finds the file from the tree alone"


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    for file in (README, ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run", *PAGES, *workflows):
        named = re.findall(r"(?:^|`|run: )make ([a-z]+)", file.read_text(encoding="utf-8"), re.M)
        assert set(named) <= targets, f"{file.name}: {sorted(set(named) - targets)}"


def test_every_test_that_compatibility_names_exists() -> None:
    proofs: list[tuple[str, str]] = []
    header: list[str] = []
    for row in re.findall(r"^\| (.+) \|$", (DOCS / "compatibility.md").read_text(encoding="utf-8"), re.M):
        cells = row.split(" | ")
        if cells[-1] in ("test", "tested with"):
            header = cells
            continue
        assert len(cells) == len(header), f"a row of another width: {row}"
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", cells[-1])
        assert named or header[-1] != "test", f"no test proves: {row}"
        proofs += named
    missing = [f"{file}::{name}" for file, name in proofs if f"def {name}(" not in _text(ROOT / file)]
    assert not missing, f"compatibility.md names tests that do not exist: {', '.join(missing)}"
    assert len(proofs) > 50


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def test_the_versions_of_compatibility_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = {"torch": ">=2.4", "transformers": ">=4.57,<6", "peft": ">=0.21,<0.23", "accelerate": ">=1.3"}
    table = (DOCS / "compatibility.md").read_text(encoding="utf-8").partition("## PEFT's verbs")[0]
    for name, bounds in wanted.items():
        assert f'"{name}{bounds}"' in project, f"{name}: docs/compatibility.md and this test are out of date"
        assert f"| {name} | " in table
    assert 'requires-python = ">=3.10"' in project and "| Python | 3.10 or newer |" in table


# ----------------------------------------------------------------------------------------------------- the reference


def reference() -> list[str]:
    return [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)]


def resolve(name: str) -> Any:
    """The object behind a dotted name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} cannot be imported")


def test_the_reference_has_every_public_name() -> None:
    described = [(name.rpartition(".")[2], resolve(name)) for name in reference()]
    missing = []
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            found = resolve(f"{module}.{name}")
            if not any(known == name and thing is found for known, thing in described):
                missing.append(f"{module}.{name}")
    assert not missing, f"add `::: name` to a page in docs/api/ for {', '.join(missing)}"


def test_the_reference_names_what_there_is_and_each_once() -> None:
    names = reference()
    assert len(names) == len(set(names)) > 40
    for name in names:
        resolve(name)


@pytest.mark.parametrize(
    ("config", "base", "page"),
    [
        (BadgeConfig, peft.PeftConfig, "adapter"),
        (EarlyExitConfig, None, "early-exit"),
        (MultiExitTrainingArguments, TrainingArguments, "training"),
    ],
)
def test_the_table_of_fields_is_that_of_the_code(config: type, base: type | None, page: str) -> None:
    inherited = {field.name for field in dataclasses.fields(base)} if base is not None else set()
    rows = []
    for field in dataclasses.fields(config):
        if field.name not in inherited:
            default = f'"{field.default}"' if isinstance(field.default, str) else field.default
            rows.append(f"| `{field.name}` | `{default}` | {field.metadata['help']} |")
    lines = (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8").splitlines()
    first = lines.index("| field | default | |") + 2
    assert lines[first : first + len(rows) + 1] == [*rows, ""]


# -------------------------------------------------------------------------------------------------------- the figures


@pytest.fixture(scope="module")
def bert() -> Any:
    """BERT-base without its weights."""
    return AutoConfig.for_model("bert", num_labels=2)


def trained(bert: Any, **fields: Any) -> int:
    with torch.device("meta"):
        model = get_peft_model(AutoModelForSequenceClassification.from_config(bert), BadgeConfig(**fields))
    return model.get_nb_trainable_parameters()[0]


def test_the_parameter_counts_of_choosing(bert: Any) -> None:
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    table = text[text.index("| nothing else |") :]
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \|$", table, re.M)
    assert len(rows) == 7
    for said, count in rows:
        fields = {} if said == "nothing else" else eval(f"dict({said.strip('`')})")
        assert trained(bert, train_head=False, **fields) == int(count.replace(",", "")), said


def test_the_parameter_formulas_of_choosing(bert: Any) -> None:
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    table = text[text.index("| part | parameters |") :].partition("\n\n")[0]
    said = {
        row[0]: int(row[1].replace(",", "")) for row in re.findall(r"^\| (.+?) \|.*\| ([\d,]+)[^|]*\|$", table, re.M)
    }
    d, r, k = 768, 16, 2
    exits = {
        "linear": k * (d + 1),
        "pooled": d * (d + 1) + k * (d + 1),
        "shared_pooled": k * (d + 1),
        "mha": 4 * 32 * d + k * (d + 1),
        "residual_mha": 4 * 32 * d + k * (d + 1),
        "past_future": 2 * d * (d + 1) + 32 * (d + 1) + 33 * k + k * (d + 1),
    }
    one = {"exit_layers": [1], "train_head": False}
    assert said["bypass"] == 2 * d * r + 2 * d == trained(bert, **one) - exits["linear"]
    for kind, count in exits.items():
        assert said[f"exit `{kind}`"] == count
        if kind != "past_future":
            assert trained(bert, exit_type=kind, placement="none", **one) == count
    both = trained(bert, exit_type="past_future", placement="none", final_exit="exit", **one)
    assert both == 2 * exits["past_future"] - d * (d + 1)  # exits 1, which looks back at none, and M
    assert said["`bias=True` adds"] == r + d == trained(bert, bias=True, **one) - trained(bert, **one)
    two = {"exit_layers": [1, 2], "train_head": False}
    assert said['`carry="logits"` adds, except for the first exit'] == trained(bert, carry="logits", **two) - trained(
        bert, **two
    )
    assert said["exit 0"] == exits["linear"] == trained(bert, exit_layers=[0], train_head=False)
    assert trained(bert, learn_to_exit=True, **one) - trained(bert, **one) == d + 1
    assert trained(bert, backbone="lora", **one) - trained(bert, **one) == 12 * 2 * 8 * 2 * d
    assert trained(bert, exit_layers=[1]) - trained(bert, **one) == k * (d + 1)


def test_the_rows_that_a_bound_needs() -> None:
    said = re.findall(
        r"([\d,]+) (?:rows in all )?for (?:a drop of )?(0\.\d+)", " ".join(prose(DOCS / "calibration.md").split())
    )
    assert len(said) == 4
    for count, drop in said:
        assert 2 * rows_needed(float(drop), 0.95) == int(count.replace(",", ""))
