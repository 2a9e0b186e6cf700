"""Every experiment on planted models, where the truth is known, and on architectures where some do not apply."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from planted import N_LAYERS, VOCABULARY, bridge, gains_apart, plain_model, plant
from written import write_result

import melens
from experiments.benchmark import check_request
from experiments.options import compose_options
from experiments.runner.job import run_job
from experiments.runner.study import begin_study, run_experiments
from melens import MelensError
from melens.analysis import ffn_concentration
from melens.claims.paper import CLAIMS
from melens.tracing import verification

TOKEN, DIM, BLOCK = 7, 21, 1


def study(model, prompts, *overrides):
    cfg = compose_options("exp=all", "exp.keep=false", "model=random", "exp.sinks.rank_tokens=12", *overrides)
    return begin_study(model, prompts, cfg, lambda name: lambda done, total: None)


def run_all(model, prompts, *overrides):
    """Every experiment's result by name."""
    return {result.experiment: result for result in run_experiments(study(model, prompts, *overrides))}


def verdicts_of(results):
    return melens.judge(results.values()).set_index("id").verdict


def figures_of(results):
    return {name: figure for result in results.values() for name, figure in result.figures.items()}


def prompts_of(token=TOKEN, n=6, position=0):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, VOCABULARY, (length,), generator=generator) for length in range(12, 12 + n)]
    for prompt in prompts:
        prompt[position] = token
    return prompts


def planted_model(family="llama", block=BLOCK):
    network = gains_apart(plain_model(family))
    plant(network, block=block, token=TOKEN, dim=DIM)
    return bridge(network)


@pytest.fixture(scope="module", params=["phi3", "gemma3"])  # joint projections; gains of 1 + w, and norms after the FFN
def planted(request):
    return run_all(planted_model(request.param), prompts_of())


def test_every_experiment_finds_what_was_planted(planted):
    metrics = {name: result.metrics for name, result in planted.items()}
    assert {part.not_applicable for part in metrics.values()} == {None}
    assert {part.me_layer for part in metrics.values()} == {BLOCK}
    assert metrics["ffn"].amplification_peak == BLOCK
    assert metrics["ffn"].concentration_peaks["down"] == BLOCK
    assert metrics["ablation"].left_without_ffn < 0.1
    assert BLOCK in metrics["ablation"].causal_layers
    assert metrics["predict"].ranks["response"] == 1
    assert metrics["predict"].predicted_dim == DIM
    assert metrics["stability"].least_agreement == 1
    beginnings = planted["stability"].tables["beginnings"].set_index("beginning")
    assert beginnings.at_first["as it is (n = 1)"] == 1  # six prompts that begin alike
    assert beginnings.none["another first token (n = 8)"] > 0.5  # the planted token is what makes it


def test_the_verdicts_on_what_was_planted(planted):
    verdicts = verdicts_of(planted)
    of_one_state = ["exists", "magnification", "first-token", "ffn-needed", "amplification"]
    assert verdicts[of_one_state].eq("holds in part").all()  # all prompts share their first token
    assert verdicts["predictable"] == "holds"
    assert verdicts["direction-inputs"] == "trivial here"


def test_every_claim_points_to_a_figure_that_is_there(planted):
    figures = figures_of(planted)
    assert {claim.figure for claim in CLAIMS if claim.experiment in planted} <= set(figures)
    for figure in figures.values():
        assert "tiny" in figure.plot.layout.title.text  # the model
        assert all((figure.source, figure.expected, figure.observed))
        assert "nan" not in figure.observed
    for name in ("norms", "dims_by_block", "cosine_by_block", "between_blocks"):
        assert "trivial by construction" in figures[name].plot.layout.title.text


def test_without_a_massive_activation_no_claim_holds():
    results = run_all(bridge(gains_apart(plain_model("qwen3"))), prompts_of())
    assert {result.metrics.me_layer for result in results.values()} == {None}
    assert set(verdicts_of(results)) == {"does not hold", "not measured"}


def test_a_massive_token_elsewhere_is_followed():
    results = run_all(planted_model(), prompts_of(position=3), "exp.experiments=[emergence,ablation]")
    ablation = results["ablation"].metrics
    assert (ablation.massive_position, ablation.ablation_prompts) == (3, 6)
    assert ablation.left_without_ffn < 0.1
    verdicts = verdicts_of(results)
    assert verdicts["first-token"] == "does not hold"
    assert verdicts["ffn-needed"] == "holds"


@pytest.mark.parametrize("block", [0, N_LAYERS - 1])
def test_a_massive_activation_in_the_first_or_last_block(block):
    results = run_all(planted_model(block=block), prompts_of())
    assert not any(result.metrics.failed for result in results.values())
    assert results["emergence"].metrics.me_layer == block
    assert verdicts_of(results)["exists"] == "holds in part"


def test_one_prompt_gives_values_without_intervals():
    results = run_all(planted_model(), prompts_of(n=1))
    assert not any(result.metrics.failed for result in results.values())
    assert verdicts_of(results)["magnification"] == "holds in part"
    assert not any("nan" in figure.observed for figure in figures_of(results).values())


@pytest.mark.parametrize(
    ("model_type", "config", "not_applicable"),
    [
        ("gpt2", {}, {"ablation", "consequence"}),
        ("gptj", {"num_attention_heads": 2, "rotary_dim": 8}, {"ablation", "consequence"}),
        ("mixtral", {"num_local_experts": 4}, {"ablation", "consequence", "predict"}),
        ("mamba", {}, {"ablation", "consequence", "predict", "rmsnorm", "ffn", "sinks"}),
        (
            "falcon_h1",
            {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
            {"ablation", "consequence"},
        ),
    ],
)
def test_other_architectures_work_or_say_why_not(model_type, config, not_applicable):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    if model_type in ("mixtral", "falcon_h1"):
        sizes["num_key_value_heads"] = 2
    model = melens.load_model("random", model_type=model_type, config=sizes | config)
    metrics = {result.experiment: result.metrics for result in run_experiments(study(model, prompts_of()))}
    reasons = {name: part.not_applicable for name, part in metrics.items() if part.not_applicable is not None}
    assert not any(part.failed for part in metrics.values()), reasons
    assert set(reasons) == not_applicable
    assert all(reason.endswith(".") for reason in reasons.values())


def test_the_projections_of_a_mixture_of_experts_are_not_taken_for_those_of_a_dense_ffn():
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "mlp_only_layers": [0, 1],
    }  # fmt: skip
    model = melens.load_model("random", model_type="qwen3_moe", config=config)
    (result,) = run_experiments(study(model, prompts_of(), "exp.experiments=[ffn]"))
    assert result.metrics.missing_projections == {"gate": [2, 3], "up": [2, 3]}
    by_block = result.tables["ffn_by_block"].set_index("quantity").layer
    assert by_block["concentration after gate"].tolist() == [0, 1]
    assert by_block["concentration after down"].tolist() == [0, 1, 2, 3]
    assert "No gate projection can be measured in the FFN of blocks 2 and 3." in result.figures["ffn"].observed


def test_a_layernorm_model_with_a_massive_activation_can_be_ablated():
    model = melens.load_model(
        "random", model_type="gpt2", config={"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY}
    )
    mlp = model.original_model.transformer.h[1].mlp
    with torch.no_grad():
        mlp.c_proj.bias[DIM] = 3_000  # every token's: a massive activation all the same
    prepared = study(model, prompts_of())
    assert prepared.me.layer == 1
    metrics = {result.experiment: result.metrics for result in run_experiments(prepared)}
    assert set(metrics["ablation"].left_without_norm) == {"identity", "no_gain", "no_norm"}
    assert metrics["ablation"].left_without_ffn < 0.1


def test_what_several_experiments_measure_is_checked_at_once(monkeypatch, tmp_path):
    checked = []
    own = verification._verify
    monkeypatch.setattr(verification, "_verify", lambda model, sites: checked.append(sites) or own(model, sites))
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path))
    several = study(
        planted_model(), prompts_of(), "exp.experiments=[emergence,sinks,ablation]", "exp.sinks.rank_tokens=8"
    )
    assert [result.metrics.not_applicable for result in run_experiments(several)] == [None, None, None]
    assert len(checked) == 1


@pytest.mark.parametrize("part", ["_amplification", "ffn_figure"])
def test_an_experiment_that_breaks_does_not_lose_the_others(monkeypatch, part):
    monkeypatch.setattr(ffn_concentration, part, lambda *args, **options: 1 / 0)
    broken, whole = run_experiments(study(planted_model(), prompts_of(), "exp.experiments=[ffn,predict]"))
    assert broken.metrics.failed
    assert "ZeroDivisionError" in broken.metrics.not_applicable
    assert whole.metrics.ranks["response"] == 1


def test_what_was_checked_is_shown_by_site_and_block_and_written_with_every_result(tmp_path):
    cfg = compose_options("exp=verify", "model=random")
    begun = begin_study(planted_model("qwen3"), prompts_of(), cfg, lambda name: lambda done, total: None)
    (result,) = run_experiments(begun)
    errors = result.tables["verification"]
    assert (errors["error"] <= errors["limit"]).all()
    assert sorted(errors[errors["site"] == "hook_resid_post"]["layer"]) == list(range(N_LAYERS))
    assert result.metrics.largest_error == pytest.approx(errors["error"].max())
    assert (result.metrics.way, result.metrics.use_cache) == ("fast", True)
    said = dict(result.findings)
    assert re.fullmatch(r"off by \d\.\de-0\d at most \(limit 1\.0e-03\), in block \d", said["hook_resid_post"])
    assert said["prompts of a trace"] == "share forward passes"
    write_result(result, tmp_path, config={}, duration=1.0)
    written = json.loads((tmp_path / "result.json").read_text())["verified"]
    assert (written["checked"], written["way"]) == (True, "fast")
    assert max(written["largest_error_by_site"].values()) < written["limit"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["exp=generate", "generate.prompt=a"], "Prompt 'a' of generate.prompt has 1 token"),
        (["exp=generate", "generate.max_new_tokens=5000"], "generate.max_new_tokens is 5000, but the longest prompt"),
        (["exp=wemask", "wemask.layers=[99]"], "The model has no block 99 to mask: its blocks are 0 to 5."),
        (["exp=wemask", "wemask.start=6"], "The model has no block 6 to mask: its blocks are 0 to 5."),
        (["exp=wemask", "wemask.rate=0.001"], "Rate 0.001 selects 0 of 128 dims"),
        (["exp=wemask", "data.n_tokens=5000"], "data.n_tokens is 5,000; lower it to the model's context of 4,096."),
        (["exp=benchmark", "benchmark.layers=[99]"], "The model has no block 99 to mask: its blocks are 0 to 5."),
        (["exp=benchmark", "benchmark.needle.lengths=[5000]"], "benchmark.needle.lengths has 5,000; lower it to"),
        (["exp=benchmark", "model.tokenizer=null"], "The benchmark needle needs a tokenizer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_told_before_its_weights_are_read(monkeypatch, tmp_path, overrides, message):
    monkeypatch.setattr("melens.models.loading.bridge_around", pytest.fail)
    options = compose_options("model=random", "model.tokenizer=bytes", "prompts=short", *overrides)
    with pytest.raises(MelensError, match=re.escape(message)):
        run_job(options, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_run_says_that_its_trace_was_measured_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))  # another test may have kept a trace that holds it
    options = compose_options("exp=emergence", "model=random", "prompts=short", "model.tokenizer=bytes")
    told = "Measured before, and kept: the trace (exp.keep=false measures anew)."
    for again in (False, True):
        run_job(options, tmp_path)
        assert (told in capsys.readouterr().out.splitlines()) == again


def test_a_judge_that_cannot_judge_is_told_before_weights_are_read(monkeypatch):
    monkeypatch.setattr("melens.benchmarks.evaluation.check_tasks", lambda *given: None)
    options = compose_options("exp=benchmark", "benchmark.tasks=[advbench]", "benchmark.judge=random")
    with pytest.raises(MelensError, match="The judge random has no chat template"):
        check_request(options.requests["benchmark"], options, SimpleNamespace(tokenizer=None))
