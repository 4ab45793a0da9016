"""Passes around cached states: which of them the exits of an adapter and the model's own head read, one pass that
records these, and one in which the head reads them. With a frozen backbone they are the same in every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from badge_peft.tuner.architectures import BlockLayout, head_pooling
from badge_peft.tuner.bypass import states_read
from badge_peft.tuner.config import BadgeConfig, own_exits
from badge_peft.tuner.context import BlockPass, Frame, PassContext, as_result, get_hidden_states
from badge_peft.tuner.decoders import read_mask
from badge_peft.tuner.exits import EXITS, AdapterExits
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.pooling import Pooling

State = tuple[int, str]  # a block number, 0 for the embeddings, and a name of `Frame`


@dataclass(frozen=True)
class StatePlan:
    """What is kept of each row.

    `head` is for exit M, where that is the model's own head: its `logits`, of each token `token_logits`, or, where it
    is trained, what it reads: the `first` position of the last block's output, or `all`.
    """

    states: tuple[State, ...]  # the tensors that the exits read, each once
    positions: str  # `all` of these; or one: what the exits' pooling `cls`, `last` or `mean` makes of them
    head: str | None = None

    def serves(self, other: StatePlan) -> bool:
        """Whether what is kept by this plan is enough for `other`."""
        kept = {"logits": ("first", "all"), "token_logits": ("all",)}.get(str(other.head), ())
        head = other.head in (None, self.head) or self.head in kept
        return head and set(other.states) <= set(self.states) and self.positions in ("all", other.positions)

    def reduce(self, states: Tensor, pooling: Pooling) -> Tensor:
        """[B, S, d] -> what is kept of it, [B, S, d] or [B, 1, d]."""
        return states if self.positions == "all" else pooling.reduce(pooling.pick(states)).unsqueeze(1)


def reads_of(config: BadgeConfig, layout: BlockLayout, num_blocks: int) -> dict[int, dict[str, State]]:
    """By exit: the names in its `Frame` of what it reads, and which state each of them is."""
    return {
        m: {name: _state(m, name, layout) for name in (states_read(config.placement, layout.pre_norm) if m else ())}
        or {"output": (0, "output")}
        for m in own_exits(config, num_blocks)
    }


def plan_states(
    config: BadgeConfig, exits: AdapterExits, layout: BlockLayout, num_blocks: int, model: nn.Module
) -> StatePlan:
    """The plan for one adapter, with its head as it is trained now."""
    reads = reads_of(config, layout, num_blocks)
    states = tuple(dict.fromkeys(state for fields in reads.values() for state in fields.values()))
    # normalized first and reduced afterwards where an exit reads pre-LN states, and by a bypass or its LN'
    mean_first = config.placement == "none" and not layout.pre_norm
    tokens = exits.reads_tokens
    one = not tokens and not EXITS[config.exit_type].reads_sequence and (exits.pooling != "mean" or mean_first)
    head = None
    if not exits.has_final_exit:
        trained = any(p.requires_grad for name, p in model.named_parameters() if name.split(".")[0] in layout.head)
        if trained:
            head = "first" if not tokens and head_pooling(model, layout) == "cls" else "all"
        else:
            head = "token_logits" if tokens else "logits"
    return StatePlan(states, exits.pooling if one else "all", head)


def _state(number: int, name: str, layout: BlockLayout) -> State:
    """The input of a block is the output of the one before, unless the model mixes something in between."""
    if name == "block_input" and (number == 1 or number - 1 > layout.full_rows_until):
        return number - 1, "output"
    return number, name


def frame_of(fields: dict[str, Tensor]) -> Frame:
    """A frame that has these tensors and no others."""
    frame = Frame(next(iter(fields.values())))
    for name, value in fields.items():
        setattr(frame, name, value)
    return frame


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
