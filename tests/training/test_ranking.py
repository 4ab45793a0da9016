"""Ranking exits: the loss by loops, batches of whole queries, and a training that learns the order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorWithPadding, default_data_collator

from badge_peft import BadgeConfig, cache_states, collect_exit_logits
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
from badge_peft.training.sampling import sampling
from tests.models import exits_of, make_badge, make_model
from tests.ranking.pairs import QUERY, make_documents, pair_tokenizer

from .runs import REGRESSION, Rows, arguments, make

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


def test_a_loss_function_that_nothing_would_call(tmp_path):
    trainer = MultiExitTrainer(
        make(REGRESSION, 1, train_head=False),
        arguments(tmp_path),
        objective=RankingDistillation(),
        train_dataset=Rows(REGRESSION, 1),
        compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum(),
    )
    with pytest.raises(ValueError, match="compute_loss_func would be ignored: the objective reads no label"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_every_row_of_an_item_is_evaluated(tmp_path):
    data = Rows(REGRESSION, 1, rows=10)
    items = [[{**data[i], "groups": i // 2} for i in (first, first + 1)] for first in range(0, 10, 2)]
    trainer = MultiExitTrainer(
        make(REGRESSION, 1, train_head=False),
        arguments(tmp_path, per_device_eval_batch_size=2, remove_unused_columns=False),
        objective=RankingDistillation(),
        data_collator=QueryCollator(default_data_collator),
    )
    found = trainer.predict(items)
    np.testing.assert_array_equal(found.label_ids, data.labels.flatten().numpy())
    expected = exits_of(trainer.model.eval(), data.batch)[:, -1]
    np.testing.assert_allclose(found.predictions, expected.numpy(), rtol=1e-4, atol=1e-5)


def rows_of_queries():
    """Rows of tokens, and the number of each row's query."""
    tokenizer = pair_tokenizer()
    queries = [f"{QUERY} {word}" for word in ("plot", "cast", "end")]
    rows = [dict(tokenizer(query, d)) for i, query in enumerate(queries) for d in make_documents(16, seed=i)]
    return rows, [i // 16 for i in range(len(rows))]


def make_trainer(path, model, epochs, **options):
    rows, ids = rows_of_queries()
    arguments = multi_exit_arguments(
        model,
        str(path),
        num_train_epochs=epochs,
        per_device_train_batch_size=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        remove_unused_columns=False,
        logging_steps=1,
        **sampling(by_length=False),
    )
    return MultiExitTrainer(
        model=model,
        args=arguments,
        objective=RankingDistillation(),
        train_dataset=[[{**rows[i], "groups": ids[i]} for i in batch] for batch in query_batches(ids, 16)],
        data_collator=QueryCollator(DataCollatorWithPadding(pair_tokenizer())),
        **options,
    )


def test_exits_learn_the_order_of_full_depth(tmp_path):
    torch.manual_seed(0)
    rows, _ = rows_of_queries()
    model = get_peft_model(make_model(num_labels=1), BadgeConfig(train_head=False, exit_pooling="mean")).eval()
    before = collect_exit_logits(model, rows).logits[:, :, 0]
    trainer = make_trainer(tmp_path, model, 60)
    trainer.train()
    assert trainer.state_cache["kept"]
    after = collect_exit_logits(model, rows).logits[:, :, 0]
    assert torch.equal(after[:, -1], before[:, -1])  # full depth has not moved
    for j in range(2):
        learned, random = (np.corrcoef(x[:, j], x[:, -1])[0, 1] for x in (after, before))
        assert learned > max(0.7, random + 0.1)


def test_batches_on_cached_states_train_as_others_do(tmp_path):
    found = []
    for options in ({"cache_states": False}, {"cache_states": True, "cache_dtype": "float32"}):
        base = make_model(num_labels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = make_badge(base=base, train_head=False, exit_pooling="mean", exit_dropout=0.0)
        trainer = make_trainer(tmp_path, model, 2, **options)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.state_cache["kept"] == options["cache_states"]
    assert len(found[0]) == 6 and found[1] == pytest.approx(found[0], rel=1e-5)


def test_states_that_were_computed_before(tmp_path):
    """Those of the rows of all batches, in any order."""
    rows, _ = rows_of_queries()
    model = make_badge(base=make_model(num_labels=1), train_head=False)
    with cache_states(model, rows[::-1]) as states:
        trainer = make_trainer(tmp_path, model, 1, cache_states=states)
        trainer.train()
        assert trainer.state_cache["where"] == "given"
        with pytest.raises(ValueError, match="the states are those of other texts"):
            make_trainer(tmp_path, model, 1, cache_states=states.select(range(1, 48))).train()
