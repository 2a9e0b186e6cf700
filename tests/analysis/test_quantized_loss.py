"""What quantisation costs on a planted model, whose outliers are the massive token's alone; what claims make of it."""

import re

import numpy as np
import pytest
import torch
from planted import VOCABULARY, bridge, gains_apart, plain_model, plant

import melens
from experiments.options import compose_options
from experiments.quantization import _masks
from experiments.runner.job import run_job
from melens import MelensError, WeMask
from melens.analysis.me_layer import Criterion
from melens.analysis.quantization_claims import CLAIMS, QuantizationMetrics
from melens.analysis.quantized_loss import _share_gone
from melens.claims.engine import NotMeasuredError

TOKEN, DIM, LENGTH = 7, 21, 16


def written_by(network, first_tokens):
    """Texts that the model itself writes: on random tokens, of which it predicts none, rounding would cost nothing."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor(first_tokens)[:, None]
    tokens = torch.cat([tokens, torch.randint(10, VOCABULARY, (len(tokens), 2), generator=generator)], dim=1)
    with torch.no_grad():
        while tokens.shape[1] < LENGTH:
            tokens = torch.cat([tokens, network(tokens).logits[:, -1:, 10:].argmax(-1) + 10], dim=1)
    return tokens


EVERYTHING = WeMask(rate=1)


def quantization(first_tokens, *, planted=True, masks=(EVERYTHING,), **options):
    network = gains_apart(plain_model("llama"))
    if planted:
        plant(network, block=1, token=TOKEN, dim=DIM)
        mlp = network.model.layers[1].mlp  # the neuron that writes it drowns the others of its block
        mlp.gate_proj.weight.data[0] *= 30
        mlp.up_proj.weight.data[0] *= 30
    texts = written_by(network, first_tokens)
    study = melens.study(bridge(network), [text[:12] for text in texts], criterion=Criterion(trailing_blocks=1))
    return melens.analysis.quantization(study, masks, texts, **options)


@pytest.fixture(scope="module")
def planted():
    return quantization([TOKEN] * 6)


def test_planted_outliers_are_found_to_be_the_massive_tokens(planted):
    found = planted.metrics
    assert (found.massive_per_text, found.predictions_per_text) == (1, LENGTH - 2)
    assert found.dloss_static_interval[0] > 0.1
    assert found.exempt_share_static_interval[0] > 0.5
    assert found.exempt_share_tensor > 0.5
    verdicts = planted.claims.set_index("id").verdict
    assert verdicts[["quant-fails", "quant-massive"]].tolist() == ["holds", "holds"]
    outliers = planted.tables["linear_inputs"].query("condition == 'no mask' and layer == 1 and input == 'down_proj'")
    assert (outliers["largest"] > 20 * outliers["largest_others"]).all()


def test_shares_and_means_are_those_of_the_texts(planted):
    by_text = planted.tables["dloss_by_text"]
    own = by_text[(by_text["bits"] == 8) & (by_text["activations"] == "tensor") & (by_text["weights"] == "full")]
    by_condition = {name: rows["dloss"].to_numpy() for name, rows in own[~own["exempt"]].groupby("condition")}
    rise, masked = by_condition["no mask"], by_condition[planted.metrics.mask]
    assert planted.metrics.mask_share == pytest.approx(1 - masked.sum() / rise.sum())
    left = own[own["exempt"]]["dloss"].to_numpy()
    assert planted.metrics.exempt_share_tensor == pytest.approx(1 - left.sum() / rise.sum())
    assert planted.metrics.dloss_tensor == pytest.approx(rise.mean())
    table = planted.tables["dloss"]
    assert len(table) == 3 * (6 + 2 + 2) + 3 * 2
    row = table.query("condition == 'no mask' and activations == 'tensor' and weights == 'full' and bits == 8")
    assert row[~row["exempt"]]["dloss"].item() == pytest.approx(rise.mean())
    assert np.ptp(by_text["loss"] - by_text["dloss"]) > 0


def test_the_same_share_gone_in_each_text_has_no_error():
    """Whatever the texts' rises: the interval is not that of a difference over a fixed divisor."""
    rise = np.array([4.0, 5.0, 9.0, 4.0, 6.0])
    found = _share_gone("share", "why_not", rise, 0.25 * rise)
    assert found["share"] == pytest.approx(0.75)
    assert found["share_interval"] == pytest.approx((0.75, 0.75))
    assert "No rise" in _share_gone("share", "why_not", rise - 5, rise)["why_not"]


def test_fewer_bits_cost_more_and_figures_draw(planted):
    table = planted.tables["dloss"].query("condition == 'no mask' and activations == 'token' and weights == 'full'")
    by_bits = table[table["exempt"]].set_index("bits")["dloss"]
    assert by_bits[4] > by_bits[8]
    panels = {note.text for note in planted.figures["dloss_by_bits"].plot.layout.annotations}
    assert {"activations, fixed scales", "weights, a scale an output"} <= panels
    drawn = {trace.name for trace in planted.figures["dloss_by_mask"].plot.data}
    assert drawn == {"no mask", "no mask, without massive tokens", planted.metrics.mask}
    assert len(planted.figures["linear_inputs"].plot.data) > 16


def test_a_prefix_takes_the_massive_tokens_place():
    found = quantization([TOKEN, 30, TOKEN, 50], masks=(), bits=[8])
    metrics, table = found.metrics, found.tables["dloss"]
    assert (metrics.prefix, metrics.prefix_is_massive) == (str(TOKEN), True)
    assert metrics.massive_behind_prefix == 0.5  # here the texts' own is massive still
    assert metrics.prompts_massive_behind_prefix == 2
    assert "2 of 4 prompts have" in found.claims.set_index("id").note["quant-prefix"]
    assert set(table[table["condition"] == "behind a prefix"]["activations"]) == {"static", "tensor", "token"}
    by_text = found.tables["dloss_by_text"]
    static, token = (
        by_text[(by_text["condition"] == where) & (by_text["activations"] == kind) & (by_text["weights"] == "full")]
        for where, kind in (("behind a prefix", "static"), ("no mask", "token"))
    )
    more = static["dloss"].to_numpy() - token[~token["exempt"]]["dloss"].to_numpy()
    assert metrics.prefix_over_token == pytest.approx(more.mean())
    assert metrics.mask_why_not.startswith("There is no mask")


def test_texts_that_begin_with_the_prefix_have_none(planted):
    assert planted.metrics.prefix is None
    assert "begin with the token" in planted.metrics.prefix_why_not


def test_without_massive_tokens_nothing_is_said_of_them():
    found = quantization([20, 30, 40], planted=False, bits=[6])
    assert (found.metrics.massive_per_text, found.metrics.predictions_per_text) == (0, LENGTH - 2)
    assert not found.tables["dloss"].query("condition == 'no mask'")["exempt"].any()
    assert set(found.claims["verdict"]) == {"not measured"}
    assert found.metrics.bits_why_not == "8 bits were not tried."
    assert all(figure.plot.data for figure in found.figures.values())


@pytest.mark.parametrize(
    ("name", "value", "interval", "verdict"),
    [
        ("quant-fails", 0.2, (0.15, 0.25), "holds"),
        ("quant-fails", 0.2, (0.05, 0.35), "holds in part"),
        ("quant-fails", 0.005, (0.004, 0.006), "does not hold"),
        ("quant-massive", 0.7, (0.6, 0.8), "holds"),
        ("quant-massive", 0.05, (0.0, 0.1), "does not hold"),
        ("quant-token", 0.005, (0.001, 0.009), "holds"),
        ("quant-token", 0.05, (0.02, 0.08), "holds in part"),
        ("quant-token", 0.2, (0.1, 0.3), "does not hold"),
        ("quant-prefix", -0.1, (-0.2, 0.0), "holds"),
        ("quant-prefix", 0.2, (0.1, 0.3), "does not hold"),
        ("quant-mask", 0.6, (0.55, 0.65), "holds"),
        ("quant-mask", 0.2, (0.1, 0.3), "holds in part"),
        ("quant-mask", 0.02, (-0.1, 0.1), "does not hold"),
    ],
)
def test_each_claim_can_come_out_either_way(name, value, interval, verdict):
    fields = {
        "quant-fails": "dloss_static", "quant-massive": "exempt_share_static", "quant-token": "dloss_token",
        "quant-prefix": "prefix_over_token", "quant-mask": "mask_share",
    }  # fmt: skip
    (claim,) = [claim for claim in CLAIMS if claim.id == name]
    metrics = QuantizationMetrics(**{fields[name]: value, f"{fields[name]}_interval": interval}, prefix_is_massive=True)
    assert claim.judge(metrics).verdict == verdict


def test_a_prefix_that_is_not_massive_judges_nothing():
    (claim,) = [claim for claim in CLAIMS if claim.id == "quant-prefix"]
    metrics = QuantizationMetrics(
        prefix="'a'", prefix_is_massive=False, prefix_over_token=0.0, prefix_over_token_interval=(0.0, 0.0)
    )
    with pytest.raises(NotMeasuredError, match="The prefix 'a' is not massive"):
        claim.judge(metrics)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": [1]}, "a list of whole numbers from 2 to 16"), ({"max_tokens": 2}, "at least 3 are needed")],
)
def test_a_mistake_gets_a_sentence(options, message):
    with pytest.raises(MelensError, match=re.escape(message)):
        quantization([TOKEN] * 3, masks=(), **options)


def test_the_masks_that_are_compared_are_the_users_where_the_user_chose():
    names = [*_masks(compose_options("exp=quantization", "model=tiny"))]
    assert names == ["paper", "resid_pre", "random", "magnitude"]
    assert [*_masks(compose_options("exp=quantization", "model=tiny", "wemask=random"))] == ["random"]
    own = _masks(compose_options("exp=quantization", "model=tiny", "wemask.site=[attn_in,ln1_in]"))
    assert own["paper"].site == ["attn_in", "ln1_in"]


def test_a_model_without_an_me_layer_is_measured_from_the_command_line(tmp_path, capsys):
    options = ("exp=quantization", "model=tiny", "exp.bits=[8]", "exp.n_texts=3", "exp.max_tokens=12", "prompts=short")
    run_job(compose_options(*options), tmp_path)
    assert (tmp_path / "dloss.parquet").exists()
    assert "In full precision the loss is" in capsys.readouterr().out
