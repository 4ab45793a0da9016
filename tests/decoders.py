"""Tiny random decoders that classify, one for each family."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models import DEVICE, HIDDEN, LABELS, PAD, VOCAB

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_SLIDING = {"sliding_window": 4}  # shorter than the texts
#: Model type -> what differs. gpt2 has other names for everything, granite no classifier in transformers.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": _SLIDING,
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "phi3": {},
    "smollm3": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.5},
    "gpt2": {"n_embd": HIDDEN, "n_layer": 3, "n_head": 4, "n_positions": 40},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
}


if not hasattr(transformers, "Olmo2ForSequenceClassification"):  # 4.57
    del FAMILIES["olmo2"]


def make_decoder(family: str, auto: Any = None, **changes: Any) -> Any:
    """A random model in eval mode, far from its usual start; without a head where the family has no classifier."""
    if auto is None:
        auto = AutoModel if family == "granite" else AutoModelForSequenceClassification
    fields = {**({} if family == "gpt2" else _SIZES), **FAMILIES[family], "num_labels": LABELS, **changes}
    if auto is AutoModelForCausalLM:
        del fields["num_labels"]
    config = AutoConfig.for_model(
        family, **{"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, **fields}
    )
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().to(DEVICE)
