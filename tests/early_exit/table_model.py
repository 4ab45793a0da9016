"""An encoder whose exits say exactly what a test wants: every row carries a table of logits through blocks that change
nothing, and exit m reads entry m of it.

So the live path can be compared with a replay of the same table bit for bit, for any logits at all. The blocks check
that what they are handed belongs to the rows that they are handed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from badge_peft import BadgeConfig, BlockLayout

LAYOUT = {
    "blocks": "blocks",
    "attention_norm": "norm",
    "ffn": ["ffn"],
    "last_norm": "norm",
    "shared_arguments": ["shared"],
}


class TableConfig(PretrainedConfig):
    model_type = "logit-table"


class TableBlock(nn.Module):
    """Returns its input. The states are [b, S, (M + 1) * K]."""

    def __init__(self, size: int, returns_tuple: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.ffn = nn.Identity()
        self.returns_tuple = returns_tuple

    def forward(
        self, hidden_states: Tensor, witness: Any, pair: Any, shared: Any, flag: Any, unused: Any = None
    ) -> Any:
        """Every argument that has a row per input must have exactly the rows of `hidden_states`, in their order."""
        assert torch.equal(witness, hidden_states[:, 0])
        assert torch.equal(pair[0], hidden_states) and torch.equal(pair[1][0], hidden_states[:, :1])
        assert pair[2] is None and flag == "flag" and unused is None
        assert torch.equal(shared, torch.arange(2 * shared.shape[0]).view(-1, 2))
        return (hidden_states, None) if self.returns_tuple else hidden_states


class TableModel(PreTrainedModel):
    config_class = TableConfig

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        size = (config.num_blocks + 1) * config.num_labels
        self.blocks = nn.ModuleList([TableBlock(size, config.returns_tuple) for _ in range(config.num_blocks)])
        self.classifier = nn.Linear(size, config.num_labels)
        self.computed: list[int] = []  # rows of each block that ran, in order

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        batch = inputs_embeds.shape[0]
        # of these `shared` alone, which looks like a batch too, belongs to no row
        witness, pair = inputs_embeds[:, 0], (inputs_embeds, (inputs_embeds[:, :1],), None)
        shared = torch.arange(2 * batch).view(batch, 2)
        self.computed.clear()
        states = inputs_embeds
        for block in self.blocks:
            if self.config.by_keyword:
                result = block(hidden_states=states, witness=witness, pair=pair, shared=shared, flag="flag")
            else:
                result = block(states, witness, pair, shared=shared, flag="flag")
            states = result[0] if isinstance(result, tuple) else result
        assert states.shape == inputs_embeds.shape  # the head gets the full batch again
        return SequenceClassifierOutput(logits=self.classifier(states[:, 0]))


@cache
def table_model(
    num_labels: int,
    problem_type: str,
    exits: tuple[int, ...],
    num_blocks: int,
    final_exit: str = "exit",
    returns_tuple: bool = False,
    by_keyword: bool = False,
    full_rows_until: int = 0,
    carry: str | None = None,
) -> Any:
    """A PEFT model whose exits are at `exits` (the last is `num_blocks`) and read the table."""
    config = TableConfig(num_labels=num_labels, problem_type=problem_type)
    config.update({"num_blocks": num_blocks, "returns_tuple": returns_tuple, "by_keyword": by_keyword})
    badge = BadgeConfig(
        placement="none",
        block_layout=BlockLayout(**LAYOUT, full_rows_until=full_rows_until),
        exit_layers=list(exits),
        final_exit=final_exit,
        exit_pooling="cls",
        exit_dropout=0.0,
        train_head=False,
        carry=carry,
    )
    base = TableModel(config)
    model = get_peft_model(base, badge).eval()
    with torch.no_grad():
        select(base.classifier, num_blocks)
        for block in base.blocks:
            for head in block.badge_exit.values():
                for number, exit_ in head.items():
                    select(exit_.linear, int(number))
            block.base_layer.register_forward_pre_hook(_count(base), with_kwargs=True)
    return model


def select(linear: nn.Linear, entry: int) -> None:
    """Makes `linear` return entry `entry` of the table, exactly: all else is multiplied by 0."""
    k = linear.out_features
    linear.weight.zero_()
    linear.weight[:, entry * k : (entry + 1) * k] = torch.eye(k)
    linear.bias.zero_()


def _count(model: TableModel) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        model.computed.append((args[0] if args else kwargs["hidden_states"]).shape[0])

    return hook


def as_inputs(table: Tensor, length: int = 3) -> dict[str, Tensor]:
    """[B, M + 1, K] -> the model's arguments."""
    return {"inputs_embeds": table.flatten(1).unsqueeze(1).repeat(1, length, 1)}
