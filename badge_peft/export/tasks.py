"""`export_tasks_onnx`: many tasks on one base model as one ONNX file that exits early, and what runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from badge_peft._version import package_version
from badge_peft.early_exit.calls import check_tasks, config_of_each
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.collate import SPECIAL
from badge_peft.export.folder import CONFIG, LARGEST_PATIENCE, MODEL
from badge_peft.export.onnx import check_difference, check_model, check_size, input_limits, own_copy, stage
from badge_peft.export.pieces import OTHER, example_inputs
from badge_peft.export.runtime import OnnxEarlyExitModel, OnnxOutput
from badge_peft.export.words import entities_of
from badge_peft.model import BadgeModel, get_badge_model
from badge_peft.utils.checks import check_int, is_number, to_python
from badge_peft.utils.extras import require_onnx_exporter
from badge_peft.utils.files import install
from badge_peft.utils.problem import problem_of


def export_tasks_onnx(
    model: nn.Module,
    directory: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    tokenizer: Any = None,
    early_exit_config: Any = None,
    int8: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes `model.onnx` for many tasks, with the tokenizer and configs beside it.

    The graph takes `input_ids`, `attention_mask` (and `token_type_ids` where the model has them), [B, S] int64, and
    for each task the scalars `<task>.threshold` (float32) and `<task>.patience` (int64), which may be left out: its
    config has their defaults. It gives `<task>.logits` [B, K] and `<task>.exit_layer` [B]; of a task that labels
    tokens [B, S, K] and [B, S], and the graph takes `special_tokens_mask`, too. A row's blocks end with its last task.

    Args:
        model: A PEFT model with BADGE adapters, in float32. It is copied, and stays as it is.
        directory: Is made; files of the same names are replaced.
        tasks: Names of adapters; None takes all.
        tokenizer: Saved beside the graph, for `OnnxTasksModel.predict`.
        early_exit_config: As for `early_exit_forward(tasks=...)`.
        int8: As for `export_onnx`.
        progress: Show a progress bar.

    Returns:
        What is in `early_exit.json`, with `size_bytes` and `max_difference`, the largest difference of logits from
        PyTorch's on random rows (float32 files).

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        ImportError: torch is older than 2.8.
        ValueError: tasks that cannot share a pass, what `export_onnx` refuses, or a file above 2 GB.
        RuntimeError: the file does not answer as the model does. Nothing is written then.
    """
    require_onnx_exporter()
    from badge_peft.export.policies import Decision
    from badge_peft.export.task_chain import assemble_tasks
    from badge_peft.export.task_groups import grouped
    from badge_peft.export.trace import export_blocks

    badge = get_badge_model(model)
    names = list(badge.peft_config) if tasks is None else list(tasks)
    check_tasks(badge, names)
    check_model(badge)
    given, decisions = config_of_each(early_exit_config, names), {}
    for task in names:
        config = badge.config_of(task)
        policy = build_policy(EarlyExitConfig.of(config.early_exit if given[task] is None else given[task]))
        decisions[task] = Decision(
            policy,
            badge.exit_layers(task),
            config.resolved_labels,
            config.resolved_problem_type,
            config.reads_tokens,
        )
        decisions[task].check_exportable(learned=config.learn_to_exit)
        if policy.by_group:
            raise ValueError(
                f"task {task!r} ranks: its rows are the candidates of one query, so it is exported alone, export_onnx."
            )
        if not is_number(decisions[task].threshold):
            raise ValueError(
                f"task {task!r} has a threshold for each exit, and a file of many tasks takes one number for each "
                "task: give one, early_exit_config={...}, or export the task alone."
            )
    read = {group.tasks: group.blocks() for group in grouped(decisions)}
    for group, numbers in read.items():
        read[group] = numbers.union(*(badge.adapter_exits(task).linked_to(numbers) for task in group))
    copied = own_copy(badge)
    pieces = export_blocks(copied, read, max(max(numbers) for numbers in read.values()), progress)
    graph = assemble_tasks(pieces, decisions, int8=int8)
    check_size(graph)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        hashes = {task: badge.weights_hash(task) for task in names}
        facts = _metadata(copied, decisions, pieces.inputs, tokenizer, hashes)
        facts["int8"] = int8
        metadata = stage(here, graph, facts, copied, tokenizer)
        session: Any = OnnxTasksModel.from_pretrained(here, threads=torch.get_num_threads())
        configs = {task: decision.policy.config for task, decision in decisions.items()}
        difference = None if int8 else _difference(copied, session, configs)
        size = (here / MODEL).stat().st_size
        install(here, Path(directory), last=(MODEL, CONFIG))
    return {**metadata, "directory": str(directory), "size_bytes": size, "max_difference": difference}


class OnnxTasksModel(OnnxEarlyExitModel):
    """An exported model of many tasks. Made by `from_pretrained`, with the arguments of `OnnxEarlyExitModel`'s.

    Attributes:
        config: What `early_exit.json` says: under `tasks` the labels, exits, rule and defaults of each.
    """

    has_tasks = True

    @property
    def labels(self) -> dict[str, list[str]]:  # type: ignore[override]  # those of each task
        """Names of the labels of each task."""
        return {task: own["labels"] for task, own in self.config["tasks"].items()}

    def __call__(  # type: ignore[override]  # an answer for each task
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        special_tokens_mask: Any = None,
        *,
        threshold: float | Mapping[str, float] | None = None,
        patience: int | Mapping[str, int] | None = None,
    ) -> dict[str, OnnxOutput]:
        """Answers a batch, for each task.

        Args:
            input_ids: [B, S], anything that numpy takes.
            attention_mask: [B, S]; None means that every position is real.
            token_type_ids: [B, S]; None means zeros. Ignored where the model has none.
            special_tokens_mask: [B, S], for tasks that label tokens, as `OnnxEarlyExitModel` has it.
            threshold: In place of the file's own, for this call: of all tasks, or a dict by task.
            patience: The same.

        Raises:
            ValueError: as `OnnxEarlyExitModel`, and for a task that the file does not have.
        """
        feed = self.inputs(input_ids, attention_mask, token_type_ids, special_tokens_mask)
        names = list(self.config["tasks"])
        for task, value in _by_task(threshold, names, "threshold").items():
            if not is_number(value):
                raise ValueError(f"threshold={value!r} is not allowed: it must be a finite number or None.")
            feed[f"{task}.threshold"] = np.asarray(value, dtype=np.float32)
        for task, value in _by_task(patience, names, "patience").items():
            check_int("patience", value, at_least=1, optional=False)
            feed[f"{task}.patience"] = np.asarray(min(value, LARGEST_PATIENCE), dtype=np.int64)
        wanted = [f"{task}.{kind}" for task in names for kind in ("logits", "exit_layer")]
        found = dict(zip(wanted, self.session.run(wanted, feed), strict=True))
        return {task: OnnxOutput(found[f"{task}.logits"], found[f"{task}.exit_layer"]) for task in names}

    def predict(
        self, texts: Sequence[str] | str, text_pairs: Sequence[str] | None = None, *, batch_size: int = 32, **rule: Any
    ) -> list[dict[str, Any]]:
        """Answers texts, or pairs of texts; `threshold` and `patience` are as in a call.

        Returns:
            Per text a dict from tasks to what `OnnxEarlyExitModel.predict` says of one.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        answers: list[dict[str, Any]] = []
        for fields, words in self.batches(texts, text_pairs, batch_size):
            found: list[dict[str, Any]] = [{} for _ in fields["input_ids"]]
            for task, output in self(**fields, **rule).items():
                own = self.config["tasks"][task]
                if output.exit_layer.ndim == 2:
                    for answer, entities in zip(found, entities_of(words, output, own["labels"]), strict=True):
                        answer[task] = entities
                    continue
                problem, names = problem_of(own["problem_type"]), own["labels"]
                for answer, row, number in zip(found, output.logits, output.exit_layer, strict=True):
                    answer[task] = {**problem.format_prediction(row, names), "exit_layer": int(number)}
            answers += found
        return answers


def _by_task(given: Any, names: Sequence[str], field: str) -> dict[str, Any]:
    """The values that a call gives, by task."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, to_python(given))
    unknown = [task for task in given if task not in names]
    if unknown:
        raise ValueError(f"{field} has {unknown[0]!r}, which is no task of this file; they are {', '.join(names)}.")
    return {task: to_python(value) for task, value in given.items() if value is not None}


def _metadata(
    badge: BadgeModel,
    decisions: Mapping[str, Any],
    inputs: list[str],
    tokenizer: Any,
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """What `OnnxTasksModel` has to know, as JSON-able values."""
    return {
        "format": 1,
        "inputs": [*inputs, *([SPECIAL] if any(d.reads_tokens for d in decisions.values()) else [])],
        "num_blocks": badge.num_blocks,
        "reads_pairs": any(badge.config_of(task).reads_pairs for task in decisions),
        **input_limits(badge, tokenizer),
        "badge_peft": package_version(),
        "tasks": {
            task: {
                "num_labels": decision.num_labels,
                "problem_type": decision.problem_type,
                "labels": badge.label_names(task),
                "exit_layers": _answering(decision),
                "weights_hash": hashes[task],
                "early_exit": decision.policy.config.measured_on(hashes[task]).to_dict(),
                "threshold": decision.threshold,
                "patience": decision.policy.patience,
                "uses_threshold": decision.uses_threshold,
                "uses_patience": decision.policy.counts_exits,
            }
            for task, decision in decisions.items()
        },
    }


def _answering(decision: Any) -> list[int]:
    """The blocks at which rows may stop, up to the one at which all do."""
    exits, policy = decision.exits, decision.policy
    end = next(i for i in range(len(exits)) if policy.is_final(exits, i))
    return [exits[i] for i in range(end + 1) if decision.reads(i) and policy.can_exit(exits, i)]


def _difference(badge: BadgeModel, session: Any, configs: dict[str, EarlyExitConfig]) -> float:
    """The largest difference of logits from PyTorch's, where both stop at the same block."""
    inputs, differences = example_inputs(badge.model, OTHER), []
    for batch in (inputs, {name: value[:1] for name, value in inputs.items()}):
        expected = early_exit_forward(badge, tasks=list(configs), early_exit_config=configs, **batch)
        for task, found in session(**batch).items():
            own = expected[task]
            exits = own.exit_layer if own.token_exit_layer is None else own.token_exit_layer
            same = exits.numpy() == found.exit_layer
            differences.append(np.abs(own.logits.numpy() - found.logits)[same].ravel())
    values = np.concatenate(differences)
    return check_difference(float(values.max()) if values.size else float("nan"))
