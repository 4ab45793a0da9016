"""Exits: from the states that a block offers to logits [B, K].

Every exit works in two steps: `represent` gives one vector per row, and the call turns it into logits. Between the two
a reader may look at the vector (learning to exit does).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from badge_peft.tuner.pooling import TOKENS, Pooling


class ExitState:
    """What the exits of one call leave for the deeper ones, and for its objective. It belongs to the rows: those that
    leave take theirs with them. `exits` are those of the call where each needs all others (Global Past-Future)."""

    def __init__(self, exits: Sequence[nn.Module] = ()) -> None:
        self.exits = list(exits)
        self.left: dict[str, Tensor] = {}  # by name: [n, ...], or [n, S, ...] where each position has its own
        self.keeps_vectors = False  # those, and predictions, that the objective compares
        self.vectors: dict[int, Tensor] = {}  # index of the exit -> v_j
        self.predictions: dict[tuple[int, int], Tensor] = {}  # (i, j) -> what exit i takes v_j to be

    def add(self, name: str, value: Tensor, for_later: Tensor) -> Tensor:
        """The sum of `name` up to this exit; deeper exits see `for_later` in place of `value`."""
        before = self.left.get(name)
        before = before if before is None else before.to(value.device)
        self.left[name] = for_later if before is None else before + for_later
        return value if before is None else before + value

    def keep_rows(self, index: Tensor, length: int | None = None) -> None:
        """Goes on with the rows `index` alone, and with their first `length` positions (None: all)."""
        for name, value in self.left.items():
            if length is not None and value.dim() > 2:
                value = value[:, :length]
            self.left[name] = torch.index_select(value, 0, index.to(value.device))


def finite(left: Tensor) -> Tensor:
    """What an exit has left for others. NaN and infinity count as 0: they say nothing, and would spread to all deeper
    exits."""
    return left.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


class CenteredDropout(nn.Dropout):
    """Dropout of deviations from a mean (`center` [d] while it is trained; None is 0): dropping a number that is the
    same for all texts says nothing of any."""

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.center: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., d], in evaluation mode the same."""
        if self.center is None or not self.training:
            return super().forward(inputs)
        center = self.center.to(inputs)
        return super().forward(inputs - center) + center


class Exit(nn.Module):
    """One exit, from d to K numbers."""

    #: Whether the exit reads all positions [B, S, d]; the others act on each alone, so pooling may come first.
    reads_sequence: ClassVar[bool] = False
    #: Whether the pooled vector is all that it knows of a row, and it learns by itself what to make of that: it may be
    #: pooled otherwise than the model's own head.
    pools_freely: ClassVar[bool] = False
    #: Its layers that read states as a block or bypass gives them.
    reads_states: ClassVar[tuple[str, ...]] = ("linear",)

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = CenteredDropout(dropout)
        self.linear = nn.Linear(hidden_size, num_labels)
        self.carry: nn.Module | None = None  # of an exit that builds on those before it

    def represent(self, states: Tensor, pooling: Pooling) -> Tensor:
        """What `pooling.pick` left of the states (or all of them, for `reads_sequence`) -> [B, d]."""
        return pooling.reduce(states)

    def forward(self, vector: Tensor, state: ExitState | None = None) -> Tensor:
        """[B, d] -> [B, K]."""
        return self.linear(self.dropout(vector))


class LinearExit(Exit):
    """Dropout and one linear layer: the simplest exit, and the paper's. K * (d + 1) parameters."""

    pools_freely = True


class DenseExit(Exit):
    """A dense layer of its own and tanh before the linear layer."""

    reads_states = ("dense",)

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__(hidden_size, num_labels, dropout)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def represent(self, states: Tensor, pooling: Pooling) -> Tensor:
        """[B, d], after the tanh."""
        return self.dense(pooling.reduce(states)).tanh()


class PooledExit(DenseExit):
    """Dense, tanh, dropout, linear: as BERT's own pooler and head, each exit with its own. The dense layer starts as a
    copy of the model's, where it has one."""

    pools_freely = True


class SharedPooledExit(Exit):
    """Dropout and one linear layer behind the model's own pooler, which all exits share. K * (d + 1) parameters.

    The pooler is the model's: it is trained with `backbone="full"`, or where it is part of a head that is trained.
    Source: Zhou et al., "BERT Loses Patience", 2020 (PABEE), whose exits have this form.
    """


class AttentionExit(Exit):
    """The multi-head attention exit of the paper's comparison: d -> 32 for Q, K and V, 32 -> d for the output, without
    biases (4 * 32 d parameters, 98,304 at d = 768), then pooling and a linear layer. After FastBERT's exit."""

    reads_sequence = True
    reads_states: ClassVar[tuple[str, ...]] = ("query", "key", "value")
    WIDTH: ClassVar[int] = 32
    HEADS: ClassVar[int] = 2

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__(hidden_size, num_labels, dropout)
        self.query = nn.Linear(hidden_size, self.WIDTH, bias=False)
        self.key = nn.Linear(hidden_size, self.WIDTH, bias=False)
        self.value = nn.Linear(hidden_size, self.WIDTH, bias=False)
        self.output = nn.Linear(self.WIDTH, hidden_size, bias=False)

    def represent(self, states: Tensor, pooling: Pooling) -> Tensor:
        """[B, S, d] -> [B, d]; for `cls` and `last` only the picked position asks."""
        asking = self.query(pooling.pick(states))  # [B, S, w], or [B, w] where one position asks
        query = self._heads(asking if asking.dim() == 3 else asking.unsqueeze(1))  # [B, h, S or 1, w/h]
        scores = query @ self._heads(self.key(states)).transpose(-1, -2) * (self.WIDTH / self.HEADS) ** -0.5
        if pooling.mask is not None:
            if pooling.mask.dim() != 2:
                raise ValueError(
                    "an exit with attention needs an attention_mask of shape [batch, sequence], got "
                    f"{list(pooling.mask.shape)}."
                )
            padding = (pooling.mask == 0)[:, None, None, :]
            scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)  # not -inf: a row may be padding alone
        mixed = scores.softmax(dim=-1) @ self._heads(self.value(states))  # [B, h, S or 1, w/h]
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, S or 1, w]
        return self.output(
            pooling.reduce(mixed) if asking.dim() == 3 else mixed[:, 0]
        )  # no bias: the mean comes first

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.HEADS, -1)).transpose(1, 2)


class ResidualAttentionExit(AttentionExit):
    """An `AttentionExit` that adds what it reads to the pooled state. Its output layer starts at zero, so it begins as
    a linear exit. Beyond the paper: a residual connection, as blocks have around their attention."""

    reads_states = ("linear", "query", "key", "value")

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__(hidden_size, num_labels, dropout)
        nn.init.zeros_(self.output.weight)

    def represent(self, states: Tensor, pooling: Pooling) -> Tensor:
        """[B, S, d] -> [B, d]."""
        return pooling.reduce(pooling.pick(states)) + super().represent(states, pooling)


class PastFutureExit(DenseExit):
    """Global Past-Future: exit i answers by the states of exits 1..i and by its predictions of those of deeper exits.

        past = sum_{j <= i} w_j v_j,  future = sum_{j > i} w_j tanh(W_j v_i)
        logits_i = 2 lam past + (2 - 2 lam) future,  lam = sigmoid(U tanh(mean_{j <= i} G_j v_j)), one per label

    v_j is the pooled state after a dense layer and tanh; the earlier ones take no gradient. W_j belongs to the exit
    that it predicts, and is trained to point the way of the real v_j (objective `past_future`). Source: Liao et al.,
    "A Global Past-Future Early Exit Method", NAACL 2021.
    """

    GATE: ClassVar[int] = 32

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__(hidden_size, num_labels, dropout)
        self.imitate = nn.Linear(hidden_size, hidden_size)  # W_j: from an earlier v_i to this v_j
        self.gate = nn.Linear(hidden_size, self.GATE)
        self.balance = nn.Linear(self.GATE, num_labels)

    def forward(self, vector: Tensor, state: ExitState | None = None) -> Tensor:
        """[B, d] -> [B, K], with what `state` has of the exits before and after this one."""
        assert state is not None
        i = state.exits.index(self)
        if state.keeps_vectors:
            state.vectors[i] = vector
        vector = self.dropout(vector)
        past = state.add("past", self.linear(vector), self.linear(vector.detach()))
        gates = state.add("gates", self.gate(vector), self.gate(vector.detach()))
        balance = self.balance((gates / (i + 1)).tanh()).sigmoid()  # lam [B, K]
        future = torch.zeros_like(past)
        for j, other in enumerate(state.exits[i + 1 :], start=i + 1):
            prediction = cast(PastFutureExit, other).imitate(vector).tanh()
            if state.keeps_vectors:
                state.predictions[i, j] = prediction
            future = future + cast(PastFutureExit, other).linear(prediction)
        return 2 * balance * past + (2 - 2 * balance) * future


EXITS: dict[str, type[Exit]] = {
    "linear": LinearExit,
    "pooled": PooledExit,
    "shared_pooled": SharedPooledExit,
    "mha": AttentionExit,
    "residual_mha": ResidualAttentionExit,
    "past_future": PastFutureExit,
}


class MultiExitHead(nn.ModuleDict):
    """The exits that one block module serves, by block number: one exit for an ordinary block, M for ALBERT's shared
    one, and exit 0 (on the embeddings) with exit 1.

    Args:
        numbers: Block numbers that get an exit.
        exit_type: A name in `EXITS`.
        hidden_size: d.
        num_labels: K.
        dropout: Probability, before the linear layer.
    """

    def __init__(self, numbers: list[int], exit_type: str, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__({str(m): EXITS[exit_type](hidden_size, num_labels, dropout) for m in numbers})

    def exit(self, number: int) -> Exit:
        """The exit of block `number`."""
        return cast(Exit, self[str(number)])


@dataclass(frozen=True)
class AdapterExits:
    """The exits of one adapter, as a call reads them."""

    adapter: str  # its name
    numbers: list[int]  # block numbers of its exits, shallow to deep; the last is M
    pooling: str  # `cls`, `mean`, `last`, or `tokens`
    num_labels: int  # K
    problem_type: str  # as transformers has it
    has_final_exit: bool  # whether exit M is one of its own; otherwise the model's own head answers there
    final_norm: nn.Module | None = None  # the model's, where blocks have none of their own at their end (pre-LN)
    past_future: list[nn.Module] = field(default_factory=list)  # its exits, where each needs all others
    uncertainty: nn.Module | None = None  # the layer of learning to exit (LTE), where the adapter has one
    carry: str | None = None  # what exit m adds of the one before it: `logits`, or None for nothing
    pooler: nn.Module | None = None  # the model's own, where all exits share it

    def linked_to(self, read: Iterable[int]) -> set[int]:
        """Block numbers of its own exits that are computed for those that are `read`: where exits need one another,
        all up to the last of these."""
        if not self.past_future and self.carry is None:
            return set()
        own = self.numbers if self.has_final_exit else self.numbers[:-1]
        last = max(set(own).intersection(read), default=-1)
        return {m for m in own if m <= last}

    @property
    def reads_tokens(self) -> bool:
        """Whether the exits answer each token: [B, S, K] in place of [B, K]."""
        return self.pooling == TOKENS


class CarriedLogits(nn.Module):
    """z_m + c_m z_{m-1}: the logits of the exit before, times one learned number.

    c_m starts at 0, so that the exit starts as one that stands alone. z_{m-1} takes no gradient: each exit corrects
    the one before it, as in boosting, and trains it for nobody else. Source: the cascade connections of Wolczyk et
    al., "Zero Time Waste: Recycling Predictions in Early Exit Neural Networks", NeurIPS 2021, which concatenate the
    logits in place of adding them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # c_m

    def forward(self, logits: Tensor, before: Tensor) -> Tensor:
        """Both [B, K], the result too."""
        return logits + self.weight.to(logits.dtype) * before


def build_on(exits: AdapterExits, exit_: Exit, logits: Tensor, state: ExitState) -> Tensor:
    """What exit m answers, [B, K], given its own `logits`: z_m + c_m z_{m-1}, which is what exit m + 1 sees of it."""
    if exits.carry is None:
        return logits
    if exit_.carry is not None:
        logits = exit_.carry(logits, finite(state.left["logits"].to(logits)))
    state.left["logits"] = logits.detach()
    return logits
