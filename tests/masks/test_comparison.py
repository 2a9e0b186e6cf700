import pytest
import torch
from planted import FAMILIES, LONGROPE, OTHERS, bridge, gains_apart, other_model, plain_model

import melens
from melens import MelensError, WeMask
from melens.masks.comparison import MaskComparison, Measured
from melens.storage.cache import Store
from melens.tracing import attention

TEXTS = torch.randint(1, 200, (5, 12), generator=torch.Generator().manual_seed(0))


def model_of(family):
    return bridge(gains_apart(plain_model(family)))


def compared(model, starts=(1, 2), **options):
    return MaskComparison(model, TEXTS, starts, texts_per_batch=2, short_texts=2, short_tokens=8, **options)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("start", "site"), [(0, "ln1_in"), (1, "attn_in"), (2, "resid_pre")])
def test_a_mask_is_measured_as_by_whole_forward_passes_in_eager_attention(family, start, site):
    model = model_of(family)
    mask = WeMask(0.3, site=site, start=start)
    found = compared(model, [start]).measure(mask)
    unmasked = model(TEXTS)[:, :-1].log_softmax(-1)
    with mask.applied(model):
        masked = model(TEXTS)[:, :-1].log_softmax(-1)
        _, cache = model.run_with_cache(TEXTS)
    loss = -masked.gather(-1, TEXTS[:, 1:, None])[..., 0].mean(1)
    kl = (unmasked.exp() * (unmasked - masked)).sum(-1).mean(1)
    torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.kl, kl, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.agreement, (masked.argmax(-1) == unmasked.argmax(-1)).float().mean(1))
    for layer in range(4):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(found.sink_mass[layer], pattern[:, :, 1:, 0].mean(-1).T, rtol=1e-3, atol=1e-4)
        entropy = -torch.xlogy(pattern, pattern).sum(-1)[:2, :, 1:8].mean((0, 2))
        torch.testing.assert_close(found.entropy[layer], entropy, rtol=1e-3, atol=1e-4)
        for name, site in (("input", "ln1.hook_out"), ("key", "attn.k.hook_out")):
            vectors = cache[f"blocks.{layer}.{site}"][:, 0].flatten(1)
            unit = torch.nn.functional.normalize(vectors, dim=-1)
            cosine = ((unit @ unit.T).sum() - 5) / 20
            with_others = getattr(found, f"{name}_cosine")[layer]
            torch.testing.assert_close(with_others.mean(), cosine, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(with_others[2], (unit[2] @ unit.T).sum() / 4 - 0.25, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.first_key[layer], vectors[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_a_mask_is_measured_whatever_the_architecture_hands_to_its_head(name):
    model, mask = other_model(name), WeMask(0.3, "random", "resid_pre", start=1)
    found = compared(model, [1]).measure(mask)
    network = model.original_model
    unmasked = network(input_ids=TEXTS, use_cache=False).logits[:, :-1].log_softmax(-1)
    with mask.applied(model):
        masked = network(input_ids=TEXTS, use_cache=False).logits[:, :-1].log_softmax(-1)
    kl = (unmasked.exp() * (unmasked - masked)).sum(-1).mean(1)
    assert kl.min() > 1e-4
    torch.testing.assert_close(found.kl, kl, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(found.loss, -masked.gather(-1, TEXTS[:, 1:, None])[..., 0].mean(1))


def test_cosines_are_of_texts_that_begin_differently_and_of_states_that_have_a_direction():
    model, texts = model_of("llama"), TEXTS.clone()
    texts[[0, 3], 0] = 7
    found = MaskComparison(model, texts, [1], patterns=False)
    assert found.unmasked.input_cosine.isnan().tolist() == [[False, False, False, True, False]] * 4
    assert found.measure(WeMask(1, start=1)).input_cosine.isnan().tolist()[1] == [True] * 5
    texts[:, 0] = 7
    assert MaskComparison(model, texts, [1], patterns=False).unmasked.key_cosine.isnan().all()


def test_without_patterns_all_else_is_the_same():
    model, mask = model_of("gemma3"), WeMask(0.3, start=1)
    whole, quick = compared(model), compared(model, patterns=False)
    for with_them, without in (
        (whole.unmasked, quick.unmasked),
        (whole.measure(mask), quick.measure(mask, patterns=False)),
    ):
        for name in Measured.__dataclass_fields__:
            if name in ("entropy", "effective_rank"):
                assert getattr(without, name).isnan().all()
            else:
                assert torch.equal(getattr(with_them, name), getattr(without, name))


def test_patterns_are_not_half_measured():
    comparison = compared(model_of("llama"), patterns=False)
    assert comparison.measure(WeMask(0.3, start=1)).entropy.isnan().all()
    with pytest.raises(MelensError, match="was made without attention patterns"):
        comparison.measure(WeMask(0.3, start=1), patterns=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_texts_are_run_in_fused_attention_alone(family, monkeypatch):
    model, lengths, fused = model_of(family), [], attention.causal_attention

    def causal_attention(query, *args, **options):
        lengths.append(query.shape[2])
        return fused(query, *args, **options)

    monkeypatch.setattr(attention, "causal_attention", causal_attention)
    compared(model, patterns=False).measure(WeMask(0.3, start=1, site="resid_pre"))
    assert lengths.count(12) == 3 * (4 + 3)  # batches, blocks of the unmasked run and of the masked one


def test_a_mask_that_takes_next_to_nothing_changes_next_to_nothing():
    comparison = compared(model_of("llama"))
    found = comparison.measure(WeMask(0.3, start=1, strength=1e-6))
    assert found.kl.max() < 1e-6
    assert (found.agreement == 1).all()
    torch.testing.assert_close(found.loss, comparison.unmasked.loss)


def test_patterns_of_short_texts_do_not_start_from_long_ones_where_the_length_matters():
    """Beyond 24 tokens this model turns its queries and keys by other angles."""
    model = melens.load_model("random", model_type="phi3", config=LONGROPE | {"initializer_range": 0.3})
    texts = torch.randint(1, 199, (3, 40), generator=torch.Generator().manual_seed(0))
    comparison = MaskComparison(model, texts, [1, 2], short_tokens=16)
    found = comparison.measure(WeMask(0.3, start=2, strength=1e-6))
    torch.testing.assert_close(found.entropy, comparison.unmasked.entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, comparison.unmasked.loss, rtol=1e-4, atol=1e-5)


def test_the_blocks_before_a_mask_run_once_for_all_masks():
    model = model_of("llama")
    times = [0] * 4
    for layer, block in enumerate(model.blocks):
        norm = block.ln2.original_component
        norm.register_forward_hook(lambda *_, layer=layer: times.__setitem__(layer, times[layer] + 1))
    comparison = compared(model, [2])
    once = list(times)
    for rate in (0.1, 0.2, 0.3):
        comparison.measure(WeMask(rate, start=2))
    own = [after - before for after, before in zip(times, once, strict=True)]
    assert own[0] == own[1] == 0
    assert own[2] == own[3] == 3 * (3 + 1)  # three batches, the patterns


def test_a_run_that_was_kept_is_taken_and_leaves_the_same(tmp_path):
    model, store = model_of("qwen3"), Store(tmp_path)
    mask = WeMask(0.3, start=2, site="resid_pre")
    first = compared(model, store=store)
    second = compared(model, store=store)
    assert (first.shared, second.shared) == (False, True)
    for name in Measured.__dataclass_fields__:
        assert torch.equal(getattr(first.unmasked, name), getattr(second.unmasked, name))
        assert torch.equal(getattr(first.measure(mask), name), getattr(second.measure(mask), name))
    assert not compared(model, [1], store=store).shared


def test_a_mask_that_starts_elsewhere_is_refused():
    with pytest.raises(MelensError, match="starts in block 3, which is none of the starts"):
        compared(model_of("llama")).measure(WeMask(0.3, start=3))
