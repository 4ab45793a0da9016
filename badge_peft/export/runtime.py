"""`OnnxEarlyExitModel`: runs what `export_onnx` wrote, with onnxruntime."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from badge_peft.evaluation.collate import SPECIAL
from badge_peft.export.folder import CONFIG, LARGEST_PATIENCE, MODEL, ExportedFolder, check_folder
from badge_peft.export.words import entities_of
from badge_peft.utils.checks import check_int, is_number, to_python
from badge_peft.utils.extras import require
from badge_peft.utils.problem import problem_of


@dataclass
class OnnxOutput:
    """Each row's answer and where it was given.

    Args:
        logits: [B, K] float32, of the exit at which the row stopped; of token classification [B, S, K].
        exit_layer: [B] int64, the block that answered, 1 to M; 0 for the exit on the embeddings. Of tokens [B, S],
            0 also for those that nobody asked about; a row left at the largest of its own.
    """

    logits: np.ndarray
    exit_layer: np.ndarray


class OnnxEarlyExitModel(ExportedFolder):
    """An exported model. Made by `from_pretrained`.

    Attributes:
        config: What `early_exit.json` says: labels, exits, the rule and its defaults.
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
                f"{folder / CONFIG} belongs to another model than the {MODEL} beside it, as where an export was "
                "interrupted: what the model itself says is taken. Export again.",
                stacklevel=2,
            )
            config = inside
        if ("tasks" in config) != cls.has_tasks:
            other = "one task: OnnxEarlyExitModel" if cls.has_tasks else "many tasks: OnnxTasksModel"
            raise ValueError(f"{directory} holds a file of {other} runs it.")
        return cls(folder, session, config)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        special_tokens_mask: Any = None,
        *,
        threshold: float | Sequence[float] | None = None,
        patience: int | None = None,
        top_k: int | None = None,
    ) -> OnnxOutput:
        """Answers a batch.

        Args:
            input_ids: [B, S], anything that numpy takes.
            attention_mask: [B, S]; None means that every position is real.
            token_type_ids: [B, S]; None means zeros. Ignored where the model has none.
            special_tokens_mask: [B, S], of token classification: 1 for tokens that need no answer and hold no row;
                None means zeros.
            threshold: In place of the file's own, for this call; where the file has one for each exit, a list of as
                many, or a number for all.
            patience: In place of the file's own, for this call.
            top_k: The same, in a file that ranks: the rows are then the candidates of one query.

        Raises:
            ValueError: an empty batch, more positions than the model has, or a threshold, patience or top_k that is
                not allowed.
        """
        counts = {"patience": to_python(patience), "top_k": to_python(top_k)}
        own = "top_k" if "top_k" in self.config else "patience"
        for name, count in counts.items():
            check_int(name, count, at_least=1)
            if count is not None and name != own:
                raise ValueError(f"{name}={count} is not allowed: the policy in the file reads {own}.")
        feed = self.inputs(input_ids, attention_mask, token_type_ids, special_tokens_mask)
        if threshold is not None:
            feed["threshold"] = self._threshold(threshold)
        if (given := counts[own]) is not None:
            feed[own] = np.asarray(min(given, LARGEST_PATIENCE), dtype=np.int64)
        logits, exit_layer = self.session.run(["logits", "exit_layer"], feed)
        return OnnxOutput(logits, exit_layer)

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

    def _threshold(self, given: Any) -> np.ndarray:
        """In the shape that the file takes: a scalar, or [E]."""
        own, given = self.config["threshold"], to_python(given)
        if is_number(given):
            return np.full(np.shape(own), given, dtype=np.float32)
        count = len(own) if isinstance(own, list) else 0
        if not count or np.shape(given) != (count,) or not all(map(is_number, map(to_python, given))):
            also = f", a list of {count}, one for each exit" if count else ""
            raise ValueError(f"threshold={given!r} is not allowed: it must be a finite number{also} or None.")
        return np.asarray(given, dtype=np.float32)

    @property
    def labels(self) -> list[str]:
        """Names of the labels, K."""
        return self.config["labels"] or [str(i) for i in range(self.config["num_labels"])]

    def predict(
        self,
        texts: Sequence[str] | str,
        text_pairs: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        threshold: float | Sequence[float] | None = None,
        patience: int | None = None,
    ) -> list[dict[str, Any]]:
        """Answers texts, or pairs of texts.

        Returns:
            Per text `label`, `confidence` and `exit_layer`; `labels` where a text may have several, `value` for
            regression. Of token classification `entities`, as `answers_of` has them, and `exit_layer`: the first
            sub-token of each word answers for it, and the text leaves with the last of these.
        """
        if "top_k" in self.config:
            raise ValueError("the policy in the file ranks the candidates of a query: use OnnxReranker(model).rank.")
        if isinstance(texts, str):
            texts = [texts]
        problem = problem_of(self.config["problem_type"])
        answers: list[dict[str, Any]] = []
        for fields, words in self.batches(texts, text_pairs, batch_size):
            output = self(**fields, threshold=threshold, patience=patience)
            if self.reads_tokens:
                answers += entities_of(words, output, self.labels)
                continue
            for row, number in zip(output.logits, output.exit_layer, strict=True):
                answers.append({**problem.format_prediction(row, self.labels), "exit_layer": int(number)})
        return answers


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
