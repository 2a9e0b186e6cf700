"""`exp=dynamics` from its options to its result: which checkpoints are taken, kept and refused."""

import json
import logging
import shutil
import string
from pathlib import Path
from uuid import uuid4

import numpy as np
import pandas as pd
import pytest
import torch
from planted import gains_apart, plain_model, plant

from experiments.dynamics import EXPERIMENTS
from experiments.options import compose_options
from experiments.options.reading import OptionError
from experiments.runner import checkpoints
from experiments.runner.jobs import Job
from experiments.runner.study import begin_study
from melens import MelensError
from melens.analysis.checkpoint_dynamics import MeasuredCheckpoint
from melens.models.folders import step_of
from melens.models.loading import load_tokenizer, plan_model
from melens.models.revisions import Checkpoint, in_order, spread, tokens_of
from melens.storage.cache import Store

(DYNAMICS,) = EXPERIMENTS
STRENGTHS = {0: 0.0, 10: 0.001, 100: 1.0}


def save_checkpoint(folder, strength, *, tokenizer=True, **config):
    """A Llama in which block 1 makes capital letters massive as token 0, the more the larger its strength."""
    network = gains_apart(plain_model("llama", **{"vocab_size": 259, "max_position_embeddings": 256} | config))
    bytes_ = load_tokenizer("random", tokenizer="bytes", config={"vocab_size": 259})
    ids = torch.tensor(bytes_.convert_tokens_to_ids(list(string.ascii_uppercase)))
    plant(network, block=1, token=ids, dim=5)
    network.base_model.layers[1].mlp.down_proj.weight.data[5, 0] = 5_000 * strength
    network.save_pretrained(folder)
    if tokenizer:
        bytes_.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    for step, strength in STRENGTHS.items():
        save_checkpoint(folder / f"checkpoint-{step}", strength)
    return folder


@pytest.fixture
def training(saved, tmp_path, monkeypatch):
    """A training of one's own to change, and a cache of one's own, but for what checks the kind of model."""
    monkeypatch.setattr(checkpoints, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("experiments.runner.study.store_for", lambda *told: Store(tmp_path / uuid4().hex))
    return Path(shutil.copytree(saved, tmp_path / "training"))


PROMPTS = [f"{letter}nd then the ferry left the quay, and nobody on the shore had seen it go by." for letter in "ABC"]


def run(training, *typed):
    """What a run of the command line does, without its terminal."""
    cfg = compose_options("exp=dynamics", "model=hub", f"model.name={training}", "model.device=cpu", *typed)
    planned = plan_model(**DYNAMICS.model_options(cfg))
    prepared = DYNAMICS.prepare(cfg, training, planned)
    tokens = [torch.tensor(planned.tokenizer(text)["input_ids"]) for text in PROMPTS]
    model = planned.load()
    own = begin_study(model, tokens, cfg, lambda name: lambda done, total: None, training, {"dynamics": prepared})
    return model, DYNAMICS.run(own, cfg.exp)


@pytest.fixture
def loaded(monkeypatch):
    """The folders whose weights are measured for a checkpoint that is not the run's own model."""
    names = []
    measure = checkpoints.measure_checkpoint
    monkeypatch.setattr(checkpoints, "measure_checkpoint", lambda *told: names.append(told[2]) or measure(*told))
    return names


def test_the_planted_step_is_found_and_a_checkpoint_is_measured_once(training, loaded):
    model, result = run(training)
    assert (result.metrics.me_from, result.metrics.me_from_layer) == (100, 1)
    assert result.tables["dynamics_by_step"]["name"].tolist() == ["checkpoint-0", "checkpoint-10", "checkpoint-100"]
    assert sum(weight.numel() for weight in model.original_model.parameters()) == 0  # one in memory at a time
    assert loaded == ["checkpoint-0", "checkpoint-10"]
    _, again = run(training)
    assert loaded == ["checkpoint-0", "checkpoint-10"]
    for name, table in result.tables.items():
        assert again.tables[name].equals(table), name


@pytest.mark.slow
def test_only_new_checkpoints_are_measured(training, loaded):
    run(training)
    save_checkpoint(training / "checkpoint-1000", 1.0)  # the training goes on
    run(training)
    assert loaded[2:] == ["checkpoint-100"]  # which was the run's own before
    save_checkpoint(training / "checkpoint-10", 0.5)  # other weights under the name of before
    _, changed = run(training)
    assert loaded[3:] == ["checkpoint-10"]
    assert changed.metrics.me_from == 10


def kept(tmp_path):
    table = pd.DataFrame({"first_token_id": [5, 6], "layer": [0, 0], "ratio": [7.5, 1 / 3], "sink_rate": [0.1, np.nan]})
    told = {"magnification_interval": (3.0, 5.5), "shared": {"n_prompts": 2}, "model": {"name": "m"}}
    own = MeasuredCheckpoint(10, "step10", table, 0, 4.25, **told)
    checkpoints._save(Store(tmp_path), own)
    return own, Checkpoint("renamed", 20, 3e9)


def test_what_is_kept_is_found_as_it_was(tmp_path):
    own, asked = kept(tmp_path)
    found = checkpoints._load(Store(tmp_path), asked)
    assert (found.step, found.name, found.tokens) == (20, "renamed", 3e9)  # as it is asked for now
    assert found.by_input.equals(own.by_input)
    same = ("me_layer", "magnification", "magnification_interval", "shared", "model")
    assert [getattr(found, name) for name in same] == [getattr(own, name) for name in same]


@pytest.mark.parametrize("damage", ["another ME layer", "another ratio", "no JSON", "other JSON", "no table"])
def test_what_was_kept_and_then_changed_is_not_taken(tmp_path, damage):
    own, asked = kept(tmp_path)
    file = tmp_path / "checkpoint.json"
    content = json.loads(file.read_text())
    match damage:
        case "another ME layer":
            content["rest"]["me_layer"] = 3
        case "another ratio":
            own.by_input.assign(ratio=[7.5, 0.34]).to_parquet(tmp_path / "by_input.parquet", index=False)
        case "no table":
            (tmp_path / "by_input.parquet").unlink()
    file.write_text({"no JSON": "{", "other JSON": "[]"}.get(damage, json.dumps(content)))
    assert checkpoints._load(Store(tmp_path), asked) is None


def test_an_incomplete_checkpoint_is_left_out_with_a_warning(training, caplog):
    (training / "checkpoint-200").mkdir()
    shutil.copytree(training / "checkpoint-100", training / "checkpoint-300")
    weights = training / "checkpoint-300" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        request = compose_options("exp=dynamics", "model=hub", f"model.name={training}").requests["dynamics"]
        assert [own.step for own in request.checkpoints] == [0, 10, 100]
    assert request.left_out == ["checkpoint-200", "checkpoint-300"]
    assert "it has no config.json" in caplog.text
    assert "model.safetensors cannot be read" in caplog.text


def prepare(training, *typed):
    cfg = compose_options("exp=dynamics", "model=hub", f"model.name={training}", "model.device=cpu", *typed)
    return DYNAMICS.prepare(cfg, training, plan_model(**DYNAMICS.model_options(cfg)))


def test_checkpoints_of_different_trainings_are_refused_before_their_weights_are_read(training):
    save_checkpoint(training / "checkpoint-50", 0, intermediate_size=80)
    with pytest.raises(MelensError, match="checkpoint-50 has another architecture or size than checkpoint-100"):
        prepare(training)
    shutil.rmtree(training / "checkpoint-50")
    save_checkpoint(training / "checkpoint-60", 0)
    settings = training / "checkpoint-60" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("{", '{"bos_token": "A",', 1))
    with pytest.raises(MelensError, match="checkpoint-60 has another tokenizer"):
        prepare(training)


def test_a_folder_without_a_tokenizer_is_read_with_the_last_ones(training):
    for file in (training / "checkpoint-10").glob("*token*"):
        file.unlink()
    assert len(prepare(training)) == 3


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["dynamics.revisions=[checkpoint-7]"], "has no checkpoint 'checkpoint-7'"),
        (["dynamics.steps=[1,2]"], "has 2 steps for 3 checkpoints"),
        (["dynamics.revisions=[checkpoint-0,checkpoint-10]", "dynamics.steps=[5,5]"], "are both of step 5"),
    ],
)
def test_what_the_folder_does_not_have_is_told(training, typed, sentence):
    with pytest.raises(MelensError, match=sentence):
        prepare(training, *typed)


def test_a_folder_of_incomplete_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(MelensError, match=r"No checkpoint in .* is complete: it has no config.json"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["model=tiny"], "tiny has no checkpoints"),
        ([], "smollm2-135m has no checkpoints"),
        (["model=hub", "model.name=org/own", "dynamics=pythia"], "dynamics=pythia is not of org/own"),
        (["model=hub", "model.name=org/own", "model.revision=main", "dynamics.revisions=[a]"], "leave it out"),
        (["dynamics.most=1"], "dynamics.most is 1"),
        (["dynamics.pattern='step('"], "dynamics.pattern is"),
    ],
)
def test_options_that_make_no_sense_are_refused(typed, sentence):
    with pytest.raises((OptionError, MelensError), match=sentence.replace("(", r"\(")):
        _ = compose_options("exp=dynamics", *typed).requests


def test_one_model_without_a_step_asks_for_checkpoints():
    cfg = compose_options("exp=dynamics", "model=hub", "model.name=org/own")
    with pytest.raises(MelensError, match="exp=dynamics takes checkpoints"):
        DYNAMICS.model_options(cfg)


def test_other_experiments_say_what_to_do_with_a_folder_of_checkpoints(saved):
    with pytest.raises(OptionError, match=r"Give one of them, .*, or all of them to exp=dynamics"):
        compose_options("exp=sinks", "model=hub", f"model.name={saved}")


# --- The hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached_hub(training, tmp_path, monkeypatch):
    """A cache of the hub with two revisions of org/model, and no connection."""
    repo = tmp_path / "hub" / "models--org--model"
    (repo / "refs").mkdir(parents=True)
    for step, commit in ((0, "a" * 40), (100, "b" * 40)):
        shutil.copytree(training / f"checkpoint-{step}", repo / "snapshots" / commit)
        (repo / "refs" / f"step{step}").write_text(commit)
    (repo / "blobs").mkdir()
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(repo.parent))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(repo.parent), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("melens.models.revisions.hub_answers", lambda: False)
    return repo


def test_revisions_come_from_the_cache_where_there_is_no_hub(cached_hub):
    found = prepare("org/model", r"dynamics.pattern=step\d+")
    assert [own.checkpoint.name for own in found] == ["step0", "step100"]
    assert found[0].identity == f"org/model@{'a' * 40}"
    (cached_hub / "refs" / "step0").write_text("b" * 40)  # the revision moved
    moved = prepare("org/model", "dynamics.revisions=[step0,step100]")
    assert moved[0].identity == f"org/model@{'b' * 40}"


@pytest.mark.slow
def test_a_revision_that_moved_is_measured_anew(cached_hub, loaded):
    run("org/model", "dynamics.revisions=[step0,step100]")
    run("org/model", "dynamics.revisions=[step0,step100]")
    assert loaded == ["step0"]
    (cached_hub / "refs" / "step0").write_text("b" * 40)
    _, moved = run("org/model", "dynamics.revisions=[step0,step100]")
    assert loaded == ["step0", "step0"]
    assert moved.tables["dynamics_by_step"]["me_layer"].tolist() == [1, 1]


def test_a_revision_that_is_missing_is_told_by_its_name(cached_hub):
    with pytest.raises(MelensError, match=r"Checkpoint step7: .*org/model"):
        prepare("org/model", "dynamics.revisions=[step7,step100]")
    with pytest.raises(MelensError, match="org/model has no revision named like 'ckpt'"):
        prepare("org/model", "dynamics.pattern=ckpt")
    with pytest.raises(MelensError, match="hub cannot be reached for org/other"):
        prepare("org/other", "dynamics.pattern=ckpt")


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step", "tokens"),
    [
        ("step1000", 1_000, None),
        ("checkpoint-10000step", 10_000, None),
        ("stage1-step10000-tokens21B", 10_000, 21e9),
        ("stage1-step-40000", 40_000, None),
        ("step-001000-2BT", 1_000, 2e9),
        ("step2627139-tokens15T", 2_627_139, 15e12),
        ("pretrain_iter_0373000", 373_000, None),
        ("global_step77", 77, None),
        ("128000", 128_000, None),
        ("main", None, None),
        ("pythia-160m", None, None),
        ("checkpoint-7-step-100", None, None),
        ("step1.5", None, None),
        ("0123456789012345", None, None),
    ],
)
def test_a_name_tells_its_step_and_tokens(name, step, tokens):
    assert (step_of(name), tokens_of(name)) == (step, tokens)


def test_checkpoints_are_in_order_of_steps_with_their_tokens():
    found = in_order(["step1000", "step4", "step20"], tokens_per_step=2_097_152)
    assert [one.step for one in found] == [4, 20, 1_000]
    assert found[2].tokens == 2_097_152_000
    with pytest.raises(MelensError, match="'main' does not tell at which step"):
        in_order(["step1", "main"])
    with pytest.raises(MelensError, match="'stage2-step5' counts its steps anew"):
        in_order(["stage1-step10", "stage2-step5"])
    assert len(in_order(["stage1-step10", "stage2-step15"])) == 2


def test_the_chosen_ones_are_spread_over_the_logarithm():
    pythia = in_order(["step0", *(f"step{2**k}" for k in range(10)), *(f"step{k}000" for k in range(1, 144))])
    assert len(pythia) == 154
    chosen = [one.step for one in spread(pythia, 6)]
    assert chosen == [0, 8, 128, 1_000, 13_000, 143_000]
    assert spread(pythia, 200) == pythia


def test_a_sweep_tells_trainings_apart(saved):
    def job(name, **swept):
        result = {"experiment": "dynamics", "status": "ok", "config": {"model": {"name": name}}}
        return Job(Path("0"), result, swept, name)

    assert checkpoints.training_of(job(str(saved / "checkpoint-10"))) == str(saved)
    one, two = (job("org/model", **{"model.revision": f"step{step}", "prompts": "short"}) for step in (1, 2))
    assert checkpoints.training_of(one) == checkpoints.training_of(two) == "org/model, prompts=short"
