"""Every ablation against plain PyTorch: forward hooks on a transformers model, no TransformerLens, nothing replayed."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import get_args

import pytest
import torch
from planted import FAMILIES, LONGROPE, N_LAYERS, VOCABULARY, bridge, gains_apart, plain_model, plant

import melens
from melens import MassiveTokenRuns, MelensError, WeMask
from melens.tracing import interventions
from melens.tracing.batching import BatchRule
from melens.tracing.interventions import Part, ablation
from melens.tracing.twin import Twin

PARTS = get_args(Part)
TOKENS = torch.randint(1, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
POSITIONS = [0, 2, 1]


@contextmanager
def plain_ablation(network, family, layer, part):
    """Do to a transformers model what the ablation of the same name says."""
    block = network.base_model.layers[layer]
    norm = block.pre_feedforward_layernorm if family == "gemma3" else block.post_attention_layernorm
    gain = norm.weight + 1 if family == "gemma3" else norm.weight

    def zero(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    def other_norm(module, args, output):
        (h,) = args
        if part == "ln2_identity":
            return h
        if part == "ln2_no_norm":
            return gain * h
        epsilon = norm.eps if family == "gemma3" else norm.variance_epsilon
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)

    target, hook = {"ffn": (block.mlp, zero), "attention": (block.self_attn, zero)}.get(part, (norm, other_norm))
    with ExitStack() as stack:
        stack.callback(target.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def plain_norms(network, tokens=TOKENS, positions=POSITIONS):
    """‖h‖ of each prompt's token after each block but the last, which transformers puts through the final norm."""
    states = network(tokens, output_hidden_states=True).hidden_states[1:-1]
    return torch.stack([state[torch.arange(len(positions)), positions].norm(dim=-1) for state in states], dim=1)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_ablation_equals_plain_pytorch(family, part):
    network = gains_apart(plain_model(family))
    model = bridge(network)
    runs = MassiveTokenRuns(model, TOKENS.tolist(), POSITIONS)
    torch.testing.assert_close(runs.intact[:, :-1], plain_norms(network), rtol=1e-4, atol=1e-4)
    for layer in range(N_LAYERS):
        with plain_ablation(network, family, layer, part):
            expected = plain_norms(network)
        replayed = runs.run(ablation(model, layer, part), start=layer)
        torch.testing.assert_close(replayed[:, layer:-1], expected[:, layer:], rtol=1e-3, atol=1e-4)
        assert replayed[:, :layer].isnan().all()
        if layer < N_LAYERS - 1:
            assert not torch.allclose(replayed[:, layer:], runs.intact[:, layer:], rtol=1e-3)


@pytest.mark.parametrize("part", PARTS)
def test_a_trace_sees_the_ablated_model_and_afterwards_the_intact_one(part):
    network = gains_apart(plain_model("qwen3"))
    model = bridge(network)
    with melens.ablated(model, (1, part)):
        table = melens.trace(model, [TOKENS[0]])["norm"]
    with plain_ablation(network, "qwen3", 1, part):
        expected = plain_norms(network, TOKENS[:1], [0])
    at_first = table[(table.site == "hook_resid_post") & (table.pos == 0)].norm.to_numpy()
    torch.testing.assert_close(torch.tensor(at_first[:-1]), expected[0], rtol=1e-3, atol=1e-4)
    after = MassiveTokenRuns(model, TOKENS.tolist(), POSITIONS).intact
    torch.testing.assert_close(after[:, :-1], plain_norms(network), rtol=1e-4, atol=1e-4)


def test_a_run_evaluates_only_the_blocks_from_the_change_on():
    model = bridge(plain_model("llama"))
    runs = MassiveTokenRuns(model, TOKENS.tolist(), POSITIONS)
    before = runs.block_evaluations
    calls = []
    handles = [block.mlp.original_component.register_forward_hook(lambda *_: calls.append(1)) for block in model.blocks]
    runs.run(ablation(model, 2, "ffn"), start=2)
    for handle in handles:
        handle.remove()
    assert len(calls) == runs.block_evaluations - before == N_LAYERS - 2


def test_a_run_that_raises_leaves_the_model_as_it_was():
    model = bridge(plain_model("llama"))
    runs = MassiveTokenRuns(model, TOKENS.tolist(), POSITIONS)

    def raises(h, hook):
        raise RuntimeError("in the hook")

    with pytest.raises(RuntimeError, match="in the hook"):
        runs.run([("blocks.2.hook_mlp_out", raises)], start=2)
    assert not any("forward" in block.original_component.__dict__ for block in model.blocks)
    torch.testing.assert_close(runs.run(), runs.intact)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("most_tokens", "n_passes"), [(4096, 1), (2 * 9, 3)])
def test_changes_that_share_a_forward_pass_are_each_as_alone(family, most_tokens, n_passes, monkeypatch):
    model = bridge(gains_apart(plain_model(family)))
    runs = MassiveTokenRuns(model, TOKENS.tolist(), POSITIONS)  # 3 prompts of up to 3 tokens
    values = torch.randn(runs.ffn[2].shape, generator=torch.Generator().manual_seed(1))
    changes = [*(ablation(model, 2, part) for part in PARTS[:4]), [runs.patch_ffn(2, values)]]
    alone = [runs.run(hooks, start=2) for hooks in changes]
    before, passes = runs.block_evaluations, []
    monkeypatch.setattr(interventions, "_MOST_TOKENS", most_tokens)
    handle = model.blocks[2].original_component.register_forward_hook(lambda *_: passes.append(1))
    for together, of_one in zip(runs.run_each(changes, start=2), alone, strict=True):
        torch.testing.assert_close(together, of_one, equal_nan=True)
    handle.remove()
    assert len(passes) == n_passes
    assert runs.block_evaluations - before == len(changes) * (N_LAYERS - 2)


def test_changes_of_prompts_that_must_run_alone_share_no_forward_pass():
    model = bridge(plain_model("llama"))
    runs = MassiveTokenRuns(model, TOKENS[:1].tolist(), POSITIONS[:1])
    runs._verified, passes = replace(runs._verified, rule=BatchRule(alone=True)), []
    model.blocks[2].original_component.register_forward_hook(lambda *_: passes.append(1))
    runs.run_each([[], []], start=2)
    assert len(passes) == 2


def test_runs_that_start_at_any_block_share_the_bridges_twin(monkeypatch):
    """To make one takes as long as several blocks of a few tokens."""
    model = bridge(plain_model("llama"))
    runs = MassiveTokenRuns(model, TOKENS.tolist(), POSITIONS)
    monkeypatch.setattr(Twin, "__init__", lambda *_: pytest.fail("The twin was made anew."))
    for start in range(N_LAYERS):
        runs.run(ablation(model, start, "ffn"), start=start)


def test_blocks_that_return_what_was_recorded_have_nothing_to_mask():
    model = bridge(plain_model("llama"))
    with WeMask(0.3, start=1).applied(model):
        runs = MassiveTokenRuns(model, TOKENS.tolist(), POSITIONS)
        hooks = ablation(model, 3, "ffn")
        torch.testing.assert_close(runs.run(hooks, start=3)[:, 3], runs.run(hooks)[:, 3])


def test_restoring_the_planted_ffn_output_restores_the_massive_activation():
    network = plain_model("llama")
    plant(network, block=2, token=7, dim=5)
    model = bridge(network)
    tokens = [[7, 11, 12], [7, 13, 14]]
    runs = MassiveTokenRuns(model, tokens, [0, 0])
    without = ablation(model, 2, "ffn")
    removed = runs.run(without, start=2)
    assert (removed[:, 2:] < 0.1 * runs.intact[:, 2:]).all()
    restored = runs.run([*without, runs.patch_ffn(2, runs.ffn[2])], start=2)
    torch.testing.assert_close(restored[:, 2:], runs.intact[:, 2:])
    carried = runs.run([runs.patch_ffn(2, torch.zeros_like(runs.ffn[2]))], start=2)
    torch.testing.assert_close(carried[:, 2:], removed[:, 2:])


def test_mistakes_are_told():
    model = bridge(plain_model("llama"))
    with pytest.raises(MelensError, match="part is 'nope'; it must be ffn, attention"):
        ablation(model, 0, "nope")
    with pytest.raises(MelensError, match="no block 4"):
        ablation(model, 4, "ffn")
    with pytest.raises(MelensError, match="beyond its prompt"):
        MassiveTokenRuns(model, [[1, 2]], [2])
    mamba = melens.load_model("random", model_type="mamba", config={"hidden_size": 32, "num_hidden_layers": 1})
    with pytest.raises(MelensError, match="Block 0 of this model has no part 'attention'"):
        ablation(mamba, 0, "attention")


def test_prompts_whose_cut_would_change_them_are_run_whole(monkeypatch):
    """Beyond 24 tokens this model turns its keys by other angles, also token 3's."""
    model = melens.load_model("random", model_type="phi3", config=LONGROPE)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 199, (length,), generator=generator) for length in (40, 30, 10)]
    at = [3, 5, 2]
    table = melens.trace(model, prompts)["norm"].query("site == 'hook_resid_post'")
    norms = torch.tensor(
        [table[(table["prompt"] == row) & (table["pos"] == pos)]["norm"].tolist() for row, pos in enumerate(at)]
    )
    tokens = [prompt.tolist() for prompt in prompts]
    cut, whole = MassiveTokenRuns(model, tokens, at), MassiveTokenRuns(model, tokens, at, norms)
    assert (cut.is_cut, whole.is_cut) == (True, False)
    assert not torch.allclose(cut.intact[:2], norms[:2], rtol=1e-3)
    torch.testing.assert_close(whole.intact, norms, rtol=1e-4, atol=0)
    hooks = ablation(model, 1, "ffn")
    replayed, anew = whole.run(hooks, start=1), whole.run(hooks)
    torch.testing.assert_close(replayed[:, 1:], anew[:, 1:])
    with pytest.raises(MelensError, match="not those of the trace"):
        MassiveTokenRuns(model, tokens, at, norms + 1)


def test_prompts_of_several_lengths_are_each_as_alone():
    model = bridge(plain_model("gemma3"))
    tokens = [ids[:length] for ids, length in zip(TOKENS.tolist(), (3, 6, 8), strict=False)]
    at = [2, 4, 1][: len(tokens)]
    runs = MassiveTokenRuns(model, tokens, at)
    for row, (ids, position) in enumerate(zip(tokens, at, strict=True)):
        alone = MassiveTokenRuns(model, [ids], [position])
        torch.testing.assert_close(runs.intact[row], alone.intact[0], rtol=1e-5, atol=1e-5)
