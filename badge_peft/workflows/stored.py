"""Exit logits that lie in a file or in an adapter's folder, and whether they are of that adapter."""

from __future__ import annotations

from pathlib import Path

from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.hub import LOGITS
from badge_peft.workflows.adapter_dir import check_adapter, read_config


def stored_logits(path: str | Path) -> ExitLogits:
    """The exit logits in a file, or those that `badge-peft train` left in an adapter's folder."""
    file = Path(path)
    if file.is_dir():
        check_adapter(path)
        file = file / LOGITS
        if not file.exists():
            raise FileNotFoundError(
                f"{path} has no {LOGITS}: give the data to run through the adapter, or write the file with "
                "`badge-peft evaluate --save-logits`."
            )
    elif not file.exists():
        raise FileNotFoundError(f"there is no file or folder {path}.")
    found = ExitLogits.load(file)
    if Path(path).is_dir():
        check_fit(path, found)
    return found


def check_fit(folder: str | Path, exit_logits: ExitLogits) -> None:
    """Refuses stored logits that are not of this adapter."""
    config = read_config(folder)
    blocks, labels, exits = (config.get(name) for name in ("num_blocks", "num_labels", "exit_layers"))
    depth, outputs = exit_logits.depth, exit_logits.logits.shape[-1]
    wanted = sorted({*(exits or range(1, depth + 1)), depth})
    remedy = f"give the data to run through the adapter, or store them anew: badge-peft evaluate {folder} DATA "
    remedy += f"--save-logits {Path(folder) / LOGITS}"
    if blocks not in (None, depth) or labels not in (None, outputs):
        raise ValueError(
            f"the exit logits are of a model with {depth} blocks and {outputs} outputs, but the adapter in "
            f"{folder} has {blocks} and {labels}: {remedy}"
        )
    if exit_logits.exits != wanted:
        raise ValueError(
            f"the exit logits are of exits {exit_logits.exits}, but the adapter in {folder} has {wanted}: {remedy}"
        )
    hashes = {exit_logits.weights_hash, config.get("weights_hash")}
    if len(hashes - {None}) > 1:
        raise ValueError(f"the exit logits are of other weights than the adapter in {folder} has now: {remedy}")
