"""Training with masks and gates: what stays zero, what goes on where it stopped, what is told and what is refused."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_chat import TEMPLATES

from experiments import tables
from experiments.options import compose_options
from experiments.options.command_line import prepare_command
from experiments.runner.job import run_job
from experiments.runner.masks import on_blocks
from experiments.runner.table_rows import one_at_a_time
from melens import MelensError, WeMask, load_model
from melens.benchmarks.evaluation import Evaluator
from melens.data.chat import check_conversations
from melens.data.prompts import byte_tokenizer
from melens.models.gates import add_gates, gates_of
from melens.models.generation import Generation
from melens.models.twins import bridged_twin, gathered_twin, plain_twin
from melens.models.view import view_model
from melens.training.data import format_rows, load_training_data
from melens.training.recipe import Lora, Recipe
from melens.training.rewards import reward_answer
from melens.training.saving import save_trained
from melens.training.trainers import _last_complete, train

ROOT = Path(__file__).parents[2]
RECIPES = {
    "sft": {"max_length": 64},
    "dpo": {"max_length": 64, "beta": 0.1},
    "grpo": {"rollouts": 4, "max_new_tokens": 6, "beta": 0.01},
}


def recipe(method="sft", **changes):
    options = {"batch_size": 4, "micro_batch_size": 4, "lr": 1e-3, "steps": 4, "save_every": 0}
    return Recipe(method, **(options | RECIPES[method] | changes))


def tiny(gate=None):
    bridge = load_model("tiny")
    planted.gains_apart(bridge.original_model)
    model = plain_twin(bridge)
    if gate is not None:
        add_gates(view_model(model), gate)
    return model, bridge.tokenizer


def sums(method="sft", n=16):
    return format_rows(load_training_data("sums", method, limit=n), method, chat=True)


def fit(folder, method="sft", *, mask=None, gate=None, rows=None, resume=False, progress=None, inspect=None, **changes):
    model, tokenizer = tiny(gate)
    settled = None if mask is None else mask.on(model)
    rows = sums(method) if rows is None else rows
    watched = {"inspect": inspect, "inspect_every": 0 if inspect is None else 1}
    own = recipe(method, **changes)
    trained = train(model, tokenizer, rows, own, folder, mask=settled, resume=resume, progress=progress, **watched)
    return trained, tokenizer, settled


def stop_after(step):
    """Kill a training when a step is done."""

    def progress(done, total):
        if done == step:
            raise KeyboardInterrupt

    return progress


MASK = WeMask(rate=0.25, start=1)


@pytest.mark.newest
def test_the_loss_falls_on_what_can_be_memorised_and_a_mask_changes_it(tmp_path):
    plain, _, _ = fit(tmp_path / "plain", steps=30, rows=sums(n=4), warmup=0.0, lr=3e-3)
    masked, _, _ = fit(tmp_path / "masked", steps=30, rows=sums(n=4), warmup=0.0, lr=3e-3, mask=MASK)
    for trained in (plain, masked):
        assert trained.log["loss"].iloc[-1] < 0.5 * trained.log["loss"].iloc[0]
    assert abs(plain.log["loss"].iloc[0] - masked.log["loss"].iloc[0]) > 1e-5


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_the_reference_model_uses_the_same_mask(tmp_path, method):
    trained, _, _ = fit(tmp_path, method, mask=MASK, steps=1)
    if method == "dpo":  # the model equals its reference before the first step
        assert trained.log["loss"].iloc[0] == pytest.approx(0.6931, abs=1e-4)
    else:
        assert trained.log["kl"].iloc[0] == pytest.approx(0, abs=1e-5)


def test_nothing_flows_back_into_what_is_masked(tmp_path):
    model, tokenizer = tiny()
    mask = MASK.on(model)
    seen = {}

    def keep(layer):
        def hook(module, args, kwargs):
            kwargs["hidden_states"].register_hook(lambda gradient: seen.__setitem__(layer, gradient.detach().clone()))

        return hook

    for layer, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(keep(layer), with_kwargs=True)  # before the mask's own hook
    train(model, tokenizer, sums(), recipe(steps=1), tmp_path, mask=mask)
    for layer, dims in mask.dims(model).items():
        assert seen[layer][:, 0, dims].abs().max() == 0
        assert seen[layer][:, 1:, dims].abs().max() > 0
        others = [dim for dim in range(64) if dim not in dims.tolist()]
        assert seen[layer][:, 0, others].abs().max() > 0
    assert seen[0][:, 0].abs().min() > 0


@pytest.mark.parametrize(("gate", "lora"), [("elementwise", None), ("headwise", Lora(rank=4))])
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, gate, lora):
    options = {"mask": MASK, "gate": gate, "lora": lora, "steps": 8, "save_every": 4}
    whole, _, _ = fit(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", progress=stop_after(5), **options)
    half = tmp_path / "cut" / "checkpoint-8"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")  # as kill -9 leaves it
    resumed, _, _ = fit(tmp_path / "cut", resume=True, **options)
    assert resumed.stats.resumed_at == 4
    assert _last_complete(tmp_path / "cut") == half
    pd.testing.assert_series_equal(resumed.log["loss"], whole.log["loss"], rtol=0, atol=1e-6)
    assert resumed.stats.tokens == whole.stats.tokens > 0
    assert resumed.stats.tokens_per_second > 0


def test_a_training_goes_on_from_the_last_checkpoint_that_is_whole(tmp_path):
    assert _last_complete(tmp_path / "nowhere") is None
    for name, state in (
        ("2", "{}"),
        ("8", '{"a": 1}'),
        ("10", '{"a": 1}'),
        ("12", '{"a'),
        ("14", None),
        ("x", '{"a": 1}'),
    ):
        (tmp_path / f"checkpoint-{name}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert _last_complete(tmp_path) == tmp_path / "checkpoint-10"


def test_a_trained_model_is_trained_again_as_a_loaded_one_is(tmp_path):
    mixed = recipe(precision="mixed", steps=2)
    model, tokenizer = tiny()
    trained = train(model, tokenizer, sums(), mixed, tmp_path / "first").model
    loaded, _ = tiny()
    loaded.load_state_dict(trained.state_dict())
    again = train(trained, tokenizer, sums(), mixed, tmp_path / "again").log
    anew = train(loaded, tokenizer, sums(), mixed, tmp_path / "anew").log
    assert again["loss"].equals(anew["loss"])  # in bfloat16, both


def reward_digits(completions, **_):
    """A reward that a random model can earn: the share of digits in what it wrote."""
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(letter in "0123456789" for letter in text) / max(len(text), 1) for text in texts]


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_it_goes_on_in_the_order_of_a_later_epoch_too(tmp_path, method, monkeypatch):
    monkeypatch.setattr("melens.training.trainers.reward_answer", reward_digits)
    options = {"mask": MASK, "steps": 7, "save_every": 5, "rows": sums(method, n=12)}  # three steps an epoch
    whole, _, _ = fit(tmp_path / "whole", method, **options)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", method, progress=stop_after(6), **options)
    resumed, _, _ = fit(tmp_path / "cut", method, resume=True, **options)
    assert resumed.stats.resumed_at == 5
    assert whole.log["grad_norm"].min() > 0
    pd.testing.assert_series_equal(resumed.log["loss"], whole.log["loss"], rtol=0, atol=1e-6)


def test_rollouts_that_a_cache_would_change_are_refused(tmp_path, monkeypatch):
    asked = []

    def without_a_cache(model, mask):
        asked.append(mask)
        return Generation(use_cache=False, together=False, error=0.0)

    monkeypatch.setattr("melens.training.trainers.verify_generation", without_a_cache)
    with pytest.raises(MelensError, match="Train it with sft or dpo"):
        fit(tmp_path, "grpo", mask=MASK)
    fit(tmp_path / "sft", "sft", mask=MASK, steps=1)
    assert len(asked) == 1
    assert asked[0].select == MASK.select


def test_what_is_rewarded_is_learnt(tmp_path, monkeypatch):
    monkeypatch.setattr("melens.training.trainers.reward_answer", reward_digits)
    options = {"steps": 25, "batch_size": 8, "micro_batch_size": 32, "lr": 3e-3, "beta": 0.0, "max_new_tokens": 8}
    trained, _, _ = fit(tmp_path, "grpo", **options)
    reward = trained.log["reward"]
    assert reward.tail(5).mean() > 2 * reward.head(5).mean()


def test_a_training_that_is_done_is_not_gone_on_with(tmp_path):
    fit(tmp_path, save_every=2)
    resumed, _, _ = fit(tmp_path, save_every=2, resume=True)
    assert resumed.stats.steps == 4
    assert len(resumed.log) == 4


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_looking_into_a_model_does_not_change_its_training(tmp_path, lora):
    seen = []

    def inspect(step, model):
        with torch.no_grad():
            seen.append(bridged_twin(model, "tiny")(torch.arange(6)[None]))

    for gate in (None, "headwise"):
        alone, _, _ = fit(tmp_path / f"alone-{gate}", lora=lora, gate=gate, lr=0.1)
        watched, _, _ = fit(tmp_path / f"watched-{gate}", lora=lora, gate=gate, lr=0.1, inspect=inspect)
        pd.testing.assert_frame_equal(alone.log[["loss", "grad_norm"]], watched.log[["loss", "grad_norm"]])
        with torch.no_grad():
            logits = watched.model(torch.arange(6)[None]).logits
        torch.testing.assert_close(seen[-1], logits, rtol=1e-4, atol=1e-4)  # with what the adapters have learnt


def test_checkpoints_of_another_training_are_refused(tmp_path):
    fit(tmp_path, mask=MASK, save_every=2)
    with pytest.raises(MelensError, match=r"has another mask: rate was 0\.25 and is 0\.5"):
        fit(tmp_path, mask=WeMask(rate=0.5, start=1), save_every=2, resume=True)
    with pytest.raises(MelensError, match=r"has another mask: .* is none"):
        fit(tmp_path, save_every=2, resume=True)
    with pytest.raises(MelensError, match=r"has another data: hash was .* and is"):
        fit(tmp_path, mask=MASK, save_every=2, resume=True, rows=sums().shuffle(seed=1))
    with pytest.raises(MelensError, match="holds the checkpoints of another run"):
        fit(tmp_path, save_every=2)
    with pytest.raises(MelensError, match="There is no training to resume"):
        fit(tmp_path / "elsewhere", resume=True)


@pytest.mark.parametrize(
    ("lora", "weights", "lost"),
    [
        (None, "model.safetensors", ["layers.1.mlp.up_proj", "embed_tokens", "melens_gate"]),
        (Lora(rank=4), "adapter_model.safetensors", ["layers.1.mlp.up_proj.lora_A", "melens_gate"]),
    ],
)
def test_a_checkpoint_with_a_part_missing_is_not_gone_on_from(tmp_path, lora, weights, lost):
    options = {"save_every": 1, "lora": lora, "gate": "headwise", "rows": sums(n=4)}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, progress=stop_after(2), **options)
    saved = tmp_path / "checkpoint-1"
    kept = load_file(saved / weights)
    for part in lost:
        name = next(name for name in kept if part in name)
        save_file({other: weight for other, weight in kept.items() if other != name}, saved / weights, {"format": "pt"})
        with pytest.raises(MelensError, match=f"The last checkpoint lacks .*{name}.*Remove it"):
            fit(tmp_path, resume=True, **options)
    save_file(kept, saved / weights, {"format": "pt"})
    (saved / "scheduler.pt").unlink()
    with pytest.raises(MelensError, match="The last checkpoint lacks the scheduler's state"):
        fit(tmp_path, resume=True, **options)


def test_mixed_precision_and_checkpointing_mask_alike(tmp_path):
    usual, _, _ = fit(tmp_path / "usual", mask=MASK)
    again, _, _ = fit(tmp_path / "again", mask=MASK, gradient_checkpointing=True)
    mixed, _, _ = fit(tmp_path / "mixed", mask=MASK, precision="mixed")
    pd.testing.assert_series_equal(usual.log["loss"], again.log["loss"], rtol=1e-5)
    pd.testing.assert_series_equal(usual.log["loss"], mixed.log["loss"], rtol=0.02)


def test_a_trained_model_is_loaded_with_its_gates_and_its_mask(tmp_path):
    states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trained, tokenizer, settled = fit(tmp_path / "run", mask=MASK, gate="headwise", lr=0.1)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states  # the user's own draws go on
    folder = save_trained(trained.model, tokenizer, tmp_path / "model", mask=settled, record={})
    bridge = load_model(str(folder))
    tokens = torch.randint(0, 250, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), trained.model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert all(gate.weight.abs().max() > 0 for gate in gates_of(view_model(bridge)).values())
    saved = WeMask.load(folder)
    assert saved.on(bridge).fixed.dims == settled.fixed.dims
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model"}


def test_a_trained_model_takes_the_place_of_another_and_of_nothing_else(tmp_path, monkeypatch):
    model, tokenizer = tiny()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.md").write_text("three years")
    with pytest.warns(
        UserWarning, match=r"model held something other than a trained model; it was moved to .*model\.1"
    ):
        save_trained(model, tokenizer, folder, mask=None, record={"run": 1})
    assert (tmp_path / "model.1" / "notes.md").read_text() == "three years"
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda partial: 1 / 0)  # the disk is full, or a mistake of ours
    with pytest.raises(ZeroDivisionError):
        save_trained(model, tokenizer, folder, mask=None, record={"run": 2})
    monkeypatch.undo()
    assert json.loads((folder / "training.json").read_text()) == {"run": 1}
    save_trained(model, tokenizer, folder, mask=None, record={"run": 3})
    assert json.loads((folder / "training.json").read_text()) == {"run": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.1"}


def test_gathered_weights_that_fill_no_model_are_told():
    model, _ = tiny()
    weights = dict(model.state_dict())
    assert gathered_twin(model, weights).get_input_embeddings().weight.equal(model.get_input_embeddings().weight)
    del weights["model.norm.weight"]
    with pytest.raises(MelensError, match="The weights gathered from all processes do not fill a LlamaForCausalLM"):
        gathered_twin(model, weights)


def test_an_ungated_model_saves_no_gates(tmp_path):
    trained, tokenizer, _ = fit(tmp_path / "run")
    folder = save_trained(trained.model, tokenizer, tmp_path / "model", mask=None, record={})
    assert not (folder / "gate.safetensors").exists()
    assert not (folder / "wemask.json").exists()


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
def test_gates_start_as_the_identity_in_bridge_and_plain_model(family, kind):
    bridge = planted.bridge(planted.gains_apart(planted.plain_model(family)))
    tokens = torch.randint(1, planted.VOCABULARY, (2, 7))
    with torch.no_grad():
        before = bridge(tokens)
        add_gates(view_model(bridge), kind)
        assert torch.equal(bridge(tokens), before)
        for gate in gates_of(view_model(bridge)).values():
            gate.weight.normal_(0, 0.5)
        gated = bridge(tokens)
        assert (gated - before).abs().max() > 0.1
        twin = plain_twin(bridge)
        torch.testing.assert_close(twin(tokens).logits, gated, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(bridged_twin(twin, "tiny")(tokens), gated, rtol=1e-3, atol=1e-3)


def test_a_headwise_gate_scales_each_head_by_twice_the_sigmoid():
    model, _ = tiny("headwise")
    attention = model.model.layers[2].self_attn
    attention.melens_gate.weight.data.normal_(0, 1)
    seen = {}
    attention.q_proj.register_forward_pre_hook(lambda module, args: seen.update(read=args[0]))
    attention.o_proj.register_forward_hook(lambda module, args, out: seen.update(gated=args[0]))
    tokens = torch.randint(0, 250, (1, 5))
    with torch.no_grad():
        model(tokens)
        gated = seen["gated"].clone()
        factors = 2 / (1 + torch.exp(-seen["read"] @ attention.melens_gate.weight.T))
        attention.melens_gate.weight.data.zero_()
        model(tokens)
    by_head = seen["gated"].unflatten(-1, (4, 16)) * factors[..., None]
    torch.testing.assert_close(gated, by_head.flatten(-2))


def test_a_loss_that_is_no_number_stops_with_step_batch_and_checkpoint(tmp_path):
    model, tokenizer = tiny()

    def spoil(done, total):
        if done == 3:
            model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))

    with pytest.raises(
        MelensError, match=r"loss is NaN or infinite in step 4, in a batch of 4 rows that begins .*checkpoint-2\."
    ):
        train(model, tokenizer, sums(), recipe(steps=6, save_every=2), tmp_path, progress=spoil)


def test_a_gradient_that_is_no_number_stops_before_it_is_saved(tmp_path):
    model, tokenizer = tiny()
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * float("nan") if len(calls) == 4 else gradient

    model.model.layers[0].mlp.down_proj.weight.register_hook(spoil)
    with pytest.raises(MelensError, match=r"gradient is NaN or infinite in step 4, .* checkpoint is .*checkpoint-2\."):
        train(model, tokenizer, sums(), recipe(steps=6, save_every=2), tmp_path)


# --- Data and rewards -------------------------------------------------------------------------------------------------


def test_rows_become_conversations_or_text(tmp_path, caplog):
    path = tmp_path / "gsm8k.train.jsonl"
    path.write_text(json.dumps({"question": "How many?", "response": "2 + 2 = 4.\u2028So 4.", "answer": "4"}) + "\n")
    data = load_training_data("gsm8k", "sft", data_dir=str(tmp_path))
    (row,) = format_rows(data, "sft", chat=True)
    assert row["prompt"] == [{"role": "user", "content": "How many?"}]
    assert row["completion"][0]["content"].startswith("2 + 2")
    (row,) = format_rows(load_training_data("gsm8k", "grpo", data_dir=str(tmp_path)), "grpo", chat=False)
    assert row == {"prompt": "How many?\n", "answer": "4"}
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: "
    path = tmp_path / "hh_rlhf_harmless.jsonl"
    path.write_text(
        "\n".join(json.dumps({"chosen": dialogue + good, "rejected": dialogue + "no"}) for good in ("See you", ""))
    )
    data = load_training_data("hh_rlhf", "dpo", data_dir=str(tmp_path))
    assert "hh_rlhf: 1 of 2 rows have no last turn to learn and are left out." in caplog.text
    (row,) = format_rows(data, "dpo", chat=True)
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("See you", "no")
    (row,) = format_rows(data, "dpo", chat=False)
    assert row["prompt"] + row["chosen"] == dialogue + "See you"


def rows_of(tmp_path, method, *rows, chat=True, **options):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return list(format_rows(load_training_data(str(path), method, **options), method, chat=chat))


USER, REPLY, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes"), ("assistant", "No"))
)


@pytest.mark.parametrize(
    ("method", "row", "options", "expected"),
    [
        ("sft", {"messages": [USER, REPLY]}, {}, {"prompt": [USER], "completion": [REPLY]}),
        (
            "sft",
            {"instruction": "Hi", "output": "Yes", "text": "Hi Yes"},
            {"columns": {"prompt": "instruction", "completion": "output"}},
            {"prompt": [USER], "completion": [REPLY]},
        ),
        ("sft", {"text": "Hi Yes"}, {}, {"text": "Hi Yes"}),
        ("sft", {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes"}, {}, {"prompt": [USER], "completion": [REPLY]}),
        (
            "dpo",
            {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
            {},
            {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        ),
        (
            "dpo",
            {"prompt": [USER], "chosen": [REPLY], "rejected": "No"},
            {},
            {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        ),
        ("grpo", {"prompt": "Hi", "answer": "So.\n#### 1,234"}, {}, {"prompt": [USER], "answer": "1234"}),
        ("grpo", {"prompt": "Hi", "answer": "(3, 4)"}, {}, {"prompt": [USER], "answer": "(3, 4)"}),
        ("grpo", {"prompt": "Hi", "answer": "[0,100)"}, {}, {"prompt": [USER], "answer": "[0,100)"}),
    ],
)
def test_rows_of_every_form_become_conversations(tmp_path, method, row, options, expected):
    assert rows_of(tmp_path, method, row, **options) == [expected]


def test_several_turns_of_one_speaker_are_one_message(tmp_path):
    asked = "\n\nHuman: Hi\n\nHuman: There?\n\nAssistant: Yes\n\nAssistant: Here\n\nHuman: Ho\n\nAssistant: "
    (row,) = rows_of(tmp_path, "dpo", {"chosen": f"{asked}Yes", "rejected": f"{asked}No"})
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert [turn["content"] for turn in row["prompt"]] == ["Hi\n\nThere?", "Yes\n\nHere", "Ho"]
    check_conversations(templated("gemma"), [[*row["prompt"], *row["chosen"]]], "own")


def test_pairs_that_reply_to_different_things_are_left_out(tmp_path):
    same = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    other = same | {"rejected": "\n\nHuman: Ho\n\nAssistant: No"}
    assert len(rows_of(tmp_path, "dpo", other, same, other, limit=2)) == 1


@pytest.mark.parametrize(
    ("method", "row", "chat", "message"),
    [
        ("sft", {"prompt": "Hi", "completion": None}, True, "'completion' is None; it must be a text"),
        ("dpo", {"chosen": "Yes", "rejected": "No"}, True, "rows without a prompt need messages, or chosen"),
        ("sft", {"messages": [USER, REPLY]}, False, "training.chat is false"),
    ],
)
def test_rows_of_another_form_are_told(tmp_path, method, row, chat, message):
    with pytest.raises(MelensError, match=message):
        rows_of(tmp_path, method, row, chat=chat)


def test_only_what_follows_the_prompt_is_learnt(tmp_path):
    rows = Dataset.from_list([{"prompt": "aaaa ", "completion": "bb"}])
    model, tokenizer = tiny()
    trained = train(model, tokenizer, rows, recipe(batch_size=1, micro_batch_size=1, steps=1), tmp_path)
    with torch.no_grad():
        ids = torch.tensor([[*tokenizer("aaaa bb").input_ids, tokenizer.eos_token_id]])
        fresh, _ = tiny()
        logprobs = fresh(ids).logits.log_softmax(-1)
    expected = -torch.stack([logprobs[0, at - 1, ids[0, at]] for at in range(5, 8)]).mean()
    assert trained.log["loss"].iloc[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ('{"q": "a", "a": "b"}', {}, "has the columns q, a; sft needs completion and prompt"),
        ("not json", {}, "line 1: this is not a JSON object"),
        ('{"q": "a", "a": "b"}', {"columns": {"question": "q"}}, "names the role 'question'"),
    ],
)
def test_data_that_cannot_be_learnt_is_told(tmp_path, line, options, message):
    (tmp_path / "own.jsonl").write_text(line + "\n")
    with pytest.raises(MelensError, match=message):
        load_training_data(str(tmp_path / "own.jsonl"), "sft", **options)


def test_columns_of_ones_own_may_be_named(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"q": "a", "a": "b"}\n')
    data = load_training_data(str(tmp_path / "own.jsonl"), "sft", columns={"prompt": "q", "completion": "a"})
    assert data.rows[0] == {"prompt": "a", "completion": "b"}


@pytest.mark.data
def test_real_solutions_are_rewarded_and_other_ones_not():
    lines = (Path(os.environ["MELENS_DATA"]) / "gsm8k.train.jsonl").read_text("utf-8").split("\n")[:300]
    rows = [json.loads(line) for line in lines]
    answers = [row["answer"] for row in rows]
    assert (
        sum(reward_answer([row["response"] for row in rows], answers)) / len(rows) > 0.9
    )  # the rewrite has mistakes of its own
    moved = reward_answer([rows[at - 1]["response"] for at in range(len(rows))], answers)
    assert sum(moved) <= sum(answers[at - 1] == answers[at] for at in range(len(rows))) + 3


# --- Chat templates ---------------------------------------------------------------------------------------------------


def templated(template):
    """The byte tokenizer with the chat template of a real model."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize(
    ("trainer", "thinking", "opened", "told"),
    [
        ({}, False, "", "off (enable_thinking=false)"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}},
            True,
            "<think>",
            "on (the chat template opens a thought)",
        ),
    ],
)
def test_rollouts_answer_without_thinking_unless_told(tmp_path, monkeypatch, trainer, thinking, opened, told):
    asked, rewarded = [], []

    def reward(completions, **given):
        rewarded.append((given["tokenizer"], given["opened"]))
        return [0.0] * len(completions)

    def write(*args, **options):
        if options.get("tokenize"):  # as TRL does for rollouts
            asked.append(options["enable_thinking"])
        return template(*args, **options)

    monkeypatch.setattr("melens.training.trainers.reward_answer", reward)
    model, _ = tiny()
    tokenizer = templated("qwen3_5_think")
    template, tokenizer.apply_chat_template = tokenizer.apply_chat_template, write
    trained = train(model, tokenizer, sums("grpo", n=4), recipe("grpo", steps=1, beta=0.0, trainer=trainer), tmp_path)
    assert set(asked) == {thinking}
    assert rewarded == [(tokenizer, opened)]
    assert trained.stats.thinking == told


@pytest.mark.parametrize("answer", [{"value": 1}, ["1"], True])
def test_right_answers_are_texts_or_numbers(tmp_path, monkeypatch, answer):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "0+1=", "answer": right}) for right in ("1", 1, 1.5, answer)))
    with pytest.raises(MelensError, match=r"own\.jsonl, line 4: 'answer' is .*; it must be a text or a number\."):
        load_training_data(str(path), "grpo")
    rows = Dataset.from_list([{"prompt": "0+1=", "answer": answer}])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    with pytest.raises(MelensError, match=r"org/name, row 1: 'answer' is .*; it must be a text or a number\."):
        load_training_data("org/name", "grpo")


@pytest.mark.parametrize(
    ("rows", "method", "message"),
    [
        ([{"system": "Be brief.", "prompt": "Hi", "completion": "Yes"}], "sft", "the roles system, user, assistant"),
        ([{"messages": [REPLY, USER, REPLY]}], "sft", "the roles assistant, user, assistant .*take turns in the data"),
        ([{"prompt": [USER, USER], "chosen": [REPLY], "rejected": [OTHER]}], "dpo", "the roles user, user, assistant"),
        ([{"prompt": [USER, USER], "answer": "4"}], "grpo", "the roles user, user "),
    ],
)  # fmt: skip
def test_conversations_that_the_chat_template_does_not_take_are_told_before_the_model_is_loaded(
    tmp_path, monkeypatch, rows, method, message
):
    monkeypatch.setattr("melens.models.loading.byte_tokenizer", lambda: templated("gemma"))
    monkeypatch.setattr("melens.models.loading.bridge_around", pytest.fail)
    path = tmp_path / f"{method}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = [f"exp={method}", f"training.dataset={path}", "training.batch_size=1", "training.micro_batch_size=1"]
    with pytest.raises(MelensError, match=rf"{method}.jsonl, row 1 of the rows in use.*{message}"):
        job(tmp_path / "run", *options)


def test_right_answers_that_are_never_rewarded_are_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("melens.models.loading.bridge_around", pytest.fail)
    path = tmp_path / "solutions.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2?", "answer": "Two and two are four apples, so it is 4."}))
    with pytest.raises(
        MelensError, match=r"solutions.jsonl: 1 of 1 right answers can never be rewarded.*row 1 \('Two "
    ):
        job(tmp_path / "run", "exp=grpo", f"training.dataset={path}", "training.batch_size=1")


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0}, "training.lr is 0"),
        ({"batch_size": 6, "micro_batch_size": 4}, r"batch_size \(6\) must be a multiple of .*micro_batch_size \(4\)"),
        ({"precision": "half"}, "training.precision is 'half'"),
        ({"trainer": {"loss_typ": "nll"}}, "training.trainer.loss_typ is not a field of SFTConfig"),
        (
            {"trainer": {"learning_rate": 1e-3}},
            "learning_rate has an option of its own: set training.lr",
        ),
        ({"trainer": {"max_grad_norm": "abc"}}, "training.trainer.max_grad_norm is 'abc'; it must be like 1.0"),
        ({"method": "dpo", "beta": 0}, "training.beta is 0; with dpo it must be over 0"),
        ({"method": "grpo", "batch_size": 32}, "The data has 16 rows; grpo needs at least 32"),
        ({"max_length": 2}, "cuts off the reply of every row"),
    ],
)
def test_wrong_options_are_told(tmp_path, changes, message):
    with pytest.raises(MelensError, match=message):
        fit(tmp_path, **changes)


# --- The command line -------------------------------------------------------------------------------------------------


def job(folder, *overrides):
    """What the command line does with these options, in this process; of `exp=`, the last."""
    cfg = compose_options(*prepare_command(["scale=smoke", *overrides]))
    folder.mkdir(parents=True, exist_ok=True)
    assert run_job(cfg, folder) == []


def run_twice_over(*overrides, program="experiments/run.py", **told):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"} | told
    done = subprocess.run(
        [*launch, "scale=smoke", *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def losses(folder):
    return pd.read_parquet(folder / "training_log.parquet")["loss"].dropna()


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_go_on_as_two(tmp_path):
    options = ["exp=sft", "training.mask=paper", "training.batch_size=8", "training.steps=6"]
    options += ["training.save_every=3", "training.trace_every=3"]
    job(tmp_path / "one", *options)
    run_twice_over(*options, f"hydra.run.dir={tmp_path / 'two'}")
    assert json.loads((tmp_path / "two" / "result.json").read_text())["metrics"]["training_processes"] == 2
    pd.testing.assert_series_equal(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=0, atol=1e-4)
    looks = pd.read_parquet(tmp_path / "one" / "training_trace.parquet")
    assert looks.groupby("masked")["step"].apply(list).to_dict() == {False: [0, 3, 6], True: [0, 3, 6]}
    (tmp_path / "two" / "checkpoints" / "checkpoint-6").rename(tmp_path / "gone")
    run_twice_over(*options, f"training.resume={tmp_path / 'two'}", f"hydra.run.dir={tmp_path / 'again'}")
    assert json.loads((tmp_path / "again" / "result.json").read_text())["metrics"]["training_resumed_at"] == 3
    pd.testing.assert_series_equal(losses(tmp_path / "one"), losses(tmp_path / "again"), rtol=0, atol=1e-4)
    again = pd.read_parquet(tmp_path / "again" / "training_trace.parquet")
    assert again[["step", "masked"]].equals(looks[["step", "masked"]])  # also what was seen before it stopped


@pytest.mark.slow
def test_two_processes_train_from_scratch_as_one_does(tmp_path):
    options = ["exp=pretrain", "training.dataset=python_docs", "training.limit=null", "training.mask=paper"]
    options += ["wemask.start=1", "training.gate=headwise"]
    options += ["training.batch_size=8", "training.micro_batch_size=4", "training.max_length=32", "training.steps=4"]
    options += ["training.trace_every=2", "training.trace_prompts=2", "training.save_every=0", "training.held_out=0.02"]
    job(tmp_path / "one", *options)
    run_twice_over(*options, f"hydra.run.dir={tmp_path / 'two'}")
    one, two = (json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("one", "two"))
    assert (one["training_processes"], two["training_processes"]) == (1, 2)
    assert one["training_tokens"] == two["training_tokens"] == 4 * 8 * 32
    pd.testing.assert_series_equal(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=0, atol=1e-4)
    held_out = [pd.read_parquet(tmp_path / name / "validation.parquet") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*held_out, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_sharded_model_trains_as_a_whole_one_does(tmp_path):
    fsdp2 = yaml.safe_load((ROOT / "conf" / "training" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    told = {"ACCELERATE_USE_FSDP": "true"} | {
        name.upper(): str(value).lower() if isinstance(value, bool) else str(value) for name, value in fsdp2.items()
    }
    options = ["exp=sft", "training.mask=paper", "training.gate=headwise", "training.lr=0.1", "training.batch_size=8"]
    options += ["training.steps=6", "training.save_every=3"]
    job(tmp_path / "whole", *options)
    run_twice_over(*options, f"hydra.run.dir={tmp_path / 'sharded'}", program="tests/sharded.py", **told)
    pd.testing.assert_series_equal(losses(tmp_path / "whole"), losses(tmp_path / "sharded"), rtol=0, atol=1e-4)
    assert not len(pd.read_parquet(tmp_path / "sharded" / "training_trace.parquet"))  # so it was sharded
    (tmp_path / "sharded" / "checkpoints" / "checkpoint-6").rename(tmp_path / "gone")
    again = [f"training.resume={tmp_path / 'sharded'}", f"hydra.run.dir={tmp_path / 'again'}"]
    run_twice_over(*options, *again, program="tests/sharded.py", **told)
    pd.testing.assert_series_equal(losses(tmp_path / "whole"), losses(tmp_path / "again"), rtol=0, atol=1e-4)
    whole, sharded = (load_model(str(tmp_path / name / "model")) for name in ("whole", "sharded"))
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens), sharded(tokens), rtol=1e-3, atol=1e-3)
    assert WeMask.load(tmp_path / "sharded" / "model").on(sharded).fixed is not None


@pytest.mark.slow
def test_a_sharded_model_trains_in_mixed_precision(tmp_path):
    options = ["exp=sft", "training.mask=paper", "training.precision=mixed", "training.gradient_checkpointing=true"]
    options += ["training.batch_size=8", "training.steps=4"]
    job(tmp_path / "whole", *options)
    told = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    told |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    run_twice_over(*options, f"hydra.run.dir={tmp_path / 'sharded'}", program="tests/sharded.py", **told)
    pd.testing.assert_series_equal(losses(tmp_path / "whole"), losses(tmp_path / "sharded"), rtol=0, atol=0.03)


@pytest.mark.parametrize("options", [["exp=dpo"], ["exp=grpo"], ["exp=sft", "training.peft=lora"]])
def test_the_other_methods_as_experiments(tmp_path, options):
    job(tmp_path, *options, "training.mask=paper")
    looks = pd.read_parquet(tmp_path / "training_trace.parquet")
    assert looks["step"].tolist() == [0, 0, 20, 20]
    assert load_model(str(tmp_path / "model")).tokenizer is not None
    assert (tmp_path / "training_loss.html").is_file()


def test_a_model_is_trained_on_with_the_mask_it_was_trained_with(tmp_path):
    job(tmp_path / "first", "exp=sft", "training.mask=paper", "training.lr=0.05", "training.steps=5")
    again = [f"model.name={tmp_path / 'first' / 'model'}", "training.mask=saved", "training.steps=1", "exp=sft"]
    job(tmp_path / "second", "model=hub", *again)
    first, second = (WeMask.load(tmp_path / name / "model") for name in ("first", "second"))
    bridge = load_model(str(tmp_path / "first" / "model"))
    assert first.fixed.dims == second.fixed.dims
    assert first.fixed.dims != WeMask(rate=0.1, start=1).on(bridge).fixed.dims  # which the weights would choose now


def test_a_saved_mask_is_kept_on_some_of_its_blocks():
    model, _ = tiny()
    mask = MASK.on(model)
    assert on_blocks(mask, "all") == mask
    assert on_blocks(mask, "first").fixed.dims == {1: mask.fixed.dims[1]}
    assert on_blocks(mask, [2, 3]).fixed.blocks == (2, 3)
    with pytest.raises(MelensError, match="on the blocks 1, 2, 3; block 0 is not masked"):
        on_blocks(mask, [0, 1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.mask=papr"], "training.mask names 'papr'; allowed are"),
        (["training.dataset=gsm9k"], "the nearest known are gsm8k"),
        (["training.lora.rank=0", "training.peft=lora"], "training.lora.rank is 0"),
        (["training.columns=abc"], "training.columns is 'abc'"),
        (["training.mask=paper", "wemask.rate=0"], "masks nothing"),
        (["training.trainer.foo=1"], "training.trainer.foo is not a field of SFTConfig"),
        (["training.gate=both"], "training.gate is 'both'"),
        (["training.mask=paper", "wemask.start=me+1"], "no ME layer to start from"),
        (["exp=tables"], "table is null; exp=tables needs one of"),
        (
            ["exp=tables", "table=7", "training.seed=[0,abc]"],
            r"training.seed is \[0, 'abc'\]; it must be a list of whole numbers",
        ),
        (["exp=tables", "table=7", "wemask.rate=[0.1,0.1]"], "each value once"),
        (["training.mask=paper", "wemask.site=[attn_in,ln1_in]"], "but a training takes one mask"),
        (["training.mask=paper", "wemask.start=all_blocks"], "wemask.start is .all_blocks., but a training"),
        (["training.resume=."], "There is no training to resume in checkpoints"),
        (["training.batch_size=0"], "training.batch_size is 0"),
        (["training.resume=/nowhere"], "there is no such folder"),
        (
            ["model.config.hidden_size=65536", "model.config.intermediate_size=1000000"],
            "needs .* GB for its weights, but",
        ),
        (["training.dataset=/nowhere.jsonl"], "There is no file /nowhere.jsonl"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(tmp_path, overrides, message):
    experiment = [] if any(option.startswith("exp=") for option in overrides) else ["exp=sft"]
    with pytest.raises(MelensError, match=message):
        job(tmp_path, *experiment, *overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_a_cache_to_write_to_is_told_before_anything_slow(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        MelensError, match=r"keeps trained models in .*file/trainings, which cannot be written to\. Set MEL"
    ):
        tables.prepare(compose_options("exp=tables", "table=3", "scale=smoke"), tmp_path, None)


def test_runs_take_turns_at_a_kept_training(tmp_path):
    told, seen = threading.Event(), []

    def other():
        with one_at_a_time(tmp_path / "trainings" / "a", told.set):
            seen.append("other")

    with one_at_a_time(tmp_path / "trainings" / "a", pytest.fail):
        waiting = threading.Thread(target=other)
        waiting.start()
        assert told.wait(10)
        seen.append("first")
    waiting.join(10)
    assert seen == ["first", "other"]


@pytest.mark.slow
def test_a_table_trains_what_is_missing_and_a_second_time_nothing(tmp_path, monkeypatch):
    options = ["exp=tables", "table=7", "training.steps=2", "wemask.rate=[0.1,0.3]", "benchmark.tasks=[induction]"]
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))
    job(tmp_path / "first", *options)
    scores = pd.read_parquet(tmp_path / "first" / "table_scores.parquet").query("task == 'induction'")
    assert scores["mask"].tolist() == [
        "base",
        "SFT",
        "SFT + WeMask rate=0.1 (TF)",
        "SFT + WeMask rate=0.3 (TF)",
        "WeMask rate=0.1 (SFT)",
        "WeMask rate=0.3 (SFT)",
        "gated attention, headwise (SFT)",
        "gated attention, elementwise (SFT)",
    ]
    assert scores.set_index("mask")["difference"].notna().tolist() == [True, False] + 6 * [True]
    pairs = pd.read_parquet(tmp_path / "first" / "table_pairs.parquet").query("task == 'induction'")
    assert pairs[["kind", "mask", "reference"]].to_numpy().tolist() == [
        row
        for rate in (0.1, 0.3)
        for row in (
            ["training over inference", f"WeMask rate={rate} (SFT)", f"SFT + WeMask rate={rate} (TF)"],
            ["training over gates", f"WeMask rate={rate} (SFT)", "gated attention, headwise (SFT)"],
            ["training over gates", f"WeMask rate={rate} (SFT)", "gated attention, elementwise (SFT)"],
        )
    ]
    metrics = json.loads((tmp_path / "first" / "result.json").read_text())["metrics"]
    assert (metrics["thinking"], metrics["n_unfinished"]) == (None, 0)  # nothing is asked in a chat
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("trainings/*/model/model.safetensors")}
    assert len(kept) == 5
    job(tmp_path / "second", *options)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "second" / "table_scores.parquet"),
        pd.read_parquet(tmp_path / "first" / "table_scores.parquet"),
    )
    blocks = {}
    score = Evaluator.score

    def spy(self, benchmark, configurations):
        blocks.update({own.label: own.mask and own.mask.fixed.blocks for own in configurations})
        return score(self, benchmark, configurations)

    monkeypatch.setattr(Evaluator, "score", spy)
    job(tmp_path / "third", *options, "benchmark.layers=[2]")
    masked = {label: (2,) for label in scores["mask"] if "WeMask" in label}
    assert {label: found for label, found in blocks.items() if found} == masked
    assert (tmp_path / "first" / "table.tex").read_text().count("WeMask") == 4
    trained = next(path.parent for path in kept if (path.parent / "wemask.json").is_file())
    saved = [
        "exp=benchmark",
        "model=hub",
        f"model.name={trained}",
        "benchmark.masks=[off,saved]",
        "benchmark.tasks=[copy]",
    ]
    job(tmp_path / "saved", *saved)
    assert len(pd.read_parquet(tmp_path / "saved" / "benchmark_scores.parquet")["mask"].unique()) == 2
