"""`Conditioning`: an optimizer works in coordinates in which what exits and bypasses read is standardized.

The states of a fine-tuned encoder are badly conditioned: in the lower blocks the first token's vector differs from
text to text by a hundredth of its size, so nearly all of a linear layer's gradient is about the part that never
changes. An optimizer step therefore moves the weights of a layer on (x - mu) / sigma,

    W x + b = W' (x - mu) / sigma + b',   W' = W sigma,   b' = b + W mu,

with mu and sigma [d] over the inputs of the first step. Before and after a step the model has W and b, so evaluations,
checkpoints and files know nothing of it. A layer without a bias (W_down of Eq. 1) keeps W mu as it is. W_up and LN',
which add to such states, move in units of their deviation.

Sources: LeCun et al., "Efficient BackProp", 1998, section 4.3; the affine-free form of Ioffe and Szegedy, "Batch
Normalization", 2015, with fixed statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from badge_peft.model import BadgeModel
from badge_peft.tuner.bypass import Bypass
from badge_peft.tuner.exits import Exit
from badge_peft.utils import distributed

KEY = "conditioning"  # in the first parameter group, so that a checkpoint of the optimizer has it
_ENOUGH = 16  # inputs before which no deviation is trusted
_SHRINK = 16  # so many inputs more, with the mean deviation of all dimensions


@dataclass
class Coordinates:
    """How the optimizer sees one layer, W [K, d] with its bias [K], or (center None) a parameter that adds to states:
    sigma [d] of the layer, or what the parameter is divided by, and mu [d]."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    center: Tensor | None
    _along: Tensor | None = None

    def enter(self) -> None:
        """W -> W', and its gradient."""
        weight, bias = self.weight, self.bias
        if self.center is None:
            weight.data.div_(self.scale)
            if weight.grad is not None:
                weight.grad.mul_(self.scale)
            return
        if bias is not None:
            bias.data.add_(weight.data @ self.center)
        weight.data.mul_(self.scale)
        if weight.grad is not None:
            if bias is not None and bias.grad is not None:
                weight.grad.sub_(torch.outer(bias.grad, self.center))
            weight.grad.div_(self.scale)
        if bias is None:
            self._along = weight.data @ _direction(self.center, self.scale)

    def leave(self) -> None:
        """W' -> W."""
        weight, bias = self.weight, self.bias
        if self.center is None:
            weight.data.mul_(self.scale)
            return
        if bias is None:
            assert self._along is not None
            along = _direction(self.center, self.scale)
            weight.data.add_(torch.outer(self._along - weight.data @ along, along))
        weight.data.div_(self.scale)
        if bias is not None:
            bias.data.sub_(weight.data @ self.center)


class Moments:
    """Count, sums and sums of squares of a layer's inputs [n, d], and the deviation within each."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [2 d + 2]

    def add(self, inputs: Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).double()
        within = x.std(dim=1).sum()
        found = torch.cat([x.sum(dim=0), x.square().sum(dim=0), within.new_tensor([len(x)]), within.reshape(1)])
        self.sums = found if self.sums is None else self.sums + found

    def standard(self) -> tuple[Tensor, Tensor, float] | None:
        """mu, sigma and the mean deviation within an input; None where nothing can be told."""
        if self.sums is None:
            return None
        sums = self.sums.clone()
        if distributed.rank_world()[1] > 1:
            dist.all_reduce(sums)
        count, within = float(sums[-2]), float(sums[-1])
        total, squares = sums[:-2].chunk(2)
        if count < _ENOUGH:
            return None
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        variance = (count * variance + _SHRINK * variance.mean()) / (count + _SHRINK)
        if not bool(variance.isfinite().all()) or not bool((variance > 0).all()):
            return None
        return mean.float(), variance.sqrt().float(), within / count


class Conditioning:
    """Gives an optimizer the coordinates of the exits and bypasses of a model's active adapter: those of the inputs
    that the first step has seen, or of the optimizer's state that is loaded before it, of an interrupted training."""

    def __init__(self, model: BadgeModel, optimizer: torch.optim.Optimizer) -> None:
        adapter = model.single_active_adapter()
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._coordinates: list[Coordinates] | None = None
        self._mask: Tensor | None = None
        self._exits: dict[str, Exit] = {}
        self._bypasses: dict[str, Bypass] = {}
        for name, part in model.named_modules():
            before, kind, own, number = ["", "", "", *name.rsplit(".", 3)][-4:]
            if own == adapter and kind in ("badge_exit", "badge_bypass"):
                if all(id(p) in trained for p in part.parameters()):
                    parts: dict[str, Any] = self._exits if kind == "badge_exit" else self._bypasses
                    parts[f"{before}.{number}"] = part
        self._moments: dict[nn.Module, Moments] = {}
        self._watching = [model.register_forward_pre_hook(self._remember_mask, with_kwargs=True)]
        for module in self._measured():
            self._moments[module] = Moments()
            self._watching.append(module.register_forward_pre_hook(self._record))
        optimizer.register_step_pre_hook(lambda own, *_: self._enter(own))
        optimizer.register_step_post_hook(lambda *_: self._leave())

    def _measured(self) -> Iterator[nn.Module]:
        for exit_ in self._exits.values():
            yield from (_entry(exit_, name) for name in exit_.reads_states)
        for bypass in self._bypasses.values():
            yield bypass.down
            if bypass.norm is not None:
                yield bypass.norm

    def forget(self) -> None:
        """Leaves out what has been measured so far."""
        for module in self._moments:
            self._moments[module] = Moments()

    def _remember_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")

    def _record(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, mask = args[0], self._mask
        if x.dim() == 3 and mask is not None and mask.shape == x.shape[:2]:
            x = x[mask.to(x.device) != 0]
        self._moments[module].add(x)

    def _enter(self, optimizer: torch.optim.Optimizer) -> None:
        group = optimizer.param_groups[0]
        if self._coordinates is None:
            for handle in self._watching:
                handle.remove()
            found = group.get(KEY)
            if found is None:
                group[KEY] = found = self._statistics()
                self._start(found)
            self._coordinates = list(self._coordinates_of(found))
            self._moments.clear()
        for own in self._coordinates:
            own.enter()

    def _leave(self) -> None:
        for own in self._coordinates or ():
            own.leave()

    def _statistics(self) -> dict[str, Tensor]:
        """mu and sigma [2, d] of each layer's inputs; of a bypass, sigma [2, d] of what W_up and LN' add to."""
        found: dict[str, Tensor] = {}
        for key, exit_ in self._exits.items():
            for name in exit_.reads_states:
                standard = self._moments[_entry(exit_, name)].standard()
                if standard is not None:
                    found[f"{key}.{name}"] = torch.stack(standard[:2])
        for key, bypass in self._bypasses.items():
            down = self._moments[bypass.down].standard()
            read = found.get(f"{key}.{self._exits[key].reads_states[0]}") if key in self._exits else None
            if down is None or read is None:
                continue
            found[f"{key}.down"] = torch.stack(down[:2])
            added = read[1]
            if bypass.norm is not None and (inputs := self._moments[bypass.norm].standard()) is not None:
                weight = cast(Tensor, bypass.norm.weight).detach().float()
                added = added * inputs[2] / weight.abs().clamp(min=0.1)
            found[f"{key}.up"] = torch.stack([added, read[1]])
        return found

    @torch.no_grad()
    def _start(self, found: dict[str, Tensor]) -> None:
        """A bypass that adds nothing yet may read what it likes: W_down, as it was drawn, is W' from now on."""
        for key, bypass in self._bypasses.items():
            if f"{key}.down" in found and not bool(bypass.up.weight.any()):
                mean, sigma = found[f"{key}.down"].to(bypass.down.weight)
                along = _direction(mean, sigma)
                weight = bypass.down.weight
                weight.copy_((weight - torch.outer(weight @ along, along)) / sigma)

    def _coordinates_of(self, found: dict[str, Tensor]) -> Iterator[Coordinates]:
        for key, exit_ in self._exits.items():
            for name in exit_.reads_states:
                if f"{key}.{name}" in found:
                    layer = cast(nn.Linear, exit_.get_submodule(name))
                    mean, sigma = found[f"{key}.{name}"].to(layer.weight)
                    if name == "linear":
                        exit_.dropout.center = mean
                    yield Coordinates(layer.weight, cast(Any, layer.bias), sigma, mean)
        for key, bypass in self._bypasses.items():
            if f"{key}.down" in found:
                mean, sigma = found[f"{key}.down"].to(bypass.down.weight)
                added, read = found[f"{key}.up"].to(bypass.down.weight)
                yield Coordinates(bypass.down.weight, cast(Any, bypass.down.bias), sigma, mean)
                yield Coordinates(bypass.up.weight, None, added.unsqueeze(1), None)
                if bypass.up.bias is not None:
                    yield Coordinates(bypass.up.bias, None, added, None)
                if bypass.norm is not None:
                    for parameter in bypass.norm.parameters():
                        yield Coordinates(parameter, None, read, None)


def _entry(exit_: Exit, name: str) -> nn.Module:
    """The module that is given what layer `name` reads: the dropout before it, where there is one."""
    return exit_.dropout if name == "linear" else exit_.get_submodule(name)


def _direction(mean: Tensor, sigma: Tensor) -> Tensor:
    """[d], mu / sigma of length 1."""
    z = mean / sigma
    return z / z.norm().clamp(min=1e-12)
