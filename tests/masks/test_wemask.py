import copy
import json

import numpy as np
import pytest
import torch
from planted import FAMILIES, N_LAYERS, VOCABULARY, bridge, gains_apart, plain_model, shared_keys_model
from torch._dynamo.utils import counters
from torch.distributed.utils import _apply_to_tensors
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import melens
from melens import MelensError, WeMask
from melens.masks.hooks import InstalledMask
from melens.masks.tokens import TokenFinder

TOKENS = torch.tensor([[5, 17, 101, 33, 8, 64, 150], [9, 2, 77, 120, 31, 6, 44]])
SELECTS = ("weight", "weight_low", "random", "magnitude", "massive")
SITES = ("attn_in", "ln1_in", "resid_pre")


def model_of(family):
    return gains_apart(plain_model(family)).eval()


def reference(network, tokens, mask, dims=None):
    """Mask token 0 in a forward pass written out: what goes where, family by family."""
    base, family = network.base_model, network.config.model_type

    def masked(x, layer):
        chosen = dims[layer] if dims else x[:, 0].abs().topk(int(mask.rate * x.shape[-1])).indices
        x = x.clone()
        for row in range(len(x)):
            x[row, 0, chosen if dims else chosen[row]] *= 1 - mask.strength
        return x

    h = base.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    future = torch.full((1, 1, tokens.shape[1], tokens.shape[1]), -1e9).triu(1)
    for layer, block in enumerate(base.layers):
        is_masked = layer >= mask.start if mask.layers == "all" else layer == mask.start
        if is_masked and mask.site == "resid_pre":
            h = masked(h, layer)
        x = block.input_layernorm(masked(h, layer) if is_masked and mask.site == "ln1_in" else h)
        x = masked(x, layer) if is_masked and mask.site == "attn_in" else x
        of_type = (network.config.layer_types[layer],) if family == "gemma3_text" else ()
        rope = base.rotary_emb(h, positions, *of_type)
        attended = block.self_attn(hidden_states=x, position_embeddings=rope, attention_mask=future)[0]
        if family == "gemma3_text":
            h = h + block.post_attention_layernorm(attended)
            h = h + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(h)))
        else:
            h = h + attended
            h = h + block.mlp(block.post_attention_layernorm(h))
    return network.lm_head(base.norm(h))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("site", SITES)
def test_a_mask_means_the_same_as_a_forward_pass_written_out(family, select, site):
    network = model_of(family)
    mask = WeMask(rate=0.2, select=select, site=site, start=1, massive_dims=(3, 40))
    dims = None if select == "magnitude" else mask.dims(network)
    expected = reference(network, TOKENS, mask, dims)
    unmasked = network(TOKENS).logits
    assert (expected - unmasked).abs().max() > 1e-3
    with mask.applied(network):
        torch.testing.assert_close(network(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(TOKENS).logits, unmasked, rtol=0, atol=0)
    of_bridge = bridge(network)
    with mask.applied(of_bridge):
        torch.testing.assert_close(of_bridge(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert not any(point.has_hooks() for point in of_bridge.hook_dict.values())


@torch.no_grad()
@pytest.mark.parametrize(("layers", "strength"), [("first", 1), ("all", 0.5)])
def test_strength_and_the_first_block_alone(layers, strength):
    network = model_of("llama")
    mask = WeMask(rate=0.2, start=2, layers=layers, strength=strength, site="ln1_in")
    with mask.applied(network):
        masked = network(TOKENS).logits
    torch.testing.assert_close(masked, reference(network, TOKENS, mask, mask.dims(network)), rtol=1e-4, atol=1e-4)


def test_which_dims():
    network = model_of("gemma3")
    gain = 1 + network.base_model.layers[2].input_layernorm.weight.detach()
    order = gain.abs().argsort(descending=True)
    assert WeMask(0.1, start=2).dims(network)[2].tolist() == sorted(order[:6].tolist())
    assert WeMask(0.1, "weight_low", start=2).dims(network)[2].tolist() == sorted(order[-6:].tolist())
    draw = {seed: WeMask(0.1, "random", start=1, seed=seed).dims(network) for seed in (0, 1)}
    assert list(draw[0]) == [1, 2, 3]
    sets = {tuple(dims.tolist()) for by_block in draw.values() for dims in by_block.values()}
    assert len(sets) == 6
    more = WeMask(0.3, "random", start=1).dims(network)
    assert set(draw[0][1].tolist()) < set(more[1].tolist())
    assert WeMask(0.29, start=0).dims(model_of("llama"))[0].numel() == int(0.29 * 64)


def test_equal_gains_choose_the_first_dims_and_say_so():
    with pytest.warns(UserWarning, match="ln1 in block 3 are all alike"):
        dims = WeMask(0.05, start=3).dims(plain_model("llama"))
    assert dims[3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("apart", "where"), [((), "blocks 0, 1, 2 and 3"), ((1,), "blocks 0, 2 and 3"), ((0, 1), "blocks 2 and 3")]
)
def test_one_sentence_names_all_blocks_whose_gains_are_equal(apart, where):
    network = plain_model("llama")
    for layer in apart:
        network.model.layers[layer].input_layernorm.weight.data[0] = 2
    with pytest.warns(UserWarning, match="all alike") as warned:
        WeMask(0.05, start=0).dims(network)
    (sentence,) = (str(one.message) for one in warned)
    assert sentence == f"The gains of ln1 in {where} are all alike, so the choice of dims there is arbitrary."


# --- Padding, caches, generation --------------------------------------------------------------------------------------

LENGTHS = (7, 3, 5)


def ragged(side):
    """Three prompts of different lengths in a batch, padded on a side."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 200, (length,), generator=generator) for length in LENGTHS]
    tokens, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        at = slice(7 - len(prompt), None) if side == "left" else slice(None, len(prompt))
        tokens[row, at], mask[row, at] = prompt, 1
    return prompts, tokens, mask


POSITIONS = ("first", [0, 2], "all")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_changes_nothing(family, site, positions):
    network = model_of(family)
    mask = WeMask(0.2, site=site, start=1, positions=positions)
    for side in ("left", "right"):
        prompts, tokens, attention_mask = ragged(side)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        with mask.applied(network):
            bare = [network(prompt[None]).logits[0] for prompt in prompts]
            padded = network(tokens, attention_mask=attention_mask, position_ids=position_ids).logits
        for row, expected in enumerate(bare):
            torch.testing.assert_close(padded[row][attention_mask[row] == 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.newest
@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("chunks", [(4, 3), (1, 1, 5), (2, 2, 2, 1)])
def test_chunks_and_a_cache_change_nothing(positions, chunks):
    network = model_of("qwen3")
    _, tokens, attention_mask = ragged("left")
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with WeMask(0.2, site="ln1_in", start=1, positions=positions).applied(network):
        whole = network(tokens, attention_mask=attention_mask, position_ids=position_ids).logits
        cache, parts, at = None, [], 0
        for n_tokens in chunks:
            part = slice(at, at + n_tokens)
            at += n_tokens
            output = network(
                tokens[:, part],
                attention_mask=attention_mask[:, :at],
                position_ids=position_ids[:, part],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            parts.append(output.logits)
    real = attention_mask == 1
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def greedy(network, prompt, n_tokens):
    """Generate without a cache, one whole forward pass a token."""
    tokens = prompt[None]
    for _ in range(n_tokens):
        tokens = torch.cat([tokens, network(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.newest
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_generates_what_each_prompt_does_without_a_cache(family, cache):
    network = model_of(family)
    prompts, tokens, attention_mask = ragged("left")
    mask = WeMask(0.3, site="resid_pre", start=1)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "disable_compile": True}
    with mask.applied(network):
        expected = [greedy(network, prompt, 6) for prompt in prompts]
        twice = [
            network.generate(tokens, attention_mask=attention_mask, cache_implementation=cache, **options)[
                :, 7:
            ].tolist()
            for _ in range(2)
        ]
    assert twice == [expected, expected]
    assert expected != [greedy(network, prompt, 6) for prompt in prompts]


@pytest.mark.newest
def test_a_bridge_generates_the_same_with_and_without_its_cache():
    model = bridge(model_of("llama"))
    prompt = ragged("left")[0][0]
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with WeMask(0.3, site="ln1_in", start=1).applied(model):
        with_cache, without = (
            model.generate(prompt[None], use_past_kv_cache=use, **options).tolist() for use in (True, False)
        )
        assert with_cache == without
        assert with_cache[0][7:] == greedy(model_with_logits(model), prompt, 6)
    assert without != model.generate(prompt[None], **options).tolist()


def model_with_logits(model):
    return lambda tokens: type("Output", (), {"logits": model(tokens)})


@torch.no_grad()
@pytest.mark.parametrize("site", ["attn_in", "ln1_in", "resid_pre"])
@pytest.mark.parametrize("positions", ["first", [0, 4]])
def test_blocks_that_get_the_last_tokens_alone_are_masked_by_position(site, positions):
    network = shared_keys_model()
    tokens = TOKENS[:1]
    with WeMask(0.5, "magnitude", site=site, start=1, positions=positions).applied(network):
        whole = network(tokens).logits
        for n_kept in (1, 3):
            assert torch.allclose(network(tokens, logits_to_keep=n_kept).logits, whole[:, -n_kept:], atol=1e-4)
    assert (network(tokens).logits - whole).abs().max() > 0.1


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_cache_is_found_by_whatever_name_it_comes(name):
    cache = DynamicCache()
    cache.update(*torch.zeros(2, 1, 2, 5, 16), layer_idx=0)
    arguments = {"input_ids": TOKENS[:1, :1], name: cache}
    assert TokenFinder("first").find(arguments).where is None
    assert TokenFinder([5]).find(arguments).where == (slice(None), 0)
    with pytest.raises(MelensError, match=r"cannot read a cache of type tuple"):
        TokenFinder("first").find({"input_ids": TOKENS, name: ((1, 2),)})


@torch.no_grad()
def test_a_decode_step_touches_nothing_but_the_authors_code_masks_every_new_token():
    network = model_of("llama")
    for positions, is_touched in (("first", False), ("massive", False), ("every_call", True)):
        prefill = network(TOKENS, use_cache=True)
        step = torch.tensor([[3], [4]])
        bare = network(step, past_key_values=network(TOKENS, use_cache=True).past_key_values).logits
        with WeMask(0.5, start=1, positions=positions).applied(network):
            masked = network(step, past_key_values=prefill.past_key_values).logits
        assert torch.equal(bare, masked) is not is_touched


@torch.no_grad()
def test_packed_sequences_are_masked_one_by_one():
    network = model_of("llama")
    packed = torch.cat([TOKENS[:1, :4], TOKENS[1:, :3]], dim=1)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with WeMask(0.3, site="ln1_in", start=1).applied(network):
        both = network(packed, position_ids=position_ids, use_cache=False).logits
        alone = [network(TOKENS[:1, :4]).logits, network(TOKENS[1:, :3]).logits]
    torch.testing.assert_close(both, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_massive_tokens_are_found_where_they_are():
    network = model_of("llama")
    network.base_model.embed_tokens.weight.data[101] *= 1e5
    tokens = torch.tensor([[5, 17, 101, 33], [101, 2, 9, 9]])
    mask = WeMask(0.3, site="attn_in", start=1, positions="massive")
    with mask.applied(network):
        masked = network(tokens).logits
        padded = network(torch.tensor([[0, 5, 17, 101, 33]]), attention_mask=torch.tensor([[0, 1, 1, 1, 1]])).logits
    with WeMask(0.3, site="attn_in", start=1, positions=[2]).applied(network):
        torch.testing.assert_close(masked[0], network(tokens[:1]).logits[0])
        torch.testing.assert_close(padded[0, 1:], masked[0], rtol=1e-3, atol=1e-3)
    with WeMask(0.3, site="attn_in", start=1).applied(network):
        torch.testing.assert_close(masked[1], network(tokens[1:]).logits[0])


def test_the_released_preset_is_the_authors_code():
    network = model_of("qwen3")
    mask = WeMask(0.2, "batch_magnitude", start=1, positions="every_call")

    def by_hand(module, args, output):
        top = output[:, 0].abs().mean(0).topk(12).indices
        output = output.clone()
        output[:, 0, top] = 0
        return output

    with mask.applied(network):
        masked = network(TOKENS).logits
    for layer in network.base_model.layers[1:]:
        layer.input_layernorm.register_forward_hook(by_hand)
    torch.testing.assert_close(masked, network(TOKENS).logits)


# --- Wherever a model is ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_masks_nest_and_come_off_in_any_order():
    network = model_of("llama")
    low, high = WeMask(0.2, "weight_low", start=1), WeMask(0.2, start=1, site="resid_pre")
    unmasked = network(TOKENS).logits
    first, second = low.install(network), high.install(network)
    both = network(TOKENS).logits
    first.remove()
    with (
        high.applied(model_of("llama")) as _,
        WeMask(0.2, start=1, site="resid_pre").applied(other := model_of("llama")),
    ):
        torch.testing.assert_close(network(TOKENS).logits, other(TOKENS).logits)
    assert not torch.allclose(both, network(TOKENS).logits)
    second.remove()
    second.remove()
    assert torch.equal(network(TOKENS).logits, unmasked)
    assert not [name for name, _ in network.named_buffers() if "melens" in name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_repeats_each_forward_call_with_its_own_mask(family, site, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        network = model_of(family).train()
        network.enable_input_require_grads()
        if checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with WeMask(0.3, site=site, start=1).applied(network):
            _, tokens, attention_mask = ragged("left")
            padded = network(tokens, attention_mask=attention_mask).logits  # two calls, then one backward pass
            bare = network(TOKENS).logits
            (padded.logsumexp(-1).mean() + bare.logsumexp(-1).mean()).backward()
        gradients.append({name: weight.grad for name, weight in network.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_blocks_whose_arguments_are_cast_are_masked(monkeypatch):
    """FSDP copies a block's arguments to cast them, and older transformers send what is masked among them."""
    monkeypatch.setattr(InstalledMask, "_hooks_are_repeated", lambda self: True)
    network = model_of("llama").train()

    def cast(module, args, kwargs):
        return _apply_to_tensors(torch.clone, args), _apply_to_tensors(torch.clone, kwargs)

    with WeMask(0.3, start=1).applied(network):
        expected = network(TOKENS).logits
        for block in network.base_model.layers:
            block.register_forward_pre_hook(cast, with_kwargs=True, prepend=True)
        torch.testing.assert_close(network(TOKENS).logits, expected)


def test_masked_dims_get_no_gradient():
    network = model_of("llama").train()
    mask = WeMask(0.3, start=1, layers="first")
    embedded = network.get_input_embeddings()(TOKENS).detach()
    seen = []
    norm = network.base_model.layers[1].input_layernorm
    norm.register_forward_hook(lambda module, args, output: (output.retain_grad(), seen.append(output))[0])
    with mask.applied(network):
        network(inputs_embeds=embedded.requires_grad_()).logits.sum().backward()
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[mask.dims(network)[1]] = True
    of_first = seen[0].grad[:, 0]
    assert (of_first[:, chosen] == 0).all()
    assert (of_first[:, ~chosen] != 0).all()
    assert (seen[0].grad[:, 1:] != 0).all()


def test_refresh_follows_the_weights_in_training_alone():
    network = model_of("gemma3")
    norm = network.base_model.layers[3].input_layernorm
    mask = WeMask(0.05, start=3)
    installed = {refresh: mask.install(network, refresh=refresh) for refresh in (True, False)}

    def dims():
        buffers = [b for n, b in network.base_model.layers[3].named_buffers() if "melens" in n]
        return [(buffer == 0).nonzero().flatten().tolist() for buffer in buffers]

    before = dims()
    norm.weight.data[:] = 0
    norm.weight.data[[1, 2, 5]] = 7
    network.eval()(TOKENS)
    assert dims() == before
    network.train()(TOKENS)
    assert dims() == [[1, 2, 5], before[1]]
    for handle in installed.values():
        handle.remove()


@torch.no_grad()
def test_a_copy_of_a_masked_model_has_a_mask_of_its_own():
    import copy

    network = model_of("llama")
    unmasked = network(TOKENS).logits
    installed = WeMask(0.3, start=1, site="ln1_in").install(network)
    masked = network(TOKENS).logits
    twin = copy.deepcopy(network)
    installed.remove()
    assert torch.equal(twin(TOKENS).logits, masked)
    assert torch.equal(network(TOKENS).logits, unmasked)


@torch.no_grad()
def test_a_bridge_is_masked_in_a_trace_a_cache_and_after_a_reset():
    model = bridge(model_of("llama"))
    prompts = [torch.tensor(row) for row in TOKENS.tolist()]
    mask = WeMask(0.3, start=2)
    dims = mask.dims(model)[2]
    with mask.applied(model):
        model.reset_hooks()
        _, cache = model.run_with_cache(TOKENS)
        assert (cache["blocks.2.ln1.hook_out"][:, 0, dims] == 0).all()
        assert (cache["blocks.2.ln1.hook_out"][:, 1:, dims] != 0).all()
        logits = model(TOKENS)
        probe = melens.TokenVectors([0], site="ln1.hook_out")
        vectors = melens.trace(model, prompts, [probe]).tensors["token_vectors"]
        norms = melens.trace(model, prompts)["norm"].query("site == 'hook_resid_post' and layer == 3")["norm"]
    assert (vectors[:, 2, 0, dims] == 0).all()
    eager = cache["blocks.3.hook_resid_post"].norm(dim=-1).flatten()
    torch.testing.assert_close(torch.tensor(norms.to_numpy()), eager, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, model(TOKENS))
    with mask.applied(model):
        model.reset_hooks(including_permanent=True)  # of TransformerLens's own hooks: a mask's are no such
        torch.testing.assert_close(logits, model(TOKENS))


@torch.no_grad()
def test_wrapped_models_are_masked_inside():
    network = model_of("llama")
    mask = WeMask(0.3, start=1)
    with mask.applied(network):
        expected = network(TOKENS).logits
    wrapped = torch.nn.DataParallel(network)  # without a GPU it calls the model as it is
    with mask.applied(wrapped):
        torch.testing.assert_close(wrapped(TOKENS).logits, expected)


@torch.no_grad()
def test_a_model_may_be_sharded_once_it_is_masked_not_before(tmp_path):
    from torch.distributed.fsdp import fully_shard

    network = model_of("llama")
    mask = WeMask(0.3, start=1, site="ln1_in")
    with mask.applied(network):
        expected = network(TOKENS).logits
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        installed = mask.install(network)
        for layer in network.base_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
        torch.testing.assert_close(network(TOKENS).logits, expected)
        installed.remove()
        assert not torch.allclose(network(TOKENS).logits, expected)
        with pytest.raises(MelensError, match="sharded or offloaded"):
            mask.install(network)
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
@pytest.mark.parametrize(
    "when", ["before", *(pytest.param(each, marks=pytest.mark.slow) for each in ("after", "in place"))]
)
def test_a_compiled_model_is_masked_whenever_it_was_compiled(when):
    network = model_of("llama")
    mask = WeMask(0.3, start=1, site="ln1_in")
    unmasked = network(TOKENS).logits
    with mask.applied(network):
        expected = network(TOKENS).logits
    if when == "in place":
        network.compile(backend="eager")
        compiled = network
    else:
        compiled = torch.compile(network, backend="eager")
    if when != "before":
        torch.testing.assert_close(compiled(TOKENS).logits, unmasked)
    installed = mask.install(network if when == "before" else compiled)
    torch.testing.assert_close(compiled(TOKENS).logits, expected)
    installed.remove()
    torch.testing.assert_close(compiled(TOKENS).logits, unmasked)


@torch.no_grad()
def test_a_masked_block_does_not_run_what_was_compiled_for_another():
    network, other = model_of("llama"), model_of("llama")
    network.config.use_cache = False  # as in training: without a cache blocks share their code
    with WeMask(0.3, start=1).applied(network):
        expected = network(TOKENS).logits
        compiled = torch.compile(network, backend="eager")
        torch.testing.assert_close(compiled(TOKENS).logits, expected)
        before = counters["frames"]["total"]
        with WeMask(0.5, start=0).applied(other):  # as an inspection in training does
            other(TOKENS)
        torch.testing.assert_close(compiled(TOKENS).logits, expected)
        assert counters["frames"]["total"] == before


@torch.no_grad()
@pytest.mark.parametrize(("family", "reader"), [("phi", "mlp"), ("falcon_h1", "mamba")])
def test_attention_alone_is_masked_where_others_read_the_same_norm(family, reader):
    config = AutoConfig.for_model(family, vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                  num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)  # fmt: skip
    network = gains_apart(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()
    block = network.base_model.layers[1]
    for site in ("attn_in", "ln1_in"):
        mask, seen = WeMask(0.3, start=1, layers="first", site=site), {}

        def spy(name, seen=seen):
            return lambda module, args, kwargs: seen.update({name: args[0] if args else kwargs["hidden_states"]})

        with mask.applied(network):
            spies = [
                part.register_forward_pre_hook(spy(name), with_kwargs=True)
                for name, part in (("other", getattr(block, reader)), ("attention", block.self_attn))
            ]
            network(TOKENS)
        for each in spies:
            each.remove()
        assert torch.equal(seen["other"][:, 1:], seen["attention"][:, 1:])
        assert not torch.equal(seen["other"][:, 0], seen["attention"][:, 0])
        with pytest.raises(MelensError, match="shares ln1 between attention and another part"):
            mask.install(bridge(network))


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
def test_a_model_whose_head_calls_the_decoder_past_its_shell_is_masked(site):
    # OPT: `model.model` never runs, `model.model.decoder` does.
    config = AutoConfig.for_model("opt", vocab_size=200, hidden_size=64, ffn_dim=96, num_hidden_layers=3,
                                  num_attention_heads=4, word_embed_proj_dim=64)  # fmt: skip
    network = gains_apart(AutoModelForCausalLM.from_config(config)).eval()
    unmasked, mask = network(TOKENS).logits, WeMask(0.3, start=1, site=site)
    with mask.applied(network):
        masked = network(TOKENS).logits
        prefill = network(TOKENS[:, :4], use_cache=True)
        rest = network(TOKENS[:, 4:], past_key_values=prefill.past_key_values).logits
    assert not torch.allclose(masked, unmasked, atol=1e-3)
    torch.testing.assert_close(torch.cat([prefill.logits, rest], dim=1), masked, rtol=1e-4, atol=1e-4)
    with mask.applied(of_bridge := bridge(network)):
        torch.testing.assert_close(of_bridge(TOKENS), masked, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
def test_a_mask_stays_the_same_in_training_and_after(site):
    network = model_of("llama")
    with WeMask(0.3, start=1, site=site).applied(network):
        before, in_training, after = (network.train(mode)(TOKENS).logits for mode in (False, True, False))
    torch.testing.assert_close(in_training, before)
    torch.testing.assert_close(after, before)
    assert not torch.allclose(network(TOKENS).logits, before)


@torch.no_grad()
def test_where_ln1_makes_the_residual_stream_that_stays_whole_in_training_and_after():
    config = AutoConfig.for_model("bloom", vocab_size=200, hidden_size=64, n_layer=3, n_head=4, hidden_dropout=0.0,
                                  attention_dropout=0.0, apply_residual_connection_post_layernorm=True)  # fmt: skip
    network = gains_apart(AutoModelForCausalLM.from_config(config)).eval()
    block, seen = network.base_model.h[1], []
    with WeMask(0.3, start=1, layers="first", site="ln1_in").applied(network):
        spy = block.self_attention.register_forward_pre_hook(lambda module, args: seen.append(args))
        before, in_training, after = (network.train(mode)(TOKENS).logits for mode in (False, True, False))
        spy.remove()
    torch.testing.assert_close(in_training, before)
    torch.testing.assert_close(after, before)
    for attended, residual in (args[:2] for args in seen):
        assert torch.equal(attended[:, 1:], residual[:, 1:])
        assert not torch.equal(attended[:, 0], residual[:, 0])
    with pytest.raises(MelensError, match="shares ln1 between attention and another part"):
        WeMask(0.3, start=1).install(bridge(network))


@pytest.mark.parametrize("site", ["attn_in", "ln1_in"])
def test_a_normalisation_behind_attention_is_no_ln1(site):
    config = AutoConfig.for_model("openai-gpt", vocab_size=200, n_embd=64, n_layer=3, n_head=4, n_positions=64)
    network = AutoModelForCausalLM.from_config(config).eval()
    for model in (network, bridge(network)):
        with pytest.raises(MelensError, match="attention without a norm ln1 of its own before it"):
            WeMask(0.3, "random", start=1, site=site).install(model)


# --- Files and errors -------------------------------------------------------------------------------------------------


def test_a_saved_mask_comes_back_for_its_model_alone(tmp_path):
    network = model_of("llama")
    mask = WeMask(0.1, "random", start=1, layers=[3, 1], positions=[0, 4], seed=7)
    with pytest.raises(MelensError, match=r"Nothing to save yet: call mask.on\(model\) first"):
        mask.save(tmp_path)
    with mask.applied(network):
        mask.save(tmp_path)
    content = json.loads((tmp_path / "wemask.json").read_text())
    assert content["blocks"] == [1, 3]
    assert content["model"]["architecture"] == "LlamaForCausalLM"
    loaded = WeMask.load(tmp_path)
    assert loaded == mask.on(network)
    assert {layer: dims.tolist() for layer, dims in loaded.dims(network.bfloat16()).items()} == {
        int(layer): dims for layer, dims in content["dims"].items()
    }
    loaded.install(bridge(model_of("llama"))).remove()
    with pytest.raises(MelensError, match="architecture is 'LlamaForCausalLM', this model's is 'Qwen2"):
        loaded.install(model_of("qwen2"))
    other = gains_apart(plain_model("llama"), seed=3)
    other.base_model.layers[2].input_layernorm.weight.data *= 1.1
    with pytest.raises(MelensError, match="weights of ln1 in block"):
        loaded.install(other)
    (tmp_path / "wemask.json").write_text("{}")
    with pytest.raises(MelensError, match="is not a mask that melens saved"):
        WeMask.load(tmp_path)
    with pytest.raises(MelensError, match="There is no mask file"):
        WeMask.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("select", "surely"), [("weight", [5, 6]), ("weight_low", [0, 1, 2])])
def test_of_equal_gains_the_first_are_masked_and_others_can_be_drawn(select, surely):
    network = plain_model("llama")
    gains = torch.tensor([0.2, -0.2, 0.2, *[0.5, -0.5] * 30, 0.5])  # of 64 dims
    gains[[5, 6]] = torch.tensor([2.0, -3.0])
    for block in network.base_model.layers:
        block.input_layernorm.weight.data = gains.clone()
    network.base_model.layers[2].input_layernorm.weight.data = torch.arange(64.0)  # no two alike
    mask = WeMask(0.1, select, start=2)  # 6 dims
    tied = [dim for dim in range(64) if dim not in (0, 1, 2, 5, 6)]
    chosen = mask.dims(network)
    assert chosen[3].tolist() == sorted([*surely, *tied[: 6 - len(surely)]])
    drawn = [mask.with_ties_drawn(network, seed).dims(network) for seed in range(3)]
    for dims in drawn:
        assert torch.equal(dims[2], chosen[2])
        assert set(surely) <= set(dims[3].tolist()) <= {*surely, *tied}
        assert len(dims[3]) == 6
    assert len({tuple(dims[3].tolist()) for dims in drawn}) == 3
    assert WeMask(0.1, select, start=2, layers="first").with_ties_drawn(network, 0) is None
    with pytest.raises(MelensError, match="select=random does not choose by gain"):
        WeMask(0.1, "random", start=2).with_ties_drawn(network, 0)


@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize("select", ["weight", "random"])
def test_a_saved_mask_is_not_that_of_a_model_whose_gains_are_shuffled(tmp_path, spread, select):
    network = plain_model("llama").eval()
    norms = [block.input_layernorm for block in network.base_model.layers]
    generator = torch.Generator().manual_seed(0)
    for norm in norms:
        norm.weight.data = 1 + spread * torch.randn(norm.weight.shape, generator=generator)
    WeMask(0.1, select, start=1).on(network).save(tmp_path)
    loaded = WeMask.load(tmp_path)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        loaded.on(copy.deepcopy(network).to(dtype))
    for layer, norm in enumerate(norms):
        weight = norm.weight.data
        norm.weight.data = weight[torch.randperm(len(weight), generator=generator)]
        with pytest.raises(MelensError, match=f"the weights of ln1 in block {layer} differ"):
            loaded.on(network)
        loaded.moved_to(network).on(network)
        norm.weight.data = weight


def test_a_mask_of_an_earlier_version_is_refused(tmp_path):
    WeMask(0.1, start=1).on(model_of("llama")).save(tmp_path)
    content = json.loads((tmp_path / "wemask.json").read_text())
    content["model"]["gains"] = [1.0 for _ in content["model"].pop("gain_sketches")]
    (tmp_path / "wemask.json").write_text(json.dumps(content))
    with pytest.raises(MelensError, match=r"is from an earlier melens, .*: call mask.on\(model\) and save it again"):
        WeMask.load(tmp_path)


def test_the_me_layer_tells_where_to_start():
    network = model_of("llama")
    with pytest.raises(MelensError, match=r"counted from the ME layer: call mask\.at"):
        WeMask().install(network)
    assert WeMask().at(1).blocks(network) == (2, 3)
    assert WeMask(start="me-1", layers="first").at(1).blocks(network) == (0,)
    assert WeMask(start=0).at(2).start == 0
    with pytest.raises(MelensError, match="before the first block"):
        WeMask(start="me-3").at(1)
    trace = melens.trace(bridge(network), [torch.tensor(row) for row in TOKENS.tolist()])
    with pytest.raises(MelensError, match="no ME layer"):
        WeMask().at(melens.find_me_layer(trace))
    with pytest.raises(MelensError, match="no ME layer"):
        WeMask().at(None)


@pytest.mark.parametrize("layer", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=["int64", "uint8", "tensor"])
def test_an_me_layer_is_an_integer_of_any_kind(layer):
    assert WeMask().at(layer) == WeMask().at(3)
    assert json.dumps(WeMask().at(layer).to_dict()["start"]) == "4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.2}, "The mask's rate is 1.2; it must be a number from 0 to 1."),
        ({"rate": 0.01}, "Rate 0.01 selects 0 of 64 dims; use at least 0.016, or 0 for no mask."),
        ({"rate": True}, "rate is true"),
        ({"select": "wieght"}, "select is 'wieght'; it must be weight, weight_low"),
        ({"site": "mlp"}, "site is 'mlp'; it must be attn_in"),
        ({"start": N_LAYERS}, "no block 4 to mask: its blocks are 0 to 3"),
        ({"start": -1}, "start is -1"),
        ({"start": "you+1"}, "start is 'you\\+1'"),
        ({"layers": [1, 9]}, "no block 9"),
        ({"layers": "some"}, "layers is 'some'"),
        ({"layers": []}, "layers is \\[\\]"),
        ({"positions": "last"}, "positions is 'last'"),
        ({"strength": 0}, "strength is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"select": "massive"}, "select=massive masks massive_dims, which is \\(\\)"),
        ({"select": "massive", "massive_dims": (64,)}, "the model's width is 64"),
    ],
)
def test_what_is_not_allowed_is_told_in_a_sentence(arguments, message):
    network = plain_model("llama")
    with pytest.raises(MelensError, match=message):
        WeMask(**{"start": 1, "select": "random", **arguments}).install(network)
    assert not network.base_model._forward_pre_hooks


@pytest.mark.parametrize("select", [*SELECTS, "batch_magnitude"])
def test_a_rate_of_0_masks_nothing_and_the_least_one_a_single_dim(select):
    network, tokens = plain_model("llama"), torch.randint(10, VOCABULARY, (1, 8))
    plain = network(tokens).logits
    with WeMask(0, select, start=1, massive_dims=(3,)).applied(network):
        assert torch.equal(network(tokens).logits, plain)
    assert [len(dims) for dims in WeMask(0.016, "random", start=1).dims(network).values()] == [1] * (N_LAYERS - 1)


def test_what_cannot_be_masked_is_told_in_a_sentence():
    mask = WeMask(0.1, start=0)
    with pytest.raises(MelensError, match="A Linear cannot be masked"):
        mask.install(torch.nn.Linear(2, 2))
    with pytest.raises(MelensError, match="give the bridge instead"):
        mask.install(bridge(plain_model("llama")).original_model)
    with pytest.raises(MelensError, match="does not know where LlamaModel keeps its blocks"):
        mask.install(plain_model("llama").base_model)
    with pytest.raises(MelensError, match="chooses its dims token by token"):
        WeMask(0.1, "magnitude", start=0).dims(plain_model("llama"))
    with pytest.raises(MelensError, match="refresh"):
        WeMask(0.1, "random", start=0).install(plain_model("llama"), refresh=True)
    config = AutoConfig.for_model("olmo2", vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                  num_attention_heads=4)  # fmt: skip
    after = AutoModelForCausalLM.from_config(config)
    with pytest.raises(MelensError, match="a norm ln1 of its own"):
        mask.install(after)
    WeMask(0.1, "random", start=0, site="resid_pre").install(after).remove()
    with torch.device("meta"):
        offloaded = AutoModelForCausalLM.from_config(config := plain_model("llama").config)
    assert config.model_type == "llama"
    with pytest.raises(MelensError, match="sharded or offloaded"):
        mask.install(offloaded)


@torch.no_grad()
def test_a_mask_that_tells_nothing_about_where_sequences_begin_is_refused():
    network = plain_model("llama")
    with WeMask(0.1, "random", start=1).applied(network):
        with pytest.raises(MelensError, match="attention mask is for 4 tokens"):
            network(TOKENS, attention_mask=torch.ones(2, 4, dtype=torch.long))
        with pytest.raises(MelensError, match="cannot read from an attention mask of this form"):
            network(TOKENS, attention_mask=torch.ones(2, 7, 1))
        whole = network(TOKENS).logits
        allowed = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
        as_float = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        torch.testing.assert_close(network(TOKENS, attention_mask=as_float).logits, whole)
