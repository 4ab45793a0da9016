"""Verbs that cannot be: each says why, in an error that comes before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    save_as_lora,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from badge_peft import BadgeConfig
from tests.models import blocks_of, exits_of, make_badge, make_batch, make_labels, make_model, shake
from tests.peft_verbs.table import save


def rescale(model: Any) -> None:
    with rescale_adapter_scale(model, 0.5):
        raise AssertionError("not reached")


MERGE = r"cannot be merged.*unload\(\)"
CONVERT = "not support LoRA conversion.*Badge"

# id -> (what is called with a PEFT model and the folder it is saved in, error, its words)
REFUSED: dict[str, tuple[Callable[[Any, Path], Any], type[Exception], str]] = {
    "merge_and_unload": (lambda model, path: model.merge_and_unload(), NotImplementedError, MERGE),
    "merge_and_unload-safe": (
        lambda model, path: model.merge_and_unload(safe_merge=True, adapter_names=["default"]),
        NotImplementedError,
        MERGE,
    ),
    "merge_adapter": (lambda model, path: model.merge_adapter(["default"]), NotImplementedError, MERGE),
    "unmerge_adapter": (lambda model, path: model.unmerge_adapter(), NotImplementedError, "cannot be merged"),
    "add_weighted_adapter": (
        lambda model, path: model.add_weighted_adapter(["default"], [1.0], "mean"),
        NotImplementedError,
        r"cannot be added up.*set_adapter\(name\), or train one adapter",
    ),
    "hotswap_adapter": (
        lambda model, path: hotswap_adapter(model, path, "default"),
        ValueError,
        "only supports LORA but BADGE was passed",
    ),
    "convert_to_lora": (lambda model, path: convert_to_lora(model, 4), TypeError, CONVERT),
    "save_as_lora": (lambda model, path: save_as_lora(path / "lora", model, 4), TypeError, CONVERT),
    "save_pretrained-converted": (
        lambda model, path: model.save_pretrained(path / "new", path_initial_model_for_weight_conversion=path),
        ValueError,
        "not supported for BadgeModel",
    ),
    "rescale_adapter_scale": (lambda model, path: rescale(model), ValueError, "only supported for models with `LoraL"),
    "forward-adapter_names": (
        lambda model, path: model(**make_batch(), adapter_names=["default"] * 4),
        ValueError,
        r"adapter_names.*set_adapter\(name\) and run the rows of each",
    ),
    "add_adapter-another-method": (
        lambda model, path: model.add_adapter("second", LoraConfig()),
        ValueError,
        "different peft types. Found .*BADGE and .*LORA",
    ),
    "add_adapter-known-name": (
        lambda model, path: model.add_adapter("default", BadgeConfig()),
        ValueError,
        "'default' already exists",
    ),
    "add_adapter-wrong-blocks": (
        lambda model, path: model.add_adapter("second", BadgeConfig(exit_layers=[7])),
        ValueError,
        "names block 7",
    ),
    "load_adapter-no-folder": (
        lambda model, path: model.load_adapter(path / "none", "second"),
        ValueError,
        "Can't find 'adapter_config.json'",
    ),
    "set_adapter-unknown": (lambda model, path: model.set_adapter("second"), ValueError, "second not found"),
    "delete_adapter-unknown": (lambda model, path: model.delete_adapter("second"), ValueError, "does not exist"),
    "save_pretrained-unknown": (
        lambda model, path: model.save_pretrained(path / "new", selected_adapters=["second"]),
        ValueError,
        r"current supported adapter names are \['default'\] - got \['second'\]",
    ),
}


@pytest.mark.parametrize("verb", REFUSED)
def test_refused(verb: str, tmp_path: Path) -> None:
    call, error, message = REFUSED[verb]
    model = make_badge()
    shake(model, only=".modules_to_save.")
    model.save_pretrained(tmp_path)
    before, names = exits_of(model, make_batch()), list(model.state_dict())
    with pytest.raises(error, match=message):
        call(model, tmp_path)
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == names
    assert torch.equal(exits_of(model, make_batch()), before)


def kind(auto: Any) -> Callable[[], Any]:
    return lambda: auto.from_config(make_model().config)


SHARED = "get_peft_model"
HEAD_REMEDY = "AutoModelForSequenceClassification, or use final_exit='exit'"

# id -> (a base model, what is called with it and an adapter's folder, the error's words)
WAYS: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], Any], str]] = {
    "inject_adapter_in_model": (make_model, lambda base, path: inject_adapter_in_model(BadgeConfig(), base), SHARED),
    "transformers-load_adapter": (make_model, lambda base, path: base.load_adapter(str(path)), SHARED),
    "transformers-from_pretrained": (
        make_model,
        lambda base, path: AutoModelForSequenceClassification.from_pretrained(path),
        SHARED,
    ),
    "get_peft_model-mixed": (
        make_model,
        lambda base, path: get_peft_model(base, BadgeConfig(), mixed=True),
        "BADGE.*not compatible",
    ),
    "PeftMixedModel": (
        make_model,
        lambda base, path: PeftMixedModel.from_pretrained(base, path),
        "BADGE is not supported for mixed models",
    ),
    "AutoPeftModel": (
        make_model,
        lambda base, path: AutoPeftModel.from_pretrained(path),
        "please use a specific class for your task type",
    ),
    **{
        auto.__name__: (
            make_model,
            lambda base, path, auto=auto: auto.from_pretrained(path),
            "Expected target PEFT class: PeftModelForSequenceClassification",
        )
        for auto in (
            AutoPeftModelForTokenClassification,
            AutoPeftModelForFeatureExtraction,
            AutoPeftModelForQuestionAnswering,
        )
    },
    "task_type": (
        make_model,
        lambda base, path: get_peft_model(base, BadgeConfig(task_type="TOKEN_CLS")),
        "task_type='TOKEN_CLS' is not allowed on BertForSequenceClassification, whose head does not classify tokens",
    ),
    **{
        auto.__name__: (
            kind(auto),
            lambda base, path: get_peft_model(base, BadgeConfig()),
            f"final_exit='base_head' is not allowed on {found}.*{HEAD_REMEDY}",
        )
        for auto, found in {
            AutoModel: "BertModel, which has no module 'classifier'",
            AutoModelForTokenClassification: "BertForTokenClassification, which does not classify sequences",
            AutoModelForMultipleChoice: "BertForMultipleChoice",
            AutoModelForQuestionAnswering: "BertForQuestionAnswering",
        }.items()
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_that_would_lose_the_exits(way: str, tmp_path: Path) -> None:
    make_base, call, message = WAYS[way]
    path = save(make_badge(), tmp_path, "bert")
    base = make_base()
    names, trained = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message):
        call(base, path)
    assert list(base.state_dict()) == names and [p.requires_grad for p in base.parameters()] == trained
    assert not blocks_of(base)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForTokenClassification])
def test_exits_of_their_own_need_no_head(auto: Any, tmp_path: Path) -> None:
    model = make_badge(base=kind(auto)().eval(), final_exit="exit", num_labels=3)
    expected = exits_of(model, make_batch())
    assert expected.shape == (4, 3, 3)
    out = model.early_exit_forward(**make_batch(), policy="never")
    torch.testing.assert_close(out.logits, expected[:, -1])
    assert len(set(model.early_exit_forward(**make_batch(), policy="max_prob", threshold=0.7).exit_layer.tolist())) > 1
    model.train()(**make_batch(), labels=make_labels()).loss.backward()
    model.eval().save_pretrained(tmp_path)
    fresh = kind(auto)().eval()
    fresh.load_state_dict(model.unload().state_dict())
    assert torch.equal(exits_of(PeftModel.from_pretrained(fresh, tmp_path), make_batch()), expected)
