"""Hybrids: attention and FFNs are measured in the blocks that have them, and said to be nowhere else."""

from typing import Any

import planted
import pytest
import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.supported_architectures.zamba2 import Zamba2ArchitectureAdapter
from transformers import AutoConfig, AutoModelForCausalLM

import melens
from experiments.options import compose_options
from experiments.runner.study import begin_study, run_experiments
from melens.masks.comparison import MaskComparison
from melens.models.layout import Layout, listed
from melens.models.twins import plain_twin
from melens.models.view import view_model
from melens.tracing.attention import uses_attention_function

SIZES: dict[str, Any] = planted.SMALL | {"num_hidden_layers": 4}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_expand": 2}
_DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16}
_DELTA_NET |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _types(recurrent: str, attention: str = "full_attention") -> dict[str, Any]:
    return {"layer_types": [recurrent, attention, recurrent, attention]}


CONFIGS: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 32,
        "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16, "head_dim": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
        "n_group": 1, "topk_group": 1,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 16, "mamba_ngroups": 1,
        "n_mamba_heads": 4, "mamba_headdim": 32, "chunk_size": 16, "num_mem_blocks": 1, "adapter_rank": 4,
        "num_key_value_heads": 4, "attention_head_dim": 32, "attention_hidden_size": 128, "hybrid_layer_ids": [1, 3],
    },
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 16, "head_dim": 16,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_groups": 1, **_MAMBA2},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "granitemoehybrid": {
        **_types("mamba", "attention"), **_MAMBA2, "num_local_experts": 0, "shared_intermediate_size": 96,
        "position_embedding_type": "rope",
    },
    "lfm2": _types("conv"),
    "lfm2_moe": _types("conv") | _EXPERTS | {"num_dense_layers": 1},
    "qwen3_next": _types("linear_attention") | _DELTA_NET | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": _types("linear_attention") | _DELTA_NET,
    "olmo_hybrid": _types("linear_attention") | _DELTA_NET,
}  # fmt: skip
ATTENTION = {"nemotron_h": (2,), "falcon_h1": (0, 1, 2, 3)}
"""Blocks with attention, where they are not 1 and 3."""
FFN = {"nemotron_h": (1, 3), "zamba2": ()}
"""Blocks with an FFN that can be heard, where they are not all."""


def hybrid(model_type: str) -> tuple[Any, Any]:
    """A bridge of a small random model, and transformers' own on the same weights, in eager attention."""
    options = SIZES | CONFIGS[model_type]
    if model_type == "recurrent_gemma":
        del options["max_position_embeddings"]
    config = AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, inside = (AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval() for _ in "12")
    inside.load_state_dict(plain.state_dict())
    return planted.bridge(inside), plain


@pytest.mark.parametrize("model_type", CONFIGS)
def test_sinks_are_measured_in_the_blocks_with_attention(model_type):
    bridge, plain = hybrid(model_type)
    layout = Layout.of(bridge)
    assert layout.attention == ATTENTION.get(model_type, (1, 3))
    assert layout.ffn == FFN.get(model_type, (0, 1, 2, 3))
    assert (layout.unnamed_attention, layout.unnamed_ffn) == ((), (1, 3) if model_type == "zamba2" else ())
    if model_type == "recurrent_gemma" and not uses_attention_function(plain.model.layers[1].temporal_block):
        pytest.skip("This transformers computes RecurrentGemma's attention without telling its pattern.")
    tokens = torch.arange(10, 22)
    trace = melens.trace(bridge, [tokens], [melens.SinkMass(), melens.Norms(("hook_resid_post",))])
    with torch.no_grad():
        seen = plain(tokens[None], use_cache=False, output_attentions=True, output_hidden_states=True)
    patterns = [pattern for pattern in seen.attentions if pattern is not None]
    expected = torch.stack([pattern[0, :, 1:, 0].mean(-1) for pattern in patterns])
    table = trace["sink_mass"].pivot(index="layer", columns="head", values="sink_mass")
    assert tuple(table.index) == layout.attention
    torch.testing.assert_close(torch.tensor(table.to_numpy()).float(), expected, rtol=1e-4, atol=1e-5)
    assert trace.model["verified"]["unchecked_sites"] == []
    assert trace.model["verified"]["way"] == "fast"


@pytest.mark.parametrize("model_type", ["nemotron_h", "zamba2", "recurrent_gemma"])
def test_a_bridge_and_a_plain_model_have_attention_in_the_same_blocks(model_type):
    bridge, plain = hybrid(model_type)
    for network in (view_model(bridge), view_model(plain)):
        attending = [layer for layer, block in enumerate(network.blocks) if block.attention is not None]
        assert tuple(attending) == Layout.of(bridge).attention
        assert all(type(network.blocks[layer].query).__name__ == "Linear" for layer in attending)
    maskable = [layer for layer in attending if view_model(plain).can_mask_attention(layer)]
    assert maskable == ([] if model_type == "zamba2" else attending)  # whose attention reads another norm


@pytest.mark.parametrize("model_type", ["nemotron_h", "recurrent_gemma"])
def test_a_mask_on_a_hybrid_changes_the_same_on_either_kind_of_model(model_type):
    bridge, plain = hybrid(model_type)
    tokens, mask = torch.arange(10, 22)[None], melens.WeMask(0.1, "random", start=0)
    masked = []
    for model in (bridge, plain):
        with mask.applied(model), torch.no_grad():
            masked.append(getattr(output := model(tokens), "logits", output))
    torch.testing.assert_close(*masked, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(plain(tokens).logits, masked[1], atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "mask", "sentence"),
    [
        (
            "nemotron_h",
            {"start": 0, "layers": "first"},
            "Block 0 has no attention, so site=attn_in cannot mask it; site=resid_pre can",
        ),
        ("nemotron_h", {"layers": [1, 2]}, "Block 1 has no attention"),
        ("zamba2", {"start": 0}, "Block 1 has attention without a norm ln1 of its own before it"),
    ],
)
def test_where_a_mask_on_attention_has_no_place_it_is_said_why(model_type, mask, sentence):
    bridge, plain = hybrid(model_type)
    for model in (bridge, plain):
        with pytest.raises(melens.MelensError, match=sentence):
            melens.WeMask(**mask).on(model)


def test_a_probe_on_blocks_without_attention_is_told_where_there_is_some():
    bridge, _ = hybrid("nemotron_h")
    with pytest.raises(melens.MelensError, match=r"at 'attn.hook_pattern' in block 0; this model has it in block 2\."):
        melens.trace(bridge, [[1, 2, 3]], melens.AttentionMaps(0))
    maps = melens.trace(bridge, [[1, 2, 3]], melens.AttentionMaps(2)).tensors["attention_maps"]
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 1, 4, 3))


def test_masks_behind_the_last_attention_are_compared_by_their_loss():
    bridge, _ = hybrid("nemotron_h")  # whose block 2 alone attends
    texts = torch.arange(10, 30).reshape(2, 10)
    comparison = MaskComparison(bridge, texts, starts=[0, 3])
    behind = comparison.measure(melens.WeMask(0.5, "random", site="resid_pre", start=3))
    assert (behind.loss != comparison.unmasked.loss).all()
    torch.testing.assert_close(behind.sink_mass, comparison.unmasked.sink_mass, equal_nan=True)
    before = comparison.measure(melens.WeMask(0.5, "random", site="resid_pre", start=0))
    attends = ~before.sink_mass.isnan().flatten(1).any(1)
    assert attends.tolist() == [False, False, True, False]
    assert not torch.allclose(before.sink_mass[2], comparison.unmasked.sink_mass[2])


def test_a_comparison_without_attention_says_so():
    config = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8}
    model = melens.load_model("random", model_type="mamba", config=config)
    with pytest.raises(melens.MelensError, match="No sinks can be compared: there is no block with attention"):
        MaskComparison(model, torch.arange(10, 30).reshape(2, 10), starts=[0])


def test_what_transformer_lens_does_not_tell_apart_is_said_not_to_be(monkeypatch):
    _, plain = hybrid("zamba2")
    monkeypatch.setitem(ArchitectureAdapterFactory._adapters, "Zamba2ForCausalLM", Zamba2ArchitectureAdapter)
    bridge = build_bridge_from_module(plain, "Zamba2ForCausalLM", hf_config=plain.config, model_name="tiny")
    layout = Layout.of(bridge)
    assert layout.attention_in_words == "attention in blocks 1 and 3 that TransformerLens does not name"
    assert layout.ffn_in_words == "an FFN in blocks 1 and 3 that TransformerLens does not name"
    with pytest.raises(melens.MelensError, match=r"the attention of Zamba2ForCausalLM; melens\.load_model does"):
        view_model(bridge)


@pytest.fixture(scope="module")
def parts():
    """Experiments on a Nemotron-H whose second block, an FFN, makes token 7 massive."""
    kinds = ["mamba", "mlp", "mamba", "attention", "mlp", "attention"]
    config = AutoConfig.for_model(
        "nemotron_h", **SIZES | CONFIGS["nemotron_h"] | {"num_hidden_layers": 6, "layers_block_type": kinds}
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        embedding, ffn = network.get_input_embeddings().weight, network.model.layers[1].mixer
        embedding[:, 3], embedding[7, 3] = 0, 10
        ffn.up_proj.weight[0] = 0
        ffn.up_proj.weight[0, 3] = 4
        ffn.down_proj.weight[21, 0] = 1_000
    some = "exp.experiments=[emergence,rmsnorm,ffn,sinks,ablation,predict]"
    cfg = compose_options("exp=all", "model=random", "exp.sinks.rank_tokens=12", some)
    prompts = [torch.cat([torch.tensor([7]), torch.arange(10, 10 + length)]) for length in (12, 13)]
    study = begin_study(planted.bridge(network), prompts, cfg, lambda name: lambda done, total: None)
    return list(run_experiments(study))


def test_experiments_say_of_a_hybrid_what_is_so(parts):
    (said,) = (dict(part.findings) for part in parts if part.experiment == "emergence")
    metrics = {part.experiment: part.metrics for part in parts}
    assert not any(part.not_applicable for part in metrics.values())
    assert {part.me_layer for part in metrics.values()} == {1}
    assert said["layout"] == "attention in blocks 3 and 5 of 6; an FFN in blocks 1 and 4 of 6"
    assert said["sinks start"] == "nowhere; there is attention in blocks 3 and 5 of 6"
    observed = {name: figure.observed for part in parts for name, figure in part.figures.items()}
    assert observed["sink_mass"].endswith("There is attention in blocks 3 and 5 of 6.")
    assert observed["ffn"].endswith("There is an FFN in blocks 1 and 4 of 6.")
    assert "No gate projection can be measured in any FFN." in observed["ffn"]
    assert metrics["ablation"].causal_layers == [1]
    assert metrics["predict"].ranks["response"] == 1


def test_claims_do_not_judge_what_a_hybrid_does_not_show(parts):
    judged = melens.judge(parts).set_index("id")
    assert judged.verdict[["exists", "ffn-needed"]].eq("holds in part").all()  # all prompts share their first token
    assert judged.verdict["predictable"] == "holds"
    assert judged.verdict["second-massive"] == "does not hold"  # whatever is in the last blocks writes little
    assert judged.former_verdict["second-massive"] == "not measured"  # block 5 has no FFN
    assert judged.verdict["attention-rank"] == "not measured"  # there is none before the ME layer
    assert "attention in blocks 3 and 5 of 6" in judged.note["attention-rank"]
    assert judged.note["sink-next"].startswith("No block up to the ME layer has attention: a sink in block 3")


def test_a_model_without_attention_is_checked_and_run_as_transformers_runs_it():
    config = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = melens.load_model("random", model_type="mamba", config=config)
    checked = melens.verify(model)
    assert (checked.agrees, checked.unchecked) == (True, ())
    tokens = torch.arange(10, 22)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain_twin(model)(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
    assert Layout.of(model).attention_in_words == "no block with attention"


def test_blocks_are_told_in_words():
    assert listed([3]) == "block 3"
    assert listed((2, 5, 8)) == "blocks 2, 5 and 8"
    assert listed(range(6)) == "blocks 0 to 5"
    partly = Layout(6, attention=(1,), ffn=(), unnamed_attention=(4,))
    named_and_not = "attention in block 1 of 6, and attention in block 4 that TransformerLens does not name"
    assert partly.attention_in_words == named_and_not
    assert partly.ffn_in_words == "no block with an FFN"
    silent = Layout(6, attention=(1, 4), ffn=()).as_measured([])
    assert silent.attention_in_words == "attention in blocks 1 and 4 that returns no pattern"
    assert Layout(6, attention=(1, 4), ffn=()).as_measured([1, 4]).attention == (1, 4)
    assert Layout(6, tuple(range(6)), ()).attention_in_words == "attention in all 6 blocks"
