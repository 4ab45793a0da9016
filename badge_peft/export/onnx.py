"""`export_onnx` and `export_tasks_onnx`: a model with early exits, for one task or for many, as one ONNX file that
skips all blocks after the exit."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from badge_peft._version import package_version
from badge_peft.early_exit.calls import check_tasks, config_of_each
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.collate import SPECIAL
from badge_peft.export.folder import CONFIG, MODEL, digests
from badge_peft.export.pieces import ALONE, OTHER, adapter_exits, example_inputs
from badge_peft.export.report import OnnxExportReport, compare, largest_difference, onnx_card
from badge_peft.export.runtime import OnnxEarlyExitModel, OnnxTasksModel
from badge_peft.model import BadgeModel, get_badge_model
from badge_peft.model_card import CARD
from badge_peft.tuner import lora
from badge_peft.tuner.architectures import max_positions
from badge_peft.tuner.extensions import extension_of
from badge_peft.utils.checks import is_number
from badge_peft.utils.extras import require_onnx_exporter
from badge_peft.utils.files import install, write_json

LARGEST = 2**31 - 1  # bytes of one protobuf message
TOLERANCE = 1e-3  # of logits, above what rounding makes of them; PyTorch and the file agree to about 1e-5


def export_onnx(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    early_exit_config: EarlyExitConfig | dict[str, Any] | None = None,
    int8: bool = False,
    examples: Any = None,
    progress: bool = False,
) -> OnnxExportReport:
    """Writes `model.onnx` and what belongs to it: tokenizer, configs and a model card.

    The graph takes `input_ids`, `attention_mask` (and `token_type_ids` where the model has them), [B, S] int64, and
    the scalars `threshold` (float32; [E] where the config has one for each exit) and `patience` (int64), which have
    the config's values as defaults: a service changes its speed from call to call. With `policy="top_k"` a call is one
    query, and `top_k` (int64) takes the place of `patience`. It gives `logits` [B, K] and `exit_layer` [B]. Rows that
    have answered keep their answer; the graph ends when all have. Of token classification there is one input more,
    `special_tokens_mask` (1 for tokens that need no answer), and `logits` are [B, S, K], `exit_layer` [B, S].

    Args:
        model: A PEFT model with an active BADGE adapter, in float32. It is copied, and stays as it is.
        directory: Is made; files of the same names are replaced.
        tokenizer: Saved next to the graph, for `OnnxEarlyExitModel.predict`.
        early_exit_config: The policy that goes into the file; None takes the active adapter's own. `min_exit`,
            `max_exit` and `depth` are fixed in the file, and blocks that no row can reach are not in it.
        int8: Quantize the weights of the blocks dynamically, with onnxruntime's own tool. Exits and decisions stay in
            float32. The scale of the activations is that of the whole batch, so rows then depend a little on their
            neighbors.
        examples: Tokenized rows, with or without labels, on which the file is compared with the PyTorch model: what
            int8 costs in score and does to the exits. A column `groups` says which are candidates of one query.
        progress: Show a progress bar.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        ImportError: torch is older than 2.8.
        ValueError: no BADGE adapter, not in float32, a policy or adapter underneath that has no ONNX form, or a file
            above 2 GB.
        RuntimeError: the file does not answer as the model does. Nothing is written then.
    """
    exporter = OnnxExporter(model, early_exit_config, progress=progress)
    return exporter.write(directory, tokenizer=tokenizer, int8=int8, examples=examples)


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
    """Writes `model.onnx` for many tasks, with the tokenizer and configs.

    The graph takes `input_ids`, `attention_mask` (and `token_type_ids` where the model has them), [B, S] int64, and
    for each task the scalars `<task>.threshold` (float32) and `<task>.patience` (int64), which may be left out: its
    config has their defaults. It gives `<task>.logits` [B, K] and `<task>.exit_layer` [B]; of a task that labels
    tokens [B, S, K] and [B, S], and the graph takes `special_tokens_mask`, too. A row's blocks end with its last task.

    Args:
        model: A PEFT model with BADGE adapters, in float32. It is copied, and stays as it is.
        directory: Is made; files of the same names are replaced.
        tasks: Names of adapters; None takes all.
        tokenizer: Saved next to the graph, for `OnnxTasksModel.predict`.
        early_exit_config: As for `early_exit_forward(tasks=...)`.
        int8: As for `export_onnx`.
        progress: Show a progress bar.

    Returns:
        What is in `early_exit.json`, with `size_bytes` and `max_difference`, the largest difference of logits from
        PyTorch's on random rows (float32 files).

    Raises:
        ValueError: tasks that cannot share a pass; and what `export_onnx` raises.
    """
    names = list(get_badge_model(model).peft_config) if tasks is None else list(tasks)
    exporter = OnnxExporter(model, early_exit_config, tasks=names, progress=progress)
    report = exporter.write(directory, tokenizer=tokenizer, int8=int8)
    sizes = {"size_bytes": report.size_bytes, "max_difference": report.max_difference}
    return {**exporter.metadata, "directory": report.directory, **sizes}


class OnnxExporter:
    """A model in pieces, of which `write` makes a file, or several: in float32 and in int8, say. Cutting it takes most
    of the time, at the first of them. Arguments and errors are those of `export_onnx`, and with the names of `tasks`
    those of `export_tasks_onnx`."""

    def __init__(
        self,
        model: nn.Module,
        early_exit_config: Any = None,
        *,
        tasks: Sequence[str] | None = None,
        progress: bool = False,
    ) -> None:
        require_onnx_exporter()
        from badge_peft.export.policies import grouped

        badge = get_badge_model(model)
        if tasks is not None:
            check_tasks(badge, tasks)
        _check_model(badge)
        self.tasks, self._progress = tasks or [], progress
        given = {ALONE: early_exit_config} if tasks is None else config_of_each(early_exit_config, tasks)
        self.decisions = {task: _decision(badge, task, given[task]) for task in given}
        self._read = {group.tasks: group.blocks() for group in grouped(self.decisions)}
        for group, numbers in self._read.items():
            numbers.update(*[adapter_exits(badge, task).linked_to({*numbers}) for task in group])
        self.hashes = {task: badge.weights_hash(task or None) for task in given}
        self.badge = _own_copy(badge)
        self.metadata: dict[str, Any] = {}  # of the last file

    @cached_property
    def pieces(self) -> Any:
        """`ExportedBlocks` of the model."""
        from badge_peft.export.trace import export_blocks

        return export_blocks(self.badge, self._read, self._progress)

    def write(
        self,
        directory: str | Path,
        *,
        tokenizer: Any = None,
        int8: bool = False,
        examples: Any = None,
    ) -> OnnxExportReport:
        """Writes the folder, once the file answers as the model does."""
        from badge_peft.export.sliced import assemble

        graph = assemble(self.pieces, self.decisions, int8=int8)
        if graph.ByteSize() > LARGEST:
            raise ValueError(
                f"the model takes {graph.ByteSize() / 1e9:.1f} GB, and one ONNX file holds 2 GB: use int8=True."
            )
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            self.metadata = _stage(here, graph, self._metadata(int8, tokenizer), self.badge, tokenizer)
            kind = OnnxTasksModel if self.tasks else OnnxEarlyExitModel
            session = kind.from_pretrained(here, threads=torch.get_num_threads())
            facts = next(iter(session.tasks.values()))
            configs = {task: own.policy.config for task, own in self.decisions.items()}
            report = OnnxExportReport(
                directory=str(directory),
                size_bytes=(here / MODEL).stat().st_size,
                int8=int8,
                policy=facts["early_exit"]["policy"],
                max_difference=None if int8 else self._difference(session, configs),
                changes=None if examples is None else compare(self.badge, session, configs[ALONE], examples),
                **{name: facts[name] for name in ("threshold", "patience", "exit_layers")},
            )
            last = [MODEL, CONFIG]
            if not self.tasks:
                (here / CARD).write_text(onnx_card(report, self.metadata, tokenizer is not None), encoding="utf-8")
                last.append(CARD)
            install(here, Path(directory), last=last)
        return report

    def _difference(self, session: OnnxEarlyExitModel, configs: dict[str, EarlyExitConfig]) -> float:
        """The largest difference from PyTorch's logits; refuses one that is more than rounding."""
        difference = largest_difference(self.badge, session, configs, example_inputs(self.badge.model, OTHER))
        if not difference < TOLERANCE:
            raise RuntimeError(
                f"the ONNX graph answers otherwise than the model: logits differ by {difference:.2g}. Please "
                "report the model's architecture and the versions of torch, onnx and onnxruntime."
            )
        return difference

    def _metadata(self, int8: bool, tokenizer: Any) -> dict[str, Any]:
        """What the folder's reader has to know, as JSON-able values."""
        tokens = any(own.reads_tokens for own in self.decisions.values())
        facts = {task: self._facts(task) for task in self.decisions}
        cut = getattr(tokenizer, "model_max_length", None)  # where training cut texts; one without a limit says 10^30
        longest = max_positions(self.badge.model)
        limits = [limit for limit in (longest, cut if cut and cut < 10**9 else None) if limit is not None]
        return {
            "format": 1,
            "inputs": [*self.pieces.inputs, *([SPECIAL] if tokens else [])],
            "num_blocks": self.badge.num_blocks,
            "hidden_size": cast(Any, self.badge.model.config).hidden_size,
            "reads_pairs": any(self.badge.config_of(task or None).reads_pairs for task in facts),
            "max_length": min(limits, default=None),  # tokens to which texts are cut
            "max_positions": longest,  # those that the model can read
            "int8": int8,
            "badge_peft": package_version(),
            **({"tasks": facts} if self.tasks else facts[ALONE]),
        }

    def _facts(self, task: str) -> dict[str, Any]:
        decision, policy, exits = self.decisions[task], self.decisions[task].policy, self.decisions[task].exits
        end = next(i for i in range(len(exits)) if policy.is_final(exits, i))
        named = task or self.badge.model.config.id2label
        return {
            "num_labels": decision.num_labels,
            "problem_type": decision.problem_type,
            "labels": self.badge.label_names(task or None) if named else None,
            "exit_layers": [exits[i] for i in range(end + 1) if decision.reads(i) and policy.can_exit(exits, i)],
            "weights_hash": self.hashes[task],
            "early_exit": policy.config.measured_on(self.hashes[task]).to_dict(),
            "threshold": decision.threshold,
            "patience": policy.patience,
            **({"top_k": policy.group_size} if policy.by_group else {}),
            "uses_threshold": decision.uses_threshold,
            "uses_patience": policy.counts_exits,
        }


def _decision(badge: BadgeModel, task: str, given: Any) -> Any:
    """The policy of a task, as the file has it."""
    from badge_peft.export.policies import Decision

    config = badge.config_of(task or None)
    policy = build_policy(EarlyExitConfig.of(config.early_exit if given is None else given))
    exits, labels = badge.exit_layers(task or None), config.resolved_labels
    decision = Decision(policy, exits, labels, config.resolved_problem_type, config.reads_tokens)
    decision.check_exportable(learned=config.learn_to_exit)
    if task and policy.by_group:
        raise ValueError(
            f"task {task!r} ranks: its rows are the candidates of one query, so it is exported alone, export_onnx."
        )
    if task and not is_number(decision.threshold):
        raise ValueError(
            f"task {task!r} has a threshold for each exit, and a file of many tasks takes one number for each "
            "task: give one, early_exit_config={...}, or export the task alone."
        )
    return decision


def _stage(here: Path, graph: Any, metadata: dict[str, Any], badge: BadgeModel, tokenizer: Any) -> dict[str, Any]:
    """Writes a graph, what belongs to it and the tokenizer, where there is one, into a temporary folder; returns the
    metadata with the digests of the tokenizer's files, and an id of it all."""
    import onnx

    if tokenizer is not None:
        tokenizer.save_pretrained(here)
    metadata = metadata | {"tokenizer_files": digests(here, os.listdir(here))}
    stored = graph.SerializeToString()
    metadata["id"] = hashlib.sha256(stored + json.dumps(metadata).encode()).hexdigest()[:16]
    entry = onnx.StringStringEntryProto(key=CONFIG, value=json.dumps(metadata))
    # two messages of protobuf, one after the other, are one
    (here / MODEL).write_bytes(stored + onnx.ModelProto(metadata_props=[entry]).SerializeToString())
    write_json(here / CONFIG, metadata)
    badge.model.config.save_pretrained(here)
    return metadata


def _check_model(badge: BadgeModel) -> None:
    """Refuses a model that has no ONNX form."""
    extension_of(badge.model).check_exportable(badge.model)
    if not badge.adapters_enabled:
        raise ValueError("the adapter is disabled, so there are no exits: leave disable_adapter() first.")
    if badge.layout.pooling == "last" and torch.__version__ < "2.10.dev0":
        raise ValueError(
            f"torch {torch.__version__} cannot trace the masks of a decoder: export it with torch 2.10 or newer. The "
            "file runs without torch."
        )
    other = sorted({str(p.dtype) for p in badge.model.parameters() if p.dtype != torch.float32})
    if other:
        raise ValueError(
            f"the model has weights in {', '.join(other)}: load it with dtype=torch.float32, and use int8=True for a "
            "smaller and faster file."
        )


def _own_copy(badge: BadgeModel) -> BadgeModel:
    """A copy on the CPU in eval mode, with the active LoRA of the adapter folded into the weights."""
    copied = copy.deepcopy(badge).cpu().eval()
    copied.compiled = None
    for layer in lora.lora_layers(copied.model):
        if layer.active_adapters and not (layer.merged or layer.disable_adapters):
            cast(Any, layer).merge()
    return copied
