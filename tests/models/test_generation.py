"""The check before writing agrees where the cache is used, and finds a cache, or a batch, that is not."""

import math

import pytest
import torch
from planted import FAMILIES, bridge, other_model, plain_model, shared_keys_model

from melens import MelensError, WeMask
from melens.masks import tokens as masking
from melens.models import generation
from melens.models.generation import Generation, verify_generation
from melens.models.twins import plain_twin

MASK = WeMask(0.3, "magnitude", start=1)


@pytest.fixture(autouse=True)
def no_kept_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path))


@pytest.mark.newest
@pytest.mark.parametrize("mask", [None, MASK], ids=["bare", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_write_with_a_cache_what_they_write_without(family, mask):
    network = plain_model(family)
    for model in (network, bridge(network)):
        found = verify_generation(model, mask)
        assert (found.use_cache, found.together, found.error < 1e-4) == (True, True, True)


def test_keys_that_blocks_share_are_written_from_under_a_mask():
    found = verify_generation(shared_keys_model(), MASK)
    assert (found.use_cache, found.together, found.error < 1e-4) == (True, True, True)


def test_a_bridge_that_does_not_find_its_cache_writes_without(monkeypatch):
    """As under transformers 5.24 without `melens.models.kv_cache`."""
    monkeypatch.setattr(generation, "find_cache_by_any_name", lambda model: None)
    model = bridge(plain_model("llama"))
    with pytest.warns(UserWarning, match=r"With a cache .* LlamaForCausalLM .* Texts are therefore written without"):
        found = verify_generation(model)
    assert (found.use_cache, found.error < 1e-4) == (False, True)


def test_a_mask_that_takes_each_step_for_a_beginning_is_found(monkeypatch):
    network = plain_model("qwen3")
    monkeypatch.setattr(masking, "_cache_among", lambda arguments: None)
    assert verify_generation(network).use_cache  # without a mask nothing is wrong
    with pytest.warns(UserWarning, match="With this mask, a cache and .* differ from those of the whole sequence by"):
        assert not verify_generation(network, MASK).use_cache


def test_prompts_that_cannot_be_padded_are_continued_one_by_one():
    network = plain_model("llama")
    own = network.generate
    network.generate = lambda ids, attention_mask, **rest: own(ids, attention_mask=torch.ones_like(ids), **rest)
    with pytest.warns(UserWarning, match="Prompts are therefore continued one by one"):
        found = verify_generation(network)
    assert (found.use_cache, found.together) == (True, False)


def test_a_model_whose_tokens_see_what_follows_writes_nothing():
    with pytest.raises(MelensError, match="No slower way agrees"):
        verify_generation(plain_twin(other_model("gemma3_text both ways")))


def test_logits_that_are_no_numbers_are_the_models_own_fault_and_no_answer_is_kept(tmp_path):
    network = plain_model("llama")
    network.lm_head.weight.data[3] = float("nan")
    found = verify_generation(network)
    assert (found.use_cache, found.together, math.isnan(found.error)) == (True, True, True)
    assert not list(tmp_path.rglob("*.json"))


def test_a_step_that_is_no_number_agrees_with_nothing(monkeypatch):
    own = generation._write

    def broken(network, prompts, **options):
        sequences, logits = own(network, prompts, **options)
        return sequences, logits * float("nan")

    monkeypatch.setattr(generation, "_write", broken)
    with pytest.raises(MelensError, match="by nan of the largest logit"):
        verify_generation(plain_model("llama"))


def test_the_authors_mask_which_masks_each_new_token_is_not_tried():
    network = plain_model("llama")
    found = verify_generation(network, WeMask(0.3, "batch_magnitude", start=1, positions="every_call"))
    assert found == verify_generation(network) == Generation(True, True, found.error)


def test_an_answer_is_kept_for_the_kind_of_model_and_the_mask(monkeypatch):
    first = verify_generation(plain_model("llama"), MASK)
    tried = []
    monkeypatch.setattr(generation, "_try", lambda network, masked: tried.append(masked) or Generation(True, True, 0.0))
    assert verify_generation(plain_model("llama", seed=1), MASK) == first
    assert not tried
    verify_generation(plain_model("llama"), WeMask(0.3, "magnitude", start=2))
    verify_generation(plain_model("llama").to(torch.bfloat16), MASK)
    verify_generation(bridge(plain_model("llama")), MASK)
    assert tried == [True] * 3
