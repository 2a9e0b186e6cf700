import html
import json
import math
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from planted import FAMILIES, bridge, gains_apart, plain_model
from rich.console import Console
from test_chat import TEMPLATES
from written import write_result

from experiments.generate import EXPERIMENTS
from experiments.options import compose_options
from experiments.runner.job import run_job
from experiments.runner.study import begin_study
from melens import MelensError, Prompt, WeMask, load_model
from melens.analysis import generated_texts
from melens.analysis.generated_texts import (
    Decoding,
    GenerateMetrics,
    Given,
    Pair,
    Side,
    compare,
    first_difference,
    parts,
    render_pairs,
    write,
)
from melens.analysis.generated_texts import _in_words as in_words
from melens.data.chat import PLAIN
from melens.report.result import Metrics, Result
from melens.report.terminal import show_findings

ROOT = Path(__file__).parents[2]
PROMPTS = [Prompt("Rain is"), Prompt("The capital of France is")]
RANDOM_DIMS = WeMask(rate=0.3, select="random", site="resid_pre", start=12)


def config(*overrides):
    return compose_options("exp=generate", "prompts=short", "generate.max_new_tokens=4", *overrides)


def study(model, *overrides, prompts=PROMPTS):
    return begin_study(model, prompts, config(*overrides), lambda name: lambda done, total: None)


def run(model, *overrides, **options):
    of_run = study(model, *overrides, **options)
    return EXPERIMENTS[0].run(of_run, of_run.cfg.exp)


def prompt(model, text="The capital of France is"):
    return Given(0, text, model.tokenizer(text)["input_ids"])


# --- Where two texts part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "at"),
    [([5, 6, 7], [5, 6, 7], None), ([5, 6, 7], [5, 9, 7], 1), ([5], [6], 0), ([5, 6], [5, 6, 2], 2), ([], [], None)],
)
def test_where_two_texts_part(left, right, at):
    assert first_difference(left, right) == first_difference(right, left) == at


def test_the_text_is_cut_at_the_token_that_differs(embedded):
    tokenizer = embedded.tokenizer
    start, ids = tokenizer("The capital is")["input_ids"], tokenizer(" Paris, of course")["input_ids"]
    assert parts(tokenizer, start, ids, 1) == (" Paris", ",", " of course")
    assert parts(tokenizer, start, ids, 0) == ("", " Paris", ", of course")
    assert parts(tokenizer, start, ids, None) == (" Paris, of course", "", "")


def test_a_character_of_several_tokens_is_not_cut(embedded):
    tokenizer = embedded.tokenizer
    start, ids = tokenizer("Look:")["input_ids"], tokenizer(" 🐉 there")["input_ids"]
    assert len(ids) > 3  # or the dragon is one token and nothing is tested
    for at in range(len(ids)):
        before, token, after = parts(tokenizer, start, ids, at)
        assert before + token + after == " 🐉 there"
        assert token


# --- Both texts -------------------------------------------------------------------------------------------------------


@pytest.mark.newest
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_nothing_masked_or_not(family):
    model = bridge(gains_apart(plain_model(family)))
    ids = torch.randint(10, 200, (14,), generator=torch.Generator().manual_seed(1)).tolist()
    options = Decoding(max_new_tokens=8)
    plain, logits = write(model, ids, options)
    again, uncached = write(model, ids, options, use_cache=False)
    assert plain == again
    torch.testing.assert_close(logits, uncached, rtol=1e-3, atol=1e-3)
    with WeMask(rate=0.5, select="random", site="resid_pre", start=0).applied(model):
        masked, masked_logits = write(model, ids, options)
        assert masked == write(model, ids, options, use_cache=False)[0]
    assert not torch.allclose(logits[0], masked_logits[0], atol=1e-2)  # the mask is there
    assert write(model, ids, options)[0] == plain  # and gone


@pytest.mark.newest
def test_a_text_is_the_likeliest_tokens_one_by_one(embedded):
    ids = prompt(embedded).ids
    new, logits = write(embedded, ids, Decoding(4))
    assert embedded.tokenizer.decode(new).startswith(" Paris.")
    assert logits.argmax(-1).tolist() == new
    with torch.no_grad():
        whole = embedded.original_model(torch.tensor([[*ids, *new]])).logits[0, len(ids) - 1 : -1]
    torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)


def test_what_the_checkpoint_prefers_is_left_out(embedded, monkeypatch):
    plain, _ = write(embedded, prompt(embedded).ids, Decoding(4))
    preferred = embedded.original_model.generation_config
    monkeypatch.setattr(preferred, "repetition_penalty", 50.0)
    monkeypatch.setattr(preferred, "do_sample", True)
    assert write(embedded, prompt(embedded).ids, Decoding(4))[0] == plain


def test_a_text_with_the_mask_and_without(embedded):
    pair = compare(embedded, RANDOM_DIMS.on(embedded), prompt(embedded), Decoding(4), seed=0)
    assert pair.seed is None
    at = pair.parted_at
    assert pair.without.ids[:at] == pair.masked.ids[:at]
    assert pair.without.ids[at] != pair.masked.ids[at]
    own, other = pair.without.log_probabilities
    other_masked, own_masked = pair.masked.log_probabilities
    assert 0 > own > other  # each side takes the token that it finds likelier
    assert 0 > own_masked > other_masked
    assert pair.kl > 0.1


def test_a_mask_that_does_next_to_nothing_leaves_the_text(embedded):
    mask = WeMask(rate=0.01, select="random", site="resid_pre", start=12, strength=1e-6).on(embedded)
    pair = compare(embedded, mask, prompt(embedded), Decoding(4), seed=0)
    assert pair.parted_at is None
    assert (pair.without.first, pair.without.log_probabilities) == ("", None)
    assert pair.without.common == pair.masked.common
    assert pair.kl == pytest.approx(0, abs=1e-4)


def test_the_divergence_is_that_of_the_unmasked_text(embedded):
    mask = RANDOM_DIMS.on(embedded)
    given = prompt(embedded)
    pair = compare(embedded, mask, given, Decoding(4), seed=0)
    tokens = torch.tensor([[*given.ids, *pair.without.ids]])
    with torch.no_grad():
        before = embedded.original_model(tokens).logits[0, len(given.ids) - 1 : -1].log_softmax(-1)
        with mask.applied(embedded):
            after = embedded.original_model(tokens).logits[0, len(given.ids) - 1 : -1].log_softmax(-1)
    assert pair.kl == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-2)
    assert pair.masked.log_probabilities[0] == pytest.approx(
        float(after[pair.parted_at, pair.without.ids[pair.parted_at]]), rel=1e-2
    )


def test_a_seed_gives_its_sample_again_and_leaves_the_global_generator_alone(embedded):
    options = Decoding(4, sample=True, temperature=1.5)
    state = torch.random.get_rng_state()
    first, second, other = (write(embedded, prompt(embedded).ids, options, seed=seed)[0] for seed in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_both_sides_draw_with_the_same_random_numbers(embedded):
    options = Decoding(4, sample=True, temperature=1.5)
    mask = WeMask(rate=0.01, select="random", site="resid_pre", start=12, strength=1e-6).on(embedded)
    assert compare(embedded, mask, prompt(embedded), options, seed=3).parted_at is None


# --- The experiment ---------------------------------------------------------------------------------------------------

HARSH = ("wemask.rate=0.3", "wemask.site=resid_pre", "wemask.select=random", "generate.max_new_tokens=2")


def test_a_row_a_prompt_and_seed(embedded):
    overrides = (
        *HARSH,
        "generate.sample=true",
        "generate.seeds=[0,1]",
        "generate.prompt=[Rain is,The capital of France is]",
    )
    result = run(embedded, *overrides)
    rows = result.tables["generations"]
    assert rows[["prompt", "seed"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert rows.prompt_text.unique().tolist() == ["Rain is", "The capital of France is"]
    assert result.metrics.n_pairs == 4
    assert result.metrics.identical_share == rows.parted_at.isna().mean()
    assert result.metrics.mean_kl == pytest.approx(rows.kl.mean())
    assert "blocks 12 to 29" in result.metrics.mask
    assert result.documents["generate.html"].count("<section>") == 4


def test_without_a_prompt_the_runs_own_short_ones_are_continued(embedded):
    prompts = [Prompt("A long one about rain and the sea"), *(Prompt(f"Number {n} is") for n in range(4))]
    rows = run(embedded, *HARSH, "generate.max_new_tokens=1", prompts=prompts).tables["generations"]
    assert rows.prompt_text.tolist() == [f"Number {n} is" for n in range(4)]
    assert rows.seed.isna().all()


def test_a_chat_is_read_in_the_models_template(embedded):
    (given,) = generated_texts._prompts(study(embedded), "Hello", PLAIN, "auto", 4)
    assert given.text == "Hello"
    assert given.chat.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("thinking", "ending", "told"),
    [
        ("auto", "<think>\n\n</think>\n\n", "off (enable_thinking=false)"),
        ("true", "<|im_start|>assistant\n<think>\n", "on (enable_thinking=true)"),
    ],
)
def test_the_chat_template_is_told_whether_to_think(thinking, ending, told):
    model = load_model("tiny")
    model.tokenizer.chat_template = (TEMPLATES / "qwen3_5_think.jinja").read_text()
    options = [*HARSH, "wemask.start=1", "generate.chat=true", f"generate.thinking={thinking}", "generate.prompt=Hello"]
    result = run(model, *options)
    prompt = re.search(
        r"<summary>In the chat template</summary><pre>(.*?)</pre>", result.documents["generate.html"], re.S
    )
    assert html.unescape(prompt[1]).endswith(ending)
    assert result.metrics.thinking == told
    assert result.metrics.n_unfinished == (2 if thinking == "true" else 0)  # two new tokens close no thought
    summary = result.findings[0][1]
    assert f"Thinking: {told}." in summary
    assert ("2 of 2 texts end inside a thought" in summary) == (thinking == "true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("generate.thinking=true",), "is an option of the chat template, but generate.chat is false"),
        (("generate.thinking=false", "generate.chat=true"), "generate.thinking is false, but .* has no switch"),
    ],
)
def test_thinking_without_a_switch_is_told_before_the_model_is_loaded(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr("melens.models.loading.bridge_around", pytest.fail)
    with pytest.raises(MelensError, match=message):
        run_job(config("model=tiny", *overrides), tmp_path)


@pytest.mark.parametrize(
    ("length", "message"), [(1, "line 1 has 1 token.*at least 2"), (10**5, "longer than the model's context")]
)
def test_a_prompt_that_does_not_fit_is_told_before_weights_are_read(tmp_path, monkeypatch, length, message):
    monkeypatch.setattr("melens.models.loading.bridge_around", pytest.fail)
    (tmp_path / "own.txt").write_text("a" * length)
    own = ("model.tokenizer=bytes", f"prompts.file={tmp_path / 'own.txt'}", "prompts.max_tokens=null")
    with pytest.raises(MelensError, match=message):
        run_job(config("model=random", *own), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("wemask.rate=[0.1,0.2]",), "takes one mask, but wemask makes 2"),
        (("generate.max_new_tokens=9000",), "generate.max_new_tokens is 9000, but the longest prompt leaves 81"),
        (("generate.prompt=Rain",), "'Rain' of generate.prompt has 1 token"),
    ],
)
def test_what_cannot_be_written(embedded, overrides, message):
    with pytest.raises(MelensError, match=re.escape(message)):
        run(embedded, *overrides)


def test_a_model_without_chat_template_or_tokenizer(embedded, monkeypatch):
    monkeypatch.setattr(embedded.tokenizer, "chat_template", None)
    with pytest.raises(MelensError, match="has no chat template"):
        run(embedded, "generate.chat=true")
    monkeypatch.setattr(embedded, "_tokenizer", None)
    with pytest.raises(MelensError, match="no tokenizer"):
        run(embedded, prompts=[torch.tensor([1, 2, 3])])


@pytest.mark.parametrize(
    "override",
    [
        "max_new_tokens=0", "max_new_tokens=1.5", "seeds=[]", "seeds=[a]", "temperature=0", "top_p=0",
        "top_p=1.1", "chat=maybe", "sample=1", "prompt=[]", "prompt=''", "prompt=[Rain,'']", "prompt=7",
        "temperature=true",
    ],
)  # fmt: skip
def test_a_wrong_option_is_told_at_once(override):
    with pytest.raises(MelensError, match=rf"generate\.{override.split('=')[0]} is .*; it must be "):
        config(f"generate.{override}")


# --- What is shown ----------------------------------------------------------------------------------------------------


def pair(**changes):
    given = Given(0, "Say <b>&amp;</b>", [1, 2], chat="<|user|>Say")
    without = Side([5, 6, 2], "It is <i>", " [red]$x", "\n</pre>", (-0.5, -3.0))
    masked = Side([5, 7], "It is <i>", " blue", "", (-math.log(1e7), -0.1))
    return Pair(
        **{"prompt": given, "seed": 4, "without": without, "masked": masked, "parted_at": 1, "kl": 0.25} | changes
    )


def test_markup_in_a_text_is_text_on_the_page():
    page = render_pairs([pair()], title="<model>", summary="1 & 2", mask="a mask")
    assert "<pre>It is &lt;i&gt;<mark> [red]$x</mark><span>\n&lt;/pre&gt;</span></pre>" in page
    assert "<pre>It is &lt;i&gt;<mark> blue</mark><span></span></pre>" in page
    assert '<pre class="prompt">Say &lt;b&gt;&amp;amp;&lt;/b&gt;</pre>' in page
    assert "<pre>&lt;|user|&gt;Say</pre>" in page
    assert "<title>&lt;model&gt;</title>" in page
    assert "Prompt 1, seed 4" in page
    assert "1e-07" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing from the network


def test_the_same_text_on_both_sides_has_no_marks():
    same = Side([5, 6], "It is", "", "", None)
    page = render_pairs([pair(without=same, masked=same, parted_at=None, seed=None)], title="t", summary="s", mask="m")
    assert page.count("<pre>It is</pre>") == 2
    assert "The same tokens on both sides." in page


@pytest.mark.parametrize(
    ("n_pairs", "same", "words"),
    [
        (1, 0.0, "The greedy text changes with the mask, from token 3 (counted from 0)."),
        (1, 1.0, "The greedy text is the same with the mask."),
        (4, 1.0, "None of 4 greedy texts changes with the mask."),
        (4, 0.75, "1 of 4 greedy texts changes with the mask, from token 3 (counted from 0)."),
        (4, 0.5, "2 of 4 greedy texts change with the mask, from token 3 on average (counted from 0)."),
    ],
)
def test_how_many_texts_change_is_a_sentence(n_pairs, same, words):
    metrics = GenerateMetrics(n_pairs=n_pairs, identical_share=same, mean_parted_at=3.0, mean_kl=0.5)
    along = "text" if n_pairs == 1 else "texts"
    assert in_words(metrics, sampled=False) == f"{words} KL of the next token along the unmasked {along}: 0.5 nats."


def test_brackets_in_a_finding_are_no_markup_of_the_terminal():
    out = StringIO()
    findings = [("[/b]", "[red]it[/red]", "\\[x]"), ("what", "value")]
    show_findings("generate", findings, Console(file=out, width=100))
    assert all(text in out.getvalue() for text in ("[/b]", "[red]it[/red]", "\\[x]"))


def test_a_page_is_written_before_the_result(tmp_path):
    result = Result("generate", {"name": "tiny"}, Metrics(), documents={"generate.html": "<p>é"})
    paths = write_result(result, tmp_path, config={"exp": {"name": "generate"}}, duration=1.0)
    assert [path.name for path in paths] == ["generate.html", "result.json"]
    assert (tmp_path / "generate.html").read_text("utf-8") == "<p>é"


def test_the_command_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("Where is the key?\nMy dog likes rain.\n")
    overrides = [
        "exp=generate",
        f"prompts.file={tmp_path}/prompts.txt",
        "generate.prompt=The capital of France is",
        *HARSH,
    ]
    done = subprocess.run(
        [sys.executable, "experiments/run.py", *overrides, f"hydra.run.dir={tmp_path}/run"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "▶ Paris" in done.stdout
    assert "The greedy text" in done.stdout
    rows = pd.read_parquet(tmp_path / "run" / "generations.parquet")
    assert rows.parted_at.tolist() == [0]
    assert rows.unmasked_text[0].startswith(" Paris")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["identical_share"] == 0
    assert "<mark> Paris</mark>" in (tmp_path / "run" / "generate.html").read_text("utf-8")
