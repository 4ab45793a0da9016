"""Tiny random models of every backbone in the table, and padded batches for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from badge_peft import BadgeBlock, BadgeConfig

#: Where all models and batches of the tests are: `make gpu` needs nothing else.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN = 32
BLOCKS = 3
LABELS = 3
VOCAB = 100
PAD = 1

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
}

#: How exits may build on one another.
LINKS: list[dict[str, Any]] = [{"carry": "logits"}]

# name -> (model_type, what differs from _SIZES; None leaves an entry out)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "camembert": ("camembert", {}),
    "electra": ("electra", {"embedding_size": 16}),
    "albert": ("albert", {"embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "albert-groups": (
        "albert",
        {"embedding_size": 16, "classifier_dropout_prob": 0.0, "num_hidden_layers": 4, "num_hidden_groups": 2},
    ),
    "distilbert": (
        "distilbert",
        {
            "dim": HIDDEN,
            "n_layers": BLOCKS,
            "n_heads": 4,
            "hidden_dim": 48,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
            **dict.fromkeys(
                (
                    "hidden_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "intermediate_size",
                    "hidden_dropout_prob",
                    "attention_probs_dropout_prob",
                    "classifier_dropout",
                )
            ),
        },
    ),
    "mpnet": ("mpnet", {}),
    "deberta-v2": (
        "deberta-v2",
        {
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "pooler_dropout": 0.0,
            "pooler_hidden_size": HIDDEN,
        },
    ),
    "modernbert-cls": (
        "modernbert",
        {"classifier_pooling": "cls", "global_attn_every_n_layers": 2, "local_attention": 4},
    ),
    "modernbert-mean": (
        "modernbert",
        {"classifier_pooling": "mean", "global_attn_every_n_layers": 2, "local_attention": 4},
    ),
}

if int(transformers.__version__.split(".")[0]) >= 5:  # before, ALBERT itself fails with several blocks in a group
    CASES["albert-inner"] = (
        "albert",
        {
            "embedding_size": 16,
            "classifier_dropout_prob": 0.0,
            "num_hidden_layers": 2,
            "num_hidden_groups": 2,
            "inner_group_num": 2,
        },
    )


#: Backbones of which another one runs the same kind of code: exported and compiled in `nox -s exhaustive` alone, and
#: otherwise tried with fewer settings.
KIN = (
    *("roberta", "xlm-roberta", "camembert", "electra", "mpnet", "distilbert"),
    *("albert-groups", "albert-inner", "modernbert-mean"),
)


def one_of_each_kind(cases: Iterable[str]) -> list[Any]:
    """`cases` for `parametrize`, those of `KIN` marked `exhaustive`."""
    return [pytest.param(case, marks=pytest.mark.exhaustive) if case in KIN else case for case in cases]


def crossed(cases: Iterable[str], *factors: Iterable[Any]) -> list[Any]:
    """Each backbone with all combinations of `factors`; kin with a third of them, the others marked `exhaustive`."""
    rows = list(itertools.product(*factors))
    return [
        pytest.param(case, *row, marks=pytest.mark.exhaustive if case in KIN and (turn + i) % 3 else [])
        for turn, case in enumerate(sorted(cases))
        for i, row in enumerate(rows)
    ]


#: transformers does not read the optimizer's file with a torch whose `torch.load` can be made to run code.
needs_safe_torch_load = pytest.mark.skipif(
    torch.__version__ < (2, 6), reason="transformers resumes a training with torch 2.6 and newer alone"
)


def make_model(case: str = "bert", seed: int = 0, num_labels: int = LABELS, **changes: Any) -> PreTrainedModel:
    """A random model in eval mode; equal arguments give equal weights.

    All weights, those of the LayerNorms too, are far from their usual start, so that whatever a test compares differs
    visibly where it should differ.
    """
    model_type, differing = CASES[case]
    fields = {**_SIZES, **differing, **changes}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
        cls_token_id=0,
        sep_token_id=2,
        num_labels=num_labels,
        initializer_range=fields.pop("initializer_range", 0.5),
        **{name: value for name, value in fields.items() if value is not None},
    )
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval() if model.device.type == "meta" else model.eval().to(DEVICE)


def make_batch(rows: int = 4, length: int = 8, seed: int = 1, side: str = "right") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, [B, S]; every row but the first is padded, each to another length."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(input_ids)
    for row in range(1, rows):
        padding = 1 + row % (length - 2)
        mask[row, slice(-padding, None) if side == "right" else slice(None, padding)] = 0
    return {"input_ids": input_ids.masked_fill(mask == 0, PAD).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def make_labels(problem_type: str = "single_label_classification", rows: int = 4, num_labels: int = LABELS) -> Tensor:
    """Labels of each kind that transformers knows."""
    generator = torch.Generator().manual_seed(2)
    if problem_type == "single_label_classification":
        return torch.randint(0, num_labels, (rows,), generator=generator).to(DEVICE)
    if problem_type == "multi_label_classification":
        return torch.randint(0, 2, (rows, num_labels), generator=generator).float().to(DEVICE)
    return (torch.randn(rows, generator=generator) if num_labels == 1 else torch.randn(rows, num_labels)).to(DEVICE)


def make_badge(case: str = "bert", base: nn.Module | None = None, adapter_name: str = "default", **fields: Any) -> Any:
    """A PEFT model in eval mode whose bypasses and exits are as if trained: no weight is zero or equal to its copy."""
    base = make_model(case) if base is None else base
    config = BadgeConfig(**{"r": 4, **fields})
    torch.manual_seed(0)
    model = get_peft_model(base, config, adapter_name=adapter_name).eval()  # type: ignore[arg-type]
    shake(model)
    return model


def shake(model: nn.Module, seed: int = 3, only: str = ".badge_") -> None:
    """Adds noise to the parameters with `only` in their names, the same for the same `seed`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if only in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def trained(case: str = "bert", base: nn.Module | None = None, **fields: Any) -> Any:
    """A model as after training: everything that is trained differs from its start."""
    model = make_badge(case, base=base, **fields)
    shake(model, only=".modules_to_save.")
    if fields.get("backbone") == "full":
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".badge_" not in name:
                shake(model, only=name)
    return model


def exits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of every exit, [B, E, K]."""
    with torch.no_grad():
        return model(**batch).exit_logits


def link(turn: int) -> dict[str, Any]:
    """Exits that stand alone, or one of `LINKS`."""
    return [{}, *LINKS][turn % (len(LINKS) + 1)]


def blocks_of(model: nn.Module) -> list[BadgeBlock]:
    """The wrapped blocks, each once."""
    return [module for module in model.modules() if isinstance(module, BadgeBlock)]


def checkpoint(model: Any, kwargs: dict[str, Any]) -> None:
    """Switches gradient checkpointing on; transformers 5 gives the method another name."""
    new = getattr(model, "activation_checkpointing_enable", None)
    if new is not None:
        new(kwargs)
    else:
        model.gradient_checkpointing_enable(kwargs)
