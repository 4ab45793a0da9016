"""`cache_states`: one pass of a frozen backbone over a data set, of which all is kept that exits read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from badge_peft.early_exit.cached_states import CachedStates, texts_of
from badge_peft.early_exit.state_passes import RecordingPass
from badge_peft.evaluation.collate import evaluating, pad_features, tensor_columns
from badge_peft.model import BadgeModel, get_badge_model
from badge_peft.tuner.adapter_file import weights_hash
from badge_peft.tuner.backbone import fingerprint, is_trained
from badge_peft.tuner.decoders import decoder_arguments
from badge_peft.tuner.lora import is_lora
from badge_peft.utils import distributed
from badge_peft.utils.checks import check_choice

CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LABELS = {"label", "labels", "label_ids"}  # what transformers' collators make labels of
MEMORY_GB = 4.0
BATCH_SIZE = 64
_EXAMPLES = 4  # rows of which the exits are computed both ways
_TOLERANCE = 1e-3

Collate = Callable[[list[Any]], Mapping[str, Any]]


class CannotCache(ValueError):
    """States cannot be kept; the message says why."""


def cache_states(
    model: nn.Module,
    dataset: Any,
    *,
    data_collator: Collate | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: str = "float16",
    memory_gb: float = MEMORY_GB,
    folder: str | Path | None = None,
    progress: bool = False,
) -> CachedStates:
    """Runs every row through the blocks once, in evaluation mode, and keeps what the exits of the active adapter read,
    and what its head reads where that is trained.

    `MultiExitTrainer(cache_states=...)` trains on them, as often and as many adapters as you like, as long as backbone
    and texts stay the same and no adapter reads more than this one does (`placement`, `exit_layers`, pooling, a
    trained head).

    Args:
        model: A PEFT model with a frozen backbone. Its training mode is restored afterwards.
        dataset: Rows of features, as for `collect_exit_logits`.
        data_collator: Makes a batch of rows, padded on the right; None pads with the model's `pad_token_id`.
        batch_size: Rows per pass.
        dtype: As what a number is stored: `float16`, `bfloat16` or `float32`.
        memory_gb: Up to how many gigabytes (10^9 bytes) stay in memory; what needs more goes into memory-mapped files.
        folder: Where these are; None: where temporary files are. They have no names, and are gone when the states are
            closed or the process ends.
        progress: Show a progress bar.

    Raises:
        ValueError: the data set is empty, the backbone is trained, rows are not padded on the right, or the states do
            not fit `dtype`.
        OSError: there is no room for the files.
    """
    if not len(dataset):
        raise ValueError("the data set is empty: there are no states to keep.")
    badge = get_badge_model(model)
    collate = data_collator or (lambda batch: pad_features(batch, badge.model))
    place = Path(gettempdir() if folder is None else folder)
    rows = [{k: v for k, v in row.items() if k not in LABELS} for row in tensor_columns(badge.model, dataset)]
    passes = StatePasses(badge, rows, collate)
    return passes.collect(batch_size, dtype, memory_gb, place, progress)


class StatePasses:
    """Passes over the rows of a data set, in the precision of `autocast`, in which the states are recorded."""

    def __init__(
        self,
        badge: BadgeModel,
        rows: Sequence[Mapping[str, Any]],
        collate: Collate,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.badge = badge
        self.rows = rows
        self.collate = collate
        self.autocast = autocast
        self.counts = [_count(row) for row in rows]
        self._accepted = inspect.signature(badge.model.forward).parameters
        self.device = next(badge.model.parameters()).device

    @torch.no_grad()
    def collect(self, batch_size: int, dtype: str, memory_gb: float, folder: Path, progress: bool) -> CachedStates:
        """As `cache_states`. Several processes share the passes and the files; each has to make the call."""
        check_choice("cache_dtype", dtype, tuple(CACHE_DTYPES))
        check_backbone(self.badge)
        order = sorted(range(len(self.rows)), key=lambda i: -self.counts[i])
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        rank, size = distributed.rank_world()
        with evaluating(self.badge), self.autocast():
            states = CachedStates(self.counts, CACHE_DTYPES[dtype], *self.check(order[:_EXAMPLES]))
            states.allocate(folder if size > 1 or states.nbytes > memory_gb * 1e9 else None)
            failure = None
            try:
                for numbers in tqdm(
                    batches[rank::size], desc="caching", disable=not (progress and distributed.is_main())
                ):
                    states.put(numbers, *self.run(numbers)[1:])
            except OverflowError as error:
                failure = f"{error}: take another cache_dtype, 'bfloat16' or 'float32'"
            except CannotCache as error:
                failure = str(error)
            except BaseException:
                states.close()
                raise
        failures = [text for text in distributed.gather([failure]) if text is not None]
        if failures:
            states.close()
            raise CannotCache(failures[0])
        states.texts, states.backbone = texts_of(self.rows), backbone_of(self.badge)
        return states

    def run(self, numbers: Sequence[int]) -> tuple[dict[str, Tensor], RecordingPass, Tensor | None]:
        """A pass over the rows of these numbers: its inputs, what it recorded, and the logits of the model's head."""
        batch = self.collate([self.rows[i] for i in numbers])
        inputs = {k: v.to(self.device) for k, v in batch.items() if k in self._accepted and k not in LABELS}
        mask = inputs.get("attention_mask")
        counts = torch.tensor([self.counts[i] for i in numbers], device=self.device).unsqueeze(1)
        if (
            mask is None
            or mask.dim() != 2
            or not torch.equal(mask != 0, torch.arange(mask.shape[1], device=self.device) < counts)
        ):
            raise CannotCache(
                "rows are not padded on the right, with an attention_mask [batch, sequence] that says where they end"
            )
        inputs = decoder_arguments(self.badge.model, inputs, len(numbers))
        recording = RecordingPass.of(self.badge, inputs)
        with recording:
            base = self.badge.model(return_dict=True, **inputs)
        return inputs, recording, base.get("logits")

    def check(self, numbers: Sequence[int]) -> tuple[RecordingPass, Tensor | None]:
        """A pass over a few rows, whose exits are the same by what is kept of it."""
        inputs, recording, logits = self.run(numbers)
        with CachedStates([self.counts[i] for i in numbers], torch.float32, recording, logits) as states:
            states.allocate()
            states.put(range(len(numbers)), recording, logits)
            rows = torch.arange(len(numbers), device=self.device)
            expected = self.badge(**inputs).exit_logits
            found = self.badge(**inputs, cached_states=states, cached_rows=rows).exit_logits
        if self.badge.config_of().reads_tokens:  # nothing is kept of padding
            real = inputs["attention_mask"] != 0
            expected, found = (logits.transpose(1, 2)[real] for logits in (expected, found))
        if not torch.allclose(
            found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * max(1.0, float(expected.abs().max()))
        ):
            far = float((found - expected).abs().max())
            raise CannotCache(f"by its states alone the exits of this model would differ by {far:.2g}")
        return recording, logits


def check_backbone(badge: BadgeModel) -> None:
    """Refuses a backbone whose states change with every step."""
    if is_trained(badge.model, badge.layout):
        mode = badge.config_of().backbone
        raise CannotCache(f"the backbone is trained (backbone={mode!r}), and its states change with every step")


def backbone_of(badge: BadgeModel) -> dict[str, Any]:
    """What tells the backbone from others; heads are left out."""
    skip = (*badge.layout.head, "pooler")
    added = {  # by an adapter: a fingerprint knows nothing of these
        name: parameter.detach()
        for name, parameter in badge.model.named_parameters()
        if (is_lora(name) or ".modules_to_save." in name) and not any(part in skip for part in name.split("."))
    }
    return {**fingerprint(badge.model, skip=skip), "added": weights_hash(added)}


def _count(row: Mapping[str, Any]) -> int:
    """Positions of a row that are no padding."""
    mask = row.get("attention_mask")
    return len(row["input_ids"]) if mask is None else int(np.count_nonzero(np.asarray(mask)))
