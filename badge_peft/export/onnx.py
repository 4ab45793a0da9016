"""`export_onnx`: a model with early exits as one ONNX file that computes no block behind the exit."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import get_badge_model
from badge_peft.early_exit.policies import build_policy
from badge_peft.export.runtime import CONFIG, MODEL, OnnxEarlyExitModel
from badge_peft.model import BadgeModel
from badge_peft.tuner import lora
from badge_peft.tuner.adapters_library import check_exportable
from badge_peft.tuner.positions import max_positions
from badge_peft.tuner.prepare import package_version
from badge_peft.utils.extras import require_onnx_exporter

if TYPE_CHECKING:
    from badge_peft.export.changes import Changes
    from badge_peft.export.decisions import Decision

LARGEST = 2**31 - 1  # bytes of one protobuf message
TOLERANCE = 1e-3  # of logits, above what rounding makes of them; PyTorch and the file agree to about 1e-5


@dataclass
class OnnxExportReport:
    """What `export_onnx` wrote.

    Args:
        directory: Where.
        size_bytes: Of `model.onnx`.
        int8: Whether the blocks are quantised.
        policy: The exit rule that is in the file.
        threshold: Its default for the input `threshold`.
        patience: Its default for the input `patience`.
        exit_layers: Block numbers at which rows can answer.
        max_difference: Largest difference of logits from PyTorch's on random rows (float32 files).
        changes: What differs from the PyTorch model on `examples`, where there were any.
    """

    directory: str
    size_bytes: int
    int8: bool
    policy: str
    threshold: float
    patience: int
    exit_layers: list[int]
    max_difference: float | None = None
    changes: Changes | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)


def export_onnx(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    early_exit_config: EarlyExitConfig | dict[str, Any] | None = None,
    int8: bool = False,
    compact: bool = True,
    examples: Any = None,
    progress: bool = False,
) -> OnnxExportReport:
    """Writes `model.onnx` and what belongs to it: tokenizer, configs and a model card.

    The graph takes `input_ids`, `attention_mask` (and `token_type_ids` where the model has them), [B, S] int64, and
    the scalars `threshold` (float32) and `patience` (int64), which have the config's values as defaults: a service
    changes its speed from call to call. It gives `logits` [B, K] and `exit_layer` [B]. Rows that have answered keep
    their answer; the graph ends when all have.

    Args:
        model: A PEFT model with an active BADGE adapter, in float32.
        directory: Is made; files of the same names are replaced.
        tokenizer: Saved beside the graph, for `OnnxEarlyExitModel.predict`.
        early_exit_config: The rule that goes into the file; None takes the active adapter's own. `min_exit`,
            `max_exit` and `depth` are fixed in the file, and blocks that nobody can reach are not in it.
        int8: Quantise the weights of the blocks dynamically, with onnxruntime's own tool. Exits and decisions stay in
            float32. The scale of the activations is that of the whole batch, so rows then depend a little on their
            neighbours.
        compact: Take rows that have answered out of the batch. Without it they go along; at batch size 1 there is no
            difference in what is computed.
        examples: Tokenised rows, with or without labels, on which the file is compared with the PyTorch model: what
            int8 costs in score and does to the exits.
        progress: Show a progress bar.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        ImportError: torch is older than 2.8.
        ValueError: no BADGE adapter, not in float32, an exit type, policy or adapter underneath that has no ONNX form,
            or a file above 2 GB.
        RuntimeError: the file does not answer as the model does. Nothing is written then.
    """
    require_onnx_exporter()
    from badge_peft.export.assemble import assemble
    from badge_peft.export.changes import compare, largest_difference
    from badge_peft.export.decisions import Decision
    from badge_peft.export.trace import cut

    badge = get_badge_model(model)
    _check(badge)
    config = badge.config_of()
    wanted = badge.get_early_exit_config() if early_exit_config is None else EarlyExitConfig.of(early_exit_config)
    exits = badge.exit_layers()
    decision = Decision(build_policy(wanted), exits, config.resolved_labels, config.resolved_problem_type)
    decision.check_exportable(learned=config.learn_to_exit)
    read = {m for i, m in enumerate(exits) if decision.reads(i)}
    depth = next(m for i, m in enumerate(exits) if decision.is_last(i))

    with _ready(badge):
        pieces = cut(badge, {m for m in read if m <= depth}, depth, progress)
        graph = assemble(pieces, decision, int(config.hidden_size or 0), int8=int8, compact=compact)
        if graph.ByteSize() > LARGEST:
            raise ValueError(
                f"the model takes {graph.ByteSize() / 1e9:.1f} GB, and one ONNX file holds 2 GB: use int8=True."
            )
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            (here / MODEL).write_bytes(graph.SerializeToString())
            facts = _facts(badge, decision, pieces.inputs, wanted, int8, compact)
            (here / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            badge.model.config.save_pretrained(here)
            if tokenizer is not None:
                tokenizer.save_pretrained(here)
            session = OnnxEarlyExitModel.from_pretrained(here, threads=torch.get_num_threads())
            report = OnnxExportReport(
                str(directory), (here / MODEL).stat().st_size, int8, wanted.policy, facts["threshold"],
                facts["patience"], facts["exit_layers"],
            )  # fmt: skip
            if not int8:
                report.max_difference = largest_difference(badge, session, wanted)
                if not report.max_difference < TOLERANCE:
                    raise RuntimeError(
                        f"the ONNX graph answers otherwise than the model: logits differ by "
                        f"{report.max_difference:.2g}. Please report the model's architecture and the versions of "
                        "torch, onnx and onnxruntime."
                    )
            if examples is not None:
                report.changes = compare(badge, session, wanted, examples)
            from badge_peft.export.card import onnx_card

            (here / "README.md").write_text(onnx_card(report, facts, tokenizer is not None), encoding="utf-8")
            target = Path(directory)
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(here.iterdir()):
                shutil.move(str(file), str(target / file.name))
    return report


def _check(badge: BadgeModel) -> None:
    config = badge.config_of()
    check_exportable(badge.model)
    if not badge.adapters_enabled:
        raise ValueError("the adapter is disabled, so there are no exits: leave disable_adapter() first.")
    if config.exit_type == "past_future":
        raise ValueError(
            "exit_type='past_future' has no ONNX form here: its exits read one another's states. Allowed are linear, "
            "pooled and mha."
        )
    other = sorted({str(p.dtype) for p in badge.model.parameters() if p.dtype != torch.float32})
    if other:
        raise ValueError(
            f"the model has weights in {', '.join(other)}: load it with dtype=torch.float32, and use int8=True for a "
            "smaller and faster file."
        )


def _facts(
    badge: BadgeModel, decision: Decision, inputs: list[str], wanted: EarlyExitConfig, int8: bool, compact: bool
) -> dict[str, Any]:
    """What `OnnxEarlyExitModel` has to know, as JSON-able values."""
    exits = [m for i, m in enumerate(decision.exits) if decision.may_stop(i)]
    depth = next(m for i, m in enumerate(decision.exits) if decision.is_last(i))
    config: Any = badge.model.config
    return {
        "format": 1,
        "inputs": inputs,
        "num_labels": decision.num_labels,
        "problem_type": decision.problem_type,
        "labels": [str(config.id2label[i]) for i in range(decision.num_labels)] if config.id2label else None,
        "num_blocks": badge.num_blocks,
        "exit_layers": [m for m in exits if m <= depth],
        "max_length": max_positions(badge.model),
        "early_exit": wanted.to_dict(),
        "threshold": decision.threshold()[0],
        "patience": decision.patience,
        "uses_threshold": decision.uses_threshold,
        "uses_patience": decision.uses_patience,
        "int8": int8,
        "compact": compact,
        "badge_peft": package_version(),
    }


@contextmanager
def _ready(badge: BadgeModel) -> Iterator[None]:
    """In eval mode, with the adapter's own LoRA folded into the weights; afterwards all is bit for bit as before."""
    training, compiled = badge.training, badge.compiled
    layers = [x for x in lora.lora_layers(badge.model) if x.active_adapters and not (x.merged or x.disable_adapters)]
    weights = [cast(nn.Parameter, x.get_base_layer().weight) for x in layers]
    kept = [weight.detach().clone() for weight in weights]
    badge.eval()
    badge.compiled = None
    try:
        for layer in layers:
            cast(Any, layer).merge()
        yield
    finally:
        for layer, weight, before in zip(layers, weights, kept, strict=True):
            layer.merged_adapters.clear()
            with torch.no_grad():
                weight.copy_(before)
        badge.compiled = compiled
        badge.train(training)
