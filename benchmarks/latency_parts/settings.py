"""What is measured: sizes, lengths, batches, and how many rounds of each experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# name -> what it measures, in the words of the page
EXPERIMENTS = {
    "full-depth": "PyTorch: full depth with every exit computed, and early exit with nobody leaving, against stock",
    "exits": "PyTorch: leaving at block k, one row at a time, against k/M of stock",
    "batch": "PyTorch: batches whose rows leave at different blocks, against mean exit/M of stock",
    "onnx": "ONNX Runtime: leaving at block k, one row at a time, against k/M of plain export",
    "onnx-int8": "ONNX Runtime, int8: leaving at block k, one row at a time, against k/M of plain int8 export",
    "onnx-batch": "ONNX Runtime: batches whose rows leave at different blocks, against mean exit/M of plain export",
    "int8-vs-stock": "ONNX Runtime, int8, leaving half-way, against stock PyTorch: time over time",
    "memory": "Peak memory of a fresh process, PyTorch, against stock",
}
ONNX = ("onnx", "onnx-int8", "onnx-batch", "int8-vs-stock")
ON_CUDA = ("full-depth", "exits", "batch")  # the others are about the CPU


@dataclass(frozen=True)
class Size:
    """A BERT of random weights.

    Args:
        hidden: d; the feed-forward part has 4 d.
        blocks: M.
        heads: Of each attention.
        vocabulary: Number of tokens.
    """

    hidden: int
    blocks: int
    heads: int
    vocabulary: int = 30522


SIZES = {
    "BERT-base": Size(768, 12, 12),
    "h384": Size(384, 12, 12),  # MiniLM-L12-H384, e5-small
    "tiny": Size(32, 4, 2, 200),  # of --quick: says nothing about speed
}


@dataclass(frozen=True)
class Settings:
    """One run of the benchmark.

    Args:
        sizes: Names in `SIZES`.
        lengths: Tokens per row, batch 1.
        batches: (rows, tokens) of the batches whose rows leave at different blocks, PyTorch.
        onnx_batches: The same for ONNX Runtime.
        memory_batches: The same for the peak memory.
        rounds: How often everything takes its turn, by experiment.
        warmup: Turns before the first that counts.
        threads: Of torch and of every ONNX Runtime session.
        quick: A tiny model, to try the benchmark itself.
    """

    sizes: Sequence[str] = ("BERT-base", "h384")
    lengths: Sequence[int] = (16, 64, 128)
    batches: Sequence[tuple[int, int]] = ((8, 32), (32, 32), (8, 64), (32, 64))
    onnx_batches: Sequence[tuple[int, int]] = ((8, 32), (32, 32))
    memory_batches: Sequence[tuple[int, int]] = ((32, 128),)
    rounds: tuple[tuple[str, int], ...] = (
        ("full-depth", 30),
        ("exits", 14),
        ("batch", 8),
        ("onnx", 20),
        ("onnx-int8", 20),
        ("onnx-batch", 10),
        ("int8-vs-stock", 20),
        ("memory", 2),
    )
    warmup: int = 2
    threads: int = 2
    quick: bool = False

    def rounds_of(self, experiment: str) -> int:
        """Rounds of one experiment."""
        return dict(self.rounds)[experiment]

    def cells(self, experiment: str) -> list[tuple[str, Settings]]:
        """The shapes of one experiment, each by its name and alone: what is measured and stored at once."""
        field = {"batch": "batches", "onnx-batch": "onnx_batches", "memory": "memory_batches"}.get(
            experiment, "lengths"
        )
        shapes = getattr(self, field)
        names = [f"S={shape}" if field == "lengths" else f"B={shape[0]}, S={shape[1]}" for shape in shapes]
        return [(name, replace(self, **{field: (shape,)})) for name, shape in zip(names, shapes, strict=True)]

    def with_rounds(self, rounds: int | None) -> Settings:
        """The same with `rounds` for every experiment; None leaves them."""
        return self if rounds is None else replace(self, rounds=tuple((name, rounds) for name in EXPERIMENTS))


QUICK = Settings(
    sizes=("tiny",),
    lengths=(8, 16),
    batches=((4, 8),),
    onnx_batches=((4, 8),),
    memory_batches=((4, 8),),
    rounds=tuple((name, 1 if name == "memory" else 2) for name in EXPERIMENTS),
    warmup=1,
    quick=True,
)
