"""Adapter files as no one should make them: bits flipped, cut, padded, tensors swapped, of wrong shape or type,
missing or too many; configs with other fields than BADGE writes. Each is refused cleanly, or loads exactly what the
file says."""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import badge_peft
from badge_peft.tuner.adapter_file import CONFIG_TENSOR
from tests.models import make_batch, make_model, trained

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CLEAN = (ValueError, OSError, SafetensorError)  # a JSON file that is none is a ValueError, too
KINDS: list[dict[str, Any]] = [
    {},
    {"placement": "ffn", "exit_pooling": "mean", "exit_type": "pooled"},
    {"backbone": "lora", "exit_layers": [0, 2, 3], "learn_to_exit": True},
    {"final_exit": "exit", "num_labels": 4, "exit_type": "mha", "bias": True},
]
#: What an adapter file cannot make a process do: names of Python's audit events.
FORBIDDEN = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}
_EVENTS: list[str] | None = None  # what happened while somebody watched; an audit hook stays for good
_HOOKED = [False]


def from_pretrained(path: str, base: Any) -> Any:
    """PEFT's way."""
    return PeftModel.from_pretrained(base, path)


def load_pretrained(path: str, base: Any) -> Any:
    """Ours."""
    return badge_peft.load_pretrained(path, base_model=base)


LOADERS = (from_pretrained, load_pretrained)


class Fuzz:
    """Good adapters, what their base model answers, and ways to spoil a copy.

    Args:
        folder: Where files may be written.
        seed: Of the draws.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.draw = random.Random(seed)
        self.base = make_model("bert")
        self.batch = make_batch()
        self.base_logits = _logits(self.base, self.batch)
        self.base_weights = {k: v.clone() for k, v in self.base.state_dict().items()}
        self.good: list[Path] = []
        for i, kind in enumerate(KINDS):
            trained("bert", **kind).save_pretrained(folder / f"good{i}")
            self.good.append(folder / f"good{i}")

    def run(self, count: int) -> tuple[Counter[str], list[str]]:
        """Loads `count` spoilt adapters.

        Returns:
            How many were refused and loaded by the way they were spoilt, and what went wrong.
        """
        found: Counter[str] = Counter()
        wrong: list[str] = []
        ways = sorted(WAYS)
        for n in range(count):
            way = ways[n % len(ways)]
            adapter = self.folder / "spoilt"
            shutil.rmtree(adapter, ignore_errors=True)
            shutil.copytree(self.draw.choice(self.good), adapter)
            what = WAYS[way](adapter, self.draw)
            # a config that is none is read by PEFT before it is ours, so there our own function is what is tried
            load = load_pretrained if way == "garble" or "peft_type" in str(what) else self.draw.choice(LOADERS)
            outcome, complaint = self.load(adapter, load)
            found[f"{way}: {outcome}"] += 1
            if complaint:
                wrong.append(f"{n} {way} ({what}): {complaint}")
        return found, wrong

    def load(self, adapter: Path, load: Callable[[str, Any], Any]) -> tuple[str, str]:
        """Loads one adapter by `load`. Returns `refused` or `loaded`, and what is wrong with that ("": nothing)."""
        base = copy.deepcopy(self.base)
        trainable = [p.requires_grad for p in base.parameters()]
        before = sorted(_files(self.folder))
        refusal = ""
        with watched() as events:
            try:
                model = load(str(adapter), base).eval()
                model.early_exit_forward(**self.batch)
            except CLEAN as error:
                refusal = f"{type(error).__name__}: {error}"
            except Exception as error:  # the defect that is looked for
                return "refused", f"{type(error).__name__}: {error}"[:200]
        if events:
            return "loaded", f"it made the process do {events[:3]}"
        if sorted(_files(self.folder)) != before:
            return "loaded", "files were written"
        if refusal:
            if len(refusal) < 30:
                return "refused", f"the message says nothing: {refusal}"
            if [p.requires_grad for p in base.parameters()] != trainable:
                return "refused", f"requires_grad is not as it was after {refusal[:60]}"
            if not torch.equal(_logits(base, self.batch), self.base_logits):
                return "refused", f"the base model answers otherwise after {refusal[:60]}"
            return "refused", ""
        return "loaded", self._is_what_the_file_says(model, adapter)

    def _is_what_the_file_says(self, model: Any, adapter: Path) -> str:
        saved = load_file(adapter / WEIGHTS)
        model.save_pretrained(self.folder / "again")
        again = load_file(self.folder / "again" / WEIGHTS)
        shutil.rmtree(self.folder / "again")
        for tensors in (saved, again):  # a stand-in for adapter_config.json, which was read
            tensors.pop(CONFIG_TENSOR, None)
        if saved.keys() != again.keys():
            return f"other tensors than the file has: {sorted(saved.keys() ^ again.keys())[:3]}"
        for name, value in saved.items():
            if not torch.equal(value.to(again[name].dtype), again[name]):
                return f"{name} is not what the file has"
        with model.disable_adapter():
            if not torch.equal(_logits(model, self.batch), self.base_logits):
                return "the base model answers otherwise"
        return ""


@contextmanager
def watched() -> Iterator[list[str]]:
    """The forbidden audit events of what happens inside."""
    global _EVENTS
    if not _HOOKED[0]:
        sys.addaudithook(_note)
        _HOOKED[0] = True
    _EVENTS = events = []
    try:
        yield events
    finally:
        _EVENTS = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _EVENTS is not None and event in FORBIDDEN:
        _EVENTS.append(f"{event} {args!r}"[:100])


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    for path in folder.rglob("*"):
        yield str(path), path.stat().st_size


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


# ---------------------------------------------------------------------------------------------------- ways to spoil it


def _bytes(adapter: Path, change: Callable[[bytearray], Any]) -> Any:
    data = bytearray((adapter / WEIGHTS).read_bytes())
    what = change(data)
    (adapter / WEIGHTS).write_bytes(bytes(data))
    return what


def flip_bits(adapter: Path, draw: random.Random) -> Any:
    """One to eight bits, in the header as often as behind it."""

    def change(data: bytearray) -> list[tuple[int, int]]:
        end = 8 + int.from_bytes(data[:8], "little")
        low, high = draw.choice(((0, end), (end, len(data))))
        places = [(draw.randrange(low, high), draw.randrange(8)) for _ in range(draw.randint(1, 8))]
        for place, bit in places:
            data[place] ^= 1 << bit
        return places

    return _bytes(adapter, change)


def cut(adapter: Path, draw: random.Random) -> Any:
    """A part of the file is left."""

    def change(data: bytearray) -> int:
        length = draw.choice((0, draw.randrange(8), draw.randrange(len(data))))
        del data[length:]
        return length

    return _bytes(adapter, change)


def pad(adapter: Path, draw: random.Random) -> Any:
    """More bytes than the header speaks of."""
    return _bytes(adapter, lambda data: data.extend(draw.randbytes(draw.randint(1, 100))))


def _tensors(adapter: Path, change: Callable[[dict[str, Tensor]], Any]) -> Any:
    tensors = load_file(adapter / WEIGHTS)
    what = change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, adapter / WEIGHTS)
    return what


def swap(adapter: Path, draw: random.Random) -> Any:
    """Two tensors change their names."""

    def change(tensors: dict[str, Tensor]) -> tuple[str, str]:
        a, b = draw.sample(sorted(tensors), 2)
        tensors[a], tensors[b] = tensors[b], tensors[a]
        return a, b

    return _tensors(adapter, change)


def reshape(adapter: Path, draw: random.Random) -> Any:
    """A tensor is turned, flat, longer, shorter, a scalar or empty."""

    def change(tensors: dict[str, Tensor]) -> str:
        name = draw.choice(sorted(tensors))
        value = tensors[name]
        forms = (value.t() if value.dim() == 2 else value[None], value.flatten(), torch.cat([value, value]))
        tensors[name] = draw.choice((*forms, value[:-1], value.sum(), value[:0])).clone()
        return f"{name} {list(value.shape)} -> {list(tensors[name].shape)}"

    return _tensors(adapter, change)


def retype(adapter: Path, draw: random.Random) -> Any:
    """A tensor of another type; of half precision it may be."""

    def change(tensors: dict[str, Tensor]) -> str:
        name = draw.choice(sorted(tensors))
        kind = draw.choice((torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float16, torch.float64))
        tensors[name] = tensors[name].to(kind)
        return f"{name} {kind}"

    return _tensors(adapter, change)


def not_finite(adapter: Path, draw: random.Random) -> Any:
    """One number of a tensor is NaN or infinite."""

    def change(tensors: dict[str, Tensor]) -> str:
        name = draw.choice(sorted(name for name, value in tensors.items() if value.is_floating_point()))
        tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = draw.choice((float("nan"), float("inf")))
        return name

    return _tensors(adapter, change)


def drop(adapter: Path, draw: random.Random) -> Any:
    """A tensor is missing."""
    return _tensors(adapter, lambda tensors: tensors.pop(draw.choice(sorted(set(tensors) - {CONFIG_TENSOR}))).shape)


def add(adapter: Path, draw: random.Random) -> Any:
    """A tensor too many: of the base model, of another block, of nobody."""

    def change(tensors: dict[str, Tensor]) -> str:
        name = draw.choice(
            (
                "base_model.model.bert.encoder.layer.0.attention.self.query.weight",
                "base_model.model.classifier.weight",
                "base_model.model.bert.encoder.layer.7.badge_exit.8.linear.weight",
                "base_model.model.bert.encoder.layer.0.base_layer.output.dense.bias",
                "x",
                "../x",
            )
        )
        tensors[name] = torch.zeros(32, 32)
        return name

    return _tensors(adapter, change)


VALUES: list[Any] = [
    None, True, 0, -1, 3, 7, 2**40, 10**400, 0.5, 1e308, "", "x", "../../etc", "block", "nan", [], [0], [-1, 99],
    ["x"], [[1]], {}, {"a": 1}, {"policy": "x"}, {"policy": "divergence", "threshold": "high"}, {"max_exit": 99},
    {"policy": "agreement", "parameters": {"weights": "none"}}, {"calibration": [1]}, {"temperature": {}}, "\ud800",
]  # fmt: skip


def configure(adapter: Path, draw: random.Random) -> Any:
    """One or two fields of the config have another value, or there are fields that BADGE does not know."""
    path = adapter / CONFIG
    config = json.loads(path.read_text())
    names = [draw.choice([*sorted(config), "surprise", "runtime_config", "source"]) for _ in range(draw.randint(1, 2))]
    changed = {name: draw.choice(VALUES) for name in names}
    path.write_text(json.dumps({**config, **changed}))
    return changed


def garble(adapter: Path, draw: random.Random) -> Any:
    """The config is no JSON, not of text, or nested without end."""
    data = (adapter / CONFIG).read_bytes()
    place = draw.randrange(len(data))
    forms = (data[:place], data[:place] + b"\xff" + data[place:], b"", b"[]", b"null", b"[" * 100_000, b'{"r": NaN}')
    (adapter / CONFIG).write_bytes(draw.choice(forms))
    return place


def exchange(adapter: Path, draw: random.Random) -> Any:
    """The config of another adapter."""
    other = adapter.parent / f"good{draw.randrange(len(KINDS))}"
    shutil.copy(other / CONFIG, adapter / CONFIG)
    return other.name


WAYS = {f.__name__: f for f in (flip_bits, cut, pad, swap, reshape, retype, not_finite, drop, add, garble, exchange)}
WAYS |= {"configure": configure, "configure again": configure}  # there are many fields
