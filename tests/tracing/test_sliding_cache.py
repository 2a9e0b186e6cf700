"""A sliding cache in one pass against real ones, token by token: one of unrotated keys, and plain transformers."""

import pytest
import torch
from planted import FAMILIES, LATENT, LONGROPE, bridge, gains_apart, other_model, plain_model, shared_keys_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import melens
from melens import MelensError, WeMask
from melens.models.view import base_of
from melens.tracing import sliding_cache
from melens.tracing.sliding_cache import SlidingCache, check_cache
from melens.tracing.twin import running

TOKENS = torch.randint(1, 200, (1, 12), generator=torch.Generator().manual_seed(0))
SCORES = "blocks.0.attn.hook_attn_scores"
SINKS, OTHERS_KEPT = SlidingCache(6, (0, 1)), SlidingCache(6, (1, 3))


@torch.no_grad()
def states(model, cache):
    with running(model) as network, cache.applied(model):
        return base_of(network)(input_ids=TOKENS, use_cache=False).last_hidden_state[0]


def test_what_a_query_sees_and_where_it_stands():
    assert SINKS.seen_by(3) == [0, 1, 2, 3]
    assert SINKS.seen_by(4) == [0, 1, 2, 3, 4]  # token 0 has left the window of four
    assert SINKS.seen_by(9) == [0, 1, 6, 7, 8, 9]
    assert SINKS.slots(8).tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    assert OTHERS_KEPT.seen_by(4) == [1, 2, 3, 4]  # token 0 is evicted, and a slot is still empty
    assert OTHERS_KEPT.seen_by(6) == [1, 3, 4, 5, 6]
    assert OTHERS_KEPT.seen_by(7) == [1, 3, 4, 5, 6, 7]
    assert OTHERS_KEPT.slots(9).tolist() == [0, 0, 2, 1, 3, 4, 4, 5, 5]
    for cache in (SINKS, OTHERS_KEPT):  # a query is the last of what it sees
        after = [query for query in range(16) if query not in cache.kept]
        seen = [len(cache.seen_by(query)) - 1 for query in after if cache.seen_by(query)[0] in (0, *cache.kept)]
        assert [int(cache.slots(16)[query]) for query in after if cache.seen_by(query)[0] in (0, *cache.kept)] == seen


@pytest.mark.parametrize("kept", [(1, 0), (0, 0), (4,), (0, 5)])
def test_kept_tokens_stand_in_the_first_window(kept):
    with pytest.raises(MelensError, match="cannot keep the tokens"):
        SlidingCache(5, kept)


@torch.no_grad()
def with_unrotated_keys(network, cache):
    """Run a Llama token by token on a cache of keys that are rotated by their slots when they are read."""
    held = [[] for _ in network.model.layers]
    final = []
    for query in range(TOKENS.shape[1]):
        hidden = network.model.embed_tokens(TOKENS[:, query : query + 1])
        for layer, memory in zip(network.model.layers, held, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (
                getattr(attention, f"{name}_proj")(normed).view(1, 1, -1, attention.head_dim).transpose(1, 2)
                for name in "qkv"
            )
            memory.append((k, v))
            seen = cache.seen_by(query)
            keys, values = (torch.cat([memory[token][part] for token in seen], dim=2) for part in (0, 1))
            cos, sin = network.model.rotary_emb(values, torch.arange(len(seen))[None])
            _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
            q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
            keys, values = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (keys, values))
            pattern = (q @ keys.mT * attention.scaling).softmax(-1)
            hidden = hidden + attention.o_proj((pattern @ values).transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        final.append(network.model.norm(hidden)[0, 0])
    return torch.stack(final)


@torch.no_grad()
def with_remembered_inputs(network, cache):
    """Run any transformers model on what each query sees, with the attention inputs of then for all but the query."""
    entered = {layer.self_attn: {} for layer in network.base_model.layers}
    final = []

    def recall(attention, args, kwargs):
        entered[attention][seen[-1]] = kwargs["hidden_states"][:, -1:]
        return args, kwargs | {"hidden_states": torch.cat([entered[attention][token] for token in seen], dim=1)}

    handles = [attention.register_forward_pre_hook(recall, with_kwargs=True) for attention in entered]
    for query in range(TOKENS.shape[1]):
        seen = cache.seen_by(query)
        final.append(network.base_model(input_ids=TOKENS[:, seen], use_cache=False).last_hidden_state[0, -1])
    for handle in handles:
        handle.remove()
    return torch.stack(final)


@pytest.mark.parametrize("cache", [SlidingCache(6), SINKS, OTHERS_KEPT], ids=["none", "sinks", "others"])
def test_one_pass_equals_a_cache_of_unrotated_keys(cache):
    network = gains_apart(plain_model("llama"))
    found, expected = states(bridge(network), cache), with_unrotated_keys(network, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[8:], states(bridge(network), SlidingCache(16))[8:], rtol=0.1)  # tokens are missed


@pytest.mark.parametrize(
    "family", [name if name in ("phi3", "gemma3") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_one_pass_equals_transformers_on_what_is_in_the_cache(family):
    network = gains_apart(plain_model(family))
    found, expected = states(bridge(network), OTHERS_KEPT), with_remembered_inputs(network, OTHERS_KEPT)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_that_holds_all_changes_nothing_and_comes_off_again():
    model = bridge(gains_apart(plain_model("llama")))
    with torch.no_grad(), running(model) as network:
        expected = base_of(network)(input_ids=TOKENS, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(states(model, SlidingCache(20, (0, 1, 2))), expected, rtol=1e-4, atol=1e-4)
    states(model, SINKS)
    with torch.no_grad(), running(model) as network:
        torch.testing.assert_close(
            base_of(network)(input_ids=TOKENS, use_cache=False).last_hidden_state[0], expected, rtol=0, atol=0
        )


@pytest.mark.filterwarnings("ignore:This model is run through")
def test_a_pass_that_the_cache_did_not_reach_is_no_result():
    model = bridge(gains_apart(plain_model("llama")))
    with (
        pytest.raises(MelensError, match="did not reach"),
        model.hooks(fwd_hooks=[(SCORES, lambda scores, hook: None)]),
    ):
        states(model, SINKS)


def test_a_mask_takes_hold_of_kept_keys_too():
    network = gains_apart(plain_model("llama"))
    model = bridge(network)
    with WeMask(rate=1, start=1).applied(model):  # token 0's attention input is 0 from block 1 on
        masked = states(model, SINKS)

    def zero(attention, args, kwargs):
        first = kwargs["hidden_states"].clone()
        first[:, 0] = 0  # it is the first of what it sees, or has left
        return args, kwargs | {"hidden_states": first}

    for layer in network.model.layers[1:]:
        layer.self_attn.register_forward_pre_hook(zero, with_kwargs=True)
    torch.testing.assert_close(masked, with_remembered_inputs(network, SINKS), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masked, states(model, SINKS), rtol=0.1)


# --- The check on the spot --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptj", "gpt_oss", "latent"])
def test_other_layouts_of_rotary_dims_pass_the_check(name):
    latent = {"model_type": "deepseek_v3", "config": LATENT}
    check_cache(melens.load_model("random", **latent) if name == "latent" else other_model(name), 8, 64)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gpt2", "takes rotary positions"),
        pytest.param("opt", "takes rotary positions", marks=pytest.mark.slow),
        pytest.param("bloom", "computes its attention eagerly", marks=pytest.mark.slow),
        ("falcon_h1", "recurrent blocks"),
        pytest.param("llama4_text in chunks", "attends in chunks", marks=pytest.mark.slow),
        ("gpt_oss", "sliding windows of 8 tokens"),
        ("longrope", "Give texts of at most 24 tokens"),
        pytest.param("shared keys", r"keeps \[1, 3\] cannot be simulated", marks=pytest.mark.slow),
    ],
)
def test_what_has_no_such_cache_is_refused(name, sentence):
    if name == "longrope":
        model = melens.load_model("random", model_type="phi3", config=LONGROPE)
    else:
        model = bridge(shared_keys_model()) if name == "shared keys" else other_model(name)
    with pytest.raises(MelensError, match=sentence):
        check_cache(model, 16 if name == "gpt_oss" else 8, 64)


@pytest.mark.parametrize("broken", ["positions", "window", "kept"])
def test_a_pass_that_is_no_cache_does_not_pass_the_check(broken, monkeypatch):
    if broken == "positions":  # counted in the text
        monkeypatch.setattr(SlidingCache, "slots", lambda cache, n_tokens: torch.arange(n_tokens))
    elif broken == "window":  # one token more
        monkeypatch.setattr(SlidingCache, "window", property(lambda cache: cache.size - len(cache.kept) + 1))
        monkeypatch.setattr(SlidingCache, "seen_by", lambda cache, query: list(range(max(0, query - 7), query + 1)))
    else:  # what is kept gets no attention
        monkeypatch.setattr(sliding_cache, "weigh_values", lambda pattern, value: 0.0)
    with pytest.raises(MelensError, match="differs by"):
        check_cache(bridge(gains_apart(plain_model("llama"))), 8, 64)
