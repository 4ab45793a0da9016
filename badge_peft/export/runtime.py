"""`OnnxEarlyExitModel` and `OnnxTasksModel`: run what an export wrote, with onnxruntime."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from badge_peft.evaluation.collate import SPECIAL
from badge_peft.evaluation.words import Words, answers_of
from badge_peft.export.folder import CONFIG, LARGEST_PATIENCE, MODEL, ExportedFolder, check_folder
from badge_peft.utils.checks import check_int, is_number, to_python
from badge_peft.utils.extras import require
from badge_peft.utils.problem import problem_of


@dataclass
class OnnxOutput:
    """Each row's answer and where it was given.

    Args:
        logits: [B, K] float32, of the exit at which the row stopped; of token classification [B, S, K].
        exit_layer: [B] int64, the block that answered, 1 to M; 0 for the exit on the embeddings. Of tokens [B, S],
            0 also for ignored ones; a row stopped at the largest of these.
    """

    logits: np.ndarray
    exit_layer: np.ndarray


class OnnxEarlyExitModel(ExportedFolder):
    """An exported model. Made by `from_pretrained`.

    Attributes:
        config: What `early_exit.json` says: labels, exits, the policy and its defaults.
    """

    #: Whether the files that this runs are of many tasks.
    has_tasks: ClassVar[bool] = False

    def __init__(self, directory: Path, session: Any, config: dict[str, Any]) -> None:
        super().__init__(directory, config)
        self.session = session

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        threads: int | None = None,
        spinning: bool = False,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> OnnxEarlyExitModel:
        """Loads a folder that `export_onnx` wrote.

        Args:
            directory: The folder.
            threads: Of one call; None leaves it to onnxruntime (all cores).
            spinning: Whether idle threads of onnxruntime spin while they wait. That saves a little time in a process
                that does nothing else, and takes it from whatever runs beside it.
            providers: As onnxruntime names them.

        Raises:
            ModuleNotFoundError: onnxruntime is not installed.
            FileNotFoundError: the folder lacks `model.onnx` or `early_exit.json`.
            ValueError: the file is of many tasks, which `OnnxTasksModel` runs, or the reverse.
        """
        require("onnx", "onnxruntime")
        folder = Path(directory)
        check_folder(folder, "export_onnx")
        check_int("threads", threads, at_least=1)
        session = open_session(folder / MODEL, threads, spinning, providers)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stored = session.get_modelmeta().custom_metadata_map.get(CONFIG)
        inside = config if stored is None else json.loads(stored)  # files of earlier versions have none
        if inside.get("id") != config.get("id"):
            warnings.warn(
                f"{folder / CONFIG} belongs to another model than the {MODEL} in its folder, as where an export was "
                "interrupted: what the model itself says is taken. Export again.",
                stacklevel=2,
            )
            config = inside
        if ("tasks" in config) != cls.has_tasks:
            other = "one task: OnnxEarlyExitModel" if cls.has_tasks else "many tasks: OnnxTasksModel"
            raise ValueError(f"{directory} holds a file of {other} runs it.")
        return cls(folder, session, config)

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """What the config says of each task; of a file of one, under the empty name."""
        return self.config["tasks"] if self.has_tasks else {"": self.config}

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        special_tokens_mask: Any = None,
        *,
        threshold: Any = None,
        patience: Any = None,
        top_k: int | None = None,
    ) -> Any:
        """Answers a batch.

        Args:
            input_ids: [B, S], anything that numpy takes.
            attention_mask: [B, S]; None means that every position is real.
            token_type_ids: [B, S]; None means zeros. Ignored where the model has none.
            special_tokens_mask: [B, S], of token classification: 1 for tokens that need no answer and hold no row;
                None means zeros.
            threshold: In place of the file's own, for this call; where the file has one for each exit, a list of as
                many, or a number for all. Of many tasks a number for all, or a dict by task.
            patience: In place of the file's own, for this call; of many tasks one for all, or a dict by task.
            top_k: The same, in a file that ranks: the rows are then the candidates of one query.

        Returns:
            `OnnxOutput`; of many tasks a dict of it by task.

        Raises:
            ValueError: an empty batch, more positions than the model has, a task that the file does not have, or a
                threshold, patience or top_k that is not allowed.
        """
        feed = self.inputs(input_ids, attention_mask, token_type_ids, special_tokens_mask)
        for name, given in (("threshold", threshold), ("patience", patience), ("top_k", top_k)):
            for task, value in self._by_task(given, name).items():
                own, place = self.tasks[task], f"{task}.{name}" if task else name
                if name == "threshold":
                    feed[place] = threshold_input(own["threshold"], value)
                    continue
                check_int(name, value, at_least=1, optional=False)
                if (name == "top_k") != ("top_k" in own):
                    reads = "top_k" if "top_k" in own else "patience"
                    raise ValueError(f"{name}={value} is not allowed: the policy in the file reads {reads}.")
                feed[place] = np.asarray(min(value, LARGEST_PATIENCE), dtype=np.int64)
        kinds = [(task, f"{task}." if task else "") for task in self.tasks]
        found = iter(self.session.run([p + kind for _, p in kinds for kind in ("logits", "exit_layer")], feed))
        answers = {task: OnnxOutput(next(found), next(found)) for task, _ in kinds}
        return answers if self.has_tasks else answers[""]

    def _by_task(self, given: Any, field: str) -> dict[str, Any]:
        """The values that a call gives, by task."""
        if given is None:
            return {}
        if not (self.has_tasks and isinstance(given, Mapping)):
            return dict.fromkeys(self.tasks, to_python(given))
        unknown = [task for task in given if task not in self.tasks]
        if unknown:
            raise ValueError(
                f"{field} has {unknown[0]!r}, which is no task of this file; they are {', '.join(self.tasks)}."
            )
        return {task: to_python(value) for task, value in given.items() if value is not None}

    def inputs(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any, special_tokens_mask: Any = None
    ) -> dict[str, np.ndarray]:
        """What the graph takes of the model's inputs, checked; as in a call."""
        ids = np.asarray(input_ids, dtype=np.int64)
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(f"input_ids must be [batch, sequence] and not empty, got shape {list(ids.shape)}.")
        if (ids < 0).any():
            raise ValueError(f"input_ids has the token number {ids.min()}, and the first is 0.")
        longest = self.config.get("max_positions", self.config["max_length"])
        if longest is not None and ids.shape[1] > longest:
            raise ValueError(
                f"the input has {ids.shape[1]} positions, and the model has {longest}: truncate to {longest} tokens."
            )
        feed = {"input_ids": ids, "attention_mask": _like(ids, attention_mask, "attention_mask", 1)}
        if "token_type_ids" in self.config["inputs"]:
            feed["token_type_ids"] = _like(ids, token_type_ids, "token_type_ids", 0)
        if SPECIAL in self.config["inputs"]:
            feed[SPECIAL] = _like(ids, special_tokens_mask, SPECIAL, 0)
        return feed

    @property
    def labels(self) -> Any:
        """Names of the labels, K; of many tasks a dict of these by task."""
        found = {task: own["labels"] or [str(i) for i in range(own["num_labels"])] for task, own in self.tasks.items()}
        return found if self.has_tasks else found[""]

    def predict(
        self,
        texts: Sequence[str] | str,
        text_pairs: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        threshold: Any = None,
        patience: Any = None,
    ) -> list[dict[str, Any]]:
        """Answers texts, or pairs of texts; `threshold` and `patience` are as in a call.

        Returns:
            Per text `label`, `score` and `exit_layer`; `labels` where a text may have several, `value` for
            regression. Of token classification `entities`, as `answers_of` has them, and `exit_layer`: the first
            sub-token of each word answers for it, and the text stops with the last of these. Of many tasks a dict
            from tasks to such.
        """
        if "top_k" in self.config:
            raise ValueError("the policy in the file ranks the candidates of a query: use OnnxReranker(model).rank.")
        texts = [texts] if isinstance(texts, str) else list(texts)
        answers: list[dict[str, Any]] = []
        names = self.labels if self.has_tasks else {"": self.labels}
        for fields, words in self.batches(texts, text_pairs, batch_size):
            output = self(**fields, threshold=threshold, patience=patience)
            each = {
                task: _said(own, words, self.tasks[task]["problem_type"], names[task])
                for task, own in (output if self.has_tasks else {"": output}).items()
            }
            together = [dict(zip(each, of_text, strict=True)) for of_text in zip(*each.values(), strict=True)]
            answers += together if self.has_tasks else each[""]
        return answers


class OnnxTasksModel(OnnxEarlyExitModel):
    """An exported model of many tasks. Made by `from_pretrained`, with the arguments of `OnnxEarlyExitModel`'s. A call
    gives a dict from tasks to `OnnxOutput`, `predict` one from tasks to answers.

    Attributes:
        config: What `early_exit.json` says: under `tasks` the labels, exits, policy and defaults of each.
    """

    has_tasks = True


def _said(output: OnnxOutput, words: Sequence[Words], problem_type: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """What is said of each text of a batch."""
    if output.exit_layer.ndim == 2:
        return [
            {"entities": answers_of(own, logits, exits, names)["entities"], "exit_layer": int(exits.max())}
            for own, logits, exits in zip(words, output.logits, output.exit_layer, strict=True)
        ]
    problem = problem_of(problem_type)
    rows = zip(output.logits, output.exit_layer, strict=True)
    return [{**problem.format_prediction(row, names), "exit_layer": int(number)} for row, number in rows]


def threshold_input(own: Any, given: Any) -> np.ndarray:
    """In the shape that the file takes: a scalar, or [E]."""
    given = to_python(given)
    if is_number(given):
        return np.full(np.shape(own), given, dtype=np.float32)
    count = len(own) if isinstance(own, list) else 0
    if not count or np.shape(given) != (count,) or not all(map(is_number, map(to_python, given))):
        also = f", a list of {count}, one for each exit" if count else ""
        raise ValueError(f"threshold={given!r} is not allowed: it must be a finite number{also} or None.")
    return np.asarray(given, dtype=np.float32)


def open_session(
    path: Path,
    threads: int | None = None,
    spinning: bool = False,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Any:
    """An onnxruntime session on the graph in `path`; the rest is as `OnnxEarlyExitModel.from_pretrained` has it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of inputs that have defaults, which is what we want
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def _like(ids: np.ndarray, value: Any, name: str, default: int) -> np.ndarray:
    if value is None:
        return np.full_like(ids, default)
    array = np.asarray(value, dtype=np.int64)
    if array.shape != ids.shape:
        raise ValueError(
            f"{name} has shape {list(array.shape)}, and input_ids have {list(ids.shape)}: they must agree."
        )
    return array
