"""`pipeline`: transformers' text-classification pipeline, on a model that exits early."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn
from transformers import AutoTokenizer, TextClassificationPipeline
from transformers.pipelines.text_classification import ClassificationFunction

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.hub import has_tokenizer, load_pretrained
from badge_peft.model import get_badge_model
from badge_peft.outputs import EarlyExitOutput

TASKS = ("text-classification", "sentiment-analysis")
_FIELDS = frozenset(EarlyExitConfig.__dataclass_fields__)
_FUNCTIONS = {
    "regression": ClassificationFunction.NONE,
    "multi_label_classification": ClassificationFunction.SIGMOID,
    "single_label_classification": ClassificationFunction.SOFTMAX,
}


class EarlyExitPipeline(TextClassificationPipeline):
    """transformers' pipeline, in which each text goes as deep as it must.

    Batches, text pairs, `top_k`, `function_to_apply` and the tokenizer's arguments (`truncation=True`) are as there.
    Each answer also holds `exit_layer`, the block that gave it (0: the embeddings). `early_exit_config` and fields of
    `EarlyExitConfig` may be given when the pipeline is made and with each call; those of the call win.

    Raises:
        ValueError: the model carries no BADGE adapter or has no name for a label, or a field is wrong.
    """

    def check_model_type(self, supported_models: Any) -> None:
        """A PEFT model is none of the classes that transformers lists here: what counts is the adapter."""
        config = get_badge_model(self.model).config_of()
        names = self.model.config.id2label or {}
        if any(i not in names for i in range(config.resolved_labels)):
            raise ValueError(
                f"the exits have {config.resolved_labels} outputs, but the model's config names {len(names)} labels: "
                "set id2label in model.config, or BadgeConfig(label_names=...) before training."
            )

    # transformers types these methods for every kind of pipeline: hence `ignore[override]`
    def _sanitize_parameters(  # type: ignore[override]
        self, early_exit_config: Any = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        rule = {name: kwargs.pop(name) for name in _FIELDS & kwargs.keys()}
        EarlyExitConfig.of(early_exit_config, **rule)  # a wrong value is refused before any text is read
        if early_exit_config is not None:
            rule["early_exit_config"] = early_exit_config
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return preprocess, {**forward, **rule}, postprocess

    def _forward(self, model_inputs: Any, **rule: Any) -> EarlyExitOutput:  # type: ignore[override]
        return early_exit_forward(self.model, **rule, **model_inputs)

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, function_to_apply: Any = None, **kwargs: Any
    ) -> Any:
        """The answer of one text, a dict or a list; the default function follows the adapter's problem type."""
        if function_to_apply is None:
            function_to_apply = _FUNCTIONS.get(get_badge_model(self.model).config_of().problem_type or "")
        said = super().postprocess(model_outputs, function_to_apply=function_to_apply, **kwargs)
        for answer in said if isinstance(said, list) else [said]:
            answer["exit_layer"] = int(model_outputs["exit_layer"][0])
        return said


def pipeline(
    task: str = "text-classification",
    model: Any = None,
    tokenizer: Any = None,
    *,
    batch_size: int | None = None,
    device: Any = None,
    revision: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> EarlyExitPipeline:
    """A text-classification pipeline that exits early, made as `transformers.pipeline` makes one.

    Args:
        task: `text-classification` (or `sentiment-analysis`).
        model: An adapter's folder or Hub repository, or a PEFT model with a BADGE adapter, which goes into eval mode.
        tokenizer: A tokenizer, or the folder or repository of one; None takes the one that lies beside the adapter,
            else that of its base model.
        batch_size: Texts per pass; None is 1.
        device: As for `transformers.pipeline`; None leaves a loaded model where it is.
        revision: Of the adapter's repository.
        model_kwargs: For `load_pretrained` (`base_model`, `dtype`, `token`, ...).
        **kwargs: `top_k`, `function_to_apply`, arguments of the tokenizer, `early_exit_config`, and fields of
            `EarlyExitConfig`: how the pipeline answers when a call does not say.

    Raises:
        ValueError: another task, no BADGE adapter, no tokenizer, or a wrong field.

    Example:

    ```python
    classify = badge_peft.pipeline("text-classification", model="my-adapter", batch_size=8)
    classify(["a fine film", "two hours that I want back"], threshold=0.2)
    # [{'label': 'positive', 'score': 0.98, 'exit_layer': 2}, {'label': 'negative', 'score': 0.91, 'exit_layer': 4}]
    ```
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not allowed: BADGE classifies sequences, so it must be {TASKS[0]!r}.")
    source = None
    if isinstance(model, (str, PathLike)):
        source = str(model)
        model = load_pretrained(source, revision=revision, **(model_kwargs or {}))
    elif not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} is not allowed: give an adapter's folder or repository, or a loaded model.")
    elif device is None and getattr(model, "hf_device_map", None) is None:
        device = next(model.parameters()).device
    config = get_badge_model(model).config_of()
    if tokenizer is None or isinstance(tokenizer, (str, PathLike)):
        places = [source, config.base_model_name_or_path] if tokenizer is None else [str(tokenizer)]
        tokenizer = _load_tokenizer([place for place in places if place], revision if source else None)
    model.eval()
    return EarlyExitPipeline(
        model=model, tokenizer=tokenizer, task=TASKS[0], device=device, batch_size=batch_size, **kwargs
    )


def _load_tokenizer(places: list[str], revision: str | None) -> Any:
    """The tokenizer in the first of `places` that has one; `revision` is of the first."""
    for place in places:
        if not has_tokenizer(place):
            continue
        try:
            return AutoTokenizer.from_pretrained(place, revision=(revision if place == places[0] else None) or "main")
        except (OSError, ValueError, KeyError):  # a repository without one
            continue
    raise ValueError(
        f"there is no tokenizer in {' or in '.join(places) or 'any place that the adapter names'}: pass "
        "tokenizer=..., or save it beside the adapter with tokenizer.save_pretrained."
    )
