"""Models larger than one device: what part on disk gives is what the whole model gives.

The CPU serves offloaded weights as a GPU does: accelerate hooks every module's `forward`, and between two calls the
weights are on the meta device.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from planted import FAMILIES, bridge, gains_apart, plant
from transformers import AutoConfig, AutoModelForCausalLM

import melens
from experiments.options import compose_options
from experiments.runner.job import run_job
from melens import MelensError, WeMask
from melens.analysis.weights import score_blocks
from melens.data.prompts import byte_tokenizer
from melens.masks.comparison import MaskComparison
from melens.models.devices import placement
from melens.models.gates import GATE_FILE, add_gates, gates_of, save_gates
from melens.models.loading import check_memory
from melens.models.normalization import read_normalization
from melens.models.twins import bridged_twin, plain_twin
from melens.models.view import view_model
from melens.tracing.interventions import MassiveTokenRuns, ablation
from melens.tracing.resume import RecordedBlocks

ROOT = Path(__file__).parents[2]
BLOCK, N_LAYERS, DIM = 1, 4, 21
TEXTS = ["The key is under the mat.", "That dog likes rain, it seems.", "Three and four"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a model of a family is saved, whose block 1 makes the token that all the texts begin with massive."""
    made = {}

    def of_family(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            _save(family, made[family])
        return str(made[family])

    return of_family


def _save(family, folder):
    shape = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    if family == "gpt2":  # a joint projection of queries, keys and values
        shape = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": N_LAYERS, "n_head": 4}
    options = shape | FAMILIES.get(family, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    if family != "gpt2":
        plant(gains_apart(network), block=BLOCK, token=byte_tokenizer()("T")["input_ids"][0], dim=DIM)
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def half_on_disk(family):
    if family == "gpt2":
        first = ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")
        return dict.fromkeys(first, "cpu") | {f"transformer.h.{layer}": _place(layer) for layer in range(N_LAYERS)}
    first = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    return dict.fromkeys(first, "cpu") | {f"model.layers.{layer}": _place(layer) for layer in range(N_LAYERS)}


def _place(layer):
    return "disk" if layer >= N_LAYERS // 2 else "cpu"


EVERYTHING_ON_DISK = {"": "disk"}


@pytest.fixture(scope="module")
def pair(folder):
    """A model whole, and the same with part of it on disk, or all."""
    made = {}

    def of_family(family="qwen3", *, all_on_disk=False):
        key = (family, all_on_disk)
        if key not in made:
            device_map = EVERYTHING_ON_DISK if all_on_disk else half_on_disk(family)
            made[key] = melens.load_model(folder(family)), melens.load_model(folder(family), device_map=device_map)
        return made[key]

    return of_family


def tokens_of(model):
    return [torch.tensor(model.tokenizer(text)["input_ids"]) for text in TEXTS]


def is_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


# --- Where the weights are --------------------------------------------------------------------------------------------


def test_it_is_told_where_the_weights_lie(pair):
    whole, parted = pair()
    assert placement(whole.original_model) == {"cpu": 1}
    shares = placement(parted.original_model)
    assert shares.keys() == {"cpu", "disk"}
    blocks = sum(weight.numel() for weight in whole.blocks[2:].parameters())
    everything = sum(weight.numel() for weight in whole.original_model.parameters())
    assert shares["disk"] == pytest.approx(blocks / everything, abs=1e-3)


def test_an_embedding_on_disk_is_looked_up_where_it_is_fetched_to(pair):
    _, parted = pair("llama", all_on_disk=True)
    assert next(parted.original_model.parameters()).is_meta
    assert parted.cfg.device == "cpu"
    assert melens.trace(parted, TEXTS).model["device"] == "cpu"
    assert placement(parted.original_model) == {"disk": 1}


def test_what_exceeds_max_memory_stays_on_disk(folder):
    path = folder("qwen3")
    model = melens.load_model(path, max_memory={"cpu": "250KB"})
    assert 0 < placement(model.original_model)["disk"] < 1
    is_close(model(tokens_of(model)[0][None]), melens.load_model(path)(tokens_of(model)[0][None]))


@pytest.mark.parametrize(
    ("max_memory", "message"),
    [
        ({"cpu": "much"}, "it must be like {0: 40GB, cpu: 90GB}, or null"),
        ({"gpu": "1GB"}, "it must be like {0: 40GB, cpu: 90GB}, or null"),
        ({99: "1GB"}, "names GPU 99, but this machine has"),
    ],
)
def test_a_limit_that_means_nothing_is_refused(folder, max_memory, message):
    with pytest.raises(MelensError, match=message):
        melens.load_model(folder("qwen3"), max_memory=max_memory)


def test_memory_is_foreseen_place_by_place(folder):
    too_much = 10**18  # bytes a weight
    with pytest.raises(MelensError, match=r"would take .* GB of cpu.*the rest stays on disk"):
        check_memory(folder("qwen3"), too_much, "its weights", max_memory={"cpu": "900000000GB"})
    check_memory(folder("qwen3"), too_much, "its weights", max_memory={"cpu": "1KB"})


def test_a_random_model_cannot_be_spread():
    with pytest.raises(MelensError, match=r"made on one device.*To use model\.device_map, save it by"):
        melens.load_model("random", device_map="balanced")


# --- What is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "all_on_disk"), [("llama", True), ("qwen3", False), ("gemma3", False), ("phi3", False), ("gpt2", False)]
)
def test_a_trace_is_that_of_the_whole_model(pair, family, all_on_disk):
    of_whole, of_parted = (melens.trace(model, TEXTS) for model in pair(family, all_on_disk=all_on_disk))
    assert of_whole.tables.keys() == of_parted.tables.keys()
    for name, table in of_whole.tables.items():
        pd.testing.assert_frame_equal(table, of_parted.tables[name], rtol=1e-6)
    if family != "gpt2":
        assert melens.find_me_layer(of_parted).layer == BLOCK


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "gpt2"])
def test_weights_on_disk_are_read(pair, family):
    whole, parted = pair(family)
    networks = [view_model(model) for model in (whole, parted)]
    is_close(*(network.gain(3) for network in networks))
    is_close(*(torch.tensor(network.gain_sketches()) for network in networks))
    for part in ("gain", "bias"):
        is_close(*(getattr(read_normalization(model, 3, "ln2"), part) for model in (whole, parted)))
    pd.testing.assert_frame_equal(score_blocks(whole), score_blocks(parted), rtol=1e-5)
    assert parted.blocks[3].ln1.original_component.weight.is_meta  # and are back there


def test_a_gain_on_disk_cannot_be_followed_in_training(pair):
    with pytest.raises(MelensError, match="is offloaded"):
        WeMask(0.1, start=2).install(pair()[1], refresh=True)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_parts_of_a_block_are_switched_off_as_in_the_whole_model(pair, family):
    found = []
    for model in pair(family):
        runs = MassiveTokenRuns(model, [ids.tolist() for ids in tokens_of(model)], [0, 3, 2])
        parts = [(layer, part) for layer in range(N_LAYERS) for part in ("ffn", "attention", "ln2_no_gain")]
        found.append([runs.intact, *(runs.run(ablation(model, *part), part[0]) for part in parts)])
    for of_parted, of_whole in zip(*reversed(found), strict=True):
        is_close(of_parted, of_whole)


def test_resuming_leaves_every_block_as_it_was(pair):
    _, model = pair()
    tokens = tokens_of(model)[0][None]
    attributes = [vars(block.original_component) for block in model.blocks]
    before, logits = [dict(of_block) for of_block in attributes], model(tokens)
    blocks = RecordedBlocks(model)
    with blocks.recording([2]):
        model(tokens)
    with blocks.resuming_at(3):
        is_close(model(tokens), logits)
    assert all(after.get("forward") is own.get("forward") for after, own in zip(attributes, before, strict=True))
    is_close(model(tokens), logits)


def test_masks_are_compared_as_on_the_whole_model(pair):
    texts = torch.randint(10, 290, (5, 24), generator=torch.Generator().manual_seed(0))
    masks = [WeMask(0.1, start=1), WeMask(0.1, start=3, select="magnitude", site="ln1_in")]
    found = []
    for model in pair():
        comparison = MaskComparison(model, texts, [1, 3])
        found.append([comparison.unmasked, *map(comparison.measure, masks)])
    for of_parted, of_whole in zip(*reversed(found), strict=True):
        for name, values in vars(of_whole).items():
            is_close(getattr(of_parted, name), values)


# --- Masks and twins --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "select", "positions"),
    [("attn_in", "weight", "first"), ("ln1_in", "magnitude", "first"), ("resid_pre", "magnitude", "massive")],
)
@torch.no_grad()
def test_a_mask_works_on_the_bridge_and_on_its_plain_twin(pair, site, select, positions):
    whole, parted = pair()
    mask = WeMask(0.2, start=2, site=site, select=select, positions=positions)
    tokens = torch.stack([ids[:12] for ids in tokens_of(whole)])
    found = []
    for model in (whole, parted, plain_twin(parted), bridged_twin(plain_twin(parted), "twin")):
        unmasked = _logits(model, tokens)
        with mask.applied(model):
            found.append(_logits(model, tokens))
        assert not torch.equal(found[-1], unmasked)
        is_close(_logits(model, tokens), unmasked)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def _logits(model, tokens):
    output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize(
    ("family", "all_on_disk"), [("llama", True), ("qwen3", False), ("gemma3", False), ("phi3", False), ("gpt2", False)]
)
@torch.no_grad()
def test_the_plain_twin_shares_weights_and_where_they_lie(pair, family, all_on_disk):
    whole, parted = pair(family, all_on_disk=all_on_disk)
    twin = plain_twin(parted)
    assert twin is not parted.original_model
    assert twin.config._attn_implementation == "sdpa"
    tokens = tokens_of(whole)[0][None]
    torch.testing.assert_close(twin(tokens).logits, whole(tokens), rtol=1e-4, atol=1e-4)
    texts = [
        model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (twin, plain_twin(whole))
    ]
    assert torch.equal(*texts)
    assert sum(weight.is_meta for weight in twin.parameters()) == sum(
        weight.is_meta for weight in parted.original_model.parameters()
    )


def test_a_mask_that_misses_a_block_of_a_parted_model_is_told(pair):
    _, model = pair()
    twin = plain_twin(model)
    with WeMask(0.1, start=2).applied(twin):
        view_model(twin).blocks[3].attention._forward_pre_hooks.clear()
        with pytest.raises(MelensError, match="did not reach block 3"):
            twin(tokens_of(model)[0][None])


def test_gates_lie_where_their_block_computes(folder, tmp_path, pair):
    whole, _ = pair()
    gated = bridge(plain_twin(whole))
    add_gates(view_model(gated), "headwise")
    for gate in gates_of(view_model(gated)).values():
        torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    weights = {f"model.layers.{layer}.self_attn.melens_gate.weight": gate.weight
               for layer, gate in gates_of(view_model(gated)).items()}  # fmt: skip
    for name in Path(folder("qwen3")).iterdir():
        (tmp_path / name.name).symlink_to(name)
    save_gates(weights, tmp_path)
    assert (tmp_path / GATE_FILE).is_file()
    parted = melens.load_model(str(tmp_path), device_map=EVERYTHING_ON_DISK)
    tokens = tokens_of(whole)[0][None]
    is_close(parted(tokens), gated(tokens))
    torch.testing.assert_close(plain_twin(parted)(tokens).logits, gated(tokens), rtol=1e-4, atol=1e-4)


# --- The experiments --------------------------------------------------------------------------------------------------


def job(folder, *overrides):
    cfg = compose_options("scale=smoke", *overrides)
    folder.mkdir(parents=True, exist_ok=True)
    assert run_job(cfg, folder) == []
    return json.loads((folder / "result.json").read_text())


EXPERIMENTS = {
    "all": ["exp=all", "exp.sinks.rank_tokens=8"],
    "wemask": ["exp=wemask", "wemask.rate=0.1", "wemask.start=2", "exp.keep=false"],
    "generate": ["exp=generate", "wemask.start=2", "generate.max_new_tokens=4", "generate.prompt=The"],
    "benchmark": [
        "exp=benchmark", "wemask.start=2", "benchmark.tasks=[perplexity,induction]", "benchmark.masks=[off,paper]",
        "exp.keep=false",
    ],
}  # fmt: skip


_SLOW = ("all", "wemask")


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in EXPERIMENTS]
)
def test_an_experiment_finds_what_it_finds_on_the_whole_model(experiment, folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    options = [*EXPERIMENTS[experiment], "model=hub", f"model.name={folder('qwen3')}", f"prompts.file={prompts}"]
    whole = job(tmp_path / "whole", *options)
    in_memory = "300KB" if experiment in ("all", "wemask") else "1KB"  # which leaves the embedding on disk too
    parted = job(tmp_path / "parted", *options, f"model.max_memory={{cpu:{in_memory}}}")
    assert whole["model"]["placement"] == {"cpu": 1}
    assert parted["model"]["placement"]["disk"] > 0.5
    _are_alike(parted["metrics"], whole["metrics"])
    for file in sorted((tmp_path / "whole").glob("*.parquet")):
        of_parted, of_whole = (pd.read_parquet(tmp_path / name / file.name) for name in ("parted", "whole"))
        pd.testing.assert_frame_equal(of_parted, of_whole, rtol=1e-4, atol=1e-5)


def _are_alike(found, expected):
    """Compare metrics, but for what a run took."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"seconds"}:
            _are_alike(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _are_alike(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-4, abs=1e-5) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(
    ("experiment", "place"), [("exp=sft", "model.max_memory={cpu:300KB}"), ("exp=tables", "model.device_map=auto")]
)
def test_a_training_of_a_spread_model_is_refused_before_the_model_is_loaded(experiment, place, tmp_path):
    options = [experiment, "table=3", "training.dataset=sums", "model=hub", "model.name=no/model", place]
    with pytest.raises(MelensError, match="spreads over devices cannot be trained"):
        job(tmp_path, *options)
