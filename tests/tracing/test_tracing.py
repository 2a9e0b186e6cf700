"""Every probe against the same quantity from `run_with_cache` on the eager bridge and from transformers itself."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from planted import (
    FALCON,
    FAMILIES,
    GPT2,
    N_LAYERS,
    OTHERS,
    SMALL,
    VOCABULARY,
    bridge,
    gains_apart,
    other_model,
    plain_model,
)

import melens
from melens import MelensError, Probe
from melens.models.twins import plain_twin
from melens.tracing.probes import Batch
from melens.tracing.sites import ATTENTION_ON_KEYS

LENGTHS = (23, 9, 16)


def some_prompts(lengths=LENGTHS, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]


def all_probes(positions=(0, 4)):
    return [
        melens.Norms(("blocks.0.hook_resid_pre", "ln1.hook_out", "ln2.hook_out", "hook_mlp_out", "hook_resid_post")),
        melens.LargestActivations(),
        melens.AbsMedian(),
        melens.TokenVectors(positions),
        melens.SinkMass(),
        melens.SinkByQuery(key=2),
        melens.Importance(key=1, n_tokens=12),
        melens.ImportanceByKey(),
        melens.AttentionOffTokens(),
    ]


def close(actual, expected):
    """Equal to 1e-4 of the largest entry: a small entry of a large vector carries the large ones' rounding."""
    actual, expected = (
        values.double() if isinstance(values, torch.Tensor) else torch.tensor(np.array(values)).double()
        for values in (actual, expected)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * max(1e-3, expected.abs().max().item()))


def rows(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def check_against_cache(trace, prompts, caches, n_layers):
    for prompt, cache in enumerate(caches):
        close(rows(trace["norm"], prompt=prompt, site="hook_resid_pre").norm.to_numpy(),
              cache["blocks.0.hook_resid_pre"][0].norm(dim=-1))  # fmt: skip
        for layer in range(n_layers):
            at = {"prompt": prompt, "layer": layer}
            for site in ("ln1.hook_out", "ln2.hook_out", "hook_mlp_out", "hook_resid_post"):
                expected = cache[f"blocks.{layer}.{site}"][0].norm(dim=-1)
                close(rows(trace["norm"], site=site, **at).norm.to_numpy(), expected)
            hidden = cache[f"blocks.{layer}.hook_resid_post"][0]
            largest = rows(trace["largest"], rank=0, **at).iloc[0]
            position, dim = np.unravel_index(int(hidden.abs().argmax()), hidden.shape)
            assert (largest.pos, largest.dim) == (position, dim)
            close(largest.value, hidden[position, dim].item())
            close(rows(trace["abs_median"], **at).abs_median.item(), hidden.abs().median().item())
            close(trace.tensors["token_vectors"][prompt, layer], hidden[[0, 4]])
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            close(rows(trace["sink_mass"], **at).sink_mass.to_numpy(), pattern[:, 1:, 0].mean(-1))
            close(rows(trace["sink_by_query"], **at).attention.to_numpy(), pattern[:, :, 2].mean(0))
            importance = rows(trace["importance"], **at).importance
            if len(hidden) < 12:
                assert importance.isna().all()
            else:
                close(importance.to_numpy(), pattern[:, 1:12, 1].mean(-1))
            check_every_key(trace, pattern, at)


def check_every_key(trace, pattern, at):
    """Each key's mean over the queries that see it, and what no token gets, from the pattern."""
    importance = pattern.sum(1) / (pattern > 0).sum(1)
    table = rows(trace["importance_by_key"], **at)
    close(table.importance.to_numpy(), importance.mean(0))
    close(table.share_of_heads.to_numpy(), (importance > 0.3).float().mean(0))
    off_tokens = torch.tensor(rows(trace["off_tokens"], **at).off_tokens.to_numpy())
    torch.testing.assert_close(off_tokens, 1 - pattern.sum(-1).mean(-1), rtol=0, atol=1e-5)


@pytest.mark.newest
@pytest.mark.parametrize("family", FAMILIES)
def test_every_probe_equals_run_with_cache(family):
    model = bridge(plain_model(family))
    prompts = some_prompts()
    trace = melens.trace(model, prompts, all_probes())
    with torch.no_grad():
        caches = [model.run_with_cache(prompt[None])[1] for prompt in prompts]
    check_against_cache(trace, prompts, caches, N_LAYERS)


@pytest.mark.parametrize("with_patterns", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_attention_of_other_kinds_equals_run_with_cache(name, with_patterns):
    model = other_model(name)
    prompts = some_prompts((30, 12))
    every_key = [melens.ImportanceByKey(), melens.AttentionOffTokens()]
    probes = [melens.Norms(("hook_resid_post",)), melens.SinkMass(), *every_key]
    entropies = melens.AttentionEntropy()
    entropies.layers = [1]
    trace = melens.trace(model, prompts, [*probes, entropies] if with_patterns else probes)
    with torch.no_grad():
        caches = [model.run_with_cache(prompt[None])[1] for prompt in prompts]
    for prompt, cache in enumerate(caches):
        for layer in range(3):
            at = {"prompt": prompt, "layer": layer}
            close(rows(trace["norm"], **at).norm.to_numpy(), cache[f"blocks.{layer}.hook_resid_post"][0].norm(dim=-1))
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            close(rows(trace["sink_mass"], **at).sink_mass.to_numpy(), pattern[:, 1:, 0].mean(-1))
            check_every_key(trace, pattern, at)
            if with_patterns and layer == 1:
                shares = pattern / pattern.sum(-1, keepdim=True)  # GPT-OSS pays a part to its learned sink
                entropy = -torch.xlogy(shares, shares).sum(-1)[:, 1:].mean(-1)
                close(rows(trace["attention_entropy"], **at).entropy.to_numpy(), entropy)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt_neox", "edit"),
        ("gpt_neox", "replace"),
        ("phi3", "compatibility"),
        ("phi3", "process"),
        ("phi3", "replace the gate"),
        ("phi3", "set data"),
        ("gpt2", "edit"),
        ("gpt2", "compatibility"),
    ],
)
def test_what_is_changed_in_a_bridge_after_a_trace_takes_effect(family, change):
    """The bridge splits joint projections into weights of its own, and folds others in its compatibility mode."""
    config = GPT2 if family == "gpt2" else SMALL
    config = {key: value for key, value in config.items() if (family, key) != ("gpt_neox", "num_key_value_heads")}
    model = melens.load_model("random", model_type=family, config=config)
    with torch.no_grad():
        for name, weight in model.original_model.named_parameters():
            if "norm" in name or "ln_" in name:
                weight.add_(torch.rand_like(weight))  # else there is nothing to fold
    prompts = some_prompts((12,))
    sites = ("ln2.hook_out", "hook_resid_post")
    before = melens.trace(model, prompts, [melens.Norms(sites)])["norm"]
    query = model.blocks[1].attn.q.original_component
    with torch.no_grad():
        if change == "edit":
            query.weight.mul_(3)
        elif change == "replace":
            query.weight = torch.nn.Parameter(3 * query.weight)
        elif change == "set data":
            query.weight.data = 3 * query.weight
        elif change == "replace the gate":
            gate = model.blocks[1].mlp.gate.original_component
            gate.weight = torch.nn.Parameter(3 * gate.weight)
        elif change == "process":
            model.process_weights(fold_ln=True)
        else:
            model.enable_compatibility_mode()
        after = melens.trace(model, prompts, [melens.Norms(sites)])["norm"]
        _, cache = model.run_with_cache(prompts[0][None])
    for site in sites:
        expected = torch.cat([cache[f"blocks.{layer}.{site}"][0].norm(dim=-1) for layer in range(3)])
        close(rows(after, site=site).norm.to_numpy(), expected)
    assert not np.allclose(after.norm, before.norm, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "hook", "other"),
    [
        ("gpt2", "mlp.out.hook_out", None),
        ("gpt2", "attn.o.hook_in", "attn.hook_pattern"),
        ("gpt2", "attn.qkv.hook_out", None),  # which the bridge never calls
        ("gpt_neox", "mlp.out.hook_out", None),
        ("llama", "attn.o.hook_in", "attn.hook_pattern"),
        ("llama", "attn.q.hook_out", "attn.hook_pattern"),
        ("llama", "mlp.gate.hook_out", "mlp.hook_pre"),
    ],
)
def test_a_hook_fires_as_often_as_in_the_bridge(family, hook, other):
    config = GPT2 if family == "gpt2" else SMALL
    config = {key: value for key, value in config.items() if (family, key) != ("gpt_neox", "num_key_value_heads")}
    model = melens.load_model("random", model_type=family, config=config)
    calls = []

    def halve(activation, hook):
        calls.append(hook.name)
        return activation / 2

    hooks = [(f"blocks.1.{hook}", halve)] + ([(f"blocks.1.{other}", lambda activation, hook: None)] if other else [])
    (prompt,) = some_prompts((12,))
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(prompt[None])
        n_calls = len(calls)
        trace = melens.trace(model, [prompt], [melens.Norms(("hook_resid_post",))])["norm"]
    assert len(calls) == 2 * n_calls
    close(rows(trace, layer=2).norm.to_numpy(), cache["blocks.2.hook_resid_post"][0].norm(dim=-1))


def test_a_trace_within_a_trace_is_refused():
    model = bridge(plain_model("llama"))
    prompts = some_prompts((5,))

    class Nested(melens.Probe):
        name, sites = "nested", ("hook_resid_post",)

        def reduce(self, activation, batch):
            melens.trace(model, prompts)

    with pytest.raises(MelensError, match="already, by a trace or a comparison: end that"):
        melens.trace(model, prompts, [Nested()])
    assert len(melens.trace(model, prompts)["norm"]) > 0


def test_every_probe_equals_run_with_cache_on_the_embedded_model(embedded):
    prompts = some_prompts((40, 12), vocabulary=40_000)
    trace = melens.trace(embedded, prompts, all_probes())
    with torch.no_grad():
        caches = [embedded.run_with_cache(prompt[None])[1] for prompt in prompts]
    check_against_cache(trace, prompts, caches, embedded.cfg.n_layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probes_of_the_figures_equal_run_with_cache(family):
    model = bridge(gains_apart(plain_model(family)))
    prompts = some_prompts((23, 20, 16))
    gains = {
        (site, layer): melens.read_normalization(model, layer, site).gain
        for site in ("ln1", "ln2")
        for layer in range(N_LAYERS)
    }
    projections = ("mlp.hook_pre", "mlp.hook_pre_linear", "hook_mlp_out")
    probes = [
        melens.GainAlignment(gains, (0.05, 0.2)),
        melens.Concentration(projections),
        melens.Spectrum(("hook_resid_post", "ln1.hook_out")),
        melens.AttentionSpectrum(),
    ]
    trace = melens.trace(model, prompts, probes)
    with torch.no_grad():
        caches = [model.run_with_cache(prompt[None])[1] for prompt in prompts]
    for prompt, cache in enumerate(caches):
        for layer in range(N_LAYERS):
            at = {"prompt": prompt, "layer": layer}
            for site in ("ln1", "ln2"):
                output, gain = cache[f"blocks.{layer}.{site}.hook_out"][0], gains[site, layer]
                row = rows(trace["gain_alignment"], site=f"{site}.hook_out", **at).iloc[0]
                top = gain.abs().topk(12).indices  # a fifth of 64
                p, g = output**2 / (output**2).sum(-1, keepdim=True), gain**2 / (gain**2).sum()
                expected = {
                    "weight_norm": output.norm(dim=-1),
                    "frac_0.2": (output[:, top] ** 2).sum(-1) / (output**2).sum(-1),
                    "kl": (p * (p / g).log()).sum(-1),
                }
                for name, values in expected.items():
                    close([row[name], row[f"{name}_others"]], [values[0], values[1:].mean()])
            for site in projections:
                share = cache[f"blocks.{layer}.{site}"][0] ** 2
                values = ((share / share.sum(-1, keepdim=True)) ** 2).sum(-1)
                row = rows(trace["concentration"], site=site, **at).iloc[0]
                close([row.concentration, row.concentration_others], [values[0], values[1:].mean()])
            for site in ("hook_resid_post", "ln1.hook_out"):
                spectrum, states = rows(trace["spectrum"], site=site, **at).iloc[0], cache[f"blocks.{layer}.{site}"][0]
                check_ranks(spectrum, torch.linalg.svdvals(states))
                check_ranks(spectrum, torch.linalg.svdvals(states[1:]), "_without_first")
                unit_rows = states / states.norm(dim=-1, keepdim=True)
                check_ranks(spectrum, torch.linalg.svdvals(unit_rows), "_unit_rows")
            of_heads = rows(trace["attention_spectrum"], **at)
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            for head, (_, row) in enumerate(of_heads.iterrows()):
                check_ranks(row, torch.linalg.svdvals(pattern[head]))


def check_ranks(row, singular_values, suffix=""):
    share, energy = (values / values.sum() for values in (singular_values, singular_values**2))
    rank, entropy = (-(share * share.log()).nansum()).exp(), -(energy * energy.log()).nansum()
    found = [row[f"{name}{suffix}"] for name in ("effective_rank", "first_share", "matrix_entropy")]
    close(found, [rank, share[0], entropy / np.log(len(energy))])


def test_one_row_of_enormous_norm_makes_a_spectrum_low_rank_and_its_variants_tell():
    states = torch.eye(6)[None].clone()
    states[0, 0, :2] = 1e6  # at 45 degrees to the next row
    spectrum = melens.Spectrum().reduce(states, Batch(torch.zeros(1, 6, dtype=torch.long), (6,), (0,)))
    close(spectrum["effective_rank"], [1])
    assert spectrum["matrix_entropy"].item() < 1e-4
    close(spectrum["effective_rank_without_first"], [5])
    close(spectrum["matrix_entropy_without_first"], [1])
    values = torch.tensor([(1 + 0.5**0.5) ** 0.5, (1 - 0.5**0.5) ** 0.5, 1, 1, 1, 1])
    check_ranks({name: of[0] for name, of in spectrum.items()}, values.sort(descending=True).values, "_unit_rows")


def test_attention_maps_are_the_patterns_of_the_blocks_asked_for():
    model = bridge(plain_model("llama"))
    (prompt,) = some_prompts((15,))
    maps = melens.trace(model, [prompt], [melens.AttentionMaps([1, 2])]).tensors["attention_maps"]
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt[None])
    close(maps[0], torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"][0] for layer in (1, 2)]))


@pytest.mark.newest
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_sinks_equal_those_of_transformers(family):
    network = plain_model(family)
    prompts = some_prompts()
    trace = melens.trace(bridge(network), prompts)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            output = network(prompt[None], output_hidden_states=True, output_attentions=True)
        for layer in range(N_LAYERS - 1):  # transformers' last hidden state is behind the final norm
            expected = output.hidden_states[layer + 1][0].norm(dim=-1)
            close(rows(trace["norm"], prompt=row, layer=layer, site="hook_resid_post").norm.to_numpy(), expected)
        for layer in range(N_LAYERS):
            expected = output.attentions[layer][0, :, 1:, 0].mean(-1)
            close(rows(trace["sink_mass"], prompt=row, layer=layer).sink_mass.to_numpy(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_one_by_one(family):
    model = bridge(plain_model(family))
    prompts = some_prompts((20, 17, 16))
    together = melens.trace(model, prompts, all_probes())
    apart = melens.trace(model, prompts, all_probes(), max_batch_tokens=1)
    for name in together.tables:
        index = [column for column in together[name] if together[name][column].dtype.kind not in "f"]
        a, b = (trace[name].sort_values([c for c in index if c not in ("pos", "dim") or name != "largest"])
                for trace in (together, apart))  # fmt: skip
        assert len(a) == len(b)
        for column in a.select_dtypes("float"):
            np.testing.assert_allclose(a[column], b[column], rtol=1e-4, atol=1e-6)
    close(together.tensors["token_vectors"], apart.tensors["token_vectors"])


def test_other_hooks_fire_and_take_effect_while_tracing():
    model = bridge(plain_model("llama"))
    prompts = some_prompts((12,))
    seen = []

    def listen(activation, hook):
        seen.append(hook.name)

    def silence(activation, hook):
        seen.append(hook.name)
        return torch.zeros_like(activation)

    listened = ("blocks.2.attn.hook_q", "blocks.3.attn.hook_pattern", "blocks.0.ln1.hook_scale")
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_out", silence), *((name, listen) for name in listened)]):
        trace = melens.trace(model, prompts, [melens.Norms(), melens.SinkMass()])
    assert len(seen) == 4
    assert rows(trace["norm"], layer=1, site="hook_mlp_out").norm.max() == 0
    assert rows(trace["norm"], layer=2, site="hook_mlp_out").norm.min() > 0
    assert sorted(trace["sink_mass"].layer.unique()) == list(range(N_LAYERS))


def state_of(model):
    """Everything that a trace touches: modules in place, their hooks, the attention implementation."""
    return (
        [(name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in module.__dict__)
         for name, module in model.original_model.named_modules()],
        [name for name, hook in model.hook_dict.items() if hook.has_hooks()],
        model.original_model.config._attn_implementation,
    )  # fmt: skip


class Raises(Probe):
    name = "raises"
    index = ("pos",)

    def __init__(self, site):
        self.sites = (site,)
        self.keys = (0,)

    def reduce(self, activation, batch):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("site", ["hook_resid_post", "attn.hook_pattern", "ln2.hook_scale", ATTENTION_ON_KEYS])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_probe_that_raises_leaves_the_model_as_it_was(family, site):
    model = bridge(plain_model(family))
    prompts = some_prompts((8,))
    model.run_with_cache(prompts[0][None])  # the bridge wires hooks of its own at its first run
    before, norms = state_of(model), melens.trace(model, prompts, [melens.Norms()])["norm"]
    with pytest.raises(RuntimeError, match="on purpose"):
        melens.trace(model, prompts, [melens.Norms(), Raises(site)])
    assert state_of(model) == before
    assert norms.equals(melens.trace(model, prompts, [melens.Norms()])["norm"])


def test_a_hook_that_raises_leaves_the_model_as_it_was():
    model = bridge(plain_model("qwen3"))
    before = state_of(model)

    def raises(activation, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", raises)]):
        melens.trace(model, some_prompts((8,)))
    assert state_of(model) == before


@pytest.mark.parametrize("path", ["mlp", "attn", "ln2", "attn.q"])
def test_pytorchs_own_hooks_on_components_take_effect_too(path):
    model = bridge(plain_model("llama"))
    prompts = some_prompts((12,))
    model.run_with_cache(prompts[0][None])  # the bridge wires hooks of its own at its first run
    plain = melens.trace(model, prompts, [melens.Norms()])["norm"].norm
    component = model.blocks[1].get_submodule(path)
    handle = component.register_forward_hook(lambda module, args, output: (
        (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0
    ))  # fmt: skip
    assert not np.allclose(melens.trace(model, prompts, [melens.Norms()])["norm"].norm, plain)
    handle.remove()
    assert np.allclose(melens.trace(model, prompts, [melens.Norms()])["norm"].norm, plain)


def test_blocks_that_reach_into_their_components_keep_them():
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 4, "pad_token_id": 0, "residual_multiplier": 0.5}  # fmt: skip
    model = melens.load_model("random", model_type="granite", config=config)
    (prompt,) = some_prompts((12,))
    table = melens.trace(model, [prompt], [melens.Norms(("hook_mlp_out",))])["norm"]
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt[None])
    close(rows(table, layer=1).norm.to_numpy(), cache["blocks.1.hook_mlp_out"][0].norm(dim=-1))


class OnKeys(Probe):
    name = "on_keys"
    sites = (ATTENTION_ON_KEYS,)
    index = ("head", "query", "key")
    kind = "tensor"

    def __init__(self, keys):
        self.keys = keys

    def reduce(self, activation, batch):
        return {"attention": activation.clone()}


@pytest.mark.parametrize("keys", [(1, 4), (4, 1), (4, 4)])
def test_attention_on_keys_comes_in_the_order_in_which_a_probe_names_them(keys):
    model = bridge(plain_model("llama"))
    prompts = some_prompts((8,))
    _, cache = model.run_with_cache(prompts[0][None])
    found = melens.trace(model, prompts, [OnKeys(keys)]).tensors["on_keys"]
    close(found[0, 1], cache["blocks.1.attn.hook_pattern"][0][..., list(keys)])


def test_a_key_behind_the_end_of_a_prompt_is_missing():
    model = bridge(plain_model("llama"))
    table = melens.trace(model, some_prompts((30, 8)), [melens.SinkMass(key=10)])["sink_mass"]
    assert rows(table, prompt=0).sink_mass.notna().all()
    assert rows(table, prompt=1).sink_mass.isna().all()


def test_a_probe_may_return_half_precision():
    class Mean(Probe):
        name = "mean"
        sites = ("hook_resid_post",)
        index = ("pos",)

        def reduce(self, activation, batch):
            return {"mean": activation.mean(-1).bfloat16()}

    assert melens.trace(bridge(plain_model("llama")), some_prompts(), [Mean()])["mean"]["mean"].notna().all()


@pytest.mark.parametrize("beside", ["thesis.txt", "model.json", "config.json"])
def test_saving_replaces_no_folder_of_the_users(tmp_path, beside):
    trace = melens.trace(bridge(plain_model("llama")), some_prompts())
    (tmp_path / "model.json").write_text("{}")  # of somebody's model
    (tmp_path / beside).write_text("three years")
    with pytest.raises(MelensError, match="no part of a saved trace, so it is not replaced: save into"):
        trace.save(tmp_path)
    assert (tmp_path / beside).read_text() == "three years"
    for not_ours in (
        '["model.json"]',
        '{"written_by": "somebody", "files": ["model.json", "thesis.txt", "config.json"]}',
    ):
        (tmp_path / "melens_trace.json").write_text(not_ours)
        with pytest.raises(MelensError, match="is not replaced"):
            trace.save(tmp_path)
    with pytest.raises(MelensError, match="is a file"):
        trace.save(tmp_path / beside)
    assert (tmp_path / beside).read_text() == "three years"


def test_a_note_beside_a_saved_trace_is_not_removed_with_it(tmp_path):
    trace = melens.trace(bridge(plain_model("llama")), some_prompts())
    trace.save(tmp_path)
    (tmp_path / "notes.md").write_text("three years")
    with pytest.raises(MelensError, match=r"holds 'notes.md'"):
        trace.save(tmp_path)
    assert (tmp_path / "notes.md").read_text() == "three years"


def test_a_kept_trace_stays_where_another_was_faster(tmp_path):
    first, second = (melens.trace(bridge(plain_model("llama", seed)), some_prompts()) for seed in (0, 1))
    first.save(tmp_path / "trace", replace=False)
    files = {path.name: path.stat().st_ino for path in (tmp_path / "trace").iterdir()}
    second.save(tmp_path / "trace", replace=False)
    assert {path.name: path.stat().st_ino for path in (tmp_path / "trace").iterdir()} == files
    second.save(tmp_path / "trace")
    assert melens.Trace.load(tmp_path / "trace")["norm"].equals(second["norm"])
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_a_probe_of_ten_lines():
    class MeanAbs(Probe):
        name = "mean_abs"
        sites = ("hook_resid_post",)
        index = ("pos",)
        layers = (1, 3)

        def reduce(self, activation, batch):
            return {"mean_abs": activation.abs().mean(-1)}

    table = melens.trace(bridge(plain_model("llama")), some_prompts(), [MeanAbs()])["mean_abs"]
    assert list(table) == ["prompt", "layer", "site", "pos", "mean_abs"]
    assert sorted(table.layer.unique()) == [1, 3]
    assert len(table) == 2 * sum(LENGTHS)


@pytest.mark.parametrize(
    ("model_type", "lacks"),
    [
        ("olmo2", {"ln2.hook_out"}),
        ("phi", {"ln2.hook_out"}),
        ("mamba", {"ln2.hook_out", "hook_mlp_out", "sink_mass"}),
        ("gpt2", set()),
        ("mixtral", set()),
    ],
)
def test_default_probes_leave_out_what_a_model_lacks(model_type, lacks):
    heads = {} if model_type == "mamba" else {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, **heads}
    if model_type == "gpt2":
        config = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
    trace = melens.trace(melens.load_model("random", model_type=model_type, config=config), some_prompts())
    everything = {"norm", "largest", "abs_median", "sink_mass"}
    everything |= {"hook_resid_pre", "ln2.hook_out", "hook_mlp_out", "hook_resid_post"}
    assert {*trace.tables, *trace["norm"].site.unique()} == everything - lacks
    assert melens.find_me_layer(trace).layer is None


def test_a_probe_that_asks_for_the_block_gets_each_by_itself():
    class Layers(Probe):
        name, sites, by_row = "layers", ("hook_resid_post",), True

        def reduce(self, activation, batch):
            return {"at": torch.zeros(len(activation))}

        def reduce_at(self, site, layer, activation, batch):
            return {"at": torch.full((len(activation),), float(layer))}

    table = melens.trace(bridge(plain_model("llama")), some_prompts(), [Layers()])["layers"]
    assert (table["at"] == table["layer"]).all()


def test_a_probe_made_of_another_reduces_each_block_by_itself():
    class Centred(melens.Norms):
        def reduce(self, activation, batch):
            norms = activation.norm(dim=-1)
            return {"norm": norms - norms.mean()}

    table = melens.trace(bridge(plain_model("llama")), some_prompts((9,)), [Centred(("hook_mlp_out",))])["norm"]
    assert table.groupby("layer")["norm"].mean().abs().max() < 1e-4


def test_a_trace_holds_what_its_probe_was_and_saw():
    class Entry(Probe):
        name, sites, index = "entry", ("blocks.1.hook_resid_post",), ("pos",)

        def reduce(self, activation, batch):
            seen.append(activation)
            return {"entry": activation[..., 5]}

    seen, probe, largest = [], Entry(), melens.LargestActivations(n_tokens=1, min_abs=0.1)
    # the check of types looks at the first table, which is made then
    trace = melens.trace(bridge(plain_model("llama")), some_prompts((9,)), [melens.Norms(), probe, largest])
    before = seen[0][0, :, 5].tolist()
    seen[0].zero_()
    probe.name, largest.min_abs = "other", 1e6
    assert trace["entry"]["entry"].tolist() == before
    assert trace["largest"]["rank"].max() == 15  # eight dims of one token, and the eight other tokens


def test_logits_are_computed_when_a_probe_listens_to_them():
    class Top(Probe):
        name = "top"
        sites = ("unembed.hook_out",)
        index = ("pos",)

        def reduce(self, activation, batch):
            return {"token": activation.argmax(-1)}

    network = plain_model("qwen2")
    (prompt,) = some_prompts((15,))
    with torch.no_grad():
        expected = network(prompt[None]).logits[0].argmax(-1)
    assert melens.trace(bridge(network), [prompt], [Top()])["top"].token.tolist() == expected.tolist()


class Total(Probe):
    """Has a dimension less than its index says."""

    name = "total"
    sites = ("hook_resid_post",)
    index = ("pos",)

    def reduce(self, activation, batch):
        return {"total": activation.sum((1, 2))}


class ByHead(Probe):
    """Finds fewer heads of keys than of queries."""

    name = "by_head"
    sites = ("attn.hook_q", "attn.hook_k")
    index = ("pos", "head")

    def reduce(self, activation, batch):
        return {"norm": activation.norm(dim=-1)}


def test_two_probes_of_one_class_are_traced_together():
    model, prompts = bridge(plain_model("llama")), some_prompts()
    probes = [melens.Norms(("ln1.hook_out",)), melens.Norms(("ln2.hook_out",)).named("norm_2")]
    both = melens.trace(model, prompts, probes)
    for name, site in (("norm", "ln1.hook_out"), ("norm_2", "ln2.hook_out")):
        alone = melens.trace(model, prompts, [melens.Norms((site,))])["norm"]
        assert both[name].equals(alone)


def test_negative_positions_count_from_each_prompts_own_end():
    model, prompts = bridge(plain_model("llama")), some_prompts()
    probe = melens.TokenVectors((0, -1, -12))
    vectors = melens.trace(model, prompts, [probe]).tensors["token_vectors"]
    for row, prompt in enumerate(prompts):
        alone = melens.trace(model, [prompt], [melens.TokenVectors((0, len(prompt) - 1))]).tensors["token_vectors"][0]
        close(vectors[row, :, :2], alone)
    assert torch.isnan(vectors[1, :, 2]).all()  # of nine tokens
    assert torch.isfinite(vectors[[0, 2], :, 2]).all()


@torch.no_grad()
def test_attention_that_calls_no_attention_function_stays_as_it_is():
    model = melens.load_model("random", model_type="falcon", config=FALCON)
    network = plain_twin(model)
    prompts = some_prompts((30, 19))
    trace = melens.trace(model, prompts, [melens.Norms(("hook_resid_post",)), melens.SinkMass()])
    for prompt, ids in enumerate(prompts):
        network.config._attn_implementation = "eager"
        seen = network(ids[None], output_attentions=True, output_hidden_states=True)
        states, attentions = seen.hidden_states[1:-1], seen.attentions[:-1]  # the last state is normalised
        for layer, (state, attention) in enumerate(zip(states, attentions, strict=True)):
            close(rows(trace["norm"], prompt=prompt, layer=layer).norm.to_numpy(), state[0].norm(dim=-1))
            sinks = rows(trace["sink_mass"], prompt=prompt, layer=layer).sink_mass.to_numpy()
            close(sinks, attention[0, :, 1:, 0].mean(-1))


def add_adapter(model):
    config = LoraConfig(r=4, target_modules=["down_proj._original_component"], init_lora_weights=False)
    inject_adapter_in_model(config, model.original_model)


def set_another_projection(model):
    projection = copy.deepcopy(model.blocks[1].mlp.out.original_component)
    projection.weight.data *= 2
    model.blocks[1].mlp.out.set_original_component(projection)


def override_forward(model):
    projection = model.blocks[1].mlp.out  # a bridge hands what is set on a component on to its module
    own = projection.original_component.forward
    projection.forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)


def override_components_forward(model):
    attention = model.blocks[1].attn
    own = attention.forward

    def doubled(*args, **kwargs):
        output, *rest = own(*args, **kwargs)
        return 2 * output, *rest

    vars(attention)["forward"] = doubled


def put_in_a_class_of_ones_own(model):
    class Doubled(type(model.blocks[1].attn)):
        def forward(self, *args, **kwargs):
            output, *rest = super().forward(*args, **kwargs)
            return 2 * output, *rest

    model.blocks[1].attn.__class__ = Doubled


@pytest.mark.parametrize(
    "change",
    [add_adapter, set_another_projection, override_forward, override_components_forward, put_in_a_class_of_ones_own],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("is_traced_before", [True, False])
def test_what_is_changed_in_a_model_is_what_a_trace_sees(change, is_traced_before):
    model, (prompt,) = bridge(plain_model("llama")), some_prompts((15,))

    def norms():
        return melens.trace(model, [prompt], [melens.Norms(("hook_resid_post",))])["norm"]

    before = norms() if is_traced_before else None
    change(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt[None])
    after = norms()
    for layer in range(N_LAYERS):
        close(rows(after, layer=layer).norm.to_numpy(), cache[f"blocks.{layer}.hook_resid_post"][0].norm(dim=-1))
    if before is not None:
        assert (rows(after, layer=1).norm / rows(before, layer=1).norm - 1).abs().max() > 0.01


def test_a_trace_survives_saving(tmp_path):
    trace = melens.trace(bridge(plain_model("llama")), some_prompts())
    trace.save(tmp_path / "trace")
    trace.save(tmp_path / "trace")  # over an existing one
    loaded = melens.Trace.load(tmp_path / "trace")
    assert loaded.model == trace.model
    assert loaded.prompts.equals(trace.prompts)
    assert set(loaded.tables) == set(trace.tables)
    assert all(loaded[name].equals(trace[name]) for name in trace.tables)
    assert torch.equal(loaded.tensors["token_vectors"], trace.tensors["token_vectors"])
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: melens.trace(model, []), "at least one prompt"),
        (lambda model: melens.trace(model, ["a text"]), "no tokenizer"),
        (lambda model: melens.trace(model, some_prompts(), [melens.Norms(), melens.Norms()]), r"named\('norm_2'\)"),
        (lambda model: melens.trace(model, some_prompts(), [melens.Norms(("attn.hook_v",))]), "name each dimension"),
        (lambda model: melens.trace(model, some_prompts(), [Total()]), "name each dimension"),
        (
            lambda model: melens.trace(model, some_prompts(), [ByHead()]),
            "trace these sites with a probe each",
        ),
        (lambda model: melens.trace(model, some_prompts(), [melens.Norms(("hook_nope",))]), "'hook_nope'"),
        (lambda model: melens.trace(model, some_prompts(), max_batch_tokens=0), "at least 1"),
        (lambda model: melens.trace(model, some_prompts())["nope"], "no table 'nope'"),
        (lambda model: melens.trace(model, [torch.tensor([5])]), "1 token"),
        (
            lambda model: melens.trace(model, [torch.ones(200, dtype=torch.long)]),
            "more than the model's context of 128",
        ),
        (lambda model: melens.trace(model, [torch.tensor([5, 999])]), "outside the vocabulary"),
        (lambda model: melens.trace(model, [torch.tensor([5.0, 9.0])]), "whole numbers"),
        (lambda model: melens.trace(model, some_prompts(), [melens.Norms(layers=(9,))]), "0 to 3"),
        (lambda model: melens.SinkMass(key=-1), "at least 0"),
        (lambda model: melens.Trace.load("/nonexistent"), "no saved trace"),
    ],
)
def test_mistakes_are_told_in_a_sentence(call, message):
    with pytest.raises(MelensError, match=message):
        call(bridge(plain_model("llama")))
