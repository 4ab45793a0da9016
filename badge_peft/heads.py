"""Exits: from a pooled representation [B, d] to logits [B, K]."""

from __future__ import annotations

from torch import Tensor, nn


class LinearExit(nn.Module):
    """Dropout and one linear layer: the simplest exit, and the paper's. K * (d + 1) parameters."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, d] -> [B, K]."""
        return self.linear(self.dropout(pooled))


class PooledExit(nn.Module):
    """Dense, tanh, dropout, linear: as PABEE's exits and BERT's own pooler and head."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, d] -> [B, K]."""
        return self.linear(self.dropout(self.dense(pooled).tanh()))


EXITS: dict[str, type[nn.Module]] = {"linear": LinearExit, "pooled": PooledExit}


class MultiExitHead(nn.ModuleDict):
    """The exits that one block module serves, by block number: one exit for an ordinary block, M for ALBERT's shared
    one, and exit 0 (on the embeddings) beside exit 1.

    Args:
        numbers: Block numbers that get an exit.
        exit_type: `linear` or `pooled`.
        hidden_size: d.
        num_labels: K.
        dropout: Probability, before the linear layer.
    """

    def __init__(self, numbers: list[int], exit_type: str, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__({str(m): EXITS[exit_type](hidden_size, num_labels, dropout) for m in numbers})

    def logits(self, number: int, pooled: Tensor) -> Tensor:
        """Exit `number`: [B, d] -> [B, K], in the exit's own precision."""
        exit_ = self[str(number)]
        return exit_(pooled.to(next(exit_.parameters()).dtype))
