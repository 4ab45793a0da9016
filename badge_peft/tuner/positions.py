"""How long an input may be."""

from __future__ import annotations

from torch import nn


def max_positions(model: nn.Module) -> int | None:
    """How many tokens the model's table of positions has room for; None where it has no table."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and MPNet count positions from behind the padding token's
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
