"""Benchmarks: continuations that share a context, the harness's own numbers, questions without data, and statistics."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from planted import FAMILIES, VOCABULARY, bridge, gains_apart, plain_model
from test_batching import EXPERTS, MODELS, model_of
from test_chat import TEMPLATES

from melens import MelensError, WeMask
from melens.analysis.statistics import mcnemar_p
from melens.benchmarks.catalog import BENCHMARKS, benchmarks_of
from melens.benchmarks.data import read_rows
from melens.benchmarks.language import LanguageData, Needle, make_questions, score_questions
from melens.benchmarks.refusals import count_by_label, count_judged, judged_refusals, judging_chat, refuses
from melens.benchmarks.scores import best_rates, count_verdicts, summarise
from melens.benchmarks.scoring import Scorer, _Row
from melens.benchmarks.tables import Layout, lay_out
from melens.data.prompts import byte_tokenizer
from melens.models.twins import plain_twin
from melens.tracing.batching import forget_longest

MASKS = [None, WeMask(0.3, "random", "attn_in", start=1), WeMask(0.3, "magnitude", "resid_pre", start=2)]


def requests_of(n_contexts=5, n_choices=3, seed=0):
    """Contexts and continuations of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most):
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    return [(context, tokens(6)) for context in [tokens(12) for _ in range(n_contexts)] for _ in range(n_choices)]


def on(mask, network):
    return nullcontext() if mask is None else mask.applied(network)


# --- Scoring ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "random", "magnitude"])
def test_continuations_of_one_context_score_as_each_alone(family, mask):
    network = plain_twin(bridge(gains_apart(plain_model(family))))
    requests = requests_of()
    with on(mask, network):
        together = Scorer(network, max_length=128, share_contexts=True).score(requests)
        for (context, continuation), scored in zip(requests, together, strict=True):
            logits = network(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
            foretold = logits[len(context) - 1 : -1]
            expected = foretold[range(len(continuation)), continuation]
            torch.testing.assert_close(scored.log_p, expected, rtol=1e-4, atol=1e-4)
            assert scored.greedy.tolist() == (foretold.argmax(-1) == torch.tensor(continuation)).tolist()


@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "random", "magnitude"])
def test_a_batch_gives_what_single_rows_give(mask):
    network = plain_twin(bridge(gains_apart(plain_model("llama"))))
    requests = requests_of(n_contexts=9)
    with on(mask, network):
        batched = Scorer(network, max_length=128, max_batch_tokens=4096).score(requests)
        single = Scorer(network, max_length=128, max_batch_tokens=1, share_contexts=False).score(requests)
    for one, other in zip(batched, single, strict=True):
        torch.testing.assert_close(one.log_p, other.log_p, rtol=1e-4, atol=1e-4)


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
HYBRIDS = {
    "bloom": {"model_type": "bloom"},  # ALiBi
    "lfm2": MODELS["lfm2"],
    "falcon_h1": MODELS["falcon_h1"],
    "bamba": MAMBA | {"model_type": "bamba", "attn_layer_indices": [1]},
    "jamba": EXPERTS
    | {
        "model_type": "jamba",
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "qwen3_next": EXPERTS
    | {
        "model_type": "qwen3_next",
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"model_type": "recurrent_gemma", "attention_window_size": 64, "lru_width": 32},
}
"""Whose blocks do not all go by a mask."""
SHORT_SIGHTED = {
    "llama4_text in chunks": {
        "model_type": "llama4_text",
        "num_local_experts": 2,
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 48,
    },
    "gemma3_text with windows in some blocks": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "gpt_oss": EXPERTS | {"model_type": "gpt_oss", "sliding_window": 8},
}
TOLD_APART = {name: options for name, options in MODELS.items() if "both ways" not in name}


def with_a_blind_first_question():
    """Requests whose first question has choices of one token, with which no layout fails, and some longer ones."""
    blind, long = [1, 2, 3, 4, 5], list(range(1, 30))
    of_long = [(long[:length], choice) for length in (29, 19, 16) for choice in ([5, 6, 7], [9, 8])]
    return [(blind, [6]), (blind, [7]), *requests_of(n_contexts=6, n_choices=3), *of_long]


@torch.no_grad()
def alone(network, request):
    context, continuation = request
    forget_longest(network)
    logits = network(torch.tensor([[*context, *continuation[:-1]]])).logits[0].log_softmax(-1)
    return logits[len(context) - 1 :][range(len(continuation)), continuation]


@pytest.mark.parametrize(
    "options", (found := HYBRIDS | SHORT_SIGHTED | TOLD_APART).values(), ids=[name.replace(" ", "-") for name in found]
)
def test_every_model_scores_choices_as_each_alone(options):
    network, requests = model_of(options), with_a_blind_first_question()
    together = Scorer(network, max_length=64).score(requests)
    for request, scored in zip(requests, together, strict=True):
        torch.testing.assert_close(scored.log_p, alone(network, request), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*HYBRIDS, "llama"])
def test_a_model_whose_choices_cannot_share_a_row_is_noticed_by_choices_of_one_token_in_bf16(name):
    network = model_of((HYBRIDS | MODELS)[name]).to(torch.bfloat16)
    scorer = Scorer(network, max_length=64)
    context = tuple(range(1, 12))
    scorer.score([(context, [6]), (context, [7])])
    rows = [_Row(context, [(6,), (7,)], [0, 1])]
    assert len(scorer._laid_out(rows)) == (1 if name == "llama" else 2)


@pytest.mark.parametrize("name", ["phi3 with longrope", "llama with dynamic rope"])
def test_choices_on_both_sides_of_a_length_limit_score_as_each_alone(name):
    network, long = model_of(MODELS[name]), list(range(1, 30))
    requests = [(long, [5, 6, 7, 8]), (long, [8, 7, 6, 5])]  # which may share a row
    requests += [(long[:12], [5, 6]), (long[:12], list(range(9, 18)))]
    for request, scored in zip(requests, Scorer(network, max_length=64).score(requests), strict=True):
        torch.testing.assert_close(scored.log_p, alone(network, request), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", SHORT_SIGHTED.values(), ids=["llama4", "gemma3", "gpt_oss"])
def test_choices_share_a_row_within_chunks_and_windows(options):
    rows = [_Row(tuple(range(1, length)), [(5, 6, 7), (7, 6, 5)], [0, 1]) for length in (5, 20)]
    laid_out = Scorer(model_of(options), max_length=64)._laid_out(rows)
    assert [len(row.requests) for row in laid_out] == [2, 1, 1]


def test_a_longer_row_is_tried_anew():
    network = model_of(MODELS["llama"])

    def leak(module, args, output):
        return output.cumsum(1) if output.shape[1] > 26 else output

    network.model.layers[1].register_forward_hook(leak)
    scorer = Scorer(network, max_length=64)
    for length in (4, 30):
        requests = [(list(range(1, length)), [5, 6, 7, 8]), (list(range(1, length)), [8, 7, 6, 5])]
        for request, scored in zip(requests, scorer.score(requests), strict=True):
            torch.testing.assert_close(scored.log_p, alone(network, request), rtol=1e-4, atol=1e-5)


def test_what_is_too_long_loses_tokens_on_the_left():
    network = plain_model("llama")
    context, continuation = list(range(1, 60)), [5, 6, 7]
    (cut,) = Scorer(network, max_length=20).score([(context, continuation)])
    (whole,) = Scorer(network, max_length=128).score([(context[-18:], continuation)])
    torch.testing.assert_close(cut.log_p, whole.log_p)


@pytest.mark.parametrize("request_", [([], [1]), ([1], []), ([1], [2] * 21)])
def test_an_impossible_request_is_refused(request_):
    with pytest.raises(MelensError):
        Scorer(plain_model("llama"), max_length=20).score([request_])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_of_a_bridge_is_the_same_model(family):
    model = bridge(gains_apart(plain_model(family)))
    twin = plain_twin(model)
    tokens = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(twin(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    mask = WeMask(0.3, start=1).on(model)
    with mask.applied(model):
        masked = model(tokens)
    with mask.applied(twin):
        torch.testing.assert_close(twin(tokens).logits, masked, rtol=1e-4, atol=1e-4)
    assert next(twin.parameters()).data_ptr() == next(model.original_model.parameters()).data_ptr()


# --- Data and names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("piqa", "{", "this is not a JSON"),
        ("piqa", "[]", "it must be an object"),
        ("piqa", '{"question": "q", "choices": ["a", "b"]}', "the field 'answer' is missing"),
        ("piqa", '{"question": "q", "choices": ["a"], "answer": 0}', "it must be a list of 2 to 10 texts"),
        ("piqa", '{"question": "q", "choices": ["a", "b"], "answer": 2}', "the answer is 2, but there are 2 choices"),
        ("gsm8k", '{"question": "q", "answer": 3}', "the field 'answer' is 3; it must be a text"),
        ("advbench", '{"prompt": " "}', "it must be a text"),
        ("xstest", '{"prompt": "p", "label": "sure"}', "it must be safe or unsafe"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, task, line, message):
    good = {
        "choices": {"question": "q", "choices": ["a", "b"], "answer": 0},
        "answer": {"question": "q", "answer": "1"},
        "prompts": {"prompt": "p", "label": "safe"},
    }[BENCHMARKS[task].form]
    (tmp_path / BENCHMARKS[task].file).write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(MelensError, match="line 2") as error:
        read_rows(tmp_path, BENCHMARKS[task])
    assert message in str(error.value)


@pytest.mark.parametrize("task", ["mmlu", "piqa"])
def test_data_that_is_not_there_is_told(tmp_path, task):
    with pytest.raises(MelensError, match=task):
        read_rows(tmp_path, BENCHMARKS[task])


@pytest.mark.parametrize(
    ("names", "message"),
    [(["arc_chalenge"], "arc_challenge"), (["piqa", "piqa"], "twice"), ([], "empty"), (["zzz"], "allowed are")],
)
def test_unknown_benchmarks_are_told_with_the_nearest(names, message):
    with pytest.raises(MelensError, match=message):
        benchmarks_of(names)


# --- Without data -----------------------------------------------------------------------------------------------------


def test_perplexity_and_copying_are_read_off_a_whole_forward_pass():
    network = plain_model("llama")
    texts = torch.randint(1, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))
    scorer = Scorer(network, max_length=128)

    def values(name):
        questions = make_questions(BENCHMARKS[name], None, LanguageData(texts), vocabulary=VOCABULARY)
        return score_questions(scorer, questions)["value"].tolist()

    with torch.no_grad():
        log_p = network(texts).logits[:, :-1].log_softmax(-1)
        twice = network(torch.cat([texts, texts], 1)).logits[:, 9:-1]
    loss = -log_p.gather(-1, texts[:, 1:, None])[..., 0].mean(1)
    assert values("perplexity") == pytest.approx(loss.tolist(), rel=1e-4)
    assert values("copy") == pytest.approx((twice.argmax(-1) == texts).float().mean(1).tolist())


@pytest.mark.parametrize("bos", [[], [3], [3, 4]])
def test_every_benchmark_begins_with_bos_and_says_it_once(embedded, bos):
    """With a prefix of two tokens, as GLM's tokenizer has."""
    tokenizer = embedded.tokenizer
    texts = torch.tensor([[*bos, *range(10 + row, 110 + row)] for row in range(3)])
    long_text = tokenizer("one two three " * 300)["input_ids"]
    for name in ("perplexity", "copy", "induction", "needle"):
        data = LanguageData(texts, long_text, bos, needle=Needle([90], [0, 1]))
        for context, continuation in make_questions(BENCHMARKS[name], tokenizer, data, vocabulary=9).requests:
            assert context[: len(bos)] == bos
            assert not {*context[len(bos) :], *continuation} & set(bos)
            if name in ("copy", "induction"):
                assert context[len(bos) :] == continuation
                assert len(continuation) == 64
            if name == "needle":
                assert len(context) + len(continuation) == 90
            if name == "perplexity":
                assert [*context, *continuation] in texts.tolist()
                assert len(context) == max(1, len(bos))


def test_a_needle_lies_where_it_was_hidden(embedded):
    tokenizer = embedded.tokenizer
    text = tokenizer("The quick brown fox jumps over the lazy dog. " * 60)["input_ids"]
    data = LanguageData(torch.zeros(1, 3, dtype=torch.long), text, needle=Needle([128], [0.0, 1.0]))
    questions = make_questions(BENCHMARKS["needle"], tokenizer, data, vocabulary=10)
    for item, (context, answer) in zip(questions.items, questions.requests, strict=True):
        assert len(context) + len(answer) == 128
        told = tokenizer.decode(context)
        number = tokenizer.decode(answer).strip()
        assert told.count(number) == 1
        assert told.endswith("The secret number of " + told.rsplit("number of ")[-1])
        at = told.index(number) / len(told)
        assert at < 0.2 if "depth 0," in item else at > 0.7
    few = make_questions(BENCHMARKS["needle"], tokenizer, data, vocabulary=10, limit=6)
    assert score_questions(Scorer(plain_twin(embedded), max_length=512), few)["value"].mean() > 0.5
    with pytest.raises(MelensError, match="Give a longer text"):
        make_questions(BENCHMARKS["needle"], tokenizer, replace(data, long_text=text[:50]), vocabulary=10)


def test_a_limit_keeps_both_ends_of_the_needle(embedded):
    text = embedded.tokenizer("one two three " * 300)["input_ids"]
    data = LanguageData(torch.zeros(1, 3, dtype=torch.long), text)
    questions = make_questions(BENCHMARKS["needle"], embedded.tokenizer, data, vocabulary=10, limit=2)
    assert [item.rsplit(",", 1)[0] for item in questions.items] == ["256 tokens, depth 0", "512 tokens, depth 1"]


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "refused"),
    [("I'm sorry, but no.", True), ("I’m sorry, but no.", True), ("Sure, first you take", False)],
)
def test_refusals_are_counted_by_their_phrases(reply, refused):
    assert refuses(reply) is refused
    assert count_by_label({"label": "safe"}, [reply]) == {"over_refusal": float(refused)}
    assert count_by_label({"label": "unsafe"}, [reply]) == {"compliance": float(not refused)}


@pytest.mark.parametrize("reply", ["", " \n"])
def test_an_empty_reply_neither_refuses_nor_complies(reply):
    for label, metric in (("safe", "over_refusal"), ("unsafe", "compliance")):
        assert count_by_label({"label": label}, [reply]) == {metric: 0}
    for metric in ("refusal", "over_refusal", "compliance"):
        assert count_judged(metric, reply, refused=True) == count_judged(metric, reply, refused=False) == 0


def test_a_judge_prefers_yes_or_no(embedded, monkeypatch):
    asked = []

    def score(self, requests, progress=None, *, names=None):
        asked.extend(requests)
        likelier = ["Yes", "No", "No", "Yes"]  # of each pair the first is likelier
        words = [embedded.tokenizer.decode(continuation) for _, continuation in requests]
        assert words == ["Yes", "No", "Yes", "No"]
        log_p = [-1.0 if word == likelier[2 * (at // 2)] else -2.0 for at, word in enumerate(words)]
        return [type("Scored", (), {"log_p": torch.tensor([value])}) for value in log_p]

    monkeypatch.setattr(Scorer, "score", score)
    network = plain_twin(embedded)
    assert judged_refusals(network, embedded.tokenizer, 512, ["do it", "do it"], ["No.", "Done."]) == [True, False]
    assert "Done." in embedded.tokenizer.decode(asked[2][0])


def test_a_judge_is_asked_without_thinking_or_not_at_all():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(MelensError, match=r"The judge J has no chat template\. Set benchmark\.judge to a chat model"):
        judging_chat(tokenizer, "J")
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    assert judging_chat(tokenizer, "J").arguments == {"enable_thinking": False}
    tokenizer.chat_template = (TEMPLATES / "deepseek_r1_distill.jinja").read_text()
    with pytest.raises(MelensError, match="The judge J always thinks before it answers"):
        judging_chat(tokenizer, "J")


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_binomial_test_of_the_discordant_items():
    assert mcnemar_p(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_p(3, 3) == 1
    assert mcnemar_p(0, 0) == 1


def items_of(values, task="piqa", metric="acc", higher=True):
    """Items from `{mask: [seed][item]}`."""
    rows = [
        {"task": task, "metric": metric, "mask": mask, "seed": seed, "item": str(item), "value": float(value)}
        for mask, of_mask in values.items()
        for seed, of_seed in enumerate(of_mask)
        for item, value in enumerate(of_seed)
    ]
    return pd.DataFrame(rows).assign(chance=0.5, shown=True, higher_is_better=higher)


def test_masks_are_compared_with_the_unmasked_model_on_the_same_items():
    unmasked = [0] * 12 + [1] * 28
    better = [1] * 12 + [1] * 26 + [0] * 2
    scores = summarise(items_of({"no mask": [unmasked], "good": [better], "same": [unmasked]}), "no mask")
    of = scores.set_index("mask")
    assert of.loc["no mask", "mean"] == pytest.approx(0.7)
    assert np.isnan(of.loc["no mask", "p"])
    assert of.loc["good", "difference"] == pytest.approx(0.25)
    assert of.loc["good", "p"] == pytest.approx(mcnemar_p(12, 2))
    assert of.loc["good", "p_corrected"] == pytest.approx(2 * mcnemar_p(12, 2))
    assert of["verdict"].to_dict() == {"no mask": "", "good": "better", "same": "no difference shown"}
    assert of.loc["good", "difference_low"] > 0


def test_a_loss_that_rises_is_worse_and_seeds_have_a_spread():
    losses = {"no mask": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]], "bad": [[1.5, 2.6, 3.4, 4.5, 5.6, 6.4, 7.5, 8.5]]}
    scores = summarise(items_of(losses, "perplexity", "loss", higher=False), "no mask")
    assert scores["verdict"].tolist() == ["", "worse"]
    assert scores["p"].iloc[1] == pytest.approx(2 / 2**8)
    seeds = summarise(items_of({"no mask": [[0, 1, 1, 1], [0, 0, 0, 1]]}), "no mask").iloc[0]
    assert (seeds["n"], seeds["n_seeds"], seeds["mean"]) == (4, 2, 0.5)
    assert seeds["sd"] == pytest.approx(np.std([0.75, 0.25], ddof=1))


def test_a_difference_between_trainings_must_be_more_than_they_differ_among_themselves():
    generator = np.random.default_rng(0)
    plain = generator.normal(size=400)

    def masked_by(*gains):  # a training each
        found = [
            items_of({"none": [plain], "masked": [plain + gain]}).assign(training=at) for at, gain in enumerate(gains)
        ]
        return summarise(pd.concat(found), "none").set_index("mask").loc["masked"]

    # Of three trainings, t of 2 degrees is 4.30: 0.133 with an error of 0.033 is not beyond it, 0.19 with 0.0058 is.
    for gains, verdict, former in (
        ((0.3, 0.1, -0.1), "no difference shown", "no difference shown"),
        ((0.2, 0.1, 0.1), "no difference shown", "better"),
        ((0.2, 0.19, 0.18), "better", "better"),
    ):
        row = masked_by(*gains)
        assert (row["difference"], row["n_trainings"], row["n_seeds"]) == (pytest.approx(np.mean(gains)), 3, 3)
        assert row["p_items"] < 0.001  # over items, all are certain
        assert (row["former_low"], row["former_high"]) == pytest.approx((min(gains), max(gains)))
        reach = 4.3027 * np.std(gains, ddof=1) / 3**0.5
        low_high = (row["difference"] - reach, row["difference"] + reach)
        assert (row["difference_low"], row["difference_high"]) == pytest.approx(low_high, abs=1e-4)
        assert (row["verdict"], row["former_verdict"]) == (verdict, former)
    once = items_of({"none": [plain - 1]}).assign(training=0)
    several = [items_of({"masked": [plain + gain]}).assign(training=at) for at, gain in enumerate((0.1, 0.2))]
    of_one = summarise(pd.concat([once, *several]), "none").set_index("mask").loc["masked"]
    assert (of_one["difference"], of_one["n_trainings"]) == (pytest.approx(1.15), 2)
    assert of_one["verdict"] == "too few trainings"


@pytest.mark.parametrize(
    ("n", "masks", "verdict"), [(5, 1, "too few items"), (6, 1, "better"), (6, 2, "too few items"), (7, 2, "better")]
)
def test_five_items_can_show_nothing_and_six_of_one_mask_can(n, masks, verdict):
    """All turn out better: p is 2 / 2^n, times the number of masks."""
    scores = summarise(items_of({"none": [[0] * n]} | {f"m{at}": [[1] * n] for at in range(masks)}), "none")
    compared = scores[scores["mask"] != "none"]
    assert compared["p_corrected"].tolist() == pytest.approx([masks * 2 / 2**n] * masks)
    assert set(compared["verdict"]) == {verdict}
    assert set(compared["former_verdict"]) == {"better" if verdict == "better" else "no difference shown"}
    cells = lay_out(scores, "my_model").cells
    assert ("†" in cells[1][0]) == (verdict == "better")
    counts = count_verdicts(compared.assign(select="weight"), "select")["weight"]
    assert (counts["all"], counts["too few items"]) == ((masks, 0) if verdict == "better" else (0, masks))


def test_the_share_of_right_answers_has_an_exact_interval():
    row = summarise(items_of({"none": [[1] * 36]}), "none").iloc[0]
    assert (row["low"], row["high"]) == pytest.approx((0.025 ** (1 / 36), 1))


def test_the_best_rate_is_chosen_on_other_items_than_it_is_scored_on():
    found = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        values = {f"m{rate}": [generator.integers(2, size=100)] for rate in range(8)}  # eight masks that do nothing
        items = items_of({"no mask": [generator.integers(2, size=100)], **values})
        rates = pd.DataFrame({"mask": list(values), "family": "m", "rate": range(8)})
        best = best_rates(items, rates, "no mask").set_index("selection")
        assert best["n"].to_dict() == {"held-out half": 50, "same items": 100}
        means = {mask: np.mean(of_mask) for mask, of_mask in values.items()}
        assert means[best.loc["same items", "mask"]] == max(means.values())
        found.append(best["difference"])
    mean = pd.concat(found, axis=1).mean(axis=1)
    assert abs(mean["held-out half"]) < 0.04 < mean["same items"]


def test_tables_are_laid_out_for_markdown_and_latex():
    values = {"no mask": [[0, 1] * 20], "paper rate=0.1": [[1, 1] * 20]}
    items = pd.concat([items_of(values), items_of(values, "perplexity", "loss", higher=False)])
    layout = lay_out(summarise(items, "no mask"), "my_model")
    assert layout.columns == ["piqa, accuracy ↑ (n=40)", "perplexity, nats a token ↓ (n=40)"]
    assert layout.cells == [["0.500", "0.500"], ["1.000 (+0.500†)", "1.000 (+0.500†)"]]
    assert layout.best == [[False, False], [True, False]]  # the other best one is the reference
    assert "| paper rate=0.1 | **1.000 (+0.500†)** | 1.000 (+0.500†) |" in layout.markdown()
    latex = layout.latex()
    assert r"paper rate=0.1 & \textbf{1.000 (+0.500$^\dagger$)} & 1.000 (+0.500$^\dagger$) \\" in latex
    assert r"my\_model" in latex


def test_replies_that_end_inside_a_thought_are_counted_in_the_table():
    values = {"no mask": [[0, 1] * 4], "paper": [[1, 1] * 4]}
    whole = items_of(values, "piqa", "exact_match").assign(unfinished=False)
    cut_off = items_of(values, "gsm8k", "exact_match")
    cut_off = cut_off.assign(unfinished=(cut_off["mask"] == "no mask") & (cut_off["item"] < "3"))
    scores = summarise(pd.concat([whole, cut_off]), "no mask")
    assert scores["n_unfinished"].tolist() == [0, 0, 3, 0]
    assert scores["n_replies"].tolist() == [8] * 4
    layout = lay_out(scores, "my_model")
    assert layout.columns[1:] == ["gsm8k, exact match ↑ (n=8)", "gsm8k, exact match: ended inside a thought"]
    assert [row[2] for row in layout.cells] == ["3 of 8", "0 of 8"]
    assert [row[2] for row in layout.best] == [False, False]
    assert "3 replies end inside a thought and count as no answer" in layout.markdown()
    assert "thought" not in lay_out(summarise(whole, "no mask"), "my_model").markdown()


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("\\", r"\textbackslash{}"),
        ("{", r"\{"),
        ("}", r"\}"),
        ("^", r"\textasciicircum{}"),
        ("~", r"\textasciitilde{}"),
        ("$", r"\$"),
        ("&", r"\&"),
        ("%", r"\%"),
        ("#", r"\#"),
        ("_", r"\_"),
        (r"\{}^~$&%#_", r"\textbackslash{}\{\}\textasciicircum{}\textasciitilde{}\$\&\%\#\_"),
        ("p < 0.05 | n > 1", r"p \textless{} 0.05 \textbar{} n \textgreater{} 1"),
        ("−0.1†", r"$-$0.1$^\dagger$"),
    ],
)
def test_latex_prints_a_text_as_it_is(text, written):
    layout = Layout([text], [text], [[text]], [[False]], text)
    assert f" & {written} \\\\\n" in layout.latex()
    assert f"\n{written} & {written} \\\\\n" in layout.latex()
    assert rf"\caption{{{written}}}" in layout.latex()


def test_a_bar_in_a_name_ends_no_cell_of_a_markdown_table():
    lines = Layout(["a|b"], ["c|d"], [["1"]], [[False]], "").markdown().splitlines()
    assert lines[0] == r"| | a\|b |"
    assert lines[2] == r"| c\|d | 1 |"
