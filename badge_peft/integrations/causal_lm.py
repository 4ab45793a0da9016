"""`from_causal_lm`: a classifier from the rows of a language model's head, for rerankers and guards that answer with a
word."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def from_causal_lm(
    model: PreTrainedModel,
    label_tokens: Sequence[str | int],
    tokenizer: Any = None,
    *,
    one_score: bool = False,
) -> PreTrainedModel:
    """A sequence classifier whose logits are those that a language model gives these tokens as the next one.

    An instruction-tuned reranker or guard model says yes or no at the end of its prompt. As a classifier it needs no
    generation, and takes exits as any other: `get_peft_model(classifier, BadgeConfig(train_head=False))`.

    Args:
        model: An `AutoModelForCausalLM`. The classifier shares its backbone, and has a copy of the rows of its head.
        label_tokens: One token for each label, in their order: its number, or a text that is one token, as it stands
            in the answer (" yes" is another token than "yes").
        tokenizer: For texts; None takes that of the model's own name.
        one_score: For a reranker: one output [B, 1], the logit of the second token less that of the first, whose
            sigmoid is the share that the second has of the two.

    Returns:
        The model's `...ForSequenceClassification`, [B, K] logits, with the tokens as names of its labels.

    Raises:
        ValueError: less than two tokens, with `one_score` more than two, a text that is not one token, or a model that
            cannot be read like this.

    Source: vLLM loads Qwen3-Reranker in this way.
    """
    config = copy.deepcopy(model.config)
    kind = cast(Any, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING).get(type(config), None)
    head = model.get_output_embeddings()
    prefix = model.base_model_prefix
    none = f"{type(model).__name__} has no classifier in transformers that shares its backbone and scores its states."
    if kind is None or not isinstance(head, nn.Linear):
        raise ValueError(none)
    if head.bias is not None:
        raise ValueError(f"the head of {type(model).__name__} has a bias, and that of a {kind.__name__} has none.")
    numbers, names, pad = _tokens(model, label_tokens, tokenizer)
    if one_score and len(numbers) != 2:
        raise ValueError(f"label_tokens={label_tokens!r} is not allowed with one_score: give two, as ['no', 'yes'].")
    if getattr(config, "final_logit_softcapping", None):
        warnings.warn(
            f"{type(model).__name__} caps its logits at {config.final_logit_softcapping}: the classifier gives them "
            "uncapped, in the same order.",
            stacklevel=2,
        )
    weight = head.weight.detach()[torch.tensor(numbers, device=head.weight.device)]
    # what Cohere and MiniCPM3 do to their logits beside
    weight = weight * (getattr(model, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0))
    if one_score:
        weight, names = weight[1:] - weight[:1], names[1:]
        config.problem_type = "regression"
    config.num_labels = len(names)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    if config.pad_token_id is None:
        config.pad_token_id = pad
    with torch.device("meta"):  # its backbone is not wanted
        classifier = kind(config)
    same_backbone = type(getattr(classifier, prefix, None)) is type(getattr(model, prefix))
    if not same_backbone or not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ValueError(none)
    setattr(classifier, prefix, getattr(model, prefix))
    classifier.score = nn.Linear(weight.shape[1], len(names), bias=False, device=weight.device, dtype=weight.dtype)
    classifier.score.weight.data.copy_(weight)
    return classifier.train(model.training)


def _tokens(model: Any, label_tokens: Sequence[str | int], tokenizer: Any) -> tuple[list[int], list[str], int | None]:
    """The tokens' numbers and names, and the padding token's number."""
    given = [label_tokens] if isinstance(label_tokens, str) else list(label_tokens)
    if tokenizer is None and any(isinstance(token, str) for token in given):
        if not model.config._name_or_path:
            raise ValueError("the model does not say where its tokenizer is: pass tokenizer=..., or tokens' numbers.")
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    numbers = []
    for token in given:
        found = tokenizer.encode(token, add_special_tokens=False) if isinstance(token, str) else [token]
        if len(found) != 1 or not 0 <= found[0] < model.config.get_text_config().vocab_size:
            raise ValueError(
                f"label_tokens has {token!r}, which is not one token of the model: the tokenizer makes {found} of it."
            )
        numbers.append(int(found[0]))
    if len(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise ValueError(f"label_tokens={label_tokens!r} is not allowed: it must be two or more different tokens.")
    return numbers, [str(token) for token in given], getattr(tokenizer, "pad_token_id", None)
