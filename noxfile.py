"""The matrix of releases that the tests run on. `nox -l` lists it, `nox -s oldest -- -k hub` runs a part of one leg.

`make test` is the newest leg, in .venv. Every other leg has an environment of its own under .nox, which `nox -r` uses
again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

# uv trusts the certificates of the system then, as pip does; the first name is that of older releases
os.environ.setdefault("UV_NATIVE_TLS", "1")
os.environ.setdefault("UV_SYSTEM_CERTS", "1")

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["tests", "exhaustive", "adapters", "oldest", "oldest_onnx", "int8", "serve", "package"]

TOOLS = ("pytest>=8.3", "pytest-xdist>=3.6", "hypothesis>=6.100")

# What we need of transformers, PEFT and torch: wrapping, loading, saving, training, early exit on every backbone.
CONTRACT = (
    "tests/peft_verbs",
    "tests/integrations/test_lora_underneath.py",
    "tests/tuner/test_architectures.py",
    "tests/early_exit/test_full_depth.py",
    "tests/test_hub.py",
    "tests/tuner/test_lora.py",
    "tests/test_model.py",
    "tests/test_pipelines.py",
    "tests/tuner/test_prepare.py",
    "tests/tuner/test_checkpoint.py",
    "tests/test_training_plain.py",
    "tests/early_exit/test_backbones.py",
    "tests/early_exit/test_adapter_names.py",
    "tests/training/test_trainer.py",
)


def install_oldest(session: nox.Session, package: str) -> None:
    """The package with the oldest releases that pyproject.toml allows, and today's tools."""
    # datasets asks for pyarrow without an upper bound, and newer ones want NumPy 2 without saying so
    session.install("--resolution=lowest-direct", "-e", package, "pyarrow>=18,<20")
    session.install(*TOOLS)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests on the newest releases."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session
def exhaustive(session: nox.Session) -> None:
    """The tests that `make test` leaves out: a law once more on kin, and benchmarks from end to end."""
    session.install("-e", ".[dev]")
    session.run("pytest", "-m", "exhaustive", *session.posargs)


@nox.session
def adapters(session: nox.Session) -> None:
    """All tests on transformers 4.57, which `adapters` 1.3 pins, beside `adapters`."""
    session.install("-e", ".[dev,adapters]")
    session.run("pytest", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """The contract tests on the lower bounds of every dependency that pyproject.toml names."""
    install_oldest(session, ".[plots,train]")
    session.run("pytest", *CONTRACT, *session.posargs)


@nox.session
def oldest_onnx(session: nox.Session) -> None:
    """The export on the lower bounds of its extra, which asks for a newer torch."""
    install_oldest(session, ".[onnx]")
    session.run("pytest", "tests/export", *session.posargs)


@nox.session
def int8(session: nox.Session) -> None:
    """Base models in int8, by torchao and by bitsandbytes."""
    session.install("-e", ".", "torchao", "bitsandbytes", *TOOLS)
    session.run("pytest", "tests/peft_verbs/test_int8.py", *session.posargs)


@nox.session
def serve(session: nox.Session) -> None:
    """The service as it is started and batch scoring, on Ray, which `make test` does without."""
    session.install("-e", ".[dev,ray,serve]")
    session.run("pytest", "-m", "", "tests/serving", "tests/deploy", *session.posargs)  # the exhaustive ones, too


@nox.session(venv_backend="venv")
@nox.parametrize("kind", ["whl", "tar.gz"], ids=["wheel", "sdist"])
def package(session: nox.Session, kind: str) -> None:
    """What `make dist` builds: pip installs it in an empty environment, and the README and the quickstart run."""
    session.install(*nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["release"])
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"))
    session.run("twine", "check", "--strict", *map(str, (folder / "dist").iterdir()))
    (built,) = (folder / "dist").glob(f"*.{kind}")

    session.run("python", "-m", "venv", str(folder / "empty"))
    python = str(folder / "empty" / "bin" / "python")
    session.run(python, "-m", "pip", "install", f"badge-peft[train] @ {built.as_uri()}", external=True)
    for name in ("tests", "docs"):
        shutil.copytree(name, folder / "user" / name)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(name, folder / "user")
    session.chdir(folder / "user")
    session.run(str(folder / "empty" / "bin" / "badge-peft"), "train", "--help", external=True, silent=True)
    session.run(python, "-m", "pip", "install", *TOOLS, external=True)
    page = "test_a_page_runs_as_printed[quickstart]"
    pages = ("test_readme.py::test_readme_code_runs_as_printed", f"test_docs.py::{page}")
    session.run(python, "-m", "pytest", *(f"tests/{page}" for page in pages), *session.posargs, external=True)


@nox.session
def audit(session: nox.Session) -> None:
    """Known weaknesses of what is installed (pip-audit asks PyPI), and of the workflows (zizmor)."""
    session.install("-e", ".[app,onnx,plots,train]", "pip-audit>=2.7", "zizmor>=1.5")
    session.run("zizmor", "--offline", ".github")
    session.run("pip-audit", "--skip-editable", *session.posargs)


@nox.session
def reliability(session: nox.Session) -> None:
    """tests/reliability with counts that take hours: no leg of CI. See docs/testing.md."""
    session.install("-e", ".[dev]")
    counts = {"KILLS": 200, "REQUESTS": 5000, "CALLS": 50_000, "FUZZ": 10_000}
    session.run(
        "pytest",
        "tests/reliability",
        *session.posargs,
        env={f"BADGE_PEFT_{name}": str(n) for name, n in counts.items()},
    )


@nox.session
def mutation(session: nox.Session) -> None:
    """Mutants of policies, pass and layer against their tests: no leg of CI. See docs/testing.md."""
    session.install("-e", ".[dev]", "cosmic-ray>=8.4")
    folder = Path(session.create_tmp())
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("badge_peft", "tests"):
        shutil.copytree(name, folder / "copy" / name)
    shutil.copy("pyproject.toml", folder / "copy")
    program, plan = ("python", "tests/mutation/mutate.py"), "tests/mutation/plan.json"
    mutants, results = str(folder / "mutants.json"), str(folder / "results.jsonl")
    session.run(*program, "draw", plan, mutants, *session.posargs)
    session.run(*program, "test", plan, mutants, results, "--tree", str(folder / "copy"))
    session.run(*program, "score", results)
