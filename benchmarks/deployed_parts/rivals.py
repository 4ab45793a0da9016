"""What a user could take instead: the model's first blocks fine-tuned alike, and a linear model on tf-idf."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import hstack
from seqeval.metrics import f1_score
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from badge_peft.evaluation.timing import Runner, take_turns
from badge_peft.export.plain import FullDepthExporter
from badge_peft.export.runtime import open_session
from badge_peft.workflows.bench import onnx_inputs
from deployed_parts.finetune import encode, label_names, read_rows

STRENGTHS = (1.0, 10.0, 100.0)  # C of the logistic regression
ROUNDS = 3
PAUSE = 0.005  # seconds before each call, in which another runtime's threads come to rest


def compare_models(models: dict[str, Path], data: Path, length: int, tokens: bool, timed: int) -> dict[str, Any]:
    """Scores on test rows, agreement with the first model, and times in turn.

    Returns:
        By name: `score`, `agreement`, `ms` (PyTorch), `int8_ms` (ONNX Runtime); times are means of a call.
    """
    rows = read_rows(data / "test.jsonl")
    names = label_names(read_rows(data / "train.jsonl"), tokens)
    auto = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    loaded = {name: auto.from_pretrained(folder, dtype=torch.float32).eval() for name, folder in models.items()}
    encoded = encode(rows, AutoTokenizer.from_pretrained(next(iter(models.values()))), names, length, tokens)
    encoded.set_format("torch")
    inputs = [{k: v[None] for k, v in row.items() if k != "labels"} for row in encoded]
    labels = [row["labels"].numpy() for row in encoded]
    answers = {name: _answers(model, inputs) for name, model in loaded.items()}
    full = next(iter(answers.values()))
    times = _times(loaded, inputs[:timed])
    return {
        name: {
            "score": _score(found, labels, names, tokens),
            "agreement": float(np.mean(_same(found, full, labels, tokens))),
            **times[name],
        }
        for name, found in answers.items()
    }


def _answers(model: Any, inputs: list[dict[str, Any]]) -> list[np.ndarray]:
    with torch.inference_mode():
        return [model(**row).logits.argmax(-1)[0].numpy() for row in inputs]


def _same(found: list[Any], full: list[Any], labels: list[Any], tokens: bool) -> np.ndarray:
    if not tokens:
        return np.array(found) == np.array(full)
    return np.concatenate([(a == b)[y >= 0] for a, b, y in zip(found, full, labels, strict=True)])


def _score(found: list[Any], labels: list[Any], names: list[str], tokens: bool) -> float:
    if not tokens:
        return float(np.mean(np.array(found) == np.array(labels)))
    said = [[names[i] for i in row[y >= 0]] for row, y in zip(found, labels, strict=True)]
    true = [[names[i] for i in y[y >= 0]] for y in labels]
    return float(f1_score(true, said))


def _times(models: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean milliseconds of a call, in PyTorch and in int8, all in turn."""
    runners, keys = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            file = Path(folder, f"{len(keys)}.onnx")
            FullDepthExporter(model).write(file, int8=True)
            session = open_session(file, torch.get_num_threads())
            arrays = partial(onnx_inputs, names=[entry.name for entry in session.get_inputs()])
            runners += [Runner(lambda row, m=model: m(**row)), Runner(partial(session.run, ["logits"]), arrays)]
            keys += [(name, "ms"), (name, "int8_ms")]
        with torch.inference_mode():
            timed = take_turns(runners, inputs, ROUNDS, warmup=inputs[:5], pause=PAUSE, settle=True)
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for (name, what), each in zip(keys, timed, strict=True):
        found[name][what] = 1e3 * float(np.mean(np.median(np.reshape(each.seconds, (-1, ROUNDS)), axis=1)))
    return found


def linear_model(data: Path, timed: int) -> dict[str, float]:
    """A logistic regression on tf-idf of words and pairs of words; its strength is chosen on validation rows."""
    train, validation, test = (read_rows(data / f"{split}.jsonl") for split in ("train", "validation", "test"))
    columns = [name for name in ("text", "text_pair") if name in train[0]]
    readers = [
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit([row[name] for row in train]) for name in columns
    ]

    def read(rows: list[dict[str, Any]]) -> Any:
        return hstack([r.transform([row[name] for row in rows]) for r, name in zip(readers, columns, strict=True)])

    features = read(train)
    labels = [row["label"] for row in train]
    models = [LogisticRegression(C=c, max_iter=300).fit(features, labels) for c in STRENGTHS]
    best = max(models, key=lambda model: model.score(read(validation), [row["label"] for row in validation]))
    seconds = []
    for row in test[:timed]:
        start = time.perf_counter()
        best.predict(read([row]))
        seconds.append(time.perf_counter() - start)
    score = float(best.score(read(test), [row["label"] for row in test]))
    return {"score": score, "ms": 1e3 * float(np.mean(seconds))}
