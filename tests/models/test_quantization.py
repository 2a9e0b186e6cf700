"""A quantised model is measured as what it is, on every way to run it; what needs its plain weights is refused.

The quantiser here keeps each linear layer's weight as int8 with a scale a row, registered with transformers as others
are; bitsandbytes' own is tried where it is installed.
"""

import importlib.util
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from planted import bridge, gains_apart, plain_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import melens
from experiments.options import compose_options
from melens import MelensError, WeMask
from melens.analysis.study import Study
from melens.analysis.weights import score_blocks
from melens.data.prompts import byte_tokenizer
from melens.models import quantization
from melens.models.gates import add_gates
from melens.models.skeletons import Skeleton
from melens.models.twins import plain_twin
from melens.models.view import view_model
from melens.storage.cache import fingerprint
from melens.tracing.batching import rule_of
from melens.training.plan import TrainingPlan
from melens.training.recipe import Recipe
from melens.training.runs import train_model

TOKENS = torch.arange(5, 25)[None]


class RowLinear(nn.Module):
    """A linear layer of int8 weights with a scale a row."""

    def __init__(self, plain):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(plain.weight.shape, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(plain.out_features, 1), requires_grad=False)
        self.bias = plain.bias

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype) * self.scale.to(hidden.dtype), self.bias)


@register_quantization_config("rows")
class RowConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs):
        self.quant_method = "rows"


@register_quantizer("rows")
class RowQuantizer(HfQuantizer):
    requires_calibration = False
    trouble = None

    def validate_environment(self, *args, **kwargs):
        if self.trouble is not None:
            raise self.trouble

    def _process_model_before_weight_loading(self, model, **kwargs):
        for name in linear_layers(model):
            with torch.device("meta"):
                model.set_submodule(name, RowLinear(model.get_submodule(name)))

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


def linear_layers(network):
    return [name for name, part in network.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]


def save_in_rows(network, folder):
    """Save a model in rows; what comes back is the plain model of the same numbers."""
    network.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in linear_layers(network):
        weight = weights[f"{name}.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 127
        weights |= {f"{name}.weight": (weight / scale).round().to(torch.int8), f"{name}.scale": scale}
        network.get_submodule(name).weight.data = weights[f"{name}.weight"] * scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"quantization_config": {"quant_method": "rows"}}))
    return network


@pytest.fixture(scope="module")
def in_rows(tmp_path_factory):
    """The plain model of a quantised one's numbers, and the folder of that."""
    folder = tmp_path_factory.mktemp("rows")
    return save_in_rows(gains_apart(plain_model("llama")), folder), folder


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return melens.load_model(folder, device="cpu", **options)


def test_a_quantised_checkpoint_is_loaded_as_it_is_and_told_of(in_rows):
    plain, folder = in_rows
    with pytest.warns(UserWarning, match="computes with weights quantised by rows, which is what melens measures"):
        model = melens.load_model(folder, device="cpu")
    assert model.original_model.model.layers[0].mlp.up_proj.original_component.weight.dtype == torch.int8
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), plain(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_every_way_to_run_it_is_that_of_its_own_numbers(in_rows):
    plain, folder = in_rows
    model = load(folder)
    twin = plain_twin(model)
    assert twin is not model.original_model
    assert twin.model.layers[1].self_attn.q_proj.weight.data_ptr() == (
        model.original_model.model.layers[1].self_attn.q_proj.original_component.weight.data_ptr()
    )
    with torch.no_grad():
        torch.testing.assert_close(twin(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)
    found = melens.verify(model)
    assert (found.way, found.why_not, found.unchecked) == ("fast", "", ())
    assert found.worst["error"] < 1e-4
    of_plain = melens.trace(bridge(plain), [TOKENS[0], TOKENS[0, :9]])
    trace = melens.trace(model, [TOKENS[0], TOKENS[0, :9]])
    assert (trace.model["quantization"], of_plain.model["quantization"]) == ("rows", None)
    norms = trace["norm"]["norm"]
    torch.testing.assert_close(
        torch.tensor(norms.to_numpy()), torch.tensor(of_plain["norm"]["norm"].to_numpy()), rtol=1e-3, atol=1e-4
    )


def test_nothing_is_kept_of_a_quantised_model_for_another(in_rows):
    model, again = load(in_rows[1]), load(in_rows[1])
    assert fingerprint(model.original_model) == fingerprint(model.original_model)
    assert fingerprint(model.original_model) != fingerprint(again.original_model)


def test_what_is_hooked_onto_a_quantised_layer_is_not_on_its_twin(in_rows):
    model = load(in_rows[1])
    heard = []
    handle = model.original_model.model.layers[1].mlp.up_proj.original_component.register_forward_hook(
        lambda *told: heard.append(1)
    )
    plain_twin(model)(TOKENS)
    assert not heard
    model(TOKENS)
    assert heard
    handle.remove()


def test_a_mask_chooses_by_the_gains_of_the_plain_model(in_rows):
    plain, folder = in_rows
    mask, model = WeMask(start=1), load(folder)
    chosen, expected = mask.dims(model), mask.dims(plain)
    assert all(torch.equal(chosen[layer], expected[layer]) for layer in (1, 2, 3))
    with torch.no_grad(), mask.applied(model), mask.applied(plain):
        torch.testing.assert_close(model(TOKENS), plain(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_what_needs_plain_weights_is_refused(in_rows):
    model = load(in_rows[1])
    with pytest.raises(MelensError, match="weights of this model are quantised"):
        score_blocks(model)
    with pytest.raises(MelensError, match="Attention in block 0 of this model is quantised"):
        add_gates(view_model(model), "headwise")


def test_a_quantised_model_is_not_trained(in_rows, tmp_path):
    cfg = compose_options("exp=sft", "training.dataset=sums", "model=hub", "model.name=no/model", "model.quantize=4bit")
    with pytest.raises(MelensError, match="because its weights cannot change"):
        _ = cfg.requests
    study = object.__new__(Study)  # of which nothing but the model is looked at
    vars(study)["model"] = load(in_rows[1])
    study.model._tokenizer = byte_tokenizer()
    with pytest.raises(MelensError, match="because its weights cannot change"):
        train_model(study, TrainingPlan(Recipe("sft", batch_size=8, lr=1e-3), "sums"), in_rows[1])


def test_a_joint_projection_of_packed_weights_is_refused_before_they_are_read(tmp_path):
    save_in_rows(plain_model("phi3"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MelensError, match="holds queries, keys and values in one quantised matrix"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "mixes"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, True),  # LLM.int8() looks for outliers in all rows
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, False),
        ({"quant_method": "gptq", "bits": 4}, False),
        ({"quant_method": "fbgemm_fp8"}, True),
        ({"quant_method": "fp8", "dequantize": True}, False),
    ],
)
def test_rows_whose_activations_are_rounded_together_run_alone(kind, mixes):
    network = plain_model("llama")
    assert not rule_of(network).alone
    told = SimpleNamespace(to_dict=lambda: kind, dequantize=kind.get("dequantize", False))
    network.hf_quantizer = SimpleNamespace(quantization_config=told)
    assert rule_of(network).alone == mixes


# --- What is told before any weight is read ---------------------------------------------------------------------------


def save_config(folder, **told):
    plain_model("llama").config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": told}))
    return folder


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
MISSING = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "bitsandbytes"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", "bitsandbytes"),
    (GPTQ, "gptq", "gptqmodel optimum"),
    (AWQ, "awq", "gptqmodel"),
    ({"quant_method": "hqq", "quant_config": {}}, "hqq", "hqq"),
    ({"quant_method": "aqlm"}, "aqlm", "aqlm[gpu,cpu]"),
    ({"quant_method": "quanto"}, "quanto", "optimum-quanto"),
    ({"quant_method": "compressed-tensors"}, "compressed-tensors", "compressed-tensors"),
]


@pytest.mark.parametrize(("told", "kind", "packages"), MISSING)
def test_a_package_that_is_missing_is_named_with_the_command_to_install_it(tmp_path, told, kind, packages):
    needed = {"aqlm[gpu,cpu]": "aqlm", "optimum-quanto": "optimum", "compressed-tensors": "compressed_tensors"}
    if importlib.util.find_spec(needed.get(packages, packages.split()[0])) is not None:
        pytest.skip("it is installed here")
    with pytest.raises(MelensError) as raised:
        load(save_config(tmp_path, **told))
    command = f"`pip install {packages} torch=={torch.__version__}`"
    assert f"is quantised with {kind}, which needs a package that is not installed. Run {command}." in str(raised.value)


def test_a_quantisation_that_does_not_run_here_is_told(tmp_path, monkeypatch):
    folder = save_config(tmp_path, quant_method="rows")
    monkeypatch.setattr(RowQuantizer, "trouble", RuntimeError("GPU is required.\nMore."))
    with pytest.raises(MelensError, match=r"is quantised with rows, which does not run here: GPU is required\."):
        load(folder)
    monkeypatch.setattr(RowQuantizer, "trouble", ImportError("Fetch the rows package from its makers"))
    with pytest.raises(MelensError, match="is missing: Fetch the rows package"):
        load(folder)


@pytest.mark.parametrize("told", [{"quant_method": "columns"}, {}])
def test_a_quantisation_that_transformers_does_not_know_is_told(tmp_path, told):
    name = told.get("quant_method", "an unnamed method")
    with pytest.raises(MelensError, match=f"is quantised with {name}, which transformers .* does not know"):
        load(save_config(tmp_path, **told))


def test_fp8_without_a_gpu_is_dequantised_and_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    network = plain_model("llama")
    network.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in linear_layers(network):
        blocks = weights[f"{name}.weight"]
        scale = torch.full([math.ceil(size / 32) for size in blocks.shape], 0.5)
        weights |= {f"{name}.weight": (blocks / 0.5).to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scale}
        network.get_submodule(name).weight.data = weights[f"{name}.weight"].float() * 0.5
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="fp8. melens measures it with its weights dequantised to float32"):
        model = melens.load_model(tmp_path, device="cpu", dtype="float32")
    assert not quantization.is_quantized(model.original_model)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), network(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert melens.verify(model).way == "fast"


def test_the_memory_of_quantised_weights_is_that_of_their_bits():
    network = plain_model("llama")
    skeleton = Skeleton(network.config, "tiny")
    n_linear = sum(network.get_submodule(name).weight.numel() for name in linear_layers(network))
    n_others = sum(weight.numel() for weight in network.parameters()) - n_linear
    assert skeleton.n_bytes(2) == 2 * (n_linear + n_others)
    assert skeleton.n_bytes(2, {"quant_method": "bitsandbytes", "load_in_8bit": True}) == 2 * n_others + n_linear
    assert skeleton.n_bytes(2, GPTQ) == 2 * n_others + n_linear / 2


# --- A plain checkpoint in fewer bits ---------------------------------------------------------------------------------


def test_what_is_quantised_is_not_quantised_again(in_rows):
    with pytest.raises(MelensError, match=r"is quantised already\. Leave out model\.quantize"):
        load(in_rows[1], quantize="4bit")
    with pytest.raises(MelensError, match=r"model\.quantize is '3bit'; it must be 8bit, 4bit or null"):
        load(in_rows[1], quantize="3bit")
    with pytest.raises(MelensError, match=r"To use model\.quantize, save it"):
        melens.load_model("random", quantize="8bit")


def test_bitsandbytes_is_named_where_it_is_missing(tmp_path):
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("it is installed here")
    plain_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(MelensError, match=r"would be quantised with bitsandbytes, .*`pip install"):
        load(tmp_path, quantize="8bit")


@pytest.mark.parametrize(("quantize", "share"), [("8bit", 0.05), ("4bit", 0.3)])
def test_a_plain_checkpoint_is_quantised_as_it_is_loaded(tmp_path, quantize, share):
    pytest.importorskip("bitsandbytes")
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, num_key_value_heads=4)
    network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    network.save_pretrained(tmp_path)
    model = load(tmp_path, quantize=quantize)
    assert quantization.describe_quantization(model.original_model) == f"bitsandbytes_{quantize}"
    tokens = TOKENS.to(model.cfg.device)
    with torch.no_grad():
        found, expected = model(tokens), network.to(model.cfg.device)(tokens).logits
        twin = plain_twin(model)(tokens).logits
    assert 0 < (found - expected).norm() / expected.norm() < share
    torch.testing.assert_close(twin, found, rtol=1e-2, atol=1e-2)
    checked = melens.verify(model)
    assert checked.agrees
    assert checked.rule.alone == (quantize == "8bit")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert reloaded.model.layers[0].mlp.up_proj.weight.dtype == torch.float32  # the checkpoint itself stays plain
