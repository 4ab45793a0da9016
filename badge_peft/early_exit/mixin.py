"""`EarlyExitMixin`: what a model with exits can do, as `GenerationMixin` says what one with a language head can do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from badge_peft.early_exit.arguments import by_name, check_special, input_size, split_arguments
from badge_peft.early_exit.cached_states import CachedStates
from badge_peft.early_exit.calls import BASE, AdapterRequest, BatchInfo, plan_call
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.early_exit.full_depth import FullDepthReader, check_labels, full_depth_output
from badge_peft.early_exit.history import group_codes
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.readers import PolicyReader, module_dtype
from badge_peft.early_exit.token_reader import TokenReader
from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.backbone import is_trained
from badge_peft.tuner.config import BadgeConfig, exit_numbers
from badge_peft.tuner.context import no_pass
from badge_peft.tuner.decoders import decoder_arguments, positions_read, read_mask
from badge_peft.tuner.exits import TOKENS, AdapterExits
from badge_peft.tuner.prepare import classifies_tokens
from badge_peft.utils.problem import Problem

_NO_LABELS = (
    "no labels reach the model in training, so it gives no loss, and one of `logits`, those of the last block, trains "
    "no exit. That is what transformers' Trainer does with label_smoothing_factor or compute_loss_func: use "
    "MultiExitTrainer, which honors both at every exit, or a loss of `exit_logits`."
)


class EarlyExitMixin:
    """Full depth with every exit, and early exit, on top of what `BadgeModel` knows of its adapters."""

    # what `BadgeModel` has
    model: Any
    layout: BlockLayout
    training: bool
    compiled: Any = None  # `CompiledBlocks`, by `compile_blocks`
    adapters_enabled: Any
    active_adapters: Any
    num_blocks: Any
    config_of: Callable[..., BadgeConfig]
    adapter_exits: Callable[[str], AdapterExits]
    block_at: Callable[[int], Any]
    single_active_adapter: Callable[[], str]
    peft_config: Any

    # ------------------------------------------------------------------------------------------------------ full depth

    def forward(
        self,
        *args: Any,
        exit_pass: type[EarlyExitPass] | None = None,
        cached_states: CachedStates | None = None,
        cached_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Full depth with every exit: the base model's arguments in, a `MultiExitOutput` out.

        With adapters disabled it is the base model, output and all.

        Args:
            *args: Of the base model.
            exit_pass: The class of the pass; a training objective, which scores all exits by itself, may change what
                goes on between the blocks.
            cached_states: What a full-depth pass gave before: no block runs then.
            cached_rows: [B], which of these rows the batch has.
            **kwargs: Of the base model, `labels` among them: then the output has the loss (Eq. 8).
        """
        if not self.adapters_enabled:
            return self.model(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            # A pass is found by its thread, and hooks tell it what blocks compute: compiled code has neither. So a
            # compiled model runs this part as it is; `compile_blocks` compiles the blocks themselves.
            kwargs |= {"exit_pass": exit_pass, "cached_states": cached_states, "cached_rows": cached_rows}
            return torch.compiler.disable(self.forward)(*args, **kwargs)
        if args:
            args, kwargs = by_name(self.model, args, kwargs)
        labels = kwargs.pop("labels", None)
        num_items = kwargs.pop("num_items_in_batch", None)
        return_dict = kwargs.pop("return_dict", None)
        batch_size, length = input_size(*args, **kwargs)
        kwargs = decoder_arguments(self.model, kwargs, batch_size)
        if self.compiled is not None:
            kwargs = self.compiled.pad(kwargs)
        adapter = self.single_active_adapter()
        if labels is not None:
            check_labels(self.config_of(adapter), labels, batch_size, length)
        exits = self.adapter_exits(adapter)
        reader = FullDepthReader(exits, batch_size, read_mask(self.model, self.layout, exits.pooling, kwargs))
        running = self._pass(exit_pass or EarlyExitPass, [reader], batch_size, kwargs.get("attention_mask"))
        if cached_states is not None and cached_rows is not None:
            base = cached_states.answer(self, self.config_of(adapter), running, cached_rows, kwargs)
        else:
            with running:
                base = self.model(*args, return_dict=True, **kwargs)
        output = full_depth_output(
            reader, base, self.config_of(adapter), labels, num_items, running.training_outputs(), length
        )
        gradient = getattr(output.exit_logits, "requires_grad", False)
        if labels is None and exit_pass is None and self.training and gradient:
            warnings.warn(_NO_LABELS, stacklevel=2)
        return output if return_dict is not False else output.to_tuple()

    # ------------------------------------------------------------------------------------------------------ early exit

    @torch.no_grad()
    def early_exit_forward(
        self,
        *,
        early_exit_config: Any = None,
        adapter_names: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        groups: Any = None,
        special_tokens_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answers each row at the exit that the policy chooses; the rest of the blocks are not computed for it.

        Row by row, a batch gives the exits and (to rounding) the logits that each row gives alone; with
        `policy="top_k"` each query gives those that its candidates give without the other queries. Switch the model to
        `eval()` first, as for `generate`: dropout makes exits random.

        Args:
            early_exit_config: `EarlyExitConfig` or dict; None takes the adapter's own. With `tasks` it may also be a
                dict from tasks to such configs.
            adapter_names: A list with the adapter of each row, whichever is active; None: the active one. Rows of
                different tasks share one pass, each with its adapter's bypasses, exits, labels and early-exit config;
                `"__base__"` stands for the base model without an adapter. Only adapters with `backbone="frozen"`,
                which save no module but the model's head.
            tasks: Names of adapters that each answer every row, whichever is active: one pass for many tasks. A row
                leaves after its last task has answered. Only adapters as for `adapter_names`.
            groups: [B], an id for each row, the same for the candidates of a query: what `policy="top_k"` reads. None:
                the rows of each adapter are one query.
            special_tokens_mask: [B, S], of token classification: 1 for tokens that need no answer and hold no row, as
                tokenizers have it (`return_special_tokens_mask=True`).
            **kwargs: The model's inputs (`labels` among them are ignored), and fields of `EarlyExitConfig`, which win
                over the config: `policy="divergence", threshold=0.2, patience=3`. Another `policy` than the config's
                takes nothing over from it, and `policy="never"` is full depth whatever it says.

        Returns:
            An `EarlyExitOutput`: `logits` [B, K], `exit_layer` [B] and `non_finite` [B]; with `adapter_names` also
            `num_labels` [B], and K is the largest. Of token classification `logits` [B, S, K] and `token_exit_layer`
            [B, S]. With `tasks` a `MultiTaskOutput`: a mapping from each of them to
            its `EarlyExitOutput`, and `blocks_run` [B].

        Raises:
            ValueError: an empty batch, a wrong field, an argument that has no meaning here, or `adapter_names` or
                `tasks` or `groups` that do not fit the rows or the model.
        """
        overrides, inputs = split_arguments(self.model, kwargs)
        if not self.adapters_enabled:
            raise ValueError("the adapter is disabled, so there are no exits: leave disable_adapter() first.")
        if self.training:
            warnings.warn(
                "early_exit_forward in training mode: dropout makes exits random. Call model.eval().", stacklevel=4
            )
        batch_size, length = input_size(**inputs)
        inputs = decoder_arguments(self.model, inputs, batch_size)
        call = plan_call(self, batch_size, adapter_names, tasks, early_exit_config)
        codes = group_codes(groups, batch_size)
        of_rows = {"special": check_special(special_tokens_mask, batch_size, length)}
        of_rows["groups"] = None if codes is None else torch.from_numpy(codes)
        inputs, of_rows = call.sort(inputs), call.sort(of_rows)
        if self.compiled is not None:
            inputs = self.compiled.pad(inputs)
        batch = BatchInfo.of(self, inputs, length, **of_rows)
        readers = [self._reader(request, batch, overrides) for request in call.requests]
        heads = call.heads(readers)
        if heads is None and not readers[0].reads_exits:  # full depth costs what the base model costs
            with no_pass():
                base = self.model(return_dict=True, **inputs)
            self._note_precision(readers[0])
        else:
            read = positions_read(self.layout, inputs, batch.ends)
            running = self._pass(EarlyExitPass, readers, batch_size, read)
            running.heads = heads
            base = running.run(self.model, inputs)
        for reader in readers:
            if not reader.exits.has_final_exit:
                self._finish(reader, base, heads)
        output = call.output(readers)
        self._warn_of_non_finite(readers, batch_size)
        return output

    def get_early_exit_config(self, adapter_name: str | None = None) -> EarlyExitConfig:
        """How `adapter_name` (None: the active adapter) stops; the default config when it has none of its own."""
        return EarlyExitConfig.of(self.config_of(adapter_name).early_exit)

    def set_early_exit_config(
        self, config: EarlyExitConfig | dict[str, Any] | None, adapter_name: str | None = None
    ) -> None:
        """Stores how `adapter_name` (None: the active adapter) stops. It is saved with the adapter.

        Raises:
            ValueError: the config does not fit the adapter's exits.
        """
        own = self.config_of(adapter_name)
        new = None if config is None else EarlyExitConfig.of(config)
        validate_policy(new, own, self.num_blocks)
        own.early_exit = new

    # ------------------------------------------------------------------------------------------------- pass and reader

    def _pass(
        self, kind: type[EarlyExitPass], readers: Sequence[Any], batch_size: int, mask: Tensor | None
    ) -> EarlyExitPass:
        trained = partial(is_trained, self.model, self.layout)
        return kind(
            readers, batch_size, mask, self.num_blocks, self.round_up, compiled=self.compiled, trains_backbone=trained
        )

    def round_up(self, length: int) -> int:
        """The length to which rows whose longest has `length` tokens may be cut: a bucket of compiled blocks, or what
        the blocks can part into chunks."""
        length = length if self.compiled is None else self.compiled.round_up(length)
        chunk = getattr(self.model.config, "chunk_size_feed_forward", 0) or 1
        return -(-length // chunk) * chunk

    def _reader(self, request: AdapterRequest, batch: BatchInfo, overrides: dict[str, Any]) -> PolicyReader:
        """Who answers a request; rows without an adapter the base model, at full depth."""
        first, rows = request.first, request.rows
        if request.adapter == BASE:
            pooling = TOKENS if classifies_tokens(self.model) else "cls"
            labels = self.model.config.num_labels
            exits = AdapterExits(BASE, [self.num_blocks], pooling, labels, Problem.name, False)
            policy = build_policy({"policy": "never"})
        else:
            exits = self.adapter_exits(request.adapter)
            own = self.config_of(request.adapter).early_exit
            policy = build_policy(own if request.config is None else request.config, **overrides)
        part = batch.part(first, rows)
        if exits.reads_tokens:
            return TokenReader(exits, rows, part.mask, first, policy, batch.length, part.special)
        mask = part.ends if exits.pooling == "last" else part.mask
        return PolicyReader(exits, rows, mask, first, policy, part.groups)

    def _note_precision(self, reader: PolicyReader) -> None:
        """Of exits that are not read."""
        numbers = reader.exits.numbers
        if len(numbers) > 1:
            reader.settle(module_dtype(self.block_at(numbers[0]).own_exit(reader.exits.adapter, numbers[0]).linear))

    def _finish(self, reader: PolicyReader, base: Any, heads: Any) -> None:
        """Gives a reader what the model's own head says; where the pass has ended before, only its precision."""
        if base is None:
            head = getattr(self.model, self.layout.head[-1], None) if self.layout.head else None
            if head is not None:
                reader.settle(module_dtype(head))
            return
        own = base.logits if heads is None else heads.logits(base.logits)[reader.exits.adapter]
        reader.finish(own[..., : reader.exits.num_labels])

    def _warn_of_non_finite(self, readers: Sequence[PolicyReader], batch_size: int) -> None:
        found = np.zeros(batch_size, dtype=bool)
        for reader in readers:
            found[reader.first : reader.first + reader.rows] |= reader.rows_non_finite()
        if found.any():
            warnings.warn(
                f"{np.count_nonzero(found)} of {batch_size} rows had logits that are NaN or infinite at an exit. "
                "They did not stop there; the output's `non_finite` says which rows. Check the precision and the "
                "weights of the model.",
                stacklevel=5,
            )


def early_exit_forward(model: nn.Module, **kwargs: Any) -> Any:
    """As the method of that name, for a PEFT model with an active BADGE adapter.

    Raises:
        ValueError: the model carries no BADGE adapter; and as the method.
    """
    return early_exit_model(model).early_exit_forward(**kwargs)


def early_exit_model(model: nn.Module) -> EarlyExitMixin:
    """The part of a PEFT model that has exits.

    Raises:
        ValueError: there is none.
    """
    inner = model if isinstance(model, EarlyExitMixin) else getattr(model, "base_model", None)
    if not isinstance(inner, EarlyExitMixin):
        raise ValueError(
            f"{type(model).__name__} carries no BADGE adapter: make one with get_peft_model(model, BadgeConfig(...)) "
            "or load one with PeftModel.from_pretrained."
        )
    return inner


def validate_policy(policy: EarlyExitConfig | None, config: BadgeConfig, num_blocks: int) -> None:
    """Refuses a policy that the exits of an adapter cannot follow, where it is stored and not by the first call."""
    if policy is not None:
        built = build_policy(policy)
        built.check(exit_numbers(config, num_blocks), config.resolved_labels, config.resolved_problem_type)
        built.check_learned(config.learn_to_exit)
