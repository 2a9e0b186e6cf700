"""What decides a kept result is in its key: weights in their order, configs, hooks, versions, options."""

import copy
import json
import weakref
from dataclasses import dataclass, field
from datetime import date
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from planted import bridge, gains_apart, plain_model
from pydantic import BaseModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import melens
from melens import MelensError, WeMask
from melens.models.gates import add_gates, gates_of
from melens.models.twins import plain_twin
from melens.models.view import view_model
from melens.storage import cache
from melens.storage.cache import Store, fingerprint, hash_of, store_for, tokenizer_fingerprint


class Weight(nn.Module):
    """A network of one weight, longer than two blocks of the hash."""

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(values.clone())


def drawn(dtype=torch.float32, shape=(384, 256)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def shuffled(size, block=1):
    order = torch.randperm(size // block, generator=torch.Generator().manual_seed(1))
    return (order[:, None] * block + torch.arange(block)).flatten()


def sign_of(values, *places):
    values = values.clone()
    for place in places:
        values.view(-1)[place] *= -1
    return values


def swapped(values, one, other):
    values = values.clone()
    flat = values.view(-1)
    flat[one], flat[other] = flat[other].clone(), flat[one].clone()
    return values


def with_last(values, last):
    values = values.clone()
    values.view(-1)[-1] = last
    return values


CHANGES = {
    "rows shuffled": lambda w: w[shuffled(len(w))],
    "columns shuffled": lambda w: w[:, shuffled(w.shape[1])],
    "two rows swapped": lambda w: w[[1, 0, *range(2, len(w))]],
    "rows in reverse": lambda w: w.flip(0),
    "blocks of 128 KiB in another order": lambda w: w.roll(128, 0),
    "blocks of 64 bytes in another order": lambda w: w.view(-1)[shuffled(w.numel(), 16)].view(w.shape),
    "neighbours swapped": lambda w: swapped(w, 6, 7),
    "two a block apart swapped": lambda w: swapped(w, 5, 5 + 2**15),
    "one sign": lambda w: sign_of(w, 3),
    "the signs of neighbours": lambda w: sign_of(w, 0, 1),
    "the signs of the last of two words": lambda w: sign_of(w, 3, 7),
    "the signs of four": lambda w: sign_of(w, 0, 1, 2, 3),
    "every sign": lambda w: -w,
    "the last bit of the last weight": lambda w: with_last(w, w.view(-1)[-1].nextafter(w.new_ones(()))),
    "another shape": lambda w: w.reshape(w.shape[1], w.shape[0]),
}  # fmt: skip


@pytest.mark.parametrize("change", list(CHANGES))
def test_every_natural_change_of_a_weight_is_seen(change):
    before = drawn()
    after = CHANGES[change](before)
    assert fingerprint(Weight(before)) != fingerprint(Weight(after))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
@pytest.mark.parametrize("change", ["rows shuffled", "the signs of neighbours", "neighbours swapped"])
def test_it_is_seen_in_every_precision(dtype, change):
    values = (drawn() * 50).to(dtype)

    def of(values):
        network = nn.Module()
        network.register_buffer("w", values)
        return fingerprint(network)

    assert of(values) != of(CHANGES[change](values))
    assert of(values) == of(values.clone())


def test_a_square_weight_is_not_its_transpose():
    values = drawn(shape=(64, 64))
    assert fingerprint(Weight(values)) != fingerprint(Weight(values.T))
    assert fingerprint(Weight(values.T.contiguous())) == fingerprint(Weight(values.T))  # whatever the layout in memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_changes_never_agree(dtype):
    """Every pair of signs and every swap within a little weight: a sum of its bits would agree by the hundred."""
    values = torch.arange(1, 25).to(dtype).view(4, 6)
    pairs = [(i, j) for i in range(24) for j in range(i)]
    found = [fingerprint(Weight(change(values, *pair))) for change in (sign_of, swapped) for pair in pairs]
    assert len({*found, fingerprint(Weight(values))}) == 2 * len(pairs) + 1


@pytest.mark.parametrize("offset", [1, 3, 4])
def test_a_weight_that_begins_within_a_word_is_read(offset):
    values = drawn(torch.bfloat16, (1_001,))
    storage = torch.cat([values.new_zeros(offset), values])
    within = nn.Module()
    within.register_buffer("w", storage[offset:])
    alone = nn.Module()
    alone.register_buffer("w", values)
    assert fingerprint(within) == fingerprint(alone)


def test_which_weight_holds_what_counts():
    network, other = plain_model("llama"), plain_model("llama")
    first, second = (layer.mlp.up_proj.weight for layer in other.model.layers[:2])
    first.data, second.data = second.data, first.data
    assert fingerprint(network) != fingerprint(other)
    other = plain_model("llama")
    for name, buffer in other.named_buffers():  # in no checkpoint
        if name.endswith("rotary_emb.inv_freq"):
            buffer *= 1.5
    assert fingerprint(network) != fingerprint(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda network: setattr(network.config, "rms_norm_eps", 10.0),
        lambda network: setattr(network.model.norm, "variance_epsilon", 10.0),
        lambda network: network.config.rope_parameters.update(rope_theta=77.0),
        lambda network: setattr(network.generation_config, "repetition_penalty", 1.3),
        lambda network: setattr(network.model.layers[0].mlp, "act_fn", nn.GELU()),
        lambda network: network.train(),
        lambda network: network.bfloat16(),
        lambda network: network.lm_head.register_forward_hook(lambda *_: None),
        lambda network: setattr(network.model.norm, "forward", lambda hidden: hidden),
        lambda network: WeMask(0.3, "random", start=1).install(network),
        lambda network: WeMask(0.3, "batch_magnitude", start=1).install(network),
        lambda network: add_gates(view_model(network), "headwise"),
    ],
    ids=["eps", "own_eps", "RoPE", "generation", "act", "mode", "dtype", "hook", "forward", "mask", "by_token", "gate"],
)
def test_all_that_decides_what_a_model_computes_is_in_its_fingerprint(change):
    before = fingerprint(plain_model("llama"))
    network = plain_model("llama")
    assert fingerprint(network) == before
    change(network)
    assert fingerprint(network) != before


def test_where_a_model_lies_is_not():
    network = plain_model("llama")
    before = fingerprint(network)
    network.config._name_or_path = "elsewhere"
    assert fingerprint(network) == before


def test_gates_are_told_by_their_weights():
    def gated():
        network = plain_model("llama")
        add_gates(view_model(network), "headwise")
        return network

    network = gated()
    assert fingerprint(network) == fingerprint(gated())
    gates_of(view_model(network))[1].weight.data += 1
    assert fingerprint(network) != fingerprint(gated())


def test_a_user_s_hook_on_a_bridge_gives_another_key():
    model = bridge(plain_model("llama"))
    before = fingerprint(model.original_model)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda activation, hook: activation * 2)]):
        assert fingerprint(model.original_model) != before
    assert fingerprint(model.original_model) == before


def test_what_a_bridge_attaches_in_its_first_forward_pass_is_no_change():
    model = bridge(plain_model("llama"))
    before = fingerprint(model.original_model)
    model.run_with_cache(torch.arange(5)[None])
    melens.trace(model, [torch.arange(1, 6)])
    assert fingerprint(model.original_model) == before


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_offloaded_weights_are_fetched(tmp_path, offload):
    def offloaded(network):
        if offload == "disk":
            disk_offload(network, str(tmp_path / fingerprint(network)[:8]), execution_device="cpu")
        else:
            cpu_offload(network, execution_device="cpu")
        assert network.lm_head.weight.is_meta
        return fingerprint(network)

    plain, other = plain_model("llama"), plain_model("llama")
    other.model.layers[2].mlp.up_proj.weight.data = other.model.layers[2].mlp.up_proj.weight.data.flip(0)
    alone = fingerprint(plain)
    assert offloaded(plain) == alone
    assert offloaded(other) != alone
    assert plain.lm_head.weight.is_meta


def test_a_fetched_weight_is_let_go_of_before_the_next(monkeypatch):
    network, held, block_sums = plain_model("llama"), [], cache._block_sums
    cpu_offload(network, execution_device="cpu")

    def spy(weight):
        held.append(weakref.ref(weight))
        assert sum(ref() is not None for ref in held) <= 3  # what the module itself has
        return block_sums(weight)

    monkeypatch.setattr(cache, "_block_sums", spy)
    fingerprint(network)
    assert len(held) > 30


def test_a_weight_without_values_is_refused_by_name():
    with pytest.raises(MelensError, match=r"model\.embed_tokens\.weight is on the meta device.*exp\.keep=false"):
        fingerprint(plain_model("llama").to("meta"))


def test_tied_weights_are_read_once(monkeypatch):
    network, read, block_sums = plain_model("llama"), [], cache._block_sums
    network.lm_head.weight = network.model.embed_tokens.weight
    monkeypatch.setattr(cache, "_block_sums", lambda weight: read.append(weight.shape) or block_sums(weight))
    fingerprint(network)
    assert read.count(network.lm_head.weight.shape) == 1


# --- What is told -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    a: object
    b: object = None
    _seen: list = field(default_factory=list)


class Options(BaseModel):
    rate: float | list[float]
    seed: int = 0


TOLD = {
    "shape": (torch.zeros(4, 8), torch.zeros(8, 4)),
    "dtype": (torch.zeros(2, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)),
    "a part of a long list": ([torch.arange(5_000)], [torch.arange(5_000).index_fill(0, torch.tensor(2_500), 1)]),
    "nesting": ([[1, 2], [3]], [[1], [2, 3]]),
    "one or two": (["ab"], ["a", "b"]),
    "text or number": ("1", 1),
    "true or one": (True, 1),
    "none or text": (None, "None"),
    "bits of a float": (0.1, 0.1 + 2**-56),
    "names": ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    "fields": (Told(1, 2), Told(2, 1)),
    "options": (Options(rate=0.1), Options(rate=[0.1])),
    "options of another name": (Options(rate=0.1), {"rate": 0.1, "seed": 0}),
    "masks": (WeMask(0.1, start=1), WeMask(0.1, start=2)),
    "precision": (torch.ones(3).bfloat16(), torch.ones(3).half()),
}


@pytest.mark.parametrize("name", list(TOLD))
def test_values_that_differ_have_different_hashes(name):
    one, other = TOLD[name]
    assert hash_of(one) != hash_of(other)
    assert hash_of([one, other]) != hash_of([other, one])
    assert hash_of(one) == hash_of(copy.deepcopy(one))


def test_what_a_dataclass_remembers_and_the_order_of_names_are_not_told():
    assert hash_of(Told(1, 2, [3])) == hash_of(Told(1, 2))
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})


def test_what_a_repr_would_cut_short_is_refused():
    with pytest.raises(TypeError, match="A key cannot hold object"):
        hash_of([object()])


@pytest.fixture
def network():
    return plain_model("llama")


def test_texts_of_other_lengths_have_another_store(network):
    texts = torch.arange(32)
    assert store_for("a", network, texts.view(4, 8)).folder != store_for("a", network, texts.view(8, 4)).folder


@pytest.mark.parametrize("library", ["torch", "transformers", "transformer_lens", "numpy", "pandas", "trl"])
def test_another_version_of_a_library_has_another_store(network, library, monkeypatch):
    before = store_for("a", network, libraries=("trl",)).folder
    version = cache.metadata.version
    monkeypatch.setattr(cache.metadata, "version", lambda name: "0" if name == library else version(name))
    assert store_for("a", network, libraries=("trl",)).folder != before


def test_a_library_that_is_not_there_is_no_error(network):
    assert store_for("a", network, libraries=("no such library",)).folder != store_for("a", network).folder


def test_other_source_has_another_store(network, monkeypatch):
    before = store_for("a", network).folder
    monkeypatch.setattr(cache, "code_version", lambda: "0")
    assert store_for("a", network).folder != before


def test_code_is_told_by_file(tmp_path):
    for number, (first, second) in enumerate([("xy", "z"), ("x", "yz")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.py").write_text(first)
        (folder / "b.py").write_text(second)
    assert cache.code_version(tmp_path / "0") != cache.code_version(tmp_path / "1")


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer(words=("a", "b", "c"), merges=(("a", "b"),), template=None, **tokens):
    vocabulary = {word: at for at, word in enumerate(["?", "<s>", "</s>", *words, "ab", "bc"])}
    rules = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="?"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="?", **tokens)
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    "other",
    [
        {"words": ("b", "a", "c")},
        {"merges": (("b", "c"),)},
        {"template": "{{ messages }}"},
        {"bos_token": "<s>"},
        {"eos_token": "</s>"},
    ],
    ids=["vocabulary", "merges", "template", "BOS", "EOS"],
)
def test_tokenizers_of_one_size_are_told_apart(other):
    assert len(tokenizer()) == len(tokenizer(**other))
    assert tokenizer_fingerprint(tokenizer()) != tokenizer_fingerprint(tokenizer(**other))


def test_what_the_last_call_asked_for_is_no_part_of_a_tokenizer():
    made = tokenizer(eos_token="</s>")
    before = tokenizer_fingerprint(made)
    made.pad_token = "</s>"
    made(["a b", "c"], padding=True, truncation=True, max_length=2)
    assert json.loads(made.backend_tokenizer.to_str())["padding"] is not None
    assert tokenizer_fingerprint(made) == before
    assert tokenizer_fingerprint(None) != before


def test_a_template_that_writes_the_date_is_told_by_the_day(monkeypatch):
    def told(template, day):
        monkeypatch.setattr(cache, "date", SimpleNamespace(today=lambda: date(2026, 1, day)))
        return tokenizer_fingerprint(tokenizer(template=template))

    dated = "{{ strftime_now('%d %b %Y') }}{{ messages }}"
    assert told(dated, 1) == told(dated, 1) != told(dated, 2)
    assert told("{{ messages }}", 1) == told("{{ messages }}", 2)


# --- Stores -----------------------------------------------------------------------------------------------------------


def test_a_store_gives_nothing_for_a_file_that_is_not_whole(tmp_path):
    store = Store(tmp_path)
    store.save("a", {"x": torch.arange(3)})
    assert store.load("a")["x"].tolist() == [0, 1, 2]
    (tmp_path / "a.safetensors").write_bytes(b"half")
    assert store.load("a") is None
    assert store.load("b") is None


def test_a_bridge_and_its_twin_keep_apart_what_they_compute():
    model = bridge(gains_apart(plain_model("llama")))
    assert fingerprint(model.original_model) != fingerprint(plain_twin(model))
