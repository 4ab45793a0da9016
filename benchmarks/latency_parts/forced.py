"""A model whose rows leave where we want them to, by real decisions.

Timings need exits that are known beforehand, and random weights decide at random. Here the token at position 0 says
where its row leaves: the last-but-one exit that a row passes is the first that is sure of its answer, and the one
after it agrees (DGE, cross-entropy, tau = 0.2, t = 1), so that a row with the token of block k leaves at block k. The
same weights do it in PyTorch, in ONNX Runtime, alone and in a batch; nothing about the call differs from service.

The token is given a large embedding, so that the states of position 0 tell it in every block, and each exit's weights
are a ridge regression on these states: a logit of 10 where the exit should be sure, 0 where it should not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import badge_peft
from badge_peft.tuner.bypass import Bypass
from badge_peft.tuner.exits import MultiExitHead

RULE = {"policy": "divergence", "divergence": "ce", "threshold": 0.2, "patience": 1}
NOBODY = {**RULE, "threshold": 1e-9}  # decisions are made, and nobody leaves

#: Logit of an exit that is sure; any above 4 agree to within tau, any below 2.5 do not.
SURE = 10.0
_LOUD = 10.0  # times the usual embedding
_SAMPLES = 2  # contexts per token and length that the weights are fitted on
_RIDGE = 1e-2


class Size(NamedTuple):
    """Of a BERT of random weights: d, M, heads of each attention, tokens."""

    hidden: int
    blocks: int
    heads: int
    vocabulary: int = 30522


SIZES = {
    "BERT-base": Size(768, 12, 12),
    "h384": Size(384, 12, 12),  # MiniLM-L12-H384, e5-small
    "tiny": Size(32, 4, 2, 200),  # tries a benchmark: says nothing about speed
}


@dataclass
class Forced:
    """Stock model, PEFT model (in eval mode, its adapter's own policy is `RULE`) and the stock model without its
    blocks (`outside`: embeddings, masks, pooler, head, and what a call costs that computes nothing), of the same
    weights."""

    size: Size
    stock: BertForSequenceClassification
    model: Any
    outside: BertForSequenceClassification

    def batch(self, exits: Sequence[int], length: int, seed: int = 0) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [B, S] of rows that leave at `exits` (2 to M); no padding."""
        return make_batch(self.size, exits, length, seed)


def add_copy(forced: Forced, name: str) -> None:
    """Gives the model an adapter of the same weights and rule as its first under another name."""
    first = forced.model.peft_config["default"]
    config = badge_peft.BadgeConfig(train_head=False, early_exit=first.early_exit)
    forced.model.add_adapter(name, config)
    weights = peft.get_peft_model_state_dict(forced.model, adapter_name="default")
    peft.set_peft_model_state_dict(forced.model, weights, adapter_name=name)
    forced.model.eval()


def exits_of(output: Any) -> list[int]:
    """The blocks at which the rows left, of an output with `exit_layer` [B]."""
    return [int(number) for number in output.exit_layer]


def build(size: Size, lengths: Sequence[int], with_stock: bool = True) -> Forced:
    """Makes the models and fits the exits to rows of these lengths. Without stock there is one set of weights, for the
    measurement of memory: `stock` is then the base model inside of `model`."""
    torch.manual_seed(0)
    base = make_base(size)
    weights = _fit(shared_copy(base), size, lengths)  # transformers leaves hooks behind where it has captured states
    stock = copy.deepcopy(base) if with_stock else base
    outside = shared_copy(base)
    outside.bert.encoder.layer = torch.nn.ModuleList()
    config = badge_peft.BadgeConfig(train_head=False, early_exit=dict(RULE))
    model = peft.get_peft_model(base, config).eval()
    _install(model, weights)
    return Forced(size, stock, model, outside)


def make_base(size: Size) -> BertForSequenceClassification:
    """The stock model: random weights, two labels, eval mode."""
    config = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        num_labels=2,
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[: size.blocks + 1] *= _LOUD
    return model


def shared_copy(model: Any) -> Any:
    """Another model on the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def make_batch(size: Size, exits: Sequence[int], length: int, seed: int = 0) -> dict[str, Tensor]:
    """See `Forced.batch`: token k at position 0 means block k, the others are random and mean nothing."""
    wrong = [number for number in exits if not 2 <= number <= size.blocks]
    if wrong:
        raise ValueError(f"exits={wrong} is not allowed: DGE stops at blocks 2 to {size.blocks}.")
    generator = torch.Generator().manual_seed(seed)
    shape = (len(exits), length)
    input_ids = torch.randint(size.vocabulary // 2, size.vocabulary, shape, generator=generator)
    input_ids[:, 0] = torch.as_tensor(list(exits))
    return {"input_ids": input_ids, "attention_mask": torch.ones(shape, dtype=torch.long)}


def even_exits(rows: int, blocks: int) -> list[int]:
    """Exits from 2 to M, as even as can be; [B], in no order that a batch could profit from."""
    exits = np.linspace(2, blocks, rows).round().astype(int)
    return [int(number) for number in np.random.default_rng(0).permutation(exits)]


@torch.inference_mode()
def _fit(base: BertForSequenceClassification, size: Size, lengths: Sequence[int]) -> list[Tensor]:
    """Weights and bias [d + 1] of the logit of every exit 1 to M - 1."""
    exits = list(range(2, size.blocks + 1)) * _SAMPLES
    states: list[list[Tensor]] = [[] for _ in range(size.blocks - 1)]
    for seed, length in enumerate(lengths, start=1):
        ids = make_batch(size, exits, length, seed)
        for part in range(0, len(exits), 8):
            rows = {name: value[part : part + 8] for name, value in ids.items()}
            hidden = base(**rows, output_hidden_states=True).hidden_states[1:-1]  # H_1 to H_{M-1}, [b, S, d]
            for m, state in enumerate(hidden):
                states[m].append(state[:, 0].double())
    wanted = torch.as_tensor(exits * len(lengths), dtype=torch.double)
    found = []
    for m, parts in enumerate(states, start=1):
        x = torch.cat([torch.cat(parts), torch.ones(len(wanted), 1, dtype=torch.double)], dim=1)  # [n, d + 1]
        y = SURE * (wanted - 1 <= m).double()  # sure from exit k - 1 on
        gram = x @ x.T + _RIDGE * len(x) * torch.eye(len(x), dtype=torch.double)  # [n, n]: n may be below d
        found.append((x.T @ torch.linalg.solve(gram, y)).float())
    return found


@torch.no_grad()
def _install(model: Any, weights: list[Tensor]) -> None:
    """Logits (w x + b, 0) for every exit; W_up a little off zero, as nothing that is in service has zeros there."""
    for module in model.modules():
        if isinstance(module, Bypass):
            module.up.weight.normal_(std=1e-4)
        if isinstance(module, MultiExitHead):
            for number in module:
                linear = module.exit(int(number)).linear
                linear.weight.zero_()
                linear.bias.zero_()
                linear.weight[0] = weights[int(number) - 1][:-1]
                linear.bias[0] = weights[int(number) - 1][-1]
