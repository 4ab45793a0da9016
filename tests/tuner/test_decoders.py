"""Classification on decoders: the base model bit for bit, rows alone and together, live and replayed."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import badge_peft
from badge_peft import BadgeConfig, compile_blocks
from badge_peft.early_exit.policies import build_policy
from badge_peft.ranking import EarlyExitReranker
from badge_peft.tuner.architectures import decoder_layout
from tests.decoders import FAMILIES, make_decoder
from tests.design import pairs
from tests.early_exit.rules import answers, mixed_rule
from tests.models import LABELS, PAD, exits_of, make_batch, shake
from tests.ranking.pairs import QUERY, all_scores, expected, make_documents
from tests.texts import make_tokenizer

RULE = {"policy": "max_prob", "threshold": 0.6}
PLACEMENTS = ("block", "ffn", "mhsa", "none")


def config_for(family: str, **fields):
    """Granite has no classifier in transformers, so its exits need one of their own at the end."""
    head = {"final_exit": "exit", "num_labels": LABELS} if family == "granite" else {}
    return BadgeConfig(task_type="SEQ_CLS", r=4, **{**head, **fields})


def badge(family: str, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make_decoder(family), config_for(family, **fields)).eval()
    shake(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_laws(family):
    model = badge(family, exit_layers=[0, 1, 2, 3])
    base = make_decoder(family)
    for side in ("right", "left"):
        batch = make_batch(5, 9, side=side)
        with torch.no_grad():
            full = model(**batch)
        if family != "granite":
            assert torch.equal(full.logits, base(**batch).logits)
        out = model.early_exit_forward(**batch, **RULE)
        assert torch.equal(build_policy(**RULE).replay(full.exit_logits, exit_layers=[0, 1, 2, 3]), out.exit_layer)
        assert len(set(out.exit_layer.tolist())) > 1
        for row in range(5):
            kept = slice(None) if side == "left" else batch["attention_mask"][row].bool()  # positions count from left
            alone = model.early_exit_forward(**{k: v[row : row + 1, kept] for k, v in batch.items()}, **RULE)
            assert alone.exit_layer == out.exit_layer[row]
            torch.testing.assert_close(alone.logits[0], out.logits[row], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "placement"), [tuple(row) for row in pairs(list(FAMILIES), list(PLACEMENTS))])
def test_an_adapter_starts_at_the_blocks_own_output(family, placement):
    """W_up is zero then, so every placement reads what `none` reads. What a family cannot do is refused."""
    refused = {"opt": ("ffn", "mhsa"), "granite": ("mhsa",)}.get(family, ())
    if placement in refused:
        message = f"placement='{placement}' is not allowed on .*: allowed are 'block', 'none'"
        with pytest.raises(ValueError, match=message):
            get_peft_model(make_decoder(family), config_for(family, placement=placement))
        return
    found = {}
    for kind in ("none", placement):
        torch.manual_seed(0)
        model = get_peft_model(make_decoder(family), config_for(family, placement=kind)).eval()
        heads = {name: p for name, p in model.named_parameters() if ".badge_exit." in name}
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(heads.items()):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        with torch.no_grad():
            found[kind] = model(**make_batch()).exit_logits
    torch.testing.assert_close(found[placement], found["none"], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_saved_and_loaded_and_trained(family, tmp_path):
    model = badge(family, backbone="lora")
    batch, labels = make_batch(), torch.tensor([0, 1, 2, 0])
    model.train()
    model(**batch, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_decoder(family), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).exit_logits, model(**batch).exit_logits)


def test_the_head_and_the_exits_read_the_last_token_that_is_not_padding():
    """A text that ends with the padding token, as where it is the end of a text as well."""
    model = badge("llama", final_exit="exit")
    batch = {"input_ids": torch.tensor([[5, 6, 7, PAD], [5, 6, 7, 8]]), "attention_mask": torch.ones(2, 4).long()}
    with torch.no_grad():
        both = model(**batch).exit_logits
        short = model(input_ids=torch.tensor([[5, 6, 7]])).exit_logits
    torch.testing.assert_close(both[0], short[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_what_the_head_reads_is_not_cut_off_as_padding(given):
    """The head knows padding by its token, and of embeddings it reads the last; the mask by which rows are cut may say
    otherwise."""
    model, tried = badge("llama"), 0
    mask = torch.arange(9) < torch.tensor([9, 5, 6, 4, 5])[:, None]
    for seed in range(8):
        ids = torch.randint(5, 99, mask.shape, generator=torch.Generator().manual_seed(seed))
        value = {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids).detach()}[given]
        batch = {given: value, "attention_mask": mask.long()}
        logits = exits_of(model, batch)
        rule = mixed_rule(logits, [1, 2, 3])
        out = model.early_exit_forward(**batch, **rule)
        torch.testing.assert_close(out.logits, answers(logits, [1, 2, 3], out.exit_layer), atol=1e-4, rtol=1e-4)
        tried += int(out.exit_layer[0] < 3)  # the longest row has left, and others go to the end
    assert tried


def test_compiled_blocks_put_nothing_behind_what_the_head_reads():
    model = badge("llama")
    batch = make_batch(1, 6)
    embeds = {"inputs_embeds": torch.randn(2, 6, 32), "attention_mask": torch.ones(2, 6).long()}
    of_text, of_embeds = exits_of(model, batch), exits_of(model, embeds)
    handle = compile_blocks(model, buckets=[8], backend="eager")
    with torch.no_grad():
        assert handle.pad(batch)["input_ids"].shape == (1, 8)
    torch.testing.assert_close(exits_of(model, embeds), of_embeds, atol=1e-5, rtol=1e-5)
    model.config.pad_token_id = model.base_model.model.config.pad_token_id = None
    compile_blocks(model, buckets=[8], backend="eager")
    torch.testing.assert_close(exits_of(model, batch), of_text, atol=1e-5, rtol=1e-5)


def test_refusals():
    model, batch = badge("llama"), make_batch()
    for call in (model, model.early_exit_forward):
        with pytest.raises(ValueError, match="use_cache is not allowed: a classifier reads each text once"):
            call(**batch, use_cache=True)
    model.config.pad_token_id = model.base_model.model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"4 rows need a padding token.*pad_token_id = tokenizer\.pad_token_id"):
        model.early_exit_forward(**batch)
    assert model.early_exit_forward(input_ids=batch["input_ids"][:1]).exit_layer.shape == (1,)
    assert decoder_layout(torch.nn.Linear(2, 2)) is None


class TestFromCausalLM:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
    def test_the_logits_are_the_language_models(self, family):
        lm = make_decoder(family, AutoModelForCausalLM)
        classifier = badge_peft.from_causal_lm(lm, ["good", "bad"], make_tokenizer())
        numbers = [make_tokenizer().convert_tokens_to_ids(word) for word in ("good", "bad")]
        batch = make_batch()
        with torch.no_grad():
            ends = batch["attention_mask"].sum(1) - 1
            wanted = lm(**batch).logits[torch.arange(4), ends][:, numbers]
            torch.testing.assert_close(classifier(**batch).logits, wanted)
        assert classifier.config.id2label == {0: "good", 1: "bad"}
        model = get_peft_model(classifier, BadgeConfig(task_type="SEQ_CLS", train_head=False)).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, wanted)

    @pytest.mark.skipif("minicpm3" not in CONFIG_MAPPING, reason="transformers is too old for it")
    def test_logits_that_are_scaled(self):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = AutoConfig.for_model("minicpm3", vocab_size=40, pad_token_id=1, dim_model_base=8, **sizes)
        lm, tokens = AutoModelForCausalLM.from_config(config).eval(), torch.tensor([[3, 4, 5]])
        assert config.logits_scaling == 4
        with torch.no_grad():
            found = badge_peft.from_causal_lm(lm, [7, 9])(tokens).logits
            torch.testing.assert_close(found, lm(tokens).logits[:, -1, [7, 9]])

    def test_one_score_is_the_difference_and_ranks(self):
        """With exits: margins of infinity give the language model's order, others what a replay says."""
        lm, tokenizer = make_decoder("llama", AutoModelForCausalLM), make_tokenizer()
        classifier = badge_peft.from_causal_lm(lm, ["bad", "good"], tokenizer, one_score=True)
        bad, good = (tokenizer.convert_tokens_to_ids(word) for word in ("bad", "good"))
        documents = [f"{document} good bad" for document in make_documents(9, longest=12)]
        model = get_peft_model(classifier, BadgeConfig(task_type="SEQ_CLS", r=4, train_head=False)).eval()
        shake(model)
        scores = all_scores(model, tokenizer, QUERY, documents)
        reranker = EarlyExitReranker(model, tokenizer)
        for row, document in enumerate(documents):
            with torch.no_grad():
                logits = lm(**tokenizer(QUERY, document, return_tensors="pt")).logits[0, -1]
            assert float(logits[good] - logits[bad]) == pytest.approx(float(scores[row, -1, 0]), abs=1e-4)
        full = scores[:, -1, 0].argsort(descending=True)[:3].tolist()
        for margins in ([None] * 3, (0.5 * scores[:, :, 0].std(dim=0)).tolist()):
            config = {"policy": "top_k", "top_k": 3, "parameters": {"margins": margins}}
            model.set_early_exit_config(config)
            found, report = reranker.rank(QUERY, documents, 3, return_report=True)
            best, stops = expected(scores, model.exit_layers(), config, 3)
            assert [answer["corpus_id"] for answer in found] == best
            assert report.exit_layer.tolist() == stops.tolist()
            assert best == full or margins[0] is not None
        assert 0 < report.blocks_saved < 1

    def test_it_is_saved_as_a_classifier(self, tmp_path):
        classifier = badge_peft.from_causal_lm(make_decoder("llama", AutoModelForCausalLM), [5, 6])
        classifier.save_pretrained(tmp_path)
        again = type(classifier).from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**make_batch()).logits, classifier(**make_batch()).logits)

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (["good film", "bad"], "'good film', which is not one token"),
            (["good"], "two or more different tokens"),
            (["good", "good"], "two or more different tokens"),
            (["good", "bad", "film"], "not allowed with one_score: give two"),
            ([5, 10**6], "1000000, which is not one token"),
        ],
    )
    def test_what_is_refused(self, tokens, message):
        with pytest.raises(ValueError, match=message):
            badge_peft.from_causal_lm(
                make_decoder("llama", AutoModelForCausalLM), tokens, make_tokenizer(), one_score=True
            )
        with pytest.raises(ValueError, match="has no classifier in transformers"):
            badge_peft.from_causal_lm(make_decoder("granite", AutoModelForCausalLM), tokens, make_tokenizer())

    def test_a_classifier_of_another_make_is_refused(self):
        """BART's reads an encoder, too; ModernBERT's has a dense layer before its last one."""
        sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
        bart = AutoConfig.for_model("bart", vocab_size=40, is_decoder=True, is_encoder_decoder=False, **sizes)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        bert = AutoConfig.for_model("modernbert-decoder", vocab_size=40, decoder_bias=False, pad_token_id=1, **sizes)
        for config in (bart, bert):
            with pytest.raises(ValueError, match="has no classifier in transformers"):
                badge_peft.from_causal_lm(AutoModelForCausalLM.from_config(config), [5, 6])

    def test_a_model_without_a_name(self):
        with pytest.raises(ValueError, match="pass tokenizer="):
            badge_peft.from_causal_lm(make_decoder("llama", AutoModelForCausalLM), ["good", "bad"])
