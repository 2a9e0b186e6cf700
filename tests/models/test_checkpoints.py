"""What is loaded is what the checkpoint holds, all of it, and loading starts no program."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planted import D_MODEL, VOCABULARY, plain_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import melens
from melens import MelensError
from melens.data.prompts import byte_tokenizer
from melens.models import checkpoints
from melens.models.gates import GATE_FILE, add_gates, gates_of, load_gates, save_gates
from melens.models.view import view_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(monkeypatch):
    """The programs that are started, none of which runs: recorded, because TransformerLens swallows what pip raises."""
    commands = []

    def record(command, *args, **options):
        commands.append(command)
        raise OSError("no program is started while testing")

    for module, names in ((subprocess, ("Popen", "run", "call", "check_call")), (os, ("system", "execvp", "popen"))):
        for name in names:
            monkeypatch.setattr(module, name, record)
    return commands


TEXT = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
MULTIMODAL = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": TEXT | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400},
        "vision_config": VISION | {"num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 16},
        "audio_config": None,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    },
    "llava_onevision": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
    },
    "idefics3": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION},
    "qwen3_vl": {"text_config": TEXT, "vision_config": QWEN_VISION},
}
"""Of each type the fields that make it tiny."""


def save_multimodal(model_type, folder):
    """A folder with a tokenizer and without a processor, on which TransformerLens's own loading runs pip."""
    network = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **MULTIMODAL[model_type]))
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return type(network).from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("model_type", [name for name in MULTIMODAL if name != "qwen3_vl"])
def test_a_multimodal_model_is_loaded_for_its_text_without_starting_a_program(tmp_path, started, model_type):
    network = save_multimodal(model_type, tmp_path)
    model = melens.load_model(str(tmp_path), device="cpu")
    assert started == []
    prompt = torch.arange(10, 30)
    assert model.tokenizer.decode(prompt) == byte_tokenizer().decode(prompt)
    with torch.no_grad():
        expected = network(input_ids=prompt[None], output_hidden_states=True)
        torch.testing.assert_close(model(prompt[None]), expected.logits)
    norms = melens.trace(model, [prompt], [melens.Norms(("hook_resid_post",))])["norm"]
    torch.testing.assert_close(
        torch.tensor(norms[norms.layer == 0].norm.to_numpy()), expected.hidden_states[1][0].norm(dim=-1)
    )


def test_a_library_that_transformer_lens_needs_is_named_with_the_command_to_install_it(tmp_path, started, monkeypatch):
    save_multimodal("qwen3_vl", tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name))
    command = re.escape(f"`pip install torchvision torch=={torch.__version__}`")  # pip would take another torch
    with pytest.raises(MelensError, match=f"needs torchvision. Install it with {command}"):
        melens.load_model(str(tmp_path), device="cpu")
    assert started == []


# --- A checkpoint against its config.json -----------------------------------------------------------------------------


def resave(folder, change=lambda weights: None, **config):
    """Change the weights and the config of a saved model."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | config))


def without(*parts):
    """Take out the weights whose names have all these parts."""

    def change(weights):
        for name in [name for name in weights if all(part in name for part in parts)]:
            del weights[name]

    return change


def load(folder):
    """Load a folder, in which nothing may be warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return melens.load_model(str(folder), device="cpu")


def test_a_block_without_its_mlp_is_refused(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    resave(tmp_path, without("layers.2.mlp"))
    names = ", ".join(f"model.layers.2.mlp.{part}_proj.weight" for part in ("down", "gate", "up"))
    with pytest.raises(
        MelensError, match=rf"does not hold the LlamaForCausalLM that .*: 3 weights are missing \({names}\)\. Fetch"
    ):
        load(tmp_path)


def test_more_layers_in_the_config_than_in_the_file_are_refused(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    resave(tmp_path, num_hidden_layers=5, layer_types=None)
    with pytest.raises(
        MelensError, match=r"9 weights are missing \(model.layers.4.input_layernorm.weight, .*, \.\.\.\)"
    ):
        load(tmp_path)


def test_more_layers_in_the_file_than_in_the_config_are_told(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    resave(tmp_path, num_hidden_layers=3, layer_types=None)
    with pytest.warns(UserWarning, match=r"9 weights that the model of its config.json does not use \(model.layers.3."):
        model = melens.load_model(str(tmp_path), device="cpu")
    assert model.cfg.n_layers == 3


def test_a_weight_of_another_shape_is_refused(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    resave(tmp_path, vocab_size=VOCABULARY + 8)
    shapes = rf"model.embed_tokens.weight \(\[{VOCABULARY}, {D_MODEL}\] for \[{VOCABULARY + 8}, {D_MODEL}\]\)"
    with pytest.raises(MelensError, match=rf"2 have other shapes \(lm_head.weight .*, {shapes}\)"):
        load(tmp_path)


@pytest.mark.parametrize("lost", ["experts.2", "experts.2.w1"])  # an expert; a part of one
def test_a_mixture_without_an_expert_is_refused(tmp_path, lost):
    config = AutoConfig.for_model("mixtral", **TEXT | {"num_local_experts": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load(tmp_path)
    resave(tmp_path, without("layers.1", lost))
    with pytest.raises(MelensError, match="other shapes"):
        load(tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    sizes = {"n_embd": D_MODEL, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY}
    AutoConfig.for_model("gpt2", architectures=["GPT2LMHeadModel"], **sizes).save_pretrained(tmp_path)
    with pytest.raises(MelensError, match=r"weights are missing \(transformer.h.0.attn.c_attn.bias"):
        load(tmp_path)


def test_a_config_whose_model_type_and_architecture_differ_is_refused(tmp_path):
    plain_model("qwen2").save_pretrained(tmp_path)
    resave(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(MelensError, match="names the architecture LlamaForCausalLM, but its model_type is 'qwen2'"):
        load(tmp_path)


def test_a_head_that_is_tied_is_not_missed_and_one_that_is_not_is(tmp_path):
    tied = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(tmp_path)
    resave(tmp_path, tie_word_embeddings=False)
    with pytest.raises(MelensError, match=r"1 weights are missing \(lm_head.weight\)"):
        load(tmp_path)


def test_what_an_architecture_itself_ignores_is_not_told(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("gpt_neox", vocab_size=200, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    old = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    }
    resave(tmp_path, lambda weights: weights.update(old))
    load(tmp_path)


def test_a_quantised_checkpoint_is_told_of_and_not_refused(tmp_path):
    network = plain_model("llama")
    network.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace())
    info = {"missing_keys": {"model.layers.0.mlp.scale"}, "mismatched_keys": set(), "unexpected_keys": set()}
    with pytest.warns(UserWarning, match=r"1 weights are missing \(model.layers.0.mlp.scale\)"):
        checkpoints._check_weights(network, info, str(tmp_path), warn=True)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_file_that_is_cut_off_is_refused(tmp_path, content):
    plain_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(MelensError, match=r"weights in .* cannot be read \(.*header.*\)\. Fetch or save them again"):
        load(tmp_path)


def test_a_part_of_the_weights_that_is_not_there_is_refused(tmp_path):
    plain_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(MelensError, match=second.name):
        load(tmp_path)


def test_nothing_is_put_on_the_device_before_the_headers_are_checked(tmp_path, monkeypatch):
    plain_model("llama").save_pretrained(tmp_path)
    resave(tmp_path, without("layers.2.mlp"))
    places = []
    whole = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda path, **options: places.append(options["device_map"]) or whole(path, **options),
    )
    with pytest.raises(MelensError, match="missing"):
        load(tmp_path)
    assert places == [{"": "meta"}]


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_is_refused(tmp_path, has_config):
    if has_config:  # transformers would load the base model that the adapter names
        plain_model("llama").save_pretrained(tmp_path)
    told = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(MelensError, match=r"holds an adapter for org/base, not a model\. Merge the two"):
        load(tmp_path)


def test_an_incomplete_checkpoint_ends_a_run_in_a_sentence(tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT | {"num_hidden_layers": 3})).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    resave(folder, without("layers.2.mlp"))
    command = [sys.executable, "experiments/run.py", "model=hub", f"model.name={folder}", f"hydra.run.dir={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert "3 weights are missing" in line
    assert "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir() if path.suffix in (".json", ".html", ".parquet")] == []


# --- Gates saved beside a checkpoint ----------------------------------------------------------------------------------


def save_gated(folder, kind="headwise"):
    """A saved model with gates beside it that are not the identity."""
    network = plain_model("llama")
    network.save_pretrained(folder)
    add_gates(view_model(network), kind)
    for gate in gates_of(view_model(network)).values():
        gate.weight.data.normal_()
    weights = {name: weight for name, weight in network.state_dict().items() if "melens_gate" in name}
    save_gates(weights, folder)
    return network, weights


@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
def test_gates_beside_a_checkpoint_are_no_weights_that_it_lacks(tmp_path, kind):
    network, _ = save_gated(tmp_path, kind)
    tokens = torch.arange(5, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(tokens), network(tokens).logits, rtol=1e-4, atol=1e-4)


GATE_2 = "model.layers.2.self_attn.melens_gate.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(GATE_2), "lacks the gates of blocks 2"),
        (lambda weights: weights.update({GATE_2: weights[GATE_2][:2]}), r"of another model: .*shape \[2, 64\]"),
        (lambda weights: weights.update({GATE_2: weights[GATE_2][0]}), r"of another model: .*shape \[64\]"),
        (lambda weights: weights.update({GATE_2.replace("2", "7"): weights.pop(GATE_2)}), "of another model"),
        (
            lambda weights: weights.update({"layers.2.mlp.weight": weights.pop(GATE_2)}),
            "of another model: layers.2.mlp",
        ),
    ],
)
def test_gates_that_are_not_those_of_all_blocks_are_refused(tmp_path, change, message):
    _, weights = save_gated(tmp_path)
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / GATE_FILE)
    with pytest.raises(MelensError, match=message):
        load_gates(view_model(plain_model("llama")), tmp_path / GATE_FILE)
