"""Training with masks and gates: what stays zero, what goes on where it stopped, what is told and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import planted
import pytest
import torch
from datasets import Dataset
from hydra import compose, initialize_config_dir

from experiments.job import run_job
from experiments.options import check_options
from melens import MelensError, WeMask, load_model
from melens.gates import add_gates, gates_of
from melens.networks import bridged_twin, open_network, plain_twin
from melens.training.data import format_rows, load_training_data
from melens.training.recipe import Lora, Recipe, check_extra
from melens.training.rewards import reward_answer, reward_format
from melens.training.saving import save_trained
from melens.training.trainers import train

ROOT = Path(__file__).parents[1]
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
        add_gates(open_network(model), gate)
    return model, bridge.tokenizer


def sums(method="sft", n=16):
    return format_rows(load_training_data("sums", method, limit=n), method, chat=True)


def fit(folder, method="sft", *, mask=None, gate=None, resume=False, rows=None, **changes):
    model, tokenizer = tiny(gate)
    settled = None if mask is None else mask.on(model)
    rows = sums(method) if rows is None else rows
    return (
        train(model, tokenizer, rows, recipe(method, **changes), folder, mask=settled, resume=resume),
        tokenizer,
        settled,
    )


MASK = WeMask(rate=0.25, start=1)


def test_the_loss_falls_on_what_can_be_memorised_and_a_mask_changes_it(tmp_path):
    plain, _, _ = fit(tmp_path / "plain", steps=30, rows=sums(n=4), warmup=0.0, lr=3e-3)
    masked, _, _ = fit(tmp_path / "masked", steps=30, rows=sums(n=4), warmup=0.0, lr=3e-3, mask=MASK)
    for trained in (plain, masked):
        assert trained.log["loss"].iloc[-1] < 0.5 * trained.log["loss"].iloc[0]
    assert abs(plain.log["loss"].iloc[0] - masked.log["loss"].iloc[0]) > 1e-5


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_the_reference_wears_the_mask_too(tmp_path, method):
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
    model, tokenizer = tiny(gate)

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    changes = {key: options[key] for key in ("lora", "steps", "save_every")}
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, sums(), recipe(**changes), tmp_path / "cut", mask=MASK.on(model), progress=stop)
    resumed, _, _ = fit(tmp_path / "cut", resume=True, **options)
    assert resumed.metrics["resumed_at"] == 4
    pd.testing.assert_series_equal(resumed.log["loss"], whole.log["loss"], rtol=0, atol=1e-6)


def test_checkpoints_of_another_training_are_refused(tmp_path):
    fit(tmp_path, mask=MASK, save_every=2)
    with pytest.raises(MelensError, match=r"was trained with another mask: rate was 0\.25 and is 0\.5"):
        fit(tmp_path, mask=WeMask(rate=0.5, start=1), save_every=2, resume=True)
    with pytest.raises(MelensError, match=r"was trained with another mask: .* is none"):
        fit(tmp_path, save_every=2, resume=True)
    with pytest.raises(MelensError, match="There is no training to go on with"):
        fit(tmp_path / "elsewhere", resume=True)


def test_mixed_precision_and_checkpointing_mask_alike(tmp_path):
    usual, _, _ = fit(tmp_path / "usual", mask=MASK)
    again, _, _ = fit(tmp_path / "again", mask=MASK, gradient_checkpointing=True)
    mixed, _, _ = fit(tmp_path / "mixed", mask=MASK, precision="mixed")
    pd.testing.assert_series_equal(usual.log["loss"], again.log["loss"], rtol=1e-5)
    pd.testing.assert_series_equal(usual.log["loss"], mixed.log["loss"], rtol=0.02)


def test_a_trained_model_is_loaded_with_its_gates_and_its_mask(tmp_path):
    trained, tokenizer, settled = fit(tmp_path / "run", mask=MASK, gate="headwise", lr=0.1)
    folder = save_trained(trained.model, tokenizer, tmp_path / "model", mask=settled, told={})
    bridge = load_model(str(folder))
    tokens = torch.randint(0, 250, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), trained.model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert all(gate.weight.abs().max() > 0 for gate in gates_of(open_network(bridge)).values())
    saved = WeMask.load(folder)
    assert saved.on(bridge).fixed.dims == settled.fixed.dims
    assert not (tmp_path / ".model.partial").exists()


def test_an_ungated_model_saves_no_gates(tmp_path):
    trained, tokenizer, _ = fit(tmp_path / "run")
    folder = save_trained(trained.model, tokenizer, tmp_path / "model", mask=None, told={})
    assert not (folder / "gate.safetensors").exists()
    assert not (folder / "wemask.json").exists()


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
def test_gates_start_as_the_identity_in_bridge_and_plain_model(family, kind):
    bridge = planted.bridge(planted.gains_apart(planted.plain_model(family)))
    tokens = torch.randint(1, planted.VOCABULARY, (2, 7))
    with torch.no_grad():
        before = bridge(tokens)
        add_gates(open_network(bridge), kind)
        assert torch.equal(bridge(tokens), before)
        for gate in gates_of(open_network(bridge)).values():
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

    with pytest.raises(MelensError, match=r"no number in step 4, in a batch of 4 that begins with '.*checkpoint-2"):
        train(model, tokenizer, sums(), recipe(steps=6, save_every=2), tmp_path, progress=spoil)


# --- Data and rewards -------------------------------------------------------------------------------------------------


def test_rows_become_conversations_or_text(tmp_path):
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
    (row,) = format_rows(data, "dpo", chat=True)  # the one without a last turn is left out
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("See you", "no")
    (row,) = format_rows(data, "dpo", chat=False)
    assert row["prompt"] + row["chosen"] == dialogue + "See you"


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
        ("not json", {}, "line 1: this is no JSON object"),
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


def test_answers_are_read_as_mathematics():
    right = [
        "So she has $1,234.50 left.",
        r"\boxed{1/2}",
        "Therefore, the final answer is 72.",
        "#### 5",
        "x = 7, so 7",
    ]
    gold = ["1234.5", "0.5", "72", "5", "7"]
    assert reward_answer(right, gold) == [1, 1, 1, 1, 1]
    assert reward_answer(right, ["1234", "2", "71", "50", "8"]) == [0, 0, 0, 0, 0]
    assert reward_answer(
        [[{"role": "assistant", "content": "It is 3."}], [{"role": "assistant", "content": "?"}]], ["3", "3"]
    ) == [1, 0]
    assert reward_format([r"So \boxed{3}", "#### 3", "the answer is 3", "3 it was"]) == [1, 1, 1, 0]


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


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0}, "training.lr is 0"),
        ({"batch_size": 6, "micro_batch_size": 4}, "do not divide"),
        ({"precision": "half"}, "training.precision is 'half'"),
        ({"trainer": {"loss_typ": "nll"}}, "training.trainer.loss_typ is no field of TRL's SFTConfig"),
    ],
)
def test_wrong_options_are_told(tmp_path, changes, message):
    with pytest.raises(MelensError, match=message):
        fit(tmp_path, **changes)


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr("melens.training.recipe.find_spec", lambda name: None if name == "trl" else True)
    with pytest.raises(MelensError, match=r"pip install 'melens\[train\]'"):
        check_extra()


# --- The command line -------------------------------------------------------------------------------------------------


def job(folder, *overrides):
    """What the command line does with these options, in this process."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["scale=smoke", *overrides])
    check_options(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    assert run_job(cfg, folder) == []


def run_twice_over(*overrides):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "experiments/run.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, "scale=smoke", *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def losses(folder):
    return pd.read_parquet(folder / "training_log.parquet")["loss"].dropna()


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


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_the_other_methods_as_experiments(tmp_path, method):
    job(tmp_path, f"exp={method}", "training.mask=paper")
    assert load_model(str(tmp_path / "model")).tokenizer is not None
    assert (tmp_path / "training_loss.html").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.mask=papr"], "training.mask names 'papr'; allowed are"),
        (["training.dataset=gsm9k"], "the nearest known are gsm8k"),
        (["training.lora.rank=0", "training.peft=lora"], "training.lora.rank is 0"),
        (["training.columns=abc"], "training.columns is 'abc'"),
        (["training.data_dir=5"], "training.data_dir is 5"),
        (["training.mask=paper", "wemask.rate=0"], "masks nothing"),
        (["+training.trainer.foo=1"], "training.trainer.foo is no field of TRL's SFTConfig"),
        (["training.gate=both"], "training.gate is 'both'"),
        (["training.mask=paper", "wemask.start=me+1"], "no ME layer to start from"),
        (["exp=tables"], "table is None; it must be one of"),
        (["training.batch_size=0"], "training.batch_size is 0"),
        (["training.resume=/nowhere"], "there is no such folder"),
        (
            ["model.config.hidden_size=65536", "model.config.intermediate_size=1000000"],
            "needs .* GB for weights, gradients",
        ),
    ],
)
def test_a_mistake_is_told_in_a_sentence(tmp_path, overrides, message):
    experiment = [] if any(option.startswith("exp=") for option in overrides) else ["exp=sft"]
    with pytest.raises(MelensError, match=message):
        job(tmp_path, *experiment, *overrides)
    assert list(tmp_path.iterdir()) == []


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
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("trainings/*/model/model.safetensors")}
    assert len(kept) == 5
    job(tmp_path / "second", *options)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "second" / "table_scores.parquet"),
        pd.read_parquet(tmp_path / "first" / "table_scores.parquet"),
    )
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
