"""What a model's name leads to is loaded, or told in one sentence before any weight is read."""

import json
import struct
import warnings

import gguf
import huggingface_hub
import pytest
import torch
import transformers
from planted import N_LAYERS, VOCABULARY, plain_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import melens
from melens import MelensError
from melens.data.prompts import byte_tokenizer
from melens.models import loading as models
from melens.models.folders import local_model

TOKENS = torch.arange(5, 25)[None]


def refused(name, **options):
    """The sentence by which a model is refused."""
    with pytest.raises(MelensError) as raised:
        melens.load_model(name, **{"device": "cpu", **options})
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def save_config(folder, **changes):
    """Write a config.json without weights."""
    plain_model("llama").config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(content | changes))
    return folder


# --- Options ----------------------------------------------------------------------------------------------------------


def test_a_path_a_dtype_and_a_device_may_be_objects(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    model = melens.load_model(tmp_path, dtype=torch.bfloat16, device=torch.device("cpu"))
    weight = next(model.original_model.parameters())
    assert (weight.dtype, weight.device.type, model.cfg.model_name) == (torch.bfloat16, "cpu", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (None, {}, "model.name is null; it must be a name, a hub id, or the path of a folder or file."),
        (3, {}, "model.name is 3; it must be a name, a hub id, or the path of a folder or file."),
        ("", {}, "model.name is ''; it must be a name, a hub id, or the path of a folder or file."),
        ("a b/c", {}, "'a b/c' is neither a folder nor a hub id like org/model."),
        ("tiny", {"dtype": None}, "model.dtype is null; it must be auto, float32, bfloat16 or float16."),
        ("tiny", {"dtype": torch.int8}, "model.dtype is 'int8'; it must be auto, float32, bfloat16 or float16."),
        ("tiny", {"device": None}, "model.device is null; it must be auto, cpu, mps, cuda or cuda:1."),
        ("tiny", {"device": ["cpu"]}, "model.device is ['cpu']; it must be auto, cpu, mps, cuda or cuda:1."),
        ("tiny", {"device": "cuda:x"}, "model.device is 'cuda:x'; it must be auto, cpu, mps, cuda or cuda:1."),
        ("tiny", {"seed": "x"}, "model.seed is 'x'; it must be a whole number of at least 0."),
        ("tiny", {"config": "x"}, "model.config is 'x'; it must be fields of transformers' configuration by name."),
        ("org/m", {"revision": 3}, "model.revision is 3; it must be a text, or null."),
        ("org/m", {"trust_remote_code": "yes"}, "model.trust_remote_code is 'yes'; it must be true or false."),
        ("org/m", {"source": "hubb"}, "model.source is 'hubb'; it must be hub, embedded or random."),
        ("org/m", {"device_map": 3}, "model.device_map is 3; it must be auto, balanced, a device map or null."),
        ("org/m", {"max_memory": "1GB"}, "model.max_memory is '1GB'; it must be like {0: 40GB, cpu: 90GB}, or null."),
    ],
)
def test_options_of_wrong_types_are_told(name, options, sentence):
    assert refused(name, **options).startswith(sentence)


@pytest.mark.parametrize(
    ("option", "place", "n_gpus", "there"),
    [
        ("device", "cuda", 0, "only cpu"),
        ("device", "cuda:7", 0, "only cpu"),
        ("device", "mps", 0, "only cpu"),
        ("device", "cuda:7", 2, "2 GPUs, cuda:0 to cuda:1"),
        ("device", "cuda:1", 1, "one GPU, cuda:0"),
        ("device_map", "cuda:2", 2, "2 GPUs, cuda:0 to cuda:1"),
    ],
)
def test_devices_that_are_not_here_are_told(monkeypatch, option, place, n_gpus, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    name, options = ("tiny", {}) if option == "device" else ("org/model", {"device": "cpu"})
    sentence = f"model.{option} is {place!r}, but this machine has {there}."
    assert refused(name, **options | {option: place}) == sentence


def test_a_device_map_that_means_nothing_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused("org/model", device_map="bogus").startswith("model.device_map names 'bogus', which is not a device;")
    assert refused("org/model", device_map={"": 0}) == "model.device_map is 'cuda:0', but this machine has only cpu."


# --- What is there ----------------------------------------------------------------------------------------------------


def test_a_single_file_is_told_with_the_folder_to_give(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    sentence = refused(tmp_path / "model.safetensors")
    assert sentence.endswith(f"is a single file. Give the folder that holds the model, {tmp_path}.")
    (tmp_path / "config.json").unlink()
    assert "model.safetensors has no config.json beside it" in refused(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("model.gguf", "but GGUF files. Give one of them, {folder}/model.gguf."),
        (
            "checkpoint-20/config.json",
            "but checkpoints of a training. Give one of them, {folder}/checkpoint-20, or all of them to exp=dynamics.",
        ),
        ("inner/config.json", "but a model in a folder inside it. Give {folder}/inner."),
        ("model.safetensors", "but weights. Add the config.json of their model."),
        ("pytorch_model.bin", "but weights. Add the config.json of their model."),
        ("__0_0.distcp", "but a sharded checkpoint of FSDP. Join it with `accelerate merge-weights`"),
        ("params.json", "but a model in its makers' own format (params.json)"),
        ("model_final.pth", "but a model in PyTorch's or TransformerLens's format"),
        ("readme.txt", "holds no transformers model (it has no config.json)."),
    ],
)
def test_a_folder_of_another_kind_is_told_with_what_it_holds(tmp_path, file, told):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    assert told.format(folder=tmp_path) in refused(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_an_adapter_of_which_little_is_told_is_one_all_the_same(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    assert "holds an adapter for a base model that it does not name, not a model. Merge the two" in refused(tmp_path)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"hello", "config.json is not JSON (Expecting value: line 1"),
        (b"", "config.json is not JSON"),
        (b'{"model_type": "lla', "config.json is not JSON (Unterminated string"),
        (b"\xff\xfe{", "config.json is not JSON ('utf-8' codec"),
        (b"[]", "it has no named fields."),
        (b"{}", "config.json has no model_type. Give"),
        (
            b'{"d_model": 8, "n_layers": 1, "n_ctx": 16}',
            "config.json has no model_type, as TransformerLens writes it. Give",
        ),
        (b'{"model_type": "lama"}', "has the model_type 'lama', which transformers"),
        (b'{"model_type": "lama"}', "does not know; the nearest known are llama"),
        (b'{"model_type": 3}', "has the model_type 3, which transformers"),
        (b'{"model_type": "llama", "hidden_size": "x"}', "Field 'hidden_size' expected int, got str"),
        (b'{"model_type": "llama", "dtype": "nope"}', "has no attribute 'nope'."),
    ],
)
def test_a_config_that_is_none_is_told(tmp_path, content, told):
    (tmp_path / "config.json").write_bytes(content)
    assert told in refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pad_token_id": 500}, f"gives the padding the id 500, but its embedding has only {VOCABULARY} rows"),
        ({"hidden_act": "nope"}, "transformers cannot make a LlamaForCausalLM of the config of"),
        ({"rope_parameters": {"rope_type": "nope"}}, "there is no 'nope'."),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads (5)."),
        ({"dtype": "float8_e4m3fn"}, "transformers cannot make a LlamaForCausalLM"),
        pytest.param(
            {"per_layer_config": {"1": {"num_key_value_heads": 1}}},
            "'num_key_value_heads' is a per-layer attribute",
            marks=pytest.mark.skipif(
                not hasattr(PreTrainedConfig, "per_layer_config"), reason="before transformers 5.15"
            ),
        ),
    ],
)
def test_a_config_of_no_model_is_told_before_weights_are_looked_for(tmp_path, changes, told):
    assert told in refused(save_config(tmp_path, **changes))


_ENCODER_DECODER = {
    "vocab_size": 200, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_SMALL = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 4}


@pytest.mark.parametrize(
    ("architecture", "model_type", "sizes", "told"),
    [
        (
            "T5ForConditionalGeneration",
            "t5",
            _ENCODER_DECODER,
            "is an encoder with a decoder. melens measures only decoders",
        ),
        ("BertForMaskedLM", "bert", _SMALL, "is an encoder, whose tokens see those behind them"),
        ("BertLMHeadModel", "bert", _SMALL, "is an encoder, whose tokens see those behind them"),
        ("ViTModel", "vit", {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}, "reads no text"),
        ("HrmTextForCausalLM", "hrm_text", _SMALL | {"head_dim": 16, "num_key_value_heads": 2}, "no blocks"),
    ],
)
def test_what_is_no_decoder_with_blocks_is_told_before_weights_are_looked_for(
    tmp_path, architecture, model_type, sizes, told
):
    AutoConfig.for_model(model_type, **sizes, architectures=[architecture]).save_pretrained(tmp_path)
    sentence = refused(tmp_path)
    assert told in sentence
    assert architecture in sentence


def test_a_bert_that_was_trained_as_a_decoder_is_one(tmp_path):
    config = AutoConfig.for_model("bert", **_SMALL, is_decoder=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert melens.load_model(tmp_path, device="cpu").cfg.n_layers == 2


def test_what_transformer_lens_cannot_put_its_bridge_into_is_told(monkeypatch):
    from melens.models import twins

    def fail(*args, **kwargs):
        raise RuntimeError("split_with_sizes expects\nmore")

    monkeypatch.setattr(twins, "build_bridge_from_module", fail)
    with pytest.raises(MelensError, match=r"its bridge into tiny \(LlamaForCausalLM\): split_with_sizes expects$"):
        melens.load_model("tiny", device="cpu")


# --- Weights ----------------------------------------------------------------------------------------------------------


def _header(n_bytes):
    return lambda content: struct.pack("<Q", n_bytes) + content[8:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:100],
        lambda content: content[: 8 + struct.unpack("<Q", content[:8])[0]],
        lambda content: b"\0" * len(content),
        lambda content: content + b"more",
        _header(10**6),
        _header(2**62),
    ],
)
def test_damaged_safetensors_are_named(tmp_path, damage):
    plain_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert f"The weights in {file} cannot be read (Error while deserializing header: " in refused(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-100],
        lambda content: content[: len(content) // 2],
        lambda content: b"\0" * 1000,
        lambda content: b"hello world",
    ],
)
def test_damaged_pickles_are_named(tmp_path, damage):
    plain_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    melens.load_model(tmp_path, device="cpu")
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(damage(file.read_bytes()))
    assert f"The weights in {file} cannot be read (it ends early or has another format)" in refused(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_index_is_named(tmp_path, content):
    plain_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(content)
    assert f"The weights in {file} cannot be read" in refused(tmp_path)


def test_weights_that_are_not_there_are_told(tmp_path):
    assert refused(save_config(tmp_path)).startswith(f"{tmp_path} holds no weights. Add model.safetensors, ")


def test_a_model_that_was_saved_without_its_head_is_told_as_such(tmp_path):
    plain_model("llama").model.save_pretrained(tmp_path)
    assert "(it was saved as a LlamaModel): 1 weights are missing (lm_head.weight)" in refused(tmp_path)


# --- The tokenizer ----------------------------------------------------------------------------------------------------


def save_with_vocabulary(folder, n_rows):
    config = plain_model("llama").config
    config.vocab_size = n_rows
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def test_a_tokenizer_of_more_tokens_than_the_embedding_has_rows_is_refused(tmp_path):
    save_with_vocabulary(tmp_path, 200)
    assert "has 256 tokens, but the embedding only 200 rows. It belongs to another model" in refused(tmp_path)


def test_tokens_that_were_added_beyond_the_embedding_are_told(tmp_path):
    save_with_vocabulary(tmp_path, 258)
    with pytest.warns(UserWarning, match=r"tokens that the embedding's 258 rows do not hold \(<\|im_start\|>\)"):
        melens.load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_told(tmp_path, file):
    plain_model("llama").save_pretrained(tmp_path)
    (tmp_path / file).write_text("{")
    assert f"The tokenizer of {tmp_path} cannot be read (" in refused(tmp_path)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def save_gguf(network, file):
    """Write a Llama as llama.cpp does: the rows of queries and keys in the order of its rotary embedding."""
    config, vocabulary = network.config, list(byte_tokenizer().get_vocab())[:256]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    pairs = [vocabulary[65:67], vocabulary[70:72]]
    vocabulary += [*map("".join, pairs), *(f"<{number}>" for number in range(258, config.vocab_size))]
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in network.state_dict().items():
        for part, n_heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                weight = weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_that_it_holds(tmp_path, monkeypatch):
    asked, whole = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, **told: asked.append(told) or whole(path, **told)
    )
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": N_LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()
    save_gguf(network, tmp_path / "tiny.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = melens.load_model(tmp_path / "tiny.gguf", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), network(TOKENS).logits, rtol=1e-4, atol=1e-5)
    if hasattr(transformers, "GgufConfig"):  # which would leave blocks packed where it has kernels for them
        assert asked[0]["quantization_config"].dequantize
    assert model.tokenizer("Hi")["input_ids"]
    assert melens.trace(model, ["Hello there"]).model["n_layers"] == N_LAYERS
    assert "is quantised already. Leave out model.quantize" in refused(tmp_path / "tiny.gguf", quantize="8bit")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\0" * 16])
def test_a_damaged_gguf_file_is_told(tmp_path, content):
    (tmp_path / "tiny.gguf").write_bytes(content)
    assert "tiny.gguf cannot be read (" in refused(tmp_path / "tiny.gguf")


def test_a_hub_id_is_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert models.ModelSpec("org/model").source == "hub"
    assert "hub cannot be reached for org/model" in refused("org/model")


def test_a_local_model_is_told_from_a_preset_and_from_the_hub(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert local_model("../mine") == local_model(str(tmp_path / "mine")) == (tmp_path / "mine").resolve()
    monkeypatch.chdir(tmp_path)
    assert local_model("mine") == (tmp_path / "mine").resolve()
    assert [local_model(name) for name in ("tiny", "org/mine", "qwen3-4b")] == [None, None, None]
