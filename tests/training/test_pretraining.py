"""Training from scratch: what rows are made of, which tokens and dims a growing mask is on, how arms are compared."""

import warnings
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import melens
from experiments.options import compose_options
from experiments.options.command_line import prepare_command
from experiments.runner.job import run_job
from melens import MelensError, WeMask
from melens.data.prompts import byte_tokenizer
from melens.models.loading import load_tokenizer
from melens.models.revisions import why_incomplete
from melens.models.twins import plain_twin
from melens.models.view import view_model
from melens.training import inspection
from melens.training.arms import Arm, arm_of, compare_arms, read_arms
from melens.training.masking import GrowingMask
from melens.training.packing import TextSource, packed_text, tokenizer_of_text
from melens.training.plan import TrainingPlan
from melens.training.pretraining import rows_to_inspect, validation_losses
from melens.training.recipe import Recipe
from melens.training.runs import train_model
from melens.training.trainers import train

DOCUMENTS = [f"document {n}: the ferry left at dawn {n * n} times" for n in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "docs"
    (place / "below").mkdir(parents=True)
    for number, text in enumerate(DOCUMENTS):
        (place / ("below" if number % 2 else ".") / f"{number:02}.txt").write_text(text)
    return place


def packed(folder, length=16, held_out=0.2):
    return packed_text(TextSource(str(folder)), byte_tokenizer(), length=length, held_out=held_out)


def documents_of(rows, tokenizer):
    """Read documents back from rows: whole ones only."""
    ids = np.concatenate([row["input_ids"] for row in rows.with_format("numpy")])
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends[:-1]], ends, strict=True)]


def test_rows_hold_documents_each_with_eos_and_none_of_those_held_out(folder):
    text, tokenizer = packed(folder), byte_tokenizer()
    training, held = (documents_of(rows, tokenizer) for rows in (text.training, text.validation))
    assert not set(training) & set(held)
    assert len(training) + len(held) >= len(DOCUMENTS) - 2  # of each the last may be cut off
    assert set(training) | set(held) <= set(DOCUMENTS)
    assert {len(row["input_ids"]) for row in text.training} == {16}


def test_what_is_held_out_does_not_hang_on_what_else_there_is(folder):
    before = documents_of(packed(folder).validation, byte_tokenizer())
    (folder / "aa.txt").write_text("something new, before all others in order")
    after = documents_of(packed(folder).validation, byte_tokenizer())
    assert set(before[:-1]) <= set(after)


def test_rows_are_kept_by_the_bytes_of_the_text(folder):
    first = packed(folder)
    again = packed(folder)
    assert first.training.cache_files == again.training.cache_files
    (folder / "00.txt").write_text(DOCUMENTS[0].replace("ferry", "berry"))
    changed = packed(folder)
    assert changed.training.cache_files != first.training.cache_files


@pytest.mark.parametrize(("length", "part"), [(5_000, "training"), (600, "validation")])
def test_too_little_text_for_a_row_is_refused(folder, length, part):
    with pytest.raises(MelensError, match=f"tokens for {part}, less than a row"):
        packed(folder, length=length)


def test_a_text_of_its_own_for_validation_is_held_out_whole(folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("another text, of which nothing is in the folder")
    source, tokenizer = TextSource(str(folder)), byte_tokenizer()
    text = packed_text(source, tokenizer, length=16, held_out=0.5, validation=TextSource(str(other)))
    assert len(documents_of(text.training, tokenizer)) >= len(DOCUMENTS) - 1
    held = np.concatenate([row["input_ids"] for row in text.validation.with_format("numpy")])
    assert (other.read_text() + tokenizer.eos_token).startswith(tokenizer.decode(held))


def test_a_file_with_columns_is_a_document_a_row_and_a_wrong_column_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(TextSource(str(file)).documents()) == ["one", "two"]
    with pytest.raises(MelensError, match=r"rows.jsonl, line 1: there is no text in column 'body'"):
        list(TextSource(str(file), column="body").documents())


def test_a_tokenizer_is_trained_on_the_text_and_cuts_all_bytes(folder):
    place = tokenizer_of_text(TextSource(str(folder)), 300)
    tokenizer = load_tokenizer("random", tokenizer=str(place), config={"vocab_size": 300})
    said = "the ferry, naïve and 東京\n\tat dawn"
    ids = tokenizer(said)["input_ids"]
    assert tokenizer.decode(ids) == said
    assert len(tokenizer(" ferry left at dawn")["input_ids"]) < 10 < len(tokenizer("東京")["input_ids"]) + 9
    assert max(ids) < 300
    with pytest.raises(MelensError, match="does not hold the 256 bytes"):
        tokenizer_of_text(TextSource(str(folder)), 200)


def test_rows_to_inspect_begin_differently(folder):
    rows = rows_to_inspect(packed(folder).training, 5)
    assert len({int(row[0]) for row in rows}) == len(rows) == 5


# --- Masks ------------------------------------------------------------------------------------------------------------


def tiny():
    return plain_twin(melens.load_model("tiny")).train()


def masked_dims(model, layer, tokens):
    """Return which dims of token 0 are zero where attention of a block reads, and whether any of token 1 is."""
    seen = {}

    def note(module, args, kwargs):
        seen["read"] = (args[0] if args else kwargs["hidden_states"]).detach()

    handle = model.model.layers[layer].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    model(input_ids=tokens)
    handle.remove()
    read = seen["read"][0]
    return set((read[0] == 0).nonzero()[:, 0].tolist()), bool((read[1] == 0).any())


def test_a_growing_mask_is_on_the_dims_with_the_largest_gains_of_the_moment():
    model, tokens = tiny(), torch.arange(8)[None]
    mask = GrowingMask(WeMask(rate=0.125, start=2))
    with mask.applied(model):
        for dims in ([3, 5, 7, 9, 11, 13, 15, 17], [20, 21, 22, 23, 24, 25, 26, 27]):
            with torch.no_grad():
                gain = model.model.layers[2].input_layernorm.weight
                gain.fill_(1)
                gain[dims] = 2
            assert masked_dims(model, 2, tokens) == (set(dims), False)
            assert masked_dims(model, 1, tokens) == (set(), False)
    assert masked_dims(model, 2, tokens) == (set(), False)


def test_a_mask_behind_the_me_layer_comes_on_with_it_and_moves_where_it_moves():
    model, tokens = tiny(), torch.arange(8)[None]
    mask = GrowingMask(WeMask(rate=0.125, start="me+1"))
    with mask.applied(model):
        for step, (me_layer, first) in enumerate(((None, None), (1, 2), (None, 2), (0, 1), (2, 3))):
            mask.look(step, me_layer)
            on = [bool(masked_dims(model, layer, tokens)[0]) for layer in range(4)]
            assert on == [first is not None and layer >= first for layer in range(4)]
    assert mask.table()["start"].tolist() == [2, 1, 3]
    assert mask.moved_to(model).start == 3


def test_a_mask_does_not_follow_the_last_inspection_under_which_nothing_is_trained():
    model, mask = tiny(), GrowingMask(WeMask(rate=0.125, start="me+1"))
    with mask.applied(model):
        mask.look(3, 0)
        mask.look(6, 2)
    mask.end(6)
    assert mask.moved_to(model).start == 1
    mask.end(6)
    assert mask.table()["step"].tolist() == [3]


def test_a_mask_that_never_came_is_none_afterwards():
    mask = GrowingMask(WeMask(start="me+1"))
    with mask.applied(tiny()):
        mask.look(1, None)
    assert mask.moved_to(tiny()) is None


# --- Training ---------------------------------------------------------------------------------------------------------


def recipe(**changes):
    own = {"batch_size": 4, "micro_batch_size": 4, "lr": 3e-3, "steps": 6, "save_every": 0, "max_length": 16}
    return Recipe("pretrain", **own | changes)


def fit(folder, text, *, mask=None, resume=False, inspect=None, **changes):
    bridge = melens.load_model("tiny")
    watched = {"inspect": inspect, "inspect_every": 0 if inspect is None else 1}
    own = None if mask is None else GrowingMask(mask)
    return train(
        plain_twin(bridge), bridge.tokenizer, text, recipe(**changes), folder, mask=own, resume=resume, **watched
    )


def test_the_loss_falls_and_tokens_are_counted(folder, tmp_path):
    trained = fit(tmp_path / "run", packed(folder).training.select(range(8)), steps=40, warmup=0.0)
    assert trained.log["loss"].iloc[-1] < 0.7 * trained.log["loss"].iloc[0]
    assert trained.stats.tokens == 40 * 4 * 16


def test_the_last_batch_of_an_epoch_counts_the_tokens_that_it_has(folder, tmp_path):
    trained = fit(tmp_path / "run", packed(folder).training.select(range(6)), steps=None, epochs=2)
    assert trained.stats.steps == 4
    assert trained.stats.tokens == 2 * 6 * 16


def test_a_mask_is_on_from_the_first_step_and_changes_the_weights(folder, tmp_path):
    rows = packed(folder).training
    plain, masked = (fit(tmp_path / str(rate), rows, mask=mask) for rate, mask in ((0, None), (1, WeMask(1, start=0))))
    assert plain.log["loss"].iloc[0] != masked.log["loss"].iloc[0]
    weights = [dict(trained.model.named_parameters()) for trained in (plain, masked)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_resumed_training_ends_where_one_does_that_never_stopped(folder, tmp_path):
    rows, mask = packed(folder).training, WeMask(0.25, start=1)
    whole = fit(tmp_path / "whole", rows, mask=mask, save_every=3)

    def stop(step, model):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", rows, mask=mask, save_every=3, inspect=stop)
    resumed = fit(tmp_path / "parts", rows, mask=mask, save_every=3, resume=True)
    assert resumed.stats.resumed_at == 3
    for (name, weight), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)


def test_a_mask_moves_where_it_would_have_in_a_training_that_never_stopped(folder, tmp_path, monkeypatch):
    # It resumes between two inspections, with an ME layer that the one that never stopped does not see
    layers = {0: None, 2: 0, 4: 2, 5: 1}
    step_now = []
    monkeypatch.setattr(inspection.Inspector, "_measured", lambda *_: {"me_layer": layers.get(step_now[-1], 2)})
    inspect = inspection.Inspector.inspect

    def noted(self, step, model):
        step_now.append(step)
        inspect(self, step, model)
        if step == 6 and place == "parts" and not resume:
            raise KeyboardInterrupt

    monkeypatch.setattr(inspection.Inspector, "inspect", noted)
    plan = TrainingPlan(recipe(steps=7, save_every=5), str(folder), trace_every=2, held_out=0.2)
    mask, trained = WeMask(0.25, start="me+1"), {}
    for place, resume in (("whole", False), ("parts", False), ("parts", True)):
        study = melens.study(melens.load_model("tiny"), ["one", "two"])
        with suppress(KeyboardInterrupt):
            trained[place] = train_model(study, plan, tmp_path / place, mask=mask, resume=resume)
    assert trained["parts"].stats.resumed_at == 5
    for training in trained.values():
        moves = training.tables["mask_moves"]
        assert moves[["step", "start"]].values.tolist() == [[2, 1], [4, 3]]
    whole, parts = (training.history.log["loss"].tolist() for training in trained.values())
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_a_mask_trains_compiled_as_it_does_not_compiled(folder, tmp_path):
    rows, mask = packed(folder).training, WeMask(0.25, start=1)
    compiled = {"compile": True, "trainer": {"torch_compile_backend": "eager"}}
    trained = [fit(tmp_path / str(len(own)), rows, mask=mask, **own) for own in ({}, compiled)]
    torch.testing.assert_close(*(torch.tensor(own.log["loss"].dropna().to_numpy()) for own in trained))


def test_a_validation_loss_is_transformers_own_row_by_row(folder):
    rows, model = packed(folder).validation, tiny()
    mask = WeMask(1, start=0).on(model)
    found = validation_losses(model, rows, [None, mask], rows_per_batch=3, mixed=False)
    for number, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])[None]
        plain = float(model(input_ids=ids, labels=ids).loss)
        with mask.applied(model):
            masked = float(model(input_ids=ids, labels=ids).loss)
        own = found[found["row"] == number].set_index("masked")["loss"]
        assert own[False] == pytest.approx(plain, rel=1e-4)
        assert own[True] == pytest.approx(masked, rel=1e-4)
        assert plain != masked


# --- Arms -------------------------------------------------------------------------------------------------------------


def arm(name, seed, *, loss=2.0, unmasked=None, largest=5_000.0, sinks=0.4, me_layer=3, text="abcde"):
    steps = [
        {"step": 0, "masked": False, "me_layer": None, "largest": 1.0, "largest_over_median": 5.0, "sink_rate": 0.0}
    ]
    last = {"step": 9, "masked": False, "me_layer": me_layer, "largest": 99.0, "largest_over_median": largest}
    steps.append(last | {"sink_rate": sinks})
    trace = pd.DataFrame(steps).astype({"me_layer": "Int64"})
    rows = np.linspace(-0.1, 0.1, len(text)) + 1e-3 * seed
    held_out = {"row": range(len(text)), "tokens": list(text)}
    parts = [pd.DataFrame(held_out | {"masked": False, "loss": (unmasked or loss) + rows})]
    if unmasked is not None:
        trace = pd.concat([trace, trace.iloc[1:].assign(masked=True)])
        parts.append(pd.DataFrame(held_out | {"masked": True, "loss": loss + rows}))
    return Arm(name, seed, "model", trace, pd.concat(parts))


def arms_of(name, **options):
    return [of for seed in range(4) for of in (arm("plain", seed), arm(name, seed, **options))]


def verdict(arms, claim):
    return compare_arms(arms).claims.set_index("id").loc[claim, "verdict"]


@pytest.mark.parametrize(
    ("claim", "holds", "not_"),
    [
        ("pretrain-mask-harmless", {"loss": 2.005, "unmasked": 2.0}, {"loss": 2.2, "unmasked": 2.0}),
        ("pretrain-mask-prevents", {"largest": 300.0}, {"largest": 4_000.0}),
        ("pretrain-mask-weakens-sinks", {"sinks": 0.1}, {"sinks": 0.4}),
        ("pretrain-unmasking-hurts", {"loss": 2.0, "unmasked": 2.1}, {"loss": 2.0, "unmasked": 2.001}),
    ],
)
def test_what_a_mask_does_is_judged_against_plain(claim, holds, not_):
    assert verdict(arms_of("WeMask", **holds), claim) == "holds"
    assert verdict(arms_of("WeMask", **not_), claim) == "does not hold"


@pytest.mark.parametrize(
    ("name", "claim"), [("gates", "pretrain-gates-prevent"), ("softpick", "pretrain-softpick-prevents")]
)
def test_a_cure_must_do_away_with_both(name, claim):
    assert verdict(arms_of(name, largest=100.0, sinks=0.0), claim) == "holds"
    assert verdict(arms_of(name, largest=100.0, sinks=0.15), claim) == "holds in part"
    assert verdict(arms_of(name, largest=100.0, sinks=0.35), claim) == "does not hold"


def test_nothing_is_prevented_where_there_is_nothing():
    arms = [replace(own, trace=own.trace.assign(me_layer=pd.NA)) for own in arms_of("WeMask", largest=1.0)]
    assert verdict(arms, "pretrain-mask-prevents") == "not measured"
    assert verdict(arms_of("WeMask")[:4], "pretrain-mask-prevents") == "not measured"  # of two seeds


def test_what_is_compared_is_of_one_model_and_one_text():
    with pytest.raises(MelensError, match="within one model"):
        compare_arms([arm("plain", 0), replace(arm("gates", 0), model="other")])
    with pytest.raises(MelensError, match="the same arm and the same seed"):
        compare_arms([arm("plain", 0), arm("plain", 0)])
    with pytest.raises(MelensError, match="different text held out"):
        compare_arms([arm("plain", 0), arm("gates", 0, text="abcdf")])


@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        ({}, "plain"),
        ({"mask_planned": True, "mask_follows": False}, "WeMask"),
        ({"mask_planned": True, "mask_follows": True, "training_mask": {"start": 3}}, "WeMask behind the ME layer"),
        ({"mask_planned": True, "mask_follows": True}, "WeMask behind the ME layer, which never came"),
        ({"gate": "headwise"}, "gates"),
        ({"attention": "softpick"}, "softpick"),
    ],
)
def test_an_arm_is_named_by_what_it_was_trained_with(metrics, name):
    assert arm_of(metrics) == name


# --- From the command line --------------------------------------------------------------------------------------------

SMALL = (
    "exp=pretrain", "model=llama-10m", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=3", "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2",
    "model.config.vocab_size=300", "training.max_length=64", "training.steps=3", "training.batch_size=2",
    "training.micro_batch_size=2", "training.held_out=0.2", "training.trace_every=2", "training.trace_prompts=2",
    "prompts=short",
)  # fmt: skip


def run(folder, *options):
    run_job(compose_options(*prepare_command([*SMALL, *options])), folder)


def test_runs_leave_models_that_attend_as_they_did_and_are_compared(folder, tmp_path):
    text = f"training.dataset={folder}"
    for name, *options in (
        ("plain",),
        ("masked", "training.mask=paper", "wemask.start=1"),
        ("softpick", "model.attention=softpick"),
        ("gated", "training.gate=elementwise"),
    ):
        run(tmp_path / "runs" / name, text, *options)
    softpick = melens.load_model(tmp_path / "runs" / "softpick" / "model", device="cpu")
    assert softpick.original_model.config.melens_attention == "softpick"
    saved = WeMask.load(tmp_path / "runs" / "masked" / "model")
    assert saved.start == 1
    gains = view_model(melens.load_model(tmp_path / "runs" / "masked" / "model", device="cpu")).gain(1)
    assert set(saved.fixed.dims[1]) == set(gains.abs().topk(3).indices.tolist())
    arms = read_arms(tmp_path / "runs")
    assert {own.name for own in arms} == {"plain", "WeMask", "softpick", "gates"}
    table = compare_arms(arms).tables["arms"]
    assert table["loss"].between(3, 7).all()
    assert len({tuple(own.validation["row"]) for own in arms if own.name != "WeMask"}) == 1


def test_a_checkpoint_is_a_model_with_its_gates_and_its_attention(folder, tmp_path):
    run(
        tmp_path,
        f"training.dataset={folder}",
        "training.gate=headwise",
        "model.attention=sigmoid",
        "training.save_every=1",
    )
    checkpoints = tmp_path / "checkpoints"
    assert [why_incomplete(checkpoints / f"checkpoint-{step}") for step in (1, 2, 3)] == [None] * 3
    tokens = torch.arange(20)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of weights that the model does not use
        last, first = (melens.load_model(checkpoints / f"checkpoint-{step}", device="cpu") for step in (3, 1))
    expected = melens.load_model(tmp_path / "model", device="cpu")(tokens)
    torch.testing.assert_close(last(tokens), expected)
    assert not torch.equal(first(tokens), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["training.dataset=nowhere"], "There is no file or folder 'nowhere'"),
        (["model=tiny", "training.limit=3"], r"exp=pretrain has no training\.limit"),
        (["training.mask=paper", "training.trace_every=0"], "The mask begins behind the ME layer"),
        (["training.mask=saved"], "There is no mask file"),
        (["training.validation=nowhere"], "'nowhere'. training.validation is"),
        (["training.max_length=5000"], "context of 1,024"),
    ],
)
def test_a_mistake_is_told_before_the_training(folder, tmp_path, options, said):
    with pytest.raises(MelensError, match=said):
        run(tmp_path / "run", f"training.dataset={folder}", *options)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_only_a_model_with_random_weights_is_trained_from_scratch():
    with pytest.raises(MelensError, match="trains a model with random weights"):
        _ = compose_options(*prepare_command(["exp=pretrain"])).requests


def test_a_scale_of_other_trainings_leaves_the_text_as_it_is():
    request = compose_options(*prepare_command(["exp=pretrain", "scale=smoke"])).requests["pretrain"]
    assert (request.plan.dataset, request.plan.recipe.steps) == ("python_docs", 20)


def test_a_mask_that_never_came_is_no_arm_with_a_verdict():
    arms = arms_of("WeMask behind the ME layer, which never came")
    assert verdict(arms, "pretrain-following-prevents") == "not measured"
    assert verdict(arms_of("WeMask behind the ME layer"), "pretrain-following-prevents") == "does not hold"
