"""Many texts on many processes and machines, by Ray Data: the rows of a dataset, or the files that `badge-peft predict
--engine ray` is given.

What reads texts is what `predict` reads them with, and what answers them is `predict`, in processes of its own. Ray
Data keeps these busy, and gives the work of one that dies to another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from badge_peft.utils.checks import check_int
from badge_peft.utils.extras import ask_for_token, no_cluster, require
from badge_peft.workflows.columns import Names, find_columns
from badge_peft.workflows.predict import Answerer, Answering
from badge_peft.workflows.settings import PolicyOverrides, TextColumns
from badge_peft.workflows.stream import TextFiles, chunks_of, texts_of

_BATCHES = 32  # passes of a chunk, which is what a process that dies has to do again


def predict_dataset(
    dataset: Any,
    adapter: str | dict[str, str],
    *,
    columns: TextColumns = TextColumns(),
    batch_size: int = 32,
    workers: int | None = None,
    base_model: str | None = None,
    device: str | None = None,
    **overrides: Any,
) -> Any:
    """A `ray.data.Dataset` with the predictions next to its columns, computed when it is read.

    Args:
        dataset: Of rows with a text each, or a pair of texts.
        adapter: A folder that every machine can read, or a repository; or a dict from tasks to such.
        columns: Where the texts are; a text column that is not named is found by its usual names.
        batch_size: Texts per pass.
        workers: How many processes answer, each with one core, or one GPU. Default: as many as there are, except for a
            core that reads the dataset.
        base_model: As for `load_pretrained`.
        device: `cpu` or `cuda`. Default: GPUs where the cluster has some.
        **overrides: `policy`, `threshold`, `patience`, `depth`, in place of the adapter's own.

    Returns:
        A lazy dataset with the columns `label`, `score` and `exit_layer` more, or what `predict` gives in their place
        for other problems and for many tasks. `dataset` itself, where it has neither columns nor rows.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        OSError: there is no such adapter or base model.
        ValueError: there is no such column, or one of an answer's name already; the adapter ranks, or is none.
    """
    require("ray", "ray", "pandas")
    answering = Answering(adapter, PolicyOverrides(**overrides), batch_size, base_model, device)
    answerer = Answerer(replace(answering, device="cpu"))
    if answerer.reading["by_query"]:
        raise ValueError(
            "the candidates of a query are ranked together, and the batches of a dataset would part them: use "
            "`badge-peft predict --engine ray`, which reads files in order."
        )
    schema = dataset.schema()
    if schema is None:  # a dataset without rows, which may have no columns either
        return dataset
    known = list(schema.names)
    names = find_columns(known, columns, answerer.reading["recorded"])
    added = [name for name in answerer.table([]).column_names if name != "text"]
    taken = [name for name in added if name in known]
    if taken:
        raise ValueError(f"the dataset has columns {', '.join(taken)} already: rename_columns or drop_columns them.")
    return dataset.map_batches(
        _Rows,
        fn_constructor_args=(answering, names, added),
        batch_size=_BATCHES * batch_size,
        batch_format="pyarrow",
        **_pool(workers, device, reads=True),
    )


def answer_files(
    files: TextFiles, answering: Answering, workers: int | None = None
) -> Generator[dict[str, Any], None, None]:
    """The answers to the texts of many files, within reach of all machines: file by file, each from its first text to
    its last; of each chunk what `chunks_of` gives, with `table`, its answers as columns, in the place of `texts`."""
    import ray.data

    dataset = ray.data.from_items([{"file": number} for number in range(len(files.paths))], override_num_blocks=1)
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = 1  # each chunk is a block, which any process may answer
    dataset.context.enable_progress_bars = False
    size = _BATCHES * answering.batch_size
    reading = {"files": files, "size": size}
    one = ray.data.TaskPoolStrategy(size=1)  # reads far faster than many answer, and has no core of its own
    dataset = dataset.flat_map(_read, fn_kwargs=reading, num_cpus=0, compute=one)
    answers = dataset.map_batches(
        _Chunks,
        fn_constructor_args=(answering,),
        batch_size=1,
        batch_format="pyarrow",
        **_pool(workers, answering.device),
    )
    for row in answers.iter_rows():
        with pa.ipc.open_stream(row.pop("table")) as stream:
            yield {**row, "table": stream.read_all()}


@contextmanager
def cluster(address: str | None = None, workers: int | None = None) -> Iterator[None]:
    """Inside of it there is a Ray cluster: that which this process is connected to already, the one at `address`, or
    one of this process alone.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        OSError: there is no cluster at the address, or none could be started.
        ValueError: as `ask_for_token`.
    """
    require("ray", "ray", "pandas")
    check_int("workers", workers, at_least=1)
    ask_for_token(address)
    import ray
    import ray.data

    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {"num_cpus": max(workers or 1, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else own))
    except Exception as error:  # which Ray raises, no kin of it, where a process of its own starts too slowly
        ray.shutdown()
        if address is None:
            raise OSError(
                f"Ray has not started on this machine ({error}): try again when it has less to do."
            ) from error
        raise OSError(no_cluster(address, error)) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plans are no news to who asked for answers
    try:
        yield
    finally:
        ray.shutdown()


def _pool(workers: int | None, device: str | None, reads: bool = False) -> dict[str, Any]:
    """What `map_batches` is told of the processes that answer; `reads`: what reads the rows needs a core, too."""
    import ray.data

    check_int("workers", workers, at_least=1)
    there = ray.cluster_resources() if ray.is_initialized() else {}
    on_gpu = there.get("GPU", 0) >= 1 if device is None else device.startswith("cuda")
    units = int(there.get("GPU" if on_gpu else "CPU", os.cpu_count() or 1))
    count = workers or max(1, units - (reads and not on_gpu))
    # with no core left to read with nothing would ever come: then Ray does not count the cores of those that answer
    each = 0 if reads and not on_gpu and 0 < units <= count else 1
    return {"compute": ray.data.ActorPoolStrategy(size=count), "num_gpus" if on_gpu else "num_cpus": each}


def _read(row: dict[str, Any], files: TextFiles, size: int) -> Iterator[dict[str, Any]]:
    """Runs as a task."""
    return chunks_of(files, int(row["file"]), size)


class _Chunks:
    """An actor that answers chunks."""

    def __init__(self, answering: Answering) -> None:
        self.answerer = Answerer(answering)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (chunk,) = batch.to_pylist()
        try:
            table = self.answerer.table(texts_of(chunk))
        except ValueError as error:  # is data until it is in the process that says it
            table, chunk["error"] = pa.table({}), str(error)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return pa.Table.from_pylist([{**chunk, "texts": "", "table": sink.getvalue().to_pybytes()}])


class _Rows:
    """An actor that puts answers beside the rows of a dataset."""

    def __init__(self, answering: Answering, names: Names, added: list[str]) -> None:
        self.answerer, self.names, self.added = Answerer(answering), names, added

    def __call__(self, table: pa.Table) -> pa.Table:
        texts, pairs = (self._values(table, self.names[name]) for name in ("text", "text_pair"))
        found = self.answerer.table(list(zip(texts, pairs, strict=True)))
        for name in self.added:
            table = table.append_column(name, found[name])
        return table

    def _values(self, table: pa.Table, name: str | None) -> list[Any]:
        if name is None:
            return [None] * len(table)
        values = table[name].to_pylist()
        if None in values:
            raise ValueError(f"a row has no value in column {name!r}: fill it, or filter such rows out.")
        return [str(value) for value in values]
