"""`TokenReader`: token classification, where each token stops by itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.policies import ExitPolicy
from badge_peft.early_exit.readers import Array, ExitReader, PolicyReader
from badge_peft.outputs import EarlyExitOutput
from badge_peft.tuner.context import Frame
from badge_peft.tuner.exits import AdapterExits
from badge_peft.tuner.layer import BadgeBlock


class TokenReader(PolicyReader):
    """A `PolicyReader` of token classification, whose unit is a token: its history, exits and answers are those of
    tokens, row by row. What leaves a pass is still the row: with its last token. Those of `special` [n, S'] need no
    answer; S' is less than S where compiled blocks have padded."""

    def __init__(
        self,
        exits: AdapterExits,
        rows: int,
        attention_mask: Tensor | None,
        first: int,
        policy: ExitPolicy,
        length: int,
        special: Tensor | None = None,
    ) -> None:
        super().__init__(exits, rows, attention_mask, first, policy)
        asked = np.ones((rows, length), dtype=bool)
        if attention_mask is not None:
            asked &= (attention_mask != 0).cpu().numpy()
        self.length = length if special is None else special.shape[1]
        if special is not None:
            asked[:, : self.length] &= (special == 0).cpu().numpy()
        self.shape = rows, length
        self.exit_layer = np.where(asked, -1, 0).ravel()  # tokens that nobody asks about have their answer, 0
        self.non_finite = np.zeros(rows * length, dtype=bool)
        self.num_active = int(asked.sum())
        self.has_answered = self.num_active < asked.size
        self._places = np.arange(rows * length)
        self._rows = np.arange(rows)

    def read(self, block: BadgeBlock, number: int, frame: Frame) -> tuple[Tensor, Tensor | None]:
        """Logits [n S, K] of exit `number`, token by token, and the uncertainty [n S]."""
        logits, uncertainty = super().read(block, number, frame)  # [n, S, K]
        return logits.flatten(0, 1), None if uncertainty is None else uncertainty.flatten()

    def finish(self, logits: Tensor) -> None:
        """Gives the tokens that are active the answer of the model's own head, [n, S, K]."""
        super().finish(logits.flatten(0, 1))

    def is_active(self) -> Array:
        """[n] bool, of the reader's rows in the states: those with a token that has no answer yet."""
        return (self.exit_layer[self._places] < 0).reshape(len(self._rows), -1).any(axis=1)

    def keep_rows(self, kept: Array, index: Tensor, length: int | None) -> None:
        """Goes on with some of its rows in the states, and with their first `length` tokens."""
        places = self._places.reshape(len(self._rows), -1)[kept][:, :length]
        ExitReader.keep_rows(self, kept, index, length)
        self._rows, self._places = self._rows[kept], places.ravel()
        self.has_answered = len(self._places) > self.num_active

    def rows_non_finite(self) -> Array:
        """[n] bool: the rows with such a token."""
        return np.logical_or.reduce(self.non_finite.reshape(self.shape)[:, : self.length], axis=1)

    def output(self) -> EarlyExitOutput:
        """The answers [n, S, K] with the exit of each token [n, S], and of each row: where its last token left."""
        if self.answer is None:  # no token was asked about
            mask = self.pooling.mask
            device = None if mask is None else mask.device
            self.answer = torch.zeros(len(self.exit_layer), self.exits.num_labels, device=device)
        found = super().output()
        assert found.logits is not None
        exits = torch.from_numpy(self.exit_layer.reshape(self.shape)[:, : self.length].copy()).to(found.logits.device)
        return EarlyExitOutput(
            logits=found.logits.unflatten(0, self.shape)[:, : self.length],
            exit_layer=exits.amax(dim=1),
            non_finite=torch.from_numpy(self.rows_non_finite()).to(exits.device),
            token_exit_layer=exits,
        )
