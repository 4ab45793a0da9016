"""Two passes around cached states: one that records them, and one in which the model's own head reads them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from badge_peft.tuner.context import BlockPass, Frame, PassContext, as_result, get_hidden_states
from badge_peft.tuner.decoders import read_mask
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.pooling import Pooling
from badge_peft.tuner.state_plan import State, StatePlan, plan_states


class RecordingPass(BlockPass):
    """A full-depth pass without readers that keeps what a plan names: `states` [B, S or 1, d] and what the `head`
    reads."""

    def __init__(self, plan: StatePlan, num_blocks: int, pooling: Pooling) -> None:
        super().__init__()
        self.plan = plan
        self.num_blocks = num_blocks
        self.pooling = pooling
        self.states: dict[State, Tensor] = {}
        self.head: Tensor | None = None
        self.tuple_length = 0

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Any]) -> RecordingPass:
        """A pass of `model`, a `BadgeModel`, for what its active adapter reads, over rows with these inputs."""
        name = model.single_active_adapter()
        exits = model.adapter_exits(name)
        plan = plan_states(model.config_of(name), exits, model.layout, model.num_blocks, model.model)
        mask = read_mask(model.model, model.layout, exits.pooling, inputs)
        return cls(plan, model.num_blocks, Pooling(exits.pooling, mask))

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `block`."""
        number = self.number_of(block)
        if number == 1:
            self._keep(0, Frame(get_hidden_states(args, kwargs)))
        result, frame = self.run_block(block, args, kwargs)
        self.tuple_length = len(result) if isinstance(result, tuple) else 0
        self._keep(number, frame)
        if number == self.num_blocks and self.plan.head in ("first", "all"):
            self.head = frame.output[:, :1] if self.plan.head == "first" else frame.output
        return result

    def head_of(self, logits: Tensor | None) -> Tensor | None:
        """What is kept for the model's own head, [B, 1 or S, ...]; `logits` [B, K] or [B, S, K] are its own."""
        if self.plan.head in ("logits", "token_logits"):
            assert logits is not None  # a model with a head has some
            return logits.unsqueeze(1) if self.plan.head == "logits" else logits
        return self.head

    def _keep(self, number: int, frame: Frame) -> None:
        for state in self.plan.states:
            if state[0] == number:
                self.states[state] = self.plan.reduce(getattr(frame, state[1]), self.pooling)


class HeadPass(PassContext):
    """A call in which no block runs, and the model's own head reads given states [B, S, d], the output of block M."""

    def __init__(self, states: Tensor, num_blocks: int, tuple_length: int) -> None:
        self.states = states
        self.num_blocks = num_blocks
        self.tuple_length = tuple_length
        self._visits = 0

    def visit(self, block: BadgeBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hands its input on; block M the given states."""
        self._visits += 1
        states = self.states if self._visits == self.num_blocks else get_hidden_states(args, kwargs)
        return as_result(states, self.tuple_length)
