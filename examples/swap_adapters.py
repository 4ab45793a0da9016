"""Answers requests of several tasks with one encoder in memory: the adapter is switched from request to request.

    python examples/train_glue.py --task sst2 --backbone frozen --output-dir out/sst2
    python examples/train_glue.py --task mrpc --backbone frozen --output-dir out/mrpc
    python examples/swap_adapters.py --adapters out/sst2 out/mrpc --requests requests.jsonl

A request is a line of JSON: {"task": "sst2", "text": "..."}, for pairs with "text_pair" as well. The task is the name
of an adapter's folder. Each adapter has its own exits, labels and policy. `--backbone lora` works, too; `full` does
not, as it changes the encoder.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, HfArgumentParser

import badge_peft


@dataclass
class Arguments:
    """The adapters, and what they are asked."""

    adapters: list[str] = field(metadata={"help": "Folders of adapters that were trained on the same encoder."})
    requests: str = field(metadata={"help": "JSON lines with task, text and, for pairs, text_pair."})
    base_model: str | None = field(default=None, metadata={"help": "The encoder, if it is not where it was."})


def main() -> None:
    """Loads every adapter onto one encoder and prints one line of JSON per request."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    folders = {Path(folder).name: folder for folder in args.adapters}
    first, *others = folders
    model = badge_peft.load_pretrained(folders[first], base_model=args.base_model, adapter_name=first)
    parts = (".badge_", ".lora_")
    encoder = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in parts))
    for name in others:
        model.load_adapter(folders[name], adapter_name=name)
    everything = sum(p.numel() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(folders[first])  # of the encoder, so the same for all

    switching = 0.0
    count = 0
    for line in Path(args.requests).read_text(encoding="utf-8").splitlines():
        request = json.loads(line)
        task = request["task"]
        if task not in folders:
            raise SystemExit(f"there is no adapter {task!r}: the folders are {', '.join(folders)}.")
        start = time.perf_counter()
        model.set_adapter(task)
        switching += time.perf_counter() - start
        count += 1
        batch = tokenizer(request["text"], request.get("text_pair"), truncation=True, return_tensors="pt")
        out = model.early_exit_forward(**batch)  # by the policy of the active adapter
        names = model.peft_config[task].label_names
        answer = float(out.logits[0, 0]) if names is None else names[int(out.logits[0].argmax())]
        print(json.dumps({**request, "answer": answer, "exit_layer": int(out.exit_layer[0])}, ensure_ascii=False))

    print(
        f"{count} requests, {len(folders)} adapters on one encoder: {encoder / 1e6:.1f} million parameters and "
        f"{(everything - encoder) / 1e6:.2f} million more; {1000 * switching / max(count, 1):.2f} ms to switch",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
