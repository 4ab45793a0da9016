"""`nn.DataParallel`, in which Trainer wraps a model where a process sees several GPUs: replicas in worker threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from tests.models import blocks_of, make_badge, make_batch, make_labels

from .runs import REGRESSION, SINGLE, Rows, close, make, make_trainer, moved, weights


def replica_of(module, copies=None):
    """As `torch.nn.parallel.replicate` makes one, on a CPU: parameters are plain tensors with a way back."""
    copies = {} if copies is None else copies
    if id(module) in copies:
        return copies[id(module)]
    replica = copies[id(module)] = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, child in module._modules.items():
        setattr(replica, name, None if child is None else replica_of(child, copies))
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            key = ("parameter", id(parameter))
            copies.setdefault(key, parameter.clone())
            setattr(replica, name, copies[key])
            replica._former_parameters[name] = copies[key]
    return replica


class DataParallel(nn.Module):
    """Two replicas, each with half of the rows, in threads as `parallel_apply` starts them."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        rows = next(len(v) for v in kwargs.values() if isinstance(v, torch.Tensor))
        halves = [
            {k: v[half] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            for half in (slice(0, rows // 2), slice(rows // 2, rows))
        ]
        replicas = [replica_of(self.module) for _ in halves]
        outputs, errors, grad = [None, None], [], torch.is_grad_enabled()

        def work(i):
            try:
                with torch.set_grad_enabled(grad):
                    outputs[i] = replicas[i](**halves[i])
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        joined = {k: torch.cat([torch.atleast_1d(out[k]) for out in outputs]) for k in outputs[0]}
        return type(outputs[0])(**joined)


@pytest.fixture
def two_devices(monkeypatch):
    """A Trainer that wraps its model."""
    monkeypatch.setattr(nn, "DataParallel", DataParallel)

    def trainer(path, model, data, **options):
        made = make_trainer(path, model, data, **options)
        made.args._n_gpu = 2  # after the batch size has been worked out: a batch has all rows, half of them a device
        return made

    return trainer


CASES = {
    "joint": ({}, {}),
    "full": ({"backbone": "full"}, {}),
    "equilibrium": ({"backbone": "full", "placement": "mhsa"}, {"objective": "gradient_equilibrium"}),
    "past_future": ({"exit_type": "past_future", "final_exit": "exit"}, {"objective": "past_future"}),
    "learn_to_exit": ({"learn_to_exit": True}, {}),
    "mhsa": ({"placement": "mhsa"}, {"objective": "gradient_equilibrium"}),
    "carry": ({"carry": "logits", "final_exit": "exit"}, {"objective": "alternating"}),
    "ffn": ({"placement": "ffn"}, {"objective": "alternating"}),
    "cached": ({"exit_pooling": "mean"}, {"cache_states": True, "cache_dtype": "float32"}),
    "lora": ({"backbone": "lora", "lora": {"r": 2, "lora_dropout": 0.0}}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_trains_what_one_device_trains(name, two_devices, tmp_path):
    fields, options = CASES[name]
    data = Rows()
    alone, model = make(**fields), make(**fields)
    before = weights(model)
    make_trainer(tmp_path / "one", alone, data, **options).train()
    trainer = two_devices(tmp_path / "two", model, data, **options)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DataParallel)
    close(weights(model), weights(alone))
    assert any(".badge_" in n for n in moved(before, weights(model)))


@pytest.mark.parametrize("case", ["bert", "albert", "modernbert-mean", "deberta-v2"])
@pytest.mark.parametrize("exit_type", ["linear", "mha", "past_future"])
def test_replicas_answer_as_the_model(case, exit_type):
    model = make_badge(case, exit_type=exit_type, final_exit="exit", learn_to_exit=True, carry="logits")
    batch = make_batch(rows=6)
    with torch.no_grad():
        want, found = model(**batch), DataParallel(model)(**batch)
    torch.testing.assert_close(found.exit_logits, want.exit_logits)
    torch.testing.assert_close(found.exit_uncertainty, want.exit_uncertainty)
    assert all(block.badge_exit for block in blocks_of(model))


def test_a_replica_reads_its_own_weights():
    """Not those of the model that it is a copy of, which are on another device."""
    model = make_badge(exit_type="past_future", final_exit="exit", learn_to_exit=True, carry="logits")
    batch = make_batch()
    with torch.no_grad():
        want = model(**batch)
        replica = replica_of(model)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        found = replica(**batch)
    torch.testing.assert_close(found.exit_logits, want.exit_logits)
    torch.testing.assert_close(found.exit_uncertainty, want.exit_uncertainty)


@pytest.mark.parametrize(("problem_type", "num_labels"), [(SINGLE, 3), (REGRESSION, 1)])
def test_losses_of_labels(problem_type, num_labels):
    model = make(problem_type, num_labels)
    batch = {**make_batch(), "labels": make_labels(problem_type, 4, num_labels)}
    losses = DataParallel(model)(**batch).loss
    assert losses.shape == (2,)
    torch.testing.assert_close(losses.mean(), model(**batch).loss)
