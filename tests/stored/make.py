"""Writes `tests/stored/data`: adapters of every kind, and what the code of commit b7d5fc6 answers with them.

`test_stored.py` loads them with the code as it is now. They are made once, by that commit and not by the code under
test, from a checkout of it:

    git worktree add ../then b7d5fc6
    PYTHONPATH=../then python tests/stored/make.py

What is written, tensors as safetensors, all else as JSON, nothing pickled:

    versions.json               of torch and the others, when this was made
    bases/<name>/               tiny random base models
    adapters/<name>/            an adapter as PEFT saves it; its card is left out
    answers/<name>.safetensors  the batch, the base model's logits, full depth, and the logits of each early-exit call
    answers/<name>.json         the early-exit configs, the blocks at which rows stopped, the loss
    mixed.safetensors, .json    one call with `adapter_names`
    exits/<name>.safetensors    `ExitLogits`, and beside it what `sweep` and `calibrate` give on them
    onnx/<name>/                exported models, with what they answer
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, logging

from badge_peft import BadgeConfig, ExitLogits, calibrate, sweep
from badge_peft.early_exit.policies import build_policy
from badge_peft.export import OnnxEarlyExitModel, export_onnx

DATA = Path(__file__).parent / "data"
HIDDEN, HEADS, FFN, BLOCKS, LABELS, VOCAB, PAD = 16, 4, 24, 4, 3, 40, 1
ROWS, LENGTH = 12, 9
MARGIN = 1e-4  # no row's decision hangs on less than this

SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": 16,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", SIZES),
    "bert_regression": ("bert", {**SIZES, "num_hidden_layers": 3, "num_labels": 1}),
    "albert": ("albert", {**SIZES, "embedding_size": 8}),
    "deberta": (
        "deberta-v2",
        {
            **SIZES,
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pooler_hidden_size": HIDDEN,
        },
    ),
    "modernbert": (
        "modernbert",
        {**SIZES, "classifier_pooling": "mean", "global_attn_every_n_layers": 2, "local_attention": 4},
    ),
    "distilbert": (
        "distilbert",
        {"dim": HIDDEN, "n_layers": BLOCKS, "n_heads": HEADS, "hidden_dim": FFN, "max_position_embeddings": 16},
    ),
}

# name -> (base, fields): every value of every field of BadgeConfig that changes what is computed or saved
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert_default": ("bert", {"learn_to_exit": True, "early_exit": {"threshold": 1.4621}}),
    "bert_ffn": (
        "bert",
        {
            "placement": "ffn",
            "exit_type": "pooled",
            "exit_pooling": "mean",
            "exit_layers": [0, 1, 3],
            "norm": "shared",
            "train_head": False,
            "early_exit": {"policy": "entropy", "threshold": 0.7377, "normalize": True},
        },
    ),
    "bert_mhsa": (
        "bert",
        {
            "placement": "mhsa",
            "exit_type": "mha",
            "exit_layers": [1, 3],
            "bias": True,
            "activation": "relu",
            "final_exit": "exit",
            "learn_to_exit": True,
        },
    ),
    "bert_past_future": ("bert", {"exit_type": "past_future", "final_exit": "exit"}),
    "bert_lora": ("bert", {"backbone": "lora", "lora": {"r": 2, "lora_alpha": 4}, "exit_weights": "linear"}),
    "bert_full": ("bert", {"backbone": "full", "placement": "none", "exit_type": "pooled", "learn_to_exit": True}),
    "bert_multi_label": (
        "bert",
        {"problem_type": "multi_label_classification", "exit_weights": [1.0, 0.5, 2.0, 1.0], "activation": "tanh"},
    ),
    "bert_regression": (
        "bert_regression",
        {"placement": "mhsa", "learn_to_exit": True, "exit_layers": [0, 1, 2], "norm": "shared"},
    ),
    "albert_block": ("albert", {"exit_type": "mha", "exit_layers": [0, 2, 3], "exit_pooling": "last"}),
    "albert_mhsa": (
        "albert",
        {
            "placement": "mhsa",
            "norm": "shared",
            "exit_type": "pooled",
            "exit_pooling": "mean",
            "final_exit": "exit",
            "activation": "silu",
        },
    ),
    "deberta_ffn": ("deberta", {"placement": "ffn", "final_exit": "exit", "learn_to_exit": True}),
    "deberta_past_future": (
        "deberta",
        {
            "placement": "mhsa",
            "exit_type": "past_future",
            "exit_layers": [0, 2, 3],
            "exit_pooling": "mean",
            "final_exit": "exit",
            "train_head": False,
        },
    ),
    "modernbert_mhsa": ("modernbert", {"placement": "mhsa", "bias": True, "activation": "leaky_relu"}),
    "modernbert_lora": (
        "modernbert",
        {"backbone": "lora", "exit_type": "mha", "exit_pooling": "cls", "norm": "shared", "learn_to_exit": True},
    ),
    "distilbert_none": ("distilbert", {"placement": "none", "exit_type": "mha", "exit_pooling": "last"}),
    "distilbert_full": (
        "distilbert",
        {"backbone": "full", "exit_layers": [2], "train_head": False, "activation": "identity"},
    ),
}

# settings of every policy; `settings` puts thresholds between two signals, and fills in what depends on the exits
POLICIES: list[dict[str, Any]] = [
    *({"divergence": d, "window": w} for d in ("ce", "kl", "js", "label") for w in ("all", "consecutive")),
    {"patience": 2},
    {"divergence": "kl", "window": "consecutive", "patience": 2},
    {"normalize": True},
    {"min_exit": 2},
    {"max_exit": 3},
    {"decide_every": 2},
    {"policy": "patience"},
    {"policy": "patience", "patience": 1},
    {"policy": "entropy"},
    {"policy": "entropy", "normalize": True, "min_exit": 2},
    {"policy": "max_prob"},
    {"policy": "max_prob", "temperature": True},
    {"policy": "learned"},
    {"policy": "confident_patience"},
    {"policy": "confident_patience", "patience": 1, "max_exit": 3},
    {"policy": "agreement"},
    {"policy": "fixed_depth", "depth": "first"},
    {"policy": "fixed_depth", "depth": "middle"},
    {"policy": "never"},
]


def make_base(name: str) -> Any:
    """A random model with weights far from their usual start, read again from where it was saved."""
    model_type, fields = BASES[name]
    special = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    config = AutoConfig.for_model(
        model_type, **{"num_labels": LABELS, "vocab_size": VOCAB, "initializer_range": 0.5, **special, **fields}
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    shake(model, list(model.state_dict(keep_vars=True).values()))
    model.save_pretrained(Path("bases", name))
    return load_base(name)


def load_base(name: str) -> Any:
    """By a relative path, which becomes `base_model_name_or_path`."""
    return AutoModelForSequenceClassification.from_pretrained(f"bases/{name}").eval()


def shake(model: Any, tensors: list[Tensor], seed: int = 3) -> None:
    """Adds noise, so that no weight has its start or equals its copy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))


def make_batch() -> dict[str, Tensor]:
    """[12, 9], every third row without padding."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(input_ids)
    for row in range(ROWS):
        if row % 3:
            mask[row, LENGTH - 1 - row % 6 :] = 0
    return {"input_ids": input_ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def make_labels(problem_type: str, num_labels: int) -> Tensor:
    """As transformers wants them."""
    generator = torch.Generator().manual_seed(2)
    if problem_type == "regression":
        return torch.randn(ROWS, generator=generator)
    if problem_type == "multi_label_classification":
        return torch.randint(0, 2, (ROWS, num_labels), generator=generator).float()
    return torch.randint(0, num_labels, (ROWS,), generator=generator)


def settings(stored: ExitLogits) -> list[dict[str, Any]]:
    """Every policy that these exits allow, with a threshold that spreads the rows, and as it is where that does."""
    found = []
    for fields in POLICIES:
        rule = dict(fields)
        name = rule.get("policy", "divergence")
        if rule.get("temperature"):
            rule["temperature"] = [1.0 + 0.25 * i for i in range(len(stored.exits))]
        if name == "fixed_depth":
            rule["depth"] = stored.exits[0 if rule["depth"] == "first" else len(stored.exits) // 2]
        if name == "learned" and stored.signals is None:
            continue
        if stored.problem_type == "regression" and name in ("entropy", "max_prob", "confident_patience"):
            continue
        if name == "agreement":
            rule["parameters"] = fitted(stored)
        if name not in ("fixed_depth", "never", "patience") or stored.problem_type == "regression":
            found += [between(rule, stored)] if name not in ("fixed_depth", "never") else []
        spreads = name in ("fixed_depth", "never") or len(set(build_policy(rule).replay(stored).tolist())) > 1
        if spreads and is_safe(rule, stored):
            found.append(rule)
    return found


def fitted(stored: ExitLogits) -> dict[str, Any] | None:
    """Parameters of `agreement`, as a sweep has them."""
    metric = "pearson" if stored.problem_type == "regression" else "accuracy"
    points = sweep(stored, policies=["agreement"], metric=metric).points
    return next(p.config.parameters for p in points if p.config.parameters)


def is_safe(rule: dict[str, Any], stored: ExitLogits) -> bool:
    """Whether these rows stop at the same blocks however the logits are rounded."""
    wanted = build_policy(rule).replay(stored)
    noise = torch.Generator().manual_seed(4)
    for _ in range(20):
        moved = stored.logits + MARGIN * (2 * torch.rand(stored.logits.shape, generator=noise) - 1)
        signals = None if stored.signals is None else stored.signals + MARGIN / 10
        other = ExitLogits(moved, None, stored.exits, stored.problem_type, stored.num_blocks, signals)
        if not torch.equal(build_policy(rule).replay(other), wanted):
            return False
    return True


def between(rule: dict[str, Any], stored: ExitLogits) -> dict[str, Any]:
    """`rule` with the threshold that spreads the rows over the most exits and does not hang on rounding."""
    policy: Any = build_policy(rule)
    history = stored.history()
    signals = np.concatenate([policy.signal(history, j) for j in range(len(stored.exits) - 1)])
    values = np.unique(signals[np.isfinite(signals)]).tolist() or [1.0]
    best = (0, -1.0, {**rule, "threshold": values[0] + 1.0})
    for low, high in zip(values, values[1:], strict=False):
        middle = (low + high) / 2
        config = {**rule, "threshold": middle}
        spread = len(set(build_policy(config).replay(stored).tolist()))
        if high - low > 20 * MARGIN and (spread, high - low) > best[:2] and is_safe(config, stored):
            best = (spread, high - low, config)
    return best[2]


def make_adapter(name: str, batch: dict[str, Tensor]) -> ExitLogits:
    """Saves the adapter and what it answers; the logits of its exits."""
    base_name, fields = ADAPTERS[name]
    base = load_base(base_name)
    with torch.no_grad():
        alone = base(**batch).logits
    torch.manual_seed(0)
    model = get_peft_model(base, BadgeConfig(r=4, **fields))
    trained = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    shake(model, [p for _, p in trained])
    model.save_pretrained(f"adapters/{name}")
    Path(f"adapters/{name}/README.md").unlink()
    model = PeftModel.from_pretrained(load_base(base_name), f"adapters/{name}").eval()

    config = model.peft_config["default"]
    labels = make_labels(config.resolved_problem_type, config.num_labels)
    with torch.no_grad():
        out = model(**batch)
        loss = model(**batch, labels=labels).loss
    stored = ExitLogits(
        out.exit_logits,
        labels,
        model.base_model.exit_layers(),
        config.resolved_problem_type,
        model.base_model.num_blocks,
        out.exit_doubts,
    )
    tensors = {**batch, "labels": labels, "base_logits": alone, "logits": out.logits, "exit_logits": out.exit_logits}
    rules = settings(stored)
    if "early_exit" in fields:  # {} stands for the adapter's own
        assert is_safe(fields["early_exit"], stored)
        rules.insert(0, {})
    blocks, early = [], []
    for rule in rules:
        answer = model.early_exit_forward(**batch, early_exit_config=rule or None)
        early.append(answer.logits)
        blocks.append(answer.exit_layer.tolist())
        assert answer.exit_layer.tolist() == build_policy(rule or fields["early_exit"]).replay(stored).tolist(), rule
    spread = [len(set(b)) for b in blocks]
    print(f"{name}: {len(rules)} calls, {sum(s > 1 for s in spread)} of them with rows at several exits")
    tensors["early_logits"] = torch.stack(early)  # [calls, B, K]
    save_tensors(Path("answers", f"{name}.safetensors"), tensors)
    calls = [{"rule": rule, "exit_layer": layers} for rule, layers in zip(rules, blocks, strict=True)]
    write_json(Path("answers", f"{name}.json"), {"base": base_name, "loss": loss.item(), "calls": calls})
    return stored


def make_mixed(batch: dict[str, Tensor]) -> None:
    """Rows of three adapters and of the base model in one call."""
    names = ["bert_default", "bert_ffn", "bert_mhsa"]
    model: Any = None
    for name in names:
        if model is None:
            model = PeftModel.from_pretrained(load_base("bert"), f"adapters/{name}", adapter_name=name).eval()
        else:
            model.load_adapter(f"adapters/{name}", adapter_name=name)
    rows = [[*names, "__base__"][i % 4] for i in range(ROWS)]
    rule = {"policy": "max_prob", "threshold": 0.7}
    answer = model.eval().early_exit_forward(**batch, adapter_names=rows, early_exit_config=rule)
    own = model.early_exit_forward(**batch, adapter_names=rows)
    save_tensors(Path("mixed.safetensors"), {**batch, "logits": answer.logits, "own_logits": own.logits})
    result = {
        "adapter_names": rows,
        "rule": rule,
        "exit_layer": answer.exit_layer.tolist(),
        "own_exit_layer": own.exit_layer.tolist(),
    }
    write_json(Path("mixed.json"), result)


def make_exits() -> None:
    """`ExitLogits` whose later exits are right more often, and what is worked out from them."""
    for name, classes in (("single_label", 3), ("multi_label", 3), ("regression", 1)):
        generator = torch.Generator().manual_seed(5)
        n, exits = 200, [0, 1, 2, 4]
        labels = torch.randint(0, 3, (n,), generator=generator)
        goal = torch.nn.functional.one_hot(labels, 3).float() * 4
        if name == "multi_label":
            labels = torch.randint(0, 2, (n, 3), generator=generator).float()
            goal = 6 * labels - 3
        elif name == "regression":
            labels = torch.randn(n, generator=generator)
            goal = labels[:, None]
        weight = torch.tensor([0.3, 0.6, 0.8, 1.0]).view(1, -1, 1)
        noise = torch.randn(n, len(exits), classes, generator=generator) * (1.3 - weight) * (2 if classes > 1 else 1)
        signals = torch.rand(n, len(exits), generator=generator)
        problem = "regression" if name == "regression" else f"{name}_classification"
        stored = ExitLogits(weight * goal[:, None] + noise, labels, exits, problem, 4, signals)
        stored.save(Path("exits", f"{name}.safetensors"))
        metric = "pearson" if name == "regression" else "accuracy"
        names = [
            name
            for name in ("divergence", "patience", "entropy", "max_prob", "learned", "confident_patience", "agreement")
            if problem != "regression" or name not in ("entropy", "max_prob", "confident_patience")
        ]
        table = sweep(stored, policies=names, points=6, metric=metric).to_dicts()
        bounded = {"policy": "divergence", "window": "consecutive", "min_exit": 1, "max_exit": 2}
        calls: list[dict[str, Any]] = [{"policy": name, "max_score_drop": 0.02} for name in (*names, "auto")]
        calls += [{"policy": policy, "target_speedup": 0.3} for policy in (*names, "auto", bounded)]
        if problem == "single_label_classification":
            calls.append({"policy": "divergence", "max_score_drop": 0.1, "confidence": 0.9})
        results = []
        for call in calls:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append({"call": call, "config": calibrate(stored, metric=metric, **call).to_dict()})
        rules = [rule for rule in settings(stored) if rule.get("policy") != "agreement"]
        replayed = [{"rule": rule, "exit_layer": build_policy(rule).replay(stored).tolist()} for rule in rules]
        write_json(
            Path("exits", f"{name}.json"),
            {"metric": metric, "sweep": table, "calibrate": results, "replay": replayed},
        )


def make_onnx(stored: ExitLogits, batch: dict[str, Tensor]) -> None:
    """fp32 and int8, with what onnxruntime gives."""
    model = PeftModel.from_pretrained(load_base("bert"), "adapters/bert_default").eval()
    for name, rule, int8 in (
        ("fp32", between({"patience": 1}, stored), False),
        ("int8", between({"policy": "max_prob"}, stored), True),
    ):
        folder = Path("onnx", name)
        export_onnx(model, folder, early_exit_config=rule, int8=int8)
        (folder / "README.md").unlink()
        session = OnnxEarlyExitModel.from_pretrained(folder, threads=1)
        answer = session(batch["input_ids"], batch["attention_mask"])
        alone = [session(batch["input_ids"][i : i + 1], batch["attention_mask"][i : i + 1]) for i in range(ROWS)]
        save_tensors(
            folder / "answers.safetensors",
            {
                **batch,
                "logits": torch.from_numpy(answer.logits),
                "exit_layer": torch.from_numpy(answer.exit_layer),
                "alone_logits": torch.from_numpy(np.concatenate([a.logits for a in alone])),
                "alone_exit_layer": torch.from_numpy(np.concatenate([a.exit_layer for a in alone])),
            },
        )


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """A line for each entry, and for each entry of a list in it."""
    lines = []
    for name, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        else:
            value = json.dumps(value)
        lines.append(f" {json.dumps(name)}: {value}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Everything, anew."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    shutil.rmtree(DATA, ignore_errors=True)
    for folder in ("answers", "exits"):
        (DATA / folder).mkdir(parents=True)
    os.chdir(DATA)
    batch = make_batch()
    for name in BASES:
        make_base(name)
    stored = {name: make_adapter(name, batch) for name in ADAPTERS}
    make_mixed(batch)
    make_exits()
    make_onnx(stored["bert_default"], batch)
    names = ("torch", "transformers", "peft", "numpy", "scikit-learn", "onnxruntime")
    write_json(Path("versions.json"), {name: version(name) for name in names})


if __name__ == "__main__":
    main()
