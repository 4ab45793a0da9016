"""Commands that put an adapter to use: `predict`, `export`, `app`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveInt
from cyclopts.validators import Number

from badge_peft.cli import options as shared
from badge_peft.utils.checks import check_choice
from badge_peft.utils.extras import require, require_onnx_exporter
from badge_peft.workflows.settings import Columns, PolicyOverrides, TextColumns

if TYPE_CHECKING:
    from badge_peft.export.report import ParityReport


def _check_file(_: Any, value: str | None) -> None:
    if value is not None and value.startswith("-") and value != "-":
        raise ValueError("There is no such option.")


def predict(
    adapter: shared.AdapterOrTasks = None,
    file: Annotated[str | None, Parameter(allow_leading_hyphen=True, validator=_check_file)] = None,
    out: str | None = None,
    /,
    *,
    task: shared.Task = None,
    format: str | None = None,
    columns: TextColumns = TextColumns(),
    batch_size: PositiveInt = 32,
    engine: str | None = None,
    workers: PositiveInt | None = None,
    address: str | None = None,
    overrides: PolicyOverrides = PolicyOverrides(),
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Predict with early exits: one line of JSON per text, in the order of the texts.

    Each line has the text, its label, the confidence (the label's probability), and the exit: the block that answered.
    An adapter for tokens gives entities in the place of the label, and tags where a row has a list of tokens. One that
    ranks gives each row its rank among the candidates of its query, which must follow one another.

    With --task each line has these for every task, from one pass: badge-peft predict --task intent=DIR --task pii=DIR
    texts.txt

    Several processes, started with accelerate launch or torchrun, share the texts among them; the output is that of
    one.

    Many files, on many cores or machines: badge-peft predict ADAPTER FOLDER OUT --engine ray answers each file of
    FOLDER into a parquet file in OUT, row by row in the same order. Run again it does what is missing. Needs the extra
    ray.

    Args:
        file: Texts to answer: a txt file (one text per line), or a csv, tsv, jsonl or parquet file. Default: -, the
            standard input. With --engine ray: a folder of such.
        out: With --engine ray: folder for the answers, on this machine; it is made.
        format: text, csv, tsv, jsonl or parquet. Default: by the file's name; text for standard input.
        batch_size: Batch size: texts per pass, in each process; 1 answers each line as soon as it is there.
        engine: ray, for a folder of files.
        workers: With --engine ray: processes that answer, each with one core or GPU. Default: as many as there are.
        address: With --engine ray: of a Ray cluster, auto for the one that this machine belongs to. Default: this
            machine alone.
    """
    from badge_peft.workflows.predict import Answerer, Answering
    from badge_peft.workflows.stream import read_texts

    if engine is not None:
        check_choice("engine", engine, ("ray",))
        places, (file, out) = shared.adapters_and(("FOLDER", "OUT"), task, adapter, file, out)
    elif out is not None or workers is not None or address is not None:
        raise ValueError("OUT, --workers and --address are for a folder of files: add --engine ray.")
    else:
        places, (file,) = shared.adapters_and(("FILE",), task, adapter, file, needed=False)
    answering = Answering(places.get(None) or places, overrides, batch_size, base_model, device)
    if engine is not None:
        require("ray", "ray", "pandas")
        from badge_peft.workflows.folders import predict_folder

        report = predict_folder(
            str(file), str(out), answering, format=format, columns=columns, workers=workers, address=address
        )
        before = f"; {report.before} were answered before" if report.before else ""
        print(f"{report.files} files with {report.rows} texts answered into {out}{before}")
        return
    answerer = Answerer(answering)
    found = answerer(read_texts(file or "-", format, columns, **answerer.reading))
    try:
        with closing(found) as answers:
            for line in answers:
                print(f"{json.dumps(line, ensure_ascii=False)}\n", end="", flush=True)  # whole, should it be killed
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def export(
    adapter: shared.AdapterOrTasks = None,
    dir: str | None = None,
    /,
    *,
    task: shared.Task = None,
    data: Annotated[
        str | None, Parameter(help=f"Compare the file with the PyTorch model on these rows. {shared.DATA}")
    ] = None,
    int8: bool = False,
    overrides: PolicyOverrides = PolicyOverrides(),
    columns: Columns = Columns(),
    json_file: shared.JsonFile = None,
    base_model: shared.BaseModel = None,
) -> None:
    """Write an adapter with its model as one ONNX file that skips all blocks after the exit.

    Threshold and patience stay inputs of the graph, so a service changes its speed from call to call. The folder also
    gets the tokenizer, the configs and a card. With --task one file answers all tasks, with threshold and patience of
    each. Needs the extra onnx: pip install 'badge-peft[onnx]'.

    Args:
        dir: Folder to write; it is made.
        int8: Quantize the blocks: several times smaller and faster on a CPU.
    """
    from badge_peft.export import export_onnx, export_tasks_onnx
    from badge_peft.workflows.adapter_dir import early_exit_configs, open_tasks

    require_onnx_exporter()
    places, (dir,) = shared.adapters_and(("DIR",), task, adapter, dir)
    shared.check_folder(dir)
    if None not in places and data is not None:
        raise ValueError("--data is for one adapter: the file of many tasks is compared on random rows alone.")
    several = open_tasks(places, base_model, "cpu")
    opened = next(iter(several.values()))
    configs = early_exit_configs(several, **vars(overrides))
    common = {"tokenizer": opened.tokenizer, "int8": int8, "progress": True}
    if None not in several:
        shared.prepare_folder(json_file)
        written = export_tasks_onnx(opened.model, dir, tasks=[*several], early_exit_config=configs, **common)
        exits = ", ".join(f"{name} {own['exit_layers']}" for name, own in written["tasks"].items())
        print(f"{Path(dir) / 'model.onnx'}: {written['size_bytes'] / 1e6:.1f} MB, exits at {exits}")
        shared.write(written, json_file)
        return
    examples = None
    if data is not None:
        rows = opened.read(data, columns)
        examples = opened.encode(rows)
        if opened.task == "ranking":
            examples = examples.add_column("groups", rows.queries())
    shared.prepare_folder(json_file)
    report = export_onnx(opened.model, dir, early_exit_config=configs[None], examples=examples, **common)
    print(f"{Path(dir) / 'model.onnx'}: {report.size_bytes / 1e6:.1f} MB, exits at {report.exit_layers}")
    found = report.changes
    if found is not None:
        print(_changes(found, opened.labels.problem_type))
        if found.score is not None:
            print(f"score {found.score:.4f} against {found.score_before:.4f}")
    shared.write(report.to_dict(), json_file)


def _changes(found: ParityReport, problem_type: str) -> str:
    same = f"same answer {found.same_answer:.1%}"
    if problem_type == "regression":
        same = f"values differ by {found.same_answer:.3g} in the mean"
    return (
        f"on {found.rows} rows, against PyTorch: {same}, same exit {found.same_exit:.1%}, mean exit "
        f"{found.mean_exit:.2f} against {found.mean_exit_before:.2f}"
    )


def app(
    adapter: shared.Adapter,
    /,
    *,
    host: str = "127.0.0.1",
    port: Annotated[int | None, Parameter(validator=Number(gte=1, lte=65535))] = None,
    share: bool = False,
    overrides: PolicyOverrides = PolicyOverrides(),
    base_model: shared.BaseModel = None,
    device: shared.Device = None,
) -> None:
    """Open a page in the browser that shows where a text stops, and why.

    Type a text: each exit's distribution is shown as it comes, with the numbers that the policy looks at, and sliders
    move its threshold and patience. A second tab has the trade-off on the adapter's evaluation data. Needs the extra
    app: pip install 'badge-peft[app]'.

    Args:
        host: Address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in.
        port: Default: the first free one from 7860 on.
        share: Also make a public link, through gradio's servers: all texts pass them.
    """
    require("app", "gradio", "matplotlib")
    from badge_peft.app.page import Callbacks, build_page, launch
    from badge_peft.workflows.adapter_dir import check_texts_only, open_adapter

    opened = open_adapter(adapter, base_model, device)
    check_texts_only(opened.task, "app")
    config = opened.early_exit_config(**vars(overrides))
    launch(build_page(Callbacks(opened, adapter, config)), host, port, share)
