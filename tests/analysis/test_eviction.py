"""Loss and needles under a sliding cache: against plain losses of pieces, by hand, and what the claims make of them."""

import numpy as np
import pandas as pd
import pytest
import torch
from planted import VOCABULARY, bridge, gains_apart, plain_model

import melens
from melens import MelensError
from melens.analysis import cache_eviction
from melens.analysis.cache_eviction import FULL, RANDOM, RECOMPUTED, long_texts
from melens.analysis.cache_eviction_claims import EvictionMetrics
from melens.analysis.cache_losses import needles_found, recomputed_losses, token_losses
from melens.benchmarks.catalog import BENCHMARKS
from melens.benchmarks.language import Questions
from melens.claims.engine import judge_parts
from melens.report.result import Result
from melens.tracing.sliding_cache import SlidingCache

TEXTS = torch.randint(1, VOCABULARY, (2, 27), generator=torch.Generator().manual_seed(1))
NETWORK = gains_apart(plain_model("llama"))


@torch.no_grad()
def plain_losses(ids, begin=0):
    """The loss of the token behind each query from `begin` on, with no token before that."""
    log_p = NETWORK(input_ids=ids[None, begin:-1]).logits[0].log_softmax(-1)
    return -log_p[torch.arange(len(log_p)), ids[begin + 1 :]]


def test_losses_with_every_token_kept_are_the_models_own():
    found = token_losses(bridge(NETWORK), TEXTS, None)
    assert found.shape == (2, 26)
    torch.testing.assert_close(found, torch.stack([plain_losses(ids) for ids in TEXTS]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [8, 9])
def test_recomputed_losses_have_half_a_piece_before_them(size):
    found = recomputed_losses(bridge(NETWORK), TEXTS, size, max_batch_tokens=16)
    assert found.shape == (2, 26)
    for ids, own in zip(TEXTS, found, strict=True):
        by_begin = {begin: plain_losses(ids, begin) for begin in range(0, 24, 4)}
        for query in range(26):  # pieces of 8 tokens begin at 0, 4, 8, ...; token 8 is predicted by the second
            begin = max(0, 4 * ((query + 1) // 4 - 1))
            assert float(own[query]) == pytest.approx(float(by_begin[begin][query - begin]), abs=1e-4)


def test_a_needle_is_found_if_every_token_of_the_answer_is_the_likeliest():
    context = TEXTS[0, :12].tolist()
    answer = []
    for _ in range(3):
        answer.append(int(NETWORK(input_ids=torch.tensor([context + answer])).logits[0, -1].argmax()))
    wrong = [*answer[:2], (answer[2] + 1) % VOCABULARY]
    questions = Questions(BENCHMARKS["needle"], [(context, answer), (context, wrong)], ["right", "wrong"])
    model = bridge(NETWORK)
    assert needles_found(model, questions, None).tolist() == [True, False]
    assert needles_found(model, questions, SlidingCache(40, (0,))).tolist() == [True, False]


def test_rises_are_over_recomputation_of_queries_that_have_lost_tokens():
    # two texts, four queries, a cache of 2: the last two count
    losses = {
        (RECOMPUTED, False, 0): np.array([[9, 9, 1, 2], [9, 9, 2, 2]], dtype=float),
        ("no sinks", False, 0): np.array([[9, 9, 4, 6], [9, 9, 5, 7]], dtype=float),
        (RANDOM, False, 0): np.array([[9, 9, 2, 2], [9, 9, 3, 3]], dtype=float),
        (RANDOM, False, 1): np.array([[9, 9, 3, 5], [9, 9, 3, 5]], dtype=float),
    }
    rises = cache_eviction._rises(losses, 2).set_index("policy")
    assert rises.loc["no sinks", "mean"] == pytest.approx((3.5 + 4) / 2)
    assert rises.loc[RANDOM, "mean"] == pytest.approx((0.5 + 2.5 + 1 + 2) / 4)
    by_position = cache_eviction._by_position(losses, 2)
    own = by_position[(by_position["policy"] == "no sinks") & (by_position["text"] == 1)]
    assert own[["position", "loss"]].values.tolist() == [[0.5, 9], [1.5, 9], [2.5, 5], [3.5, 7]]


def test_where_attention_does_nothing_no_cache_costs_anything():
    network = gains_apart(plain_model("llama", vocab_size=259))
    for layer in network.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    tokens = [torch.randint(1, 200, (9,), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    result = melens.analysis.eviction(melens.study(bridge(network), tokens), cache=16, n_texts=3, n_tokens=40)
    assert result.metrics.mask_why_not == "The model has no ME layer to mask from."
    assert "no tokenizer" in result.metrics.needle_why_not
    assert set(result.metrics.rise_by_policy) == {FULL, "no sinks", "1 sink kept", "4 sinks kept", RANDOM}
    assert max(map(abs, result.metrics.rise_by_policy.values())) < 1e-5
    verdicts = result.claims.set_index("id")["verdict"].to_dict()
    assert verdicts["sinks-needed-in-cache"] == "does not hold"
    assert verdicts["four-sinks-restore"] == "not measured"
    assert all("nan" not in str(row).lower() for row in result.findings)
    assert set(result.draw().figures) == {"loss_by_position", "loss_rise"}


def test_texts_may_go_beyond_the_context_and_must_hold_two_caches():
    model = bridge(NETWORK)  # a context of 128 tokens, and no tokenizer
    texts, ids = long_texts(model, None, cache=16, n_texts=3, n_tokens=150)
    assert (texts.shape, ids) == ((3, 150), [])
    with pytest.raises(MelensError, match="too short for a cache of 16: give n_tokens=32 or more"):
        long_texts(model, None, cache=16, n_texts=3, n_tokens=31)


HOLDS = {"rise_without": 2.0, "rise_without_interval": (1.5, 2.5)}


@pytest.mark.parametrize(
    ("claim", "measured", "verdict"),
    [
        ("sinks-needed-in-cache", {}, "holds"),
        ("sinks-needed-in-cache", {"rise_without": 0.3, "rise_without_interval": (0.2, 0.4)}, "holds in part"),
        ("sinks-needed-in-cache", {"rise_without": 0.02, "rise_without_interval": (0.01, 0.03)}, "does not hold"),
        ("four-sinks-restore", {"rise_with_four": 0.01, "rise_with_four_interval": (-0.01, 0.03)}, "holds"),
        ("four-sinks-restore", {"rise_with_four": 0.15, "rise_with_four_interval": (0.1, 0.2)}, "holds in part"),
        ("four-sinks-restore", {"rise_with_four": 0.3, "rise_with_four_interval": (0.2, 0.4)}, "does not hold"),
        ("four-sinks-restore", {"rise_without": 0.04, "rise_with_four": 0.0}, "not measured"),
        ("random-tokens-do-not", {"rise_with_random": 1.8, "rise_with_random_interval": (1.2, 2.4)}, "holds"),
        ("random-tokens-do-not", {"rise_with_random": 1.8, "rise_with_random_interval": (0.4, 2.4)}, "holds in part"),
        ("random-tokens-do-not", {"rise_with_random": 0.2, "rise_with_random_interval": (0.1, 0.3)}, "does not hold"),
        ("mask-spares-sinks", {"rise_without_masked": 0.5, "rise_without_masked_interval": (0.2, 0.8)}, "holds"),
        (
            "mask-spares-sinks",
            {
                "rise_without_masked": 1.7,
                "rise_without_masked_interval": (1.5, 1.9),
                "rise_spared_interval": (0.1, 0.5),
            },
            "holds in part",
        ),
        (
            "mask-spares-sinks",
            {"rise_without_masked": 1.9, "rise_without_masked_interval": (1, 2.8), "rise_spared_interval": (-0.1, 0.3)},
            "does not hold",
        ),
        ("mask-spares-sinks", {"mask_why_not": "No mask."}, "not measured"),
        ("mask-helps-long-texts", {"loss_masked_less": -0.05, "loss_masked_less_interval": (-0.08, -0.02)}, "holds"),
        (
            "mask-helps-long-texts",
            {"loss_masked_less": -0.05, "loss_masked_less_interval": (-0.2, 0.1)},
            "holds in part",
        ),
        ("mask-helps-long-texts", {"loss_masked_less": 0.05, "loss_masked_less_interval": (0.0, 0.1)}, "does not hold"),
    ],
)
def test_verdicts_by_the_thresholds(claim, measured, verdict):
    metrics = EvictionMetrics(me_layer=2, **HOLDS | measured)
    judged = judge_parts([Result("eviction", {"name": "by hand"}, metrics)])
    assert judged.set_index("id").loc[claim, "verdict"] == verdict
    assert pd.notna(judged.set_index("id").loc[claim, "fixed"])
