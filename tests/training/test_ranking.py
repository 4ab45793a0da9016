"""Ranking exits: the loss by loops, batches of whole queries, and a training that learns the order."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorWithPadding, TrainingArguments

from badge_peft import BadgeConfig, collect_exit_logits
from badge_peft.outputs import MultiExitOutput
from badge_peft.training import (
    MultiExitTrainer,
    QueryCollator,
    RankingDistillation,
    multi_exit_arguments,
    query_batches,
)
from badge_peft.training.objectives import Step
from badge_peft.training.ranking import listwise_loss
from tests.models import make_badge, make_model
from tests.ranking.pairs import QUERY, make_documents, pair_tokenizer

SCORES = torch.randn(3, 7, 1, generator=torch.Generator().manual_seed(0))  # [E, B, 1]
GROUPS = torch.tensor([4, 9, 4, 4, 9, 2, 9])


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def listwise_by_loops(student, teacher, groups, temperature=1.0):
    total = 0.0
    for query in set(groups):
        rows = [i for i, g in enumerate(groups) if g == query]
        p, q = (softmax([x[i] / temperature for i in rows]) for x in (teacher, student))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(set(groups)) * temperature**2


@pytest.mark.parametrize("groups", [GROUPS, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_listwise_term(temperature, groups):
    student, teacher = SCORES[0, :, 0], SCORES[2, :, 0]
    want = listwise_by_loops(
        student.tolist(), teacher.tolist(), (groups if groups is not None else torch.zeros(7)).tolist(), temperature
    )
    assert float(listwise_loss(student, teacher, groups, temperature)) == pytest.approx(want, rel=1e-5)
    assert float(listwise_loss(teacher + 3, teacher, groups)) == pytest.approx(0.0, abs=1e-5)
    assert float(listwise_loss(teacher, teacher, groups)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("squared", "listwise"), [(1.0, 1.0), (0.5, 0.0), (0.0, 2.0)])
def test_the_loss_of_every_exit_below_the_last(squared, listwise):
    step = Step([1, 2, 3], list(SCORES), None, "regression", 0, MultiExitOutput(), groups=GROUPS)
    found = RankingDistillation(squared=squared, listwise=listwise)(step)
    want = 0.0
    for student in SCORES[:2, :, 0].tolist():
        teacher = SCORES[2, :, 0].tolist()
        want += squared * float(np.mean((np.array(student) - np.array(teacher)) ** 2))
        want += listwise * listwise_by_loops(student, teacher, GROUPS.tolist())
    assert float(found) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_batches_keep_queries_together(batch_size):
    ids = [f"q{i % 7}" for i in range(60)]
    batches = query_batches(ids, batch_size, seed=1)
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    assert max(map(len, batches)) <= batch_size
    for query in set(ids):  # in as few parts as can be
        parts = [sum(ids[i] == query for i in batch) for batch in batches]
        wanted = -(-ids.count(query) // batch_size)
        assert sum(count > 0 for count in parts) == wanted
        assert max(parts) - min(count for count in parts if count) <= 1
    assert query_batches(ids, batch_size, seed=1) == batches != query_batches(ids, batch_size, seed=2)


def test_what_is_refused():
    for fields, message in (
        ({"squared": -1.0}, r"squared=-1\.0 is not allowed"),
        ({"squared": 0.0, "listwise": 0.0}, "leave nothing to learn"),
    ):
        with pytest.raises(ValueError, match=message):
            RankingDistillation(**fields)
    objective = RankingDistillation()
    two, trained = make_badge("bert", train_head=False), make_badge("bert", make_model(num_labels=1))
    with pytest.raises(ValueError, match="the model has 3 outputs"):
        objective.check(two.peft_config["default"], [1, 2, 3])
    with pytest.raises(ValueError, match=r"train_head=False and final_exit='base_head'"):
        objective.check(trained.peft_config["default"], [1, 2, 3])


def test_exits_learn_the_order_of_full_depth(tmp_path):
    torch.manual_seed(0)
    tokenizer = pair_tokenizer()
    base = make_model(num_labels=1)
    model = get_peft_model(base, BadgeConfig(train_head=False, exit_pooling="mean")).eval()
    queries = [f"{QUERY} {word}" for word in ("plot", "cast", "end")]
    rows = [dict(tokenizer(query, d)) for i, query in enumerate(queries) for d in make_documents(16, seed=i)]
    ids = [i // 16 for i in range(len(rows))]
    batches = [[{**rows[i], "groups": ids[i]} for i in batch] for batch in query_batches(ids, 16)]
    before = collect_exit_logits(model, rows).logits[:, :, 0]
    sampling = "train_sampling_strategy" in {f.name for f in dataclasses.fields(TrainingArguments)}
    arguments = multi_exit_arguments(
        model,
        str(tmp_path),
        num_train_epochs=60,
        per_device_train_batch_size=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        remove_unused_columns=False,
        **({"train_sampling_strategy": "random"} if sampling else {"group_by_length": False}),
    )
    trainer = MultiExitTrainer(
        model=model,
        args=arguments,
        objective=RankingDistillation(),
        train_dataset=batches,
        data_collator=QueryCollator(DataCollatorWithPadding(tokenizer)),
    )
    trainer.train()
    after = collect_exit_logits(model, rows).logits[:, :, 0]
    assert torch.equal(after[:, -1], before[:, -1])  # full depth has not moved
    for j in range(2):
        learned, random = (np.corrcoef(x[:, j], x[:, -1])[0, 1] for x in (after, before))
        assert learned > max(0.7, random + 0.1)
