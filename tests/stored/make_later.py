"""Writes `tests/stored/later`: what came after the commit of `make.py`, and what the code of commit 0b4ebac answers.

Exits that build on one another, one pooler for all exits, tokens, decoders, many tasks in a pass, and ranking;
`test_later.py` loads them with the code as it is now. Made once, from a checkout of that commit:

    git worktree add ../then 0b4ebac
    PYTHONPATH=../then python tests/stored/make_later.py

The layout is that of `data`, and the bases are small random ones again. `tasks` and `ranking` are ONNX files.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    logging,
)

from badge_peft import BadgeConfig, ExitLogits
from badge_peft.early_exit.policies import build_policy
from badge_peft.export import OnnxEarlyExitModel, export_onnx, export_tasks_onnx

DATA = Path(__file__).parent / "later"
SEQUENCES, TOKENS = AutoModelForSequenceClassification, AutoModelForTokenClassification
ROWS, LENGTH, VOCAB, PAD = 8, 7, 40, 1
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}

#: name -> (class, architecture, labels)
BASES: dict[str, tuple[Any, str, int]] = {
    "bert": (SEQUENCES, "bert", 3),
    "bert_scores": (SEQUENCES, "bert", 1),
    "bert_tokens": (TOKENS, "bert", 3),
    "llama": (SEQUENCES, "llama", 3),
}

#: name -> (base, fields)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "carry_logits": ("bert", {"carry": "logits", "exit_layers": [0, 1, 3]}),
    "carry_states": ("bert", {"carry": "states", "exit_pooling": "mean"}),
    "ladder": ("bert", {"ladder": True, "carry": "logits", "final_exit": "exit", "placement": "ffn"}),
    "shared_pooled": ("bert", {"exit_type": "shared_pooled", "norm": "shared"}),
    "mean": ("bert", {"exit_pooling": "mean", "exit_layers": [0, 2]}),
    "few": ("bert", {"exit_layers": [1, 2], "activation": "relu"}),
    "tokens": ("bert_tokens", {"task_type": "TOKEN_CLS", "bias": True}),
    "decoder": ("llama", {"carry": "logits"}),
    "ranking": ("bert_scores", {"train_head": False}),
}
RULES: list[dict[str, Any]] = [
    {},
    {"policy": "entropy", "threshold": 0.75},
    {"policy": "max_prob", "threshold": [0.55, 0.6, 0.65, 0.7], "temperature": [1.0, 1.25, 1.5, 1.0]},
    {"threshold": 1.0, "patience": 2},
    {"policy": "patience", "patience": 1},
    {"policy": "fixed_depth", "depth": 3},
    {"policy": "never"},
]
RANKING: list[dict[str, Any]] = [{"policy": "top_k", "top_k": 2, "parameters": {"margins": [1.0, 1.0, 1.0, 0.0]}}]


def make_base(name: str) -> None:
    """A random model, far from its usual start."""
    kind, architecture, labels = BASES[name]
    config = AutoConfig.for_model(
        architecture,
        **{**SIZES, "vocab_size": VOCAB, "pad_token_id": PAD, "initializer_range": 0.5, "num_labels": labels},
    )
    torch.manual_seed(0)
    model = kind.from_config(config)
    shake(list(model.state_dict(keep_vars=True).values()))
    model.save_pretrained(Path("bases", name))


def load_base(name: str) -> Any:
    """By a relative path, which becomes `base_model_name_or_path`."""
    return BASES[name][0].from_pretrained(f"bases/{name}").eval()


def shake(tensors: list[Tensor]) -> None:
    """Adds noise, so that no weight has its start or equals its copy."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))


def make_batch() -> dict[str, Tensor]:
    """[8, 7], every other row with padding."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(input_ids)
    for row in range(1, ROWS, 2):
        mask[row, LENGTH - 1 - row % 4 :] = 0
    return {"input_ids": input_ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def make_adapter(name: str, batch: dict[str, Tensor]) -> None:
    """Saves an adapter, and what it answers."""
    base, fields = ADAPTERS[name]
    torch.manual_seed(0)
    model = get_peft_model(load_base(base), BadgeConfig(r=4, **fields))
    shake([p for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)])
    exits = len(model.base_model.exit_layers())
    rules = RANKING if name == "ranking" else RULES
    rules = [
        {key: value[-exits:] if isinstance(value, list) else value for key, value in rule.items()} for rule in rules
    ]
    rules = [rule for rule in rules if rule.get("depth") in (None, *model.base_model.exit_layers())]
    if name == "tokens":  # whose policies have one number for all exits
        rules = [rule for rule in rules if not isinstance(rule.get("threshold"), list)]
    model.save_pretrained(f"adapters/{name}")
    Path(f"adapters/{name}/README.md").unlink()
    model = PeftModel.from_pretrained(load_base(base), f"adapters/{name}").eval()
    with torch.no_grad():
        full = model(**batch)
    tensors = {**batch, "logits": full.logits, "exit_logits": full.exit_logits}
    calls = []
    for i, rule in enumerate(rules):
        answer = model.early_exit_forward(**batch, early_exit_config=rule or None)
        tensors[f"early_logits.{i}"] = answer.logits
        layers = answer.token_exit_layer if name == "tokens" else answer.exit_layer
        calls.append({"rule": rule, "exit_layer": layers.tolist()})
        if name != "tokens":
            stored = ExitLogits(full.exit_logits, None, model.base_model.exit_layers())
            assert build_policy(rule).replay(stored).tolist() == layers.tolist(), rule
    print(name, [len({*torch.tensor(call["exit_layer"]).flatten().tolist()}) for call in calls])
    save(Path("answers", f"{name}.safetensors"), tensors)
    write(Path("answers", f"{name}.json"), {"base": base, "calls": calls})


def make_tasks(batch: dict[str, Tensor]) -> None:
    """Three tasks on every row: one pass, and one ONNX file."""
    names = ["mean", "few", "shared_pooled"]
    model: Any = PeftModel.from_pretrained(load_base("bert"), f"adapters/{names[0]}", adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(f"adapters/{name}", adapter_name=name)
    rules = {name: {"policy": "max_prob", "threshold": 0.6 + 0.05 * i} for i, name in enumerate(names)}
    answers = model.eval().early_exit_forward(**batch, tasks=names, early_exit_config=rules)
    for name, rule in rules.items():
        model.base_model.set_early_exit_config(rule, name)
    export_tasks_onnx(model, "tasks", tasks=names)
    logits = {f"{name}.logits": answers[name].logits for name in names}
    save(Path("answers", "tasks.safetensors"), {**batch, **logits})
    write(
        Path("answers", "tasks.json"),
        {"rules": rules, "exit_layer": {name: answers[name].exit_layer.tolist() for name in names}},
    )


def make_ranking(batch: dict[str, Tensor]) -> None:
    """One query as an ONNX file."""
    model = PeftModel.from_pretrained(load_base("bert_scores"), "adapters/ranking").eval()
    export_onnx(model, "ranking", early_exit_config=RANKING[0])
    Path("ranking/README.md").unlink()
    answer = OnnxEarlyExitModel.from_pretrained("ranking", threads=1)(**{k: v.numpy() for k, v in batch.items()})
    logits, layers = torch.from_numpy(answer.logits), torch.from_numpy(answer.exit_layer)
    save(Path("ranking", "answers.safetensors"), {**batch, "logits": logits, "exit_layer": layers})


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))


def write(path: Path, data: dict[str, Any]) -> None:
    """JSON, an entry a line."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Everything, anew."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    os.chdir(DATA)
    batch = make_batch()
    for name in BASES:
        make_base(name)
    for name in ADAPTERS:
        make_adapter(name, batch)
    make_tasks(batch)
    make_ranking(batch)
    names = ("torch", "transformers", "peft", "numpy", "onnxruntime")
    write(Path("versions.json"), {name: version(name) for name in names})


if __name__ == "__main__":
    main()
