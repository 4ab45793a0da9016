"""`export_onnx`: a model with early exits as one ONNX file that skips all blocks after the exit."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from badge_peft._version import package_version
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.collate import SPECIAL
from badge_peft.export.folder import CONFIG, MODEL, digests
from badge_peft.export.pieces import OTHER, example_inputs
from badge_peft.export.report import OnnxExportReport, compare, largest_difference, onnx_card
from badge_peft.export.runtime import OnnxEarlyExitModel
from badge_peft.model import BadgeModel, get_badge_model
from badge_peft.model_card import CARD
from badge_peft.tuner import lora
from badge_peft.tuner.architectures import max_positions
from badge_peft.tuner.extensions import extension_of
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
        tokenizer: Saved beside the graph, for `OnnxEarlyExitModel.predict`.
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


class OnnxExporter:
    """A model in pieces, of which `write` makes a file, or several: in float32 and in int8, say. Cutting it takes most
    of the time, at the first of them. Arguments and errors are those of `export_onnx`."""

    def __init__(
        self,
        model: nn.Module,
        early_exit_config: EarlyExitConfig | dict[str, Any] | None = None,
        *,
        progress: bool = False,
    ) -> None:
        require_onnx_exporter()
        from badge_peft.export.policies import Decision

        badge = get_badge_model(model)
        check_model(badge)
        config = badge.config_of()
        given = badge.get_early_exit_config() if early_exit_config is None else early_exit_config
        policy = build_policy(EarlyExitConfig.of(given))
        exits = badge.exit_layers()
        self.decision = Decision(
            policy, exits, config.resolved_labels, config.resolved_problem_type, config.reads_tokens
        )
        self.decision.check_exportable(learned=config.learn_to_exit)
        self.exits = exits[: next(i for i in range(len(exits)) if policy.is_final(exits, i)) + 1]
        read = {number for i, number in enumerate(self.exits) if self.decision.reads(i)}
        self._read = read | badge.adapter_exits(badge.single_active_adapter()).linked_to(read)
        self._progress = progress
        self.weights_hash = badge.weights_hash()
        self.badge = own_copy(badge)

    @cached_property
    def pieces(self) -> Any:
        """`ExportedBlocks` of the model."""
        from badge_peft.export.trace import export_blocks

        return export_blocks(self.badge, self._read, self.exits[-1], self._progress)

    def write(
        self,
        directory: str | Path,
        *,
        tokenizer: Any = None,
        int8: bool = False,
        examples: Any = None,
    ) -> OnnxExportReport:
        """Writes the folder, once the file answers as the model does."""
        from badge_peft.export.assemble import assemble

        graph = assemble(self.pieces, self.decision, int8=int8)
        check_size(graph)
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            metadata = stage(here, graph, self._metadata(int8, tokenizer), self.badge, tokenizer)
            session = OnnxEarlyExitModel.from_pretrained(here, threads=torch.get_num_threads())
            policy_config = self.decision.policy.config
            report = OnnxExportReport(
                directory=str(directory),
                size_bytes=(here / MODEL).stat().st_size,
                policy=policy_config.policy,
                max_difference=None if int8 else self._difference(session),
                changes=None if examples is None else compare(self.badge, session, policy_config, examples),
                **{name: metadata[name] for name in ("int8", "threshold", "patience", "exit_layers")},
            )
            (here / CARD).write_text(onnx_card(report, metadata, tokenizer is not None), encoding="utf-8")
            install(here, Path(directory), last=(MODEL, CONFIG, CARD))
        return report

    def _difference(self, session: OnnxEarlyExitModel) -> float:
        inputs = example_inputs(self.badge.model, OTHER)
        return check_difference(largest_difference(self.badge, session, self.decision.policy.config, inputs))

    def _metadata(self, int8: bool, tokenizer: Any) -> dict[str, Any]:
        """What `OnnxEarlyExitModel` has to know, as JSON-able values."""
        decision, policy = self.decision, self.decision.policy
        config: Any = self.badge.model.config
        return {
            "format": 1,
            "inputs": [*self.pieces.inputs, *([SPECIAL] if decision.reads_tokens else [])],
            "num_labels": decision.num_labels,
            "problem_type": decision.problem_type,
            "labels": self.badge.label_names() if config.id2label else None,
            "num_blocks": self.badge.num_blocks,
            "hidden_size": config.hidden_size,
            "exit_layers": [number for i, number in enumerate(self.exits) if policy.can_exit(decision.exits, i)],
            "reads_pairs": self.badge.config_of().reads_pairs,
            **input_limits(self.badge, tokenizer),
            "weights_hash": self.weights_hash,
            "early_exit": policy.config.measured_on(self.weights_hash).to_dict(),
            "threshold": decision.threshold,
            "patience": policy.patience,
            **({"top_k": policy.group_size} if policy.by_group else {}),
            "uses_threshold": decision.uses_threshold,
            "uses_patience": policy.counts_exits,
            "int8": int8,
            "badge_peft": package_version(),
        }


def stage(here: Path, graph: Any, metadata: dict[str, Any], badge: BadgeModel, tokenizer: Any) -> dict[str, Any]:
    """Writes a graph, what belongs to it and the tokenizer, where there is one, into a temporary folder.

    Returns:
        The metadata with the digests of the tokenizer's files, and an id of it all.
    """
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


def input_limits(badge: BadgeModel, tokenizer: Any) -> dict[str, int | None]:
    """`max_length`, tokens to which texts are cut, and `max_positions`, those that the model can read."""
    cut = getattr(tokenizer, "model_max_length", None)  # where training cut texts; one without a limit says 10^30
    limits = (max_positions(badge.model), cut if cut and cut < 10**9 else None)
    return {
        "max_length": min((limit for limit in limits if limit is not None), default=None),
        "max_positions": limits[0],
    }


def check_size(graph: Any) -> None:
    """Refuses a graph that no file holds.

    Raises:
        ValueError: it takes more than 2 GB.
    """
    if graph.ByteSize() > LARGEST:
        raise ValueError(
            f"the model takes {graph.ByteSize() / 1e9:.1f} GB, and one ONNX file holds 2 GB: use int8=True."
        )


def check_difference(difference: float) -> float:
    """Refuses a file whose logits differ from PyTorch's by more than rounding.

    Raises:
        RuntimeError: they do.
    """
    if not difference < TOLERANCE:
        raise RuntimeError(
            f"the ONNX graph answers otherwise than the model: logits differ by {difference:.2g}. Please "
            "report the model's architecture and the versions of torch, onnx and onnxruntime."
        )
    return difference


def check_model(badge: BadgeModel) -> None:
    """Refuses a model that has no ONNX form.

    Raises:
        ValueError: why, and the remedy.
    """
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


def own_copy(badge: BadgeModel) -> BadgeModel:
    """A copy on the CPU in eval mode, with the active LoRA of the adapter folded into the weights."""
    copied = copy.deepcopy(badge).cpu().eval()
    copied.compiled = None
    for layer in lora.lora_layers(copied.model):
        if layer.active_adapters and not (layer.merged or layer.disable_adapters):
            cast(Any, layer).merge()
    return copied
