"""Kinds of attention without softmax: by their formulas, by transformers and by the bridge, saved and loaded."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AttentionInterface

import melens
from melens.errors import MelensError
from melens.models.attention_kinds import WEIGHTS, _InBridge, attend_as_configured, mark_saved, set_attention
from melens.models.loading import plan_model
from melens.models.twins import bridged_twin, plain_twin
from melens.tracing import attended
from melens.tracing.attention import weighed_attention

SIZES = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
KINDS = sorted(WEIGHTS)
FAMILIES = ("llama", "qwen3", "gemma3_text", "mistral", "olmo2", "phi3")
TOKENS = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))


def model_of(family="llama", **options):
    small = {"sliding_window": 8} if family == "gemma3_text" else {"pad_token_id": 0}
    return melens.load_model("random", model_type=family, config=SIZES | small, device="cpu", **options)


def by_hand(kind, scores):
    """Weigh the scores of one query in double precision, as the papers write it."""
    x = torch.tensor(scores, dtype=torch.float64)
    if kind == "softpick":
        return torch.relu(x.exp() - 1) / (x.exp() - 1).abs().sum()
    if kind == "off_by_one":
        return x.exp() / (1 + x.exp().sum())
    return 1 / (1 + len(x) * (-x).exp())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scores", [[1.0, -2.0, 0.5], [-3.0, -0.1], [30.0, 29.0, -80.0], [0.7]])
def test_weights_are_those_of_the_paper_whatever_is_unseen(kind, scores):
    lowest = torch.finfo(torch.float32).min
    seen = torch.tensor(scores)
    for unseen in (float("-inf"), lowest, seen[:1] + lowest):
        row = torch.cat([seen, torch.tensor([float(unseen)] * 2)])
        weights = WEIGHTS[kind](row[None])[0]
        torch.testing.assert_close(weights[:-2].double(), by_hand(kind, scores), rtol=1e-5, atol=1e-7)
        assert (weights[-2:] == 0).all() or (kind == "sigmoid" and weights[-2:].max() < 1e-30)


def test_softpick_pays_nothing_to_a_score_under_0_and_is_1_for_one_that_stands_out():
    weights = WEIGHTS["softpick"](torch.tensor([[-1.0, 0.0, 50.0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_the_gradient_of_their_formula(kind):
    scores = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(WEIGHTS[kind], (scores,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unseen", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_row_that_sees_nothing_pays_nothing_and_has_a_gradient(kind, unseen):
    scores = torch.tensor([[0.5, 2.0], [unseen, unseen]], requires_grad=True)
    weights = WEIGHTS[kind](scores)
    weights.square().sum().backward()
    assert weights[1].tolist() == [0, 0]
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_mask_hides_is_unseen_in_reduced_precision_too(kind, dtype):
    """float16's lowest number, which hides a key there, is a score like any other in float32."""
    seen, states = torch.ones(5, 5).tril().bool(), torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for own in (dtype, torch.float32):
        mask = torch.where(seen, 0.0, torch.finfo(own).min).to(own)[None, None]
        own_states = states.to(dtype).to(own)
        _, pattern = AttentionInterface()[f"melens_{kind}"](torch.nn.Module().eval(), *[own_states] * 3, mask, 0.3)
        scores = own_states @ own_states.mT * 0.3 + mask
        found += [pattern.float(), _InBridge(kind)(scores, torch.float32)]
    for weights in found[:3]:
        torch.testing.assert_close(weights, found[3], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_plain_model_and_measurement_pay_the_same(family, kind):
    softmax, model = model_of(family), model_of(family, attention=kind)
    plain = plain_twin(model)
    expected = plain(TOKENS, output_attentions=True)
    torch.testing.assert_close(model(TOKENS), expected.logits)
    assert not torch.allclose(softmax(TOKENS), expected.logits, atol=1e-4)
    trace = melens.trace(model, list(TOKENS), [melens.SinkMass(), melens.AttentionMaps(range(3))])
    assert trace.model["verified"]["way"] == "fast"
    torch.testing.assert_close(trace.tensors["attention_maps"], torch.stack(expected.attentions, 1))
    for layer, pattern in enumerate(
        expected.attentions if family != "gemma3_text" else ()
    ):  # whose windows do not count
        found = trace["sink_mass"].query(f"layer == {layer}").set_index(["prompt", "head"])["sink_mass"].unstack()
        torch.testing.assert_close(torch.tensor(found.to_numpy()), pattern[:, :, 1:, 0].mean(-1), rtol=1e-4, atol=1e-6)


def test_a_key_that_is_seen_and_paid_nothing_counts_as_seen():
    pattern = torch.tensor([[[[1.0, 0, 0], [0, 0, 0], [0, 0, 0.5]]]])
    for window, seen_by in ((None, [3, 2, 1]), (2, [2, 2, 1])):
        found = attended.FromPattern(pattern, window).by_key(torch.tensor([3]))
        assert found[0, 0].tolist() == [[paid, seen] for paid, seen in zip([1, 0, 0.5], seen_by, strict=True)]
    model = model_of(attention="softpick")
    patterns = [model.run_with_cache(TOKENS)[1][f"blocks.{layer}.attn.hook_pattern"] for layer in range(3)]
    table = melens.trace(model, list(TOKENS), melens.ImportanceByKey())["importance_by_key"]
    for layer, pattern in enumerate(patterns):
        found = table[table["layer"] == layer]["importance"].to_numpy().reshape(2, -1)
        expected = pattern.mean(1).sum(1) / torch.arange(24, 0, -1)
        torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["softpick", "sigmoid"])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 4, "softcap": 1.5}])
@pytest.mark.parametrize("rows_in_a_chunk", [1, 4, 1000])
def test_rows_computed_a_few_at_a_time_are_those_of_the_pattern(kind, options, rows_in_a_chunk, monkeypatch):
    monkeypatch.setattr(attended, "_CHUNK_BYTES", rows_in_a_chunk * 4 * 2 * 4 * 13)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 13, 8, generator=generator) for heads in (4, 2, 2))
    output, read = weighed_attention(query, key, value, kind, scale=0.7, **options)
    scores = 0.7 * query.double() @ key.repeat_interleave(2, 1).double().mT
    scores = scores if "softcap" not in options else 1.5 * torch.tanh(scores / 1.5)
    distance = torch.arange(13)[:, None] - torch.arange(13)
    sees = (distance >= 0) & (distance < options.get("window", 13))
    pattern = torch.zeros_like(scores)
    for row, head, at in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(13)):
        pattern[row, head, at, sees[at]] = by_hand(kind, scores[row, head, at, sees[at]].tolist())
    torch.testing.assert_close(output.double(), pattern @ value.double().repeat_interleave(2, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.on_keys((0, 7, 40)).double()[..., :2], pattern[..., [0, 7]], rtol=1e-4, atol=1e-6)
    assert not read.on_keys((40,)).any()
    by_key = read.by_key(torch.tensor([13, 10]))
    for row, n in enumerate([13, 10]):
        torch.testing.assert_close(by_key[row, ..., 0].double(), pattern[row, :, :n].sum(1), rtol=1e-4, atol=1e-5)
        assert torch.equal(by_key[row, 2, :, 1], sees[:n].sum(0).float())


def test_off_by_one_is_softmax_beside_a_key_that_is_zero():
    model = plain_twin(model_of(attention="off_by_one"))
    pattern = model(TOKENS, output_attentions=True).attentions[0]
    scores = torch.log(pattern / (1 - pattern.sum(-1, keepdim=True)))  # e to the score is what is paid over the rest
    torch.testing.assert_close(torch.softmax(with_a_zero(scores), -1)[..., :-1], pattern, rtol=1e-4, atol=1e-6)


def with_a_zero(scores):
    return torch.nn.functional.pad(scores, (0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_decodes_as_it_prefills_and_padding_changes_nothing(kind):
    model = plain_twin(model_of(attention=kind))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(TOKENS[:1, :9], use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(with_cache, without)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), TOKENS[:1]], 1)
    seen = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 24, dtype=torch.long)], 1)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    left = model(padded, attention_mask=seen, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(left, model(TOKENS[:1]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_attends_as_it_did_and_transformers_alone_refuses_it(kind, tmp_path):
    model = plain_twin(model_of(attention=kind))
    model.save_pretrained(tmp_path)
    mark_saved(tmp_path, model.config)
    loaded = melens.load_model(tmp_path, device="cpu")
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS).logits)
    assert json.loads((tmp_path / "config.json").read_text())["melens_attention"] == kind
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    if kind == KINDS[0]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode
        assert f"melens_{kind}" in done.stderr


def test_every_copy_attends_alike():
    model = model_of(attention="softpick")
    expected = model(TOKENS)
    torch.testing.assert_close(copy.deepcopy(plain_twin(model))(TOKENS).logits, expected)
    torch.testing.assert_close(bridged_twin(plain_twin(model), "again")(TOKENS), expected)


def test_a_mask_masks_and_a_pattern_can_be_changed():
    model = model_of(attention="softpick")
    with melens.WeMask(rate=0.5, select="random", start=1).applied(model):
        masked = melens.trace(model, list(TOKENS), [melens.SinkMass()])
    assert not masked["sink_mass"].equals(melens.trace(model, list(TOKENS), [melens.SinkMass()])["sink_mass"])
    nothing = model.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.0.attn.hook_pattern", lambda pattern, hook: torch.zeros_like(pattern))]
    )
    assert not torch.allclose(nothing, model(TOKENS), atol=1e-4)


def test_softmax_stays_as_it_is():
    model = model_of()
    before = model(TOKENS)
    attend_as_configured(model)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("gemma2", {"head_dim": 16}, "caps its scores"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "has learned sinks"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "in code of its own"),
        ("gemma3_text", {"head_dim": 16, "use_bidirectional_attention": True}, "in chunks or both ways"),
    ],
)
def test_a_model_whose_attention_is_of_another_making_is_refused(family, config, said):
    sizes = {} if family == "bloom" else SIZES
    with pytest.raises(MelensError, match=said):
        plan_model("random", model_type=family, config=sizes | config, device="cpu", attention="softpick")


@pytest.mark.parametrize(
    ("family", "kind", "said"),
    [("bloom", "softpick", "in code of its own"), ("llama", "newer", "says melens_attention")],
)
def test_a_folder_that_cannot_attend_as_it_says_is_refused_before_its_weights_are_read(family, kind, said, tmp_path):
    model = plain_twin(melens.load_model("random", model_type=family, device="cpu"))
    model.config.melens_attention = kind
    model.config.save_pretrained(tmp_path)  # and no weights
    with pytest.raises(MelensError, match=said):
        plan_model(tmp_path)


def test_an_unknown_kind_and_a_trained_model_are_refused():
    with pytest.raises(MelensError, match="allowed are softpick, off_by_one, sigmoid"):
        set_attention(model_of(), "linear")
    with pytest.raises(MelensError, match=r"model\.attention"):
        plan_model("random", config=SIZES, attention="linear")
    with pytest.raises(MelensError, match="attends as it was trained"):
        plan_model("smollm2-135m", attention="softpick")


@pytest.mark.parametrize(("kind", "works"), [("off_by_one", True), ("softpick", False)])
def test_a_sliding_cache_is_simulated_where_attention_has_a_normaliser(kind, works):
    from melens.tracing.sliding_cache import check_cache

    model = model_of(attention=kind)
    if works:
        check_cache(model, 8, 24)
    else:
        with pytest.raises(MelensError, match="simulated in a model with softpick attention"):
            check_cache(model, 8, 24)
