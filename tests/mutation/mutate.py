"""Mutation testing: change one operator of the package at a time, and see whether a test notices (docs/testing.md).

    python tests/mutation/mutate.py draw plan.json mutants.json --tree . --size 120 --seed 0    # needs cosmic-ray
    python tests/mutation/mutate.py test plan.json mutants.json results.jsonl --tree COPY       # needs the dev extra
    python tests/mutation/mutate.py score results.jsonl

The operators are cosmic-ray's; the runner is ours, since most of a short test run is the import of torch, transformers
and PEFT: they are imported once, and each mutant is tested in a fork, which reads the package anew. `COPY` is a copy
of the repository in which files are changed (and changed back). A mutant counts as killed where a test fails, the
package cannot be imported, or the tests need more than four times their CPU time.

A plan has groups: `modules` (globs) whose mutants are tested with the files in `tests`, the fast ones first.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

THIRD_PARTY = (
    "torch transformers transformers.trainer transformers.models.auto.modeling_auto peft peft.tuners.lora accelerate "
    "datasets sklearn.metrics sklearn.linear_model scipy.stats pandas safetensors.torch hypothesis "
    "hypothesis.extra.numpy _hypothesis_pytestplugin pytest xdist tqdm"
).split()
SLACK = 4  # times the CPU seconds that a group's tests take without a mutant
LEAST = 60  # CPU seconds that every mutant gets


# ------------------------------------------------------------------------------------------------------------ drawing


def draw(plan: dict[str, Any], tree: Path, size: int, seed: int) -> list[dict[str, Any]]:
    """`size` mutants by chance, at different places of the source and as many of each group; those that cannot change
    anything are left out."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    operators = {name: cosmic_ray.plugins.get_operator(name) for name in sorted(cosmic_ray.plugins.operator_names())}
    operators = {name: operator() for name, operator in operators.items() if not operator.arguments()}
    places: dict[tuple[str, str, Any], list[tuple[str, int]]] = {}
    sources = {}
    for group, entry in plan.items():
        for path in sorted({path for glob in entry["modules"] for path in tree.glob(glob)}):
            module = path.relative_to(tree).as_posix()
            sources[module] = path.read_text(encoding="utf-8")
            nodes = list(ast_nodes(get_ast(sources[module])))
            for name, operator in operators.items():
                positions = [start for node in nodes for start, _ in operator.mutation_positions(node)]
                for occurrence, start in enumerate(positions):
                    places.setdefault((group, module, start), []).append((name, occurrence))
    rng = random.Random(seed)
    order = sorted(places)
    rng.shuffle(order)
    wanted = dict.fromkeys(plan, size // len(plan))
    mutants: list[dict[str, Any]] = []
    for group, module, start in order:
        if not wanted[group]:
            continue
        name, occurrence = rng.choice(places[group, module, start])
        code = mutate_code(sources[module], operators[name], occurrence)
        if code is None or meaning(code) in ("", meaning(sources[module])):
            continue
        wanted[group] -= 1
        diff = difflib.unified_diff(sources[module].splitlines(), code.splitlines(), lineterm="", n=0)
        mutants.append(
            {
                "id": len(mutants),
                "group": group,
                "module": module,
                "line": start[0],
                "operator": name,
                "diff": [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")],
                "code": code,
            }
        )
    print(f"{len(mutants)} mutants at {len(places)} places of {len(sources)} files")
    return mutants


def meaning(source: str) -> str:
    """What remains of a module when annotations, which are never evaluated, are taken away."""

    class Strip(ast.NodeTransformer):
        def visit_arg(self, node: ast.arg) -> ast.arg:
            node.annotation = None
            return node

        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            node.returns = None
            return self.generic_visit(node)

        def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
            node.annotation = ast.Constant(value=None)
            return self.generic_visit(node)

    try:
        return ast.dump(Strip().visit(ast.parse(source)))
    except SyntaxError:  # some operators make none of Python's sentences: no mutant either
        return ""


# ------------------------------------------------------------------------------------------------------------- testing


def test(
    plan: dict[str, Any], mutants: list[dict[str, Any]], tree: Path, results: Path, first: int, parts: int
) -> None:
    """Adds a line to `results` for each mutant; those that are there already are not tested again."""
    prepare(tree)
    done = {json.loads(line)["id"] for line in results.read_text().splitlines()} if results.exists() else set()
    known = results.with_suffix(".limits.json")
    limits: dict[str, float] = json.loads(known.read_text()) if known.exists() else {}
    for mutant in mutants[first::parts]:
        if mutant["id"] in done:
            continue
        tests, group = plan[mutant["group"]]["tests"], mutant["group"]
        if group not in limits:
            status, seconds = run(tree, tests, 1e6, results.with_suffix(f".{group}.log"))
            if status:
                raise SystemExit(f"the tests of {group} fail without a mutant: see {results.with_suffix('')}.*.log")
            limits[group] = max(LEAST, SLACK * seconds)
            known.write_text(json.dumps(limits))
            print(f"{group}: {seconds:.0f} CPU seconds", flush=True)
        path = tree / mutant["module"]
        before, stat = path.read_text(encoding="utf-8"), path.stat()
        try:
            path.write_text(mutant["code"], encoding="utf-8")
            status, seconds = run(tree, tests, limits[group], results.with_suffix(".log"))
        finally:
            path.write_text(before, encoding="utf-8")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        facts = {key: mutant[key] for key in ("id", "group", "module", "line", "operator", "diff")}
        with results.open("a") as file:
            print(json.dumps({**facts, "status": status, "killed": status != 0, "seconds": seconds}), file=file)


def prepare(tree: Path) -> None:
    """Imports what does not change."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tree.resolve()),
    }
    sys.path[:] = [str(tree.resolve()), *(path for path in sys.path[1:] if path != str(tree.resolve()))]
    for name in THIRD_PARTY:
        importlib.import_module(name)
    assert not any(name.partition(".")[0] in ("badge_peft", "tests") for name in sys.modules)


def run(tree: Path, tests: list[str], limit: float, log: Path) -> tuple[int, float]:
    """(exit status of pytest, or minus the signal that ended it; CPU seconds)."""
    start = time.time()
    process = os.fork()
    if not process:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(tree)
            import pytest

            status = int(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow", *tests]))
        except BaseException:
            status = 99
        os._exit(status)
    _, ended, usage = os.wait4(process, 0)
    print(f"{os.waitstatus_to_exitcode(ended)} after {time.time() - start:.0f} s", flush=True)
    return os.waitstatus_to_exitcode(ended), round(usage.ru_utime + usage.ru_stime, 1)


# ------------------------------------------------------------------------------------------------------------- scoring


def score(lines: list[dict[str, Any]]) -> str:
    """A table of groups, and the mutants that lived; a mutant that stands in two files counts once."""
    lines = list({line["id"]: line for line in lines}.values())
    killed, seen = Counter(x["group"] for x in lines if x["killed"]), Counter(x["group"] for x in lines)
    rows = [f"{group}: {killed[group]} of {seen[group]} killed" for group in seen]
    rows.append(f"all: {killed.total()} of {seen.total()} killed, {killed.total() / max(1, seen.total()):.1%}")
    for x in sorted((x for x in lines if not x["killed"]), key=lambda x: (x["module"], x["line"])):
        rows += ["", f"{x['module']}:{x['line']} (mutant {x['id']}, {x['operator']})", *x["diff"]]
    return "\n".join(rows)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["draw", "test", "score"])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tree", type=Path, default=Path("."))
    parser.add_argument("--size", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1", help="which mutants: i/n takes every n-th from the i-th")
    options = parser.parse_args()
    if options.verb == "draw":
        plan, target = options.files
        mutants = draw(json.loads(plan.read_text()), options.tree, options.size, options.seed)
        target.write_text(json.dumps(mutants, indent=1))
    elif options.verb == "test":
        plan, mutants, results = options.files
        first, parts = map(int, options.part.split("/"))
        drawn = json.loads(mutants.read_text())
        test(json.loads(plan.read_text()), drawn, options.tree, results.resolve(), first, parts)
    else:
        print(score([json.loads(line) for file in options.files for line in file.read_text().splitlines()]))


if __name__ == "__main__":
    main()
