"""Bypasses, exits and their loss written plainly: hooks on an unwrapped model, Eq. 1 and 2, and Eq. 8.

Nothing here uses the code under test. Where the parts of a backbone are is written down a second time, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Parts:
    """Where a backbone has what the equations name, and its FFN (in eval mode or without dropout)."""

    blocks: str
    attention_norm: str
    last_norm: str | None  # post-LN
    final_norm: str | None  # pre-LN
    ffn: Callable[[Any, Tensor], Tensor]


_BERT = Parts(
    "encoder.layer.*",
    "attention.output.LayerNorm",
    "output.LayerNorm",
    None,
    lambda block, x: block.output.dense(block.intermediate.intermediate_act_fn(block.intermediate.dense(x))),
)

PARTS: dict[str, Parts] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), _BERT),
    "albert": Parts(
        "encoder.albert_layer_groups.*.albert_layers.*",
        "attention.LayerNorm",
        "full_layer_layer_norm",
        None,
        lambda block, x: block.ffn_output(block.activation(block.ffn(x))),
    ),
    "distilbert": Parts(
        "transformer.layer.*",
        "sa_layer_norm",
        "output_layer_norm",
        None,
        lambda block, x: block.ffn.lin2(block.ffn.activation(block.ffn.lin1(x))),
    ),
    "mpnet": replace(_BERT, attention_norm="attention.LayerNorm"),
    "modernbert": Parts("layers.*", "mlp_norm", None, "final_norm", lambda block, x: block.mlp(block.mlp_norm(x))),
}

#: The dense layer in front of the tanh that the model's own head reads.
POOLERS = {"bert": "bert.pooler.dense", "albert": "albert.pooler"}
POOLERS |= dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), "classifier.dense")

ACTIVATIONS: dict[str, Any] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    "identity": lambda x: x,
}


@dataclass
class States:
    """What one block computes, [B, S, d] each."""

    block: Any
    block_input: Tensor  # H_{m-1}
    attention_sum: Any = None  # the input of the attention norm
    attention: Any = None  # H_{m,MHA}
    ffn_sum: Any = None  # H_{m,F}
    output: Any = None  # H_m


def submodules(root: nn.Module, pattern: str) -> list[nn.Module]:
    """The modules at `pattern`, where `*` stands for every entry of a list."""
    found = [root]
    for part in pattern.split("."):
        found = [child for m in found for child in (m if part == "*" else [getattr(m, part)])]  # type: ignore
    return found


def trace(model: Any, batch: dict[str, Tensor]) -> tuple[list[States], Tensor]:
    """The states of blocks 1 to M, in the order in which they run, and the logits of the model's own head."""
    parts = PARTS[model.config.model_type]
    states: list[States] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(States(module, args[0] if args else kwargs["hidden_states"]))

    def add(name: str, value: Tensor) -> None:
        before = getattr(states[-1], name)  # the feed-forward part may come in chunks of the sequence
        setattr(states[-1], name, value if before is None else torch.cat([before, value], dim=1))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        states[-1].output = output[0] if isinstance(output, tuple) else output
        if parts.last_norm is None:
            states[-1].ffn_sum = states[-1].output

    handles = []
    for block in submodules(model.base_model, parts.blocks):
        norm = block.get_submodule(parts.attention_norm)
        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.register_forward_hook(leave))
        if parts.last_norm is None:
            handles.append(norm.register_forward_pre_hook(lambda module, args: add("attention", args[0])))
        else:
            handles.append(norm.register_forward_pre_hook(lambda module, args: add("attention_sum", args[0])))
            handles.append(norm.register_forward_hook(lambda module, args, output: add("attention", output)))
            last = block.get_submodule(parts.last_norm)
            handles.append(last.register_forward_pre_hook(lambda module, args: add("ffn_sum", args[0])))
    logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    return states, logits


def exit_norm(model: Any, block: Any) -> Any:
    """The norm that LN' of `block` shares or copies."""
    parts = PARTS[model.config.model_type]
    if parts.last_norm is None:
        return model.base_model.get_submodule(parts.final_norm)
    return block.get_submodule(parts.last_norm)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    return normed if bias is None else normed + bias


def own_weights(peft_model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's parameters under short names: `bypass.1.down.weight`, `exit.0.linear.bias`."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        kind, _, rest = name.partition(".badge_")[2].partition(f".{adapter}.")
        if rest:
            found[f"{kind}.{rest}"] = parameter
    return found


def pool(states: Tensor, mask: Tensor, kind: str) -> Tensor:
    """[B, S, d] -> [B, d], row by row."""
    rows = []
    for row, real in zip(states, mask.bool(), strict=True):
        if kind == "cls":
            rows.append(row[0])
        else:
            rows.append(row[real].mean(0) if kind == "mean" else row[real][-1])
    return torch.stack(rows)


def exit_logits(
    model: Any,
    config: Any,
    weights: dict[str, Tensor],
    states: list[States],
    number: int,
    mask: Tensor,
    kind: str,
) -> Tensor:
    """Logits of exit `number` at the states that `trace` has found, [B, K].

    Args:
        model: The unwrapped model.
        config: The BadgeConfig.
        weights: `own_weights` of the adapter.
        states: Of all blocks.
        number: 1 to M, or 0 for the embeddings.
        mask: [B, S].
        kind: The pooling.
    """
    block = states[max(number - 1, 0)]
    parts, norm = PARTS[model.config.model_type], exit_norm(model, block.block)
    w = {name.removeprefix(f"bypass.{number}."): p for name, p in weights.items() if f"bypass.{number}." in name}
    if number == 0:
        state = block.block_input
    elif config.placement == "none":
        state = block.output
        if parts.last_norm is None:
            state = layer_norm(state, norm.weight, norm.bias, norm.eps)
    else:
        inner = bottleneck(config, weights, block, number)
        adjustment = inner @ w["up.weight"].T + w.get("up.bias", 0)  # B, Eq. 1
        if config.placement != "mhsa":
            state = adjustment + block.ffn_sum
        elif parts.last_norm is None:
            inner = adjustment + block.attention
            state = parts.ffn(block.block, inner) + inner
        else:
            attention_norm = block.block.get_submodule(parts.attention_norm)
            inner = layer_norm(
                adjustment + block.attention_sum, attention_norm.weight, attention_norm.bias, attention_norm.eps
            )
            state = parts.ffn(block.block, inner) + inner
        state = layer_norm(state, w["norm.weight"], w.get("norm.bias"), norm.eps)  # Eq. 2
    w = {name.removeprefix(f"exit.{number}."): p for name, p in weights.items() if f"exit.{number}." in name}
    attended = attend(state, mask, w) if config.exit_type in ("mha", "residual_mha") else None
    pooled = pool(state if attended is None or config.exit_type == "residual_mha" else attended, mask, kind)
    if config.exit_type == "residual_mha":
        pooled = pooled + pool(attended, mask, kind)
    if config.exit_type == "pooled":
        pooled = torch.tanh(pooled @ w["dense.weight"].T + w["dense.bias"])
    if config.exit_type == "shared_pooled":
        dense = model.get_submodule(POOLERS[model.config.model_type])
        pooled = torch.tanh(pooled @ dense.weight.T + dense.bias)
    return pooled @ w["linear.weight"].T + w["linear.bias"]


def bottleneck(config: Any, weights: dict[str, Tensor], block: States, number: int) -> Tensor:
    """s_m [B, S, r] of the bypass at block `number`."""
    w = {name.removeprefix(f"bypass.{number}."): p for name, p in weights.items() if f"bypass.{number}." in name}
    source = block.attention if config.placement == "ffn" else block.block_input
    inner = source @ w["down.weight"].T + w.get("down.bias", 0)
    return ACTIVATIONS[config.activation](inner)


def attend(states: Tensor, mask: Tensor, w: dict[str, Tensor], heads: int = 2) -> Tensor:
    """Multi-head attention over the real positions, [B, S, d] -> [B, S, d]."""
    rows = []
    for row, real in zip(states, mask.bool(), strict=True):
        query, key, value = (row @ w[f"{name}.weight"].T for name in ("query", "key", "value"))  # [S, 32]
        parts = []
        for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
            scores = (q @ k.T / k.shape[-1] ** 0.5).masked_fill(~real, -torch.inf)
            parts.append(scores.softmax(-1) @ v)
        rows.append(torch.cat(parts, -1) @ w["output.weight"].T)
    return torch.stack(rows)


def all_logits(
    model: Any, config: Any, weights: dict[str, Tensor], batch: dict[str, Tensor], kind: str
) -> list[Tensor]:
    """Logits of every exit, shallow to deep; of all M blocks unless `config.exit_layers` says otherwise."""
    states, own = trace(model, batch)
    numbers = sorted({*config.exit_layers, len(states)}) if config.exit_layers else range(1, len(states) + 1)
    logits: list[Tensor] = []
    for number in numbers:
        if number == len(states) and config.final_exit == "base_head":
            logits.append(own)
            continue
        found = exit_logits(model, config, weights, states, number, batch["attention_mask"], kind)
        if config.carry == "logits" and logits:  # the exit before, whose logits take no gradient
            found = found + weights[f"exit.{number}.carry.weight"] * logits[-1].detach()
        logits.append(found)
    return logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows of -log p(label)."""
    rows = [row[label] - torch.log(torch.exp(row).sum()) for row, label in zip(logits, labels, strict=True)]
    return -torch.stack(rows).mean()
