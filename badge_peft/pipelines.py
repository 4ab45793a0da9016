"""`pipeline`: transformers' pipelines for text and token classification, on a model that exits early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from difflib import get_close_matches
from os import PathLike
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import TextClassificationPipeline, TokenClassificationPipeline
from transformers.pipelines.text_classification import ClassificationFunction

from badge_peft.bundle import is_bundle
from badge_peft.early_exit.calls import config_of_each
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation.entities import in_iob2, scheme_of
from badge_peft.hub import load_pretrained, load_tokenizer
from badge_peft.model import get_badge_model
from badge_peft.outputs import EarlyExitOutput
from badge_peft.utils.texts import check_second_text

TASKS = ("text-classification", "sentiment-analysis")
TOKEN_TASKS = ("token-classification", "ner")
_BESIDE = ("offset_mapping", "sentence", "is_last", "word_ids", "word_to_chars_map")  # what the model does not read
_FIELDS = frozenset(EarlyExitConfig.__dataclass_fields__) - {"top_k"}  # which is transformers' own here
_Given = tuple[Any, dict[str, Any]]  # `early_exit_config` and fields
_NOTHING: _Given = (None, {})
_FUNCTIONS = {
    "regression": ClassificationFunction.NONE,
    "multi_label_classification": ClassificationFunction.SIGMOID,
    "single_label_classification": ClassificationFunction.SOFTMAX,
}


class _ExitRules:
    """What the pipelines of models that exit early have in common: the arguments that say how they stop."""

    model: Any
    tasks: Sequence[Any] = (None,)  # names of adapters; None: the active one

    def check_model_type(self, supported_models: Any) -> None:
        """A PEFT model is none of the classes that transformers lists here: what counts is the adapter."""
        get_badge_model(self.model)

    def _sanitize_parameters(
        self, early_exit_config: Any = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        rule = {name: kwargs.pop(name) for name in _FIELDS & kwargs.keys()}
        for name in kwargs:  # all others go to the tokenizer, which passes over what it does not know
            meant = get_close_matches(name, _FIELDS, n=1, cutoff=0.8)
            if meant:
                raise ValueError(f"the pipeline has no argument {name!r}: did you mean {meant[0]!r}?")
        # transformers lays the arguments of a call over those of the start, one by one: here each has a place of its
        # own, so that a policy takes nothing over from another
        given = {"of_call" if hasattr(self, "_forward_params") else "at_start": (early_exit_config, rule)}
        self._rule(**given)  # a wrong value is refused before any text is read
        super_: Any = super()
        preprocess, forward, postprocess = super_._sanitize_parameters(**kwargs)
        return preprocess, {**forward, **given}, postprocess

    def _rule(self, at_start: _Given = _NOTHING, of_call: _Given = _NOTHING) -> dict[Any, EarlyExitConfig]:
        """How a call stops, task by task."""
        configs = {task: get_badge_model(self.model).get_early_exit_config(task) for task in self.tasks}
        for given, fields in (at_start, of_call):
            each = {None: given} if None in configs else config_of_each(given, self.tasks)
            configs = {
                task: EarlyExitConfig.of(own if each[task] is None else each[task], **fields)
                for task, own in configs.items()
            }
        return configs


class EarlyExitPipeline(_ExitRules, TextClassificationPipeline):  # type: ignore[misc]  # typed for every pipeline
    """transformers' pipeline, in which each text goes as deep as it must.

    Batches, text pairs, `top_k`, `function_to_apply` and the tokenizer's arguments (`truncation=True`) are as there.
    Each answer also holds `exit_layer`, the block that gave it (0: the embeddings). `early_exit_config` and fields of
    `EarlyExitConfig` may be given when the pipeline is made and with each call; those of the call win, a config takes
    the place of all that was given before, and another policy takes nothing over.

    Raises:
        ValueError: the model carries no BADGE adapter, or a field is wrong.
    """

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:  # type: ignore[override]  # named as above
        """Refuses one text where an adapter was trained on pairs."""
        badge = get_badge_model(self.model)
        is_pair = not isinstance(inputs, str) and not (isinstance(inputs, dict) and inputs.get("text_pair") is None)
        check_second_text(any(badge.config_of(task).reads_pairs for task in self.tasks), is_pair)
        return super().preprocess(inputs, **tokenizer_kwargs)

    def _forward(self, model_inputs: Any, **rule: Any) -> EarlyExitOutput:  # type: ignore[override]  # typed for any
        return early_exit_forward(self.model, early_exit_config=self._rule(**rule)[None], **model_inputs)

    def postprocess(  # type: ignore[override]  # transformers types it for any pipeline
        self, model_outputs: Any, function_to_apply: Any = None, **kwargs: Any
    ) -> Any:
        """The answer of one text, a dict or a list; the default function follows the adapter's problem type."""
        return self._answer(None, model_outputs, function_to_apply, **kwargs)

    def _answer(self, adapter: str | None, outputs: Mapping[str, Any], function_to_apply: Any, **kwargs: Any) -> Any:
        """What `adapter` (None: the active one) says of one text, under its own names of the labels."""
        badge = get_badge_model(self.model)
        function = function_to_apply or _FUNCTIONS[badge.config_of(adapter).resolved_problem_type]
        names = dict(enumerate(badge.label_names(adapter)))
        of_adapter: Any = copy(self)
        of_adapter.model = SimpleNamespace(config=SimpleNamespace(id2label=names))
        logits: Any = {"logits": outputs["logits"]}
        said: Any = TextClassificationPipeline.postprocess(of_adapter, logits, function_to_apply=function, **kwargs)
        for answer in said if isinstance(said, list) else [said]:
            answer["exit_layer"] = int(outputs["exit_layer"][0])
        return said


class EarlyExitTokenPipeline(_ExitRules, TokenClassificationPipeline):  # type: ignore[misc]  # typed for any
    """transformers' token-classification pipeline, in which each token stops alone and a text with its last.

    `aggregation_strategy`, `stride`, words and batches are as there; tags of IOBES and BILOU are read, too, and words
    whose tags name no entities are not joined. Each entity also holds `exit_layer`: the block
    that answered its token; where tokens are aggregated, the one at which the text left. Rules are given as for
    `EarlyExitPipeline`.

    Raises:
        ValueError: as `EarlyExitPipeline`, or the model's config has other labels than the adapter.
    """

    def check_model_type(self, supported_models: Any) -> None:
        """transformers reads the names of the labels from the model's config."""
        badge = get_badge_model(self.model)
        if badge.config_of().label_names is not None:
            badge.name_labels(badge.label_names())
        names, wanted = self.model.config.id2label or {}, badge.label_names()
        if [names.get(i) for i in range(len(wanted))] != wanted:
            raise ValueError(
                f"the exits have the labels {', '.join(wanted)}, but the model's config has {len(names)} others: set "
                "id2label in model.config."
            )

    def _forward(self, model_inputs: Any, **rule: Any) -> dict[str, Any]:  # type: ignore[override]  # typed for any
        inputs = {name: value for name, value in model_inputs.items() if name not in _BESIDE}
        output = early_exit_forward(self.model, early_exit_config=self._rule(**rule)[None], **inputs)
        exits = {"exit_layer": output.exit_layer, "token_exit_layer": output.token_exit_layer}
        return {**dict.fromkeys(_BESIDE), **model_inputs, "logits": output.logits, **exits}

    def group_entities(self, entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """In the scheme of the labels, of which transformers reads B- and I- alone; words whose tags name no entities
        stay one by one."""
        names = get_badge_model(self.model).label_names()
        if scheme_of(names) or not all("index" in entity for entity in entities):  # which tokens have, and words not
            for entity, tag in zip(entities, in_iob2([e["entity"] for e in entities], names), strict=True):
                entity["entity"] = tag
        return super().group_entities(entities)

    def postprocess(self, all_outputs: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The entities of one text."""
        all_outputs = list(all_outputs)
        found = super().postprocess(all_outputs, *args, **kwargs)
        deepest = max(int(outputs["exit_layer"][0]) for outputs in all_outputs)
        for entity in found:
            place = entity.get("index") if len(all_outputs) == 1 else None
            own = deepest if place is None else int(all_outputs[0]["token_exit_layer"][0, place])
            entity["exit_layer"] = own
        return found


class MultiTaskPipeline(EarlyExitPipeline):
    """As `EarlyExitPipeline`, for many tasks in one pass: each text's answer is a dict from tasks to what the pipeline
    of that task alone would say.

    Args:
        tasks: Names of adapters.
        **kwargs: As for `EarlyExitPipeline`; `early_exit_config` may also be a dict from tasks to configs.
    """

    def __init__(self, *args: Any, tasks: Sequence[str], **kwargs: Any) -> None:
        self.tasks = list(tasks)
        super().__init__(*args, **kwargs)

    def check_model_type(self, supported_models: Any) -> None:
        """Each task is an adapter of the model."""
        for task in self.tasks:
            if get_badge_model(self.model).config_of(task).reads_tokens:
                raise ValueError(
                    f"task {task!r} classifies tokens, which this pipeline does not: call "
                    "model.early_exit_forward(**batch, tasks=[...]), or leave it out of tasks."
                )

    def _forward(self, model_inputs: Any, **rule: Any) -> Any:  # type: ignore[override]  # typed for any
        output = early_exit_forward(self.model, tasks=self.tasks, early_exit_config=self._rule(**rule), **model_inputs)
        # transformers takes a batch apart where all values are tensors
        return {(task, name): value for task, own in output.items() for name, value in own.items()}

    def postprocess(  # type: ignore[override]  # transformers types it for any pipeline
        self, model_outputs: dict[tuple[str, str], Tensor], function_to_apply: Any = None, **kwargs: Any
    ) -> Any:
        """The answers of one text, by task."""
        each = {task: {n: model_outputs[task, n] for n in ("logits", "exit_layer")} for task in self.tasks}
        return {task: self._answer(task, own, function_to_apply, **kwargs) for task, own in each.items()}


def pipeline(
    task: str = "text-classification",
    model: Any = None,
    tokenizer: Any = None,
    *,
    batch_size: int | None = None,
    device: Any = None,
    revision: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    tasks: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """A pipeline for text or token classification that exits early, made as `transformers.pipeline` makes one.

    Args:
        task: `text-classification` (or `sentiment-analysis`), `token-classification` (or `ner`).
        model: An adapter's folder or Hub repository, or a PEFT model with a BADGE adapter, which goes into eval mode.
            For many tasks a bundle, which `save_tasks` wrote, or a dict from tasks to folders or repositories.
        tokenizer: A tokenizer, or the folder or repository of one; None takes the one in the adapter's folder,
            else that of its base model.
        batch_size: Texts per pass; None is 1.
        device: As for `transformers.pipeline`; None leaves a loaded model where it is.
        revision: Of the adapter's repository.
        model_kwargs: For `load_pretrained` (`base_model`, `dtype`, `token`, ...).
        tasks: Names of adapters of the model that each answer every text, in one pass: then each answer is a dict from
            tasks to answers. None: all of a bundle or a dict; else the active adapter alone.
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
    if task not in (*TASKS, *TOKEN_TASKS):
        raise ValueError(
            f"task={task!r} is not allowed: BADGE classifies sequences and tokens, so it must be {TASKS[0]!r} or "
            f"{TOKEN_TASKS[0]!r}."
        )
    source, options = None, model_kwargs or {}
    if isinstance(model, Mapping):
        source = str(next(iter(model.values()), ""))
        model = load_pretrained(model, revision=revision, **options)
        tasks = tasks or list(model.peft_config)
    elif isinstance(model, (str, PathLike)):
        source = str(model)
        model = load_pretrained(source, revision=revision, **options)
        if tasks is None and is_bundle(source, revision, options.get("cache_dir")):
            tasks = list(model.peft_config)
    elif not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} is not allowed: give an adapter's folder or repository, or a loaded model.")
    elif device is None and getattr(model, "hf_device_map", None) is None:
        device = next(model.parameters()).device
    config = get_badge_model(model).config_of()
    if tokenizer is None or isinstance(tokenizer, (str, PathLike)):
        places = [source, config.base_model_name_or_path] if tokenizer is None else [str(tokenizer)]
        tokenizer = load_tokenizer(places, revision if source else None)
    model.eval()
    made: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "device": device, "batch_size": batch_size}
    if tasks is not None:
        return MultiTaskPipeline(task=TASKS[0], tasks=tasks, **made, **kwargs)
    kind: Any = EarlyExitTokenPipeline if config.reads_tokens else EarlyExitPipeline
    named = TOKEN_TASKS if config.reads_tokens else TASKS
    if task not in named:
        raise ValueError(
            f"task={task!r} is not allowed for this adapter, whose task_type is {config.task_type}: {named[0]!r}."
        )
    return kind(task=named[0], **made, **kwargs)
