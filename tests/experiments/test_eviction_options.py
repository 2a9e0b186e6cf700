"""`exp=eviction` from its options to its result, on a model with a planted massive activation."""

import string

import pytest
import torch
from planted import bridge, gains_apart, plain_model, plant

from experiments.eviction import EXPERIMENTS
from experiments.options import compose_options
from experiments.options.reading import OptionError
from experiments.runner.study import begin_study
from melens import MelensError
from melens.models.loading import load_tokenizer

(EVICTION,) = EXPERIMENTS
SMALL = (
    "exp=eviction",
    "exp.cache=64",
    "exp.n_tokens=128",
    "exp.draws=1",
    "exp.n_texts=3",
    "exp.needles=2",
    "exp.keep=false",
)


@pytest.fixture(scope="module")
def model():
    network = gains_apart(plain_model("llama", vocab_size=259, max_position_embeddings=100))
    tokenizer = load_tokenizer("random", tokenizer="bytes", config={"vocab_size": 259})
    plant(network, block=1, token=torch.tensor(tokenizer.convert_tokens_to_ids(list(string.ascii_letters))), dim=5)
    model = bridge(network)
    model.tokenizer = tokenizer
    return model


def test_a_run_takes_the_mask_and_the_text_of_its_options(model, tmp_path):
    (tmp_path / "own.txt").write_text("Rain fell on the quay. " * 40)
    cfg = compose_options(*SMALL, f"exp.text={tmp_path / 'own.txt'}", "wemask.rate=0.2", "exp.sinks=[2]")
    text = EVICTION.prepare(cfg, tmp_path, model)
    prompts = [torch.tensor(model.tokenizer(text)["input_ids"]) for text in ("Abc de", "Bcd ef", "Cde fg")]
    run = begin_study(model, prompts, cfg, lambda name: lambda done, total: None, tmp_path, prepared={"eviction": text})
    result = EVICTION.run(run, cfg.exp)
    metrics = result.metrics
    assert metrics.me_layer == 1
    assert "rate=0.2" in metrics.mask
    assert list(metrics.rise_by_policy_masked) == list(metrics.rise_by_policy)
    assert "2 sinks kept" in metrics.rise_by_policy
    assert (metrics.needles, metrics.trained_context, metrics.tokens_per_text) == (2, 100, 128)
    assert result.tables["needles"].groupby(["policy", "masked"]).size().eq(2).all()
    assert result.draw().figures.keys() == {"loss_by_position", "loss_rise"}


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("exp.n_tokens=100", "too short for a cache of 64"),
        ("exp.n_tokens=200000", "too few for 3 of 200,000"),
        ("exp.text=nowhere.txt", "There is no file nowhere.txt"),
    ],
)
def test_texts_are_tried_before_the_weights_are_read(model, typed, sentence, tmp_path):
    with pytest.raises(MelensError, match=sentence):
        EVICTION.prepare(compose_options(*SMALL, typed), tmp_path, model)


@pytest.mark.parametrize("typed", ["exp.cache=8", "exp.sinks=[9]", "exp.n_texts=2", "exp.needles=-1"])
def test_options_that_make_no_sense_are_refused(typed):
    with pytest.raises(OptionError, match=typed.split("=")[0]):
        compose_options("exp=eviction", typed)


def test_one_mask_is_taken():
    with pytest.raises(OptionError, match="takes one mask"):
        EVICTION.request(compose_options("exp=eviction", "wemask.rate=[0.1,0.2]"))
