import json
import os
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from planted import bridge, plain_model

import melens
from melens import MelensError, Prompt, load_prompts
from melens.data.prompts import byte_tokenizer, choose_prompts, random_tokens, tokenize


def test_at_least_eight_prompts_a_task_type():
    counts = Counter(prompt.task for prompt in load_prompts())
    assert set(counts) == {"commonsense", "maths", "logic", "continuation"}
    assert min(counts.values()) >= 8


def test_no_tokenizer_can_give_two_prompts_the_same_first_token():
    firsts = [prompt.text[0] for prompt in load_prompts()]
    assert len(set(firsts)) == len(firsts)


def test_lengths_and_first_tokens_in_the_embedded_model(embedded):
    prompts = load_prompts()
    tokens = tokenize(embedded, prompts)
    assert len({ids[0] for ids in tokens}) == len(prompts)
    for task in ("commonsense", "maths", "logic", "continuation"):
        lengths = [len(ids) for ids, prompt in zip(tokens, prompts, strict=True) if prompt.task == task]
        assert min(lengths) <= 13
        assert max(lengths) > 1000


def test_bos_follows_the_models_own_tokenizer_unless_told(embedded):
    prompt = [Prompt("Paris is a city")]
    ((first, *rest),) = tokenize(embedded, prompt)
    assert first != embedded.tokenizer.bos_token_id
    assert tokenize(embedded, prompt, bos="true") == [[embedded.tokenizer.bos_token_id, first, *rest]]
    assert tokenize(embedded, prompt, bos="false") == [[first, *rest]]
    assert embedded.to_tokens("Paris is a city").tolist() == [[first, *rest]]


def test_text_and_jsonl_files(tmp_path):
    text, jsonl = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("One prompt.\n\nAnother prompt.\n")
    jsonl.write_text('{"text": "With a task.", "task": "maths", "id": 3}\n{"text": "Without."}\n')
    assert [prompt.text for prompt in load_prompts(text)] == ["One prompt.", "Another prompt."]
    assert load_prompts(jsonl) == [Prompt("With a task.", "maths", "3"), Prompt("Without.", None, "line 2")]
    assert [prompt.id for prompt in load_prompts(jsonl, tasks=["maths"])] == ["3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\n \n", "is empty"), (b"\xff", "UTF-8")],
)
def test_a_useless_text_file_is_told(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MelensError, match=message):
        load_prompts(tmp_path / "a.txt")


@pytest.mark.parametrize("line", ["no json", '{"task": "maths"}', '{"text": 3}', '["text"]', '{"text": " "}'])
def test_a_wrong_line_of_jsonl_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(MelensError, match="line 2"):
        load_prompts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("text", "message"), [("A", "1 token"), ("word " * 9000, "more than the model's context of 8,192")]
)
def test_too_short_and_too_long_prompts_are_told(embedded, text, message):
    with pytest.raises(MelensError, match=message):
        tokenize(embedded, [Prompt(text)])


def test_ids_and_tasks_of_any_kind_become_words_that_a_table_holds(tmp_path):
    rows = [
        {"text": "one", "id": None, "task": None},
        {"text": "two", "id": 0, "task": 3},
        {"text": "three", "id": "x", "task": "maths"},
        {"text": "four", "id": "", "task": 2.5},
        {"text": "five", "id": float("nan"), "task": ""},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = load_prompts(tmp_path / "a.jsonl")
    assert [prompt.id for prompt in prompts] == ["line 1", "0", "x", "line 4", "line 5"]
    assert [prompt.task for prompt in prompts] == [None, "3", "maths", "2.5", None]
    assert load_prompts(tmp_path / "a.jsonl", tasks=[3]) == [Prompt("two", 3, 0)] == prompts[1:2]
    model = bridge(plain_model("llama"))
    model.tokenizer = byte_tokenizer()
    trace = melens.trace(model, [*prompts[:2], Prompt("six", "word", 7)], [melens.AbsMedian()])
    trace.prompts.to_parquet(tmp_path / "prompts.parquet")
    table = pd.read_parquet(tmp_path / "prompts.parquet")
    assert table["id"].tolist() == ["line 1", "0", "7"]
    assert table["task"].tolist()[1:] == ["3", "word"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "task": ["b"]}', r"line 2: 'task' is \[\"b\"\]; it must be a word"),
        ('{"text": "a", "id": {}}', "line 2: 'id' is {}; it must be a word"),
        ('{"text": null}', "line 2: 'text' is null; it must be a text"),
        ('{"prompt": "a", "task": "b"}', "line 2: there is no column 'text', only prompt, task"),
    ],
)
def test_what_is_wrong_with_a_line_is_told(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(MelensError, match=message):
        load_prompts(tmp_path / "a.jsonl")


def test_half_of_a_character_is_told_by_whoever_makes_a_prompt(embedded):
    with pytest.raises(MelensError, match=r"contains \\ud800, half of a surrogate pair"):
        melens.trace(embedded, ["fine", "\ud800"])
    with pytest.raises(MelensError, match=r"contains \\udcff"):
        Prompt("a", task=os.fsdecode(b"\xff"))


def test_one_task_may_be_a_word_and_none_is_told(tmp_path):
    assert load_prompts(tasks="maths") == load_prompts(tasks=["maths"])
    assert {prompt.task for prompt in load_prompts(tasks=("maths", "logic"))} == {"maths", "logic"}
    with pytest.raises(MelensError, match=r"prompts\.tasks is empty; the tasks are commonsense, continuation"):
        load_prompts(tasks=[])


def test_a_mark_at_the_start_of_a_file_is_no_token(embedded, tmp_path):
    text = "The sky is blue.\nThe sea is wide.\n"
    (tmp_path / "a.txt").write_text(text, "utf-8-sig")
    assert tokenize(embedded, load_prompts(tmp_path / "a.txt")) == tokenize(
        embedded, [Prompt("The sky is blue."), Prompt("The sea is wide.")]
    )


# --- Which fit --------------------------------------------------------------------------------------------------------


def with_context(model, n_ctx):
    return SimpleNamespace(tokenizer=model.tokenizer, cfg=SimpleNamespace(n_ctx=n_ctx, d_vocab=model.cfg.d_vocab))


@pytest.mark.parametrize(
    ("n_ctx", "max_tokens", "n_kept", "n_left_out"),
    [
        (8192, None, 36, 0),
        (1024, None, 32, 4),
        (1024, 130, 19, 0),
        (64, None, 12, 24),
        (64, 130, 12, 7),
        (64, 20, 7, 0),
    ],
)
def test_own_prompts_that_do_not_fit_are_left_out_and_counted(embedded, caplog, n_ctx, max_tokens, n_kept, n_left_out):
    model = with_context(embedded, n_ctx)
    chosen = choose_prompts(model, load_prompts(), max_tokens=max_tokens)
    assert max(map(len, chosen.tokens)) <= min(n_ctx, max_tokens or n_ctx)
    assert [ids.tolist() for ids in chosen.tokens] == tokenize(model, chosen.prompts)
    assert len(chosen.prompts) == n_kept
    sentence = f"{n_left_out} of {n_kept + n_left_out} prompts are longer than the model's context of {n_ctx:,} tokens"
    assert [sentence in record.message for record in caplog.records] == [True] * (n_left_out > 0)


def test_a_users_prompts_are_left_out_only_where_that_was_asked(embedded):
    model = with_context(embedded, 64)
    short, long = Prompt("A short one", id="line 1"), Prompt("word " * 100, id="line 2")
    for max_tokens in (None, 130):
        with pytest.raises(
            MelensError,
            match=r"1 of 2 prompts .* of 64 tokens; the first is line 2\. Leave them out: prompts\.max_tokens=64",
        ):
            choose_prompts(model, [short, long], max_tokens=max_tokens)
    assert choose_prompts(model, [short, long], max_tokens=64).prompts == [short]
    with pytest.raises(MelensError, match=r"prompts\.max_tokens is 0, but the shortest prompt has 3 tokens"):
        choose_prompts(model, [short, long], max_tokens=0)


def test_a_context_that_holds_no_prompt_is_told(embedded):
    with pytest.raises(MelensError, match=r"36 of 36 prompts are longer than .* of 8 tokens; the shortest has 9"):
        choose_prompts(with_context(embedded, 8), load_prompts())


def test_a_trace_of_the_projects_prompts_leaves_out_what_the_command_line_does(caplog):
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 96}
    model = melens.load_model("random", model_type="llama", tokenizer="bytes", config=sizes, device="cpu")
    trace = melens.trace(model, load_prompts(), [melens.Norms("hook_resid_post")])
    assert "prompts are longer than the model's context of 96 tokens and are left out" in caplog.text
    assert trace.prompts["id"].tolist() == [prompt.id for prompt in load_prompts() if len(prompt.text.encode()) <= 96]
    assert [prompt.id for prompt in load_prompts(model=model)] == trace.prompts["id"].tolist()
    with pytest.raises(MelensError, match=r"1 of 1 prompts"):
        melens.trace(model, "long " * 30)


def test_presets_are_read_by_the_name_that_the_command_line_takes(embedded):
    short = load_prompts("short", model=embedded)
    assert len(short) == 19
    assert set(short) < set(load_prompts("default"))
    assert max(map(len, tokenize(embedded, short))) <= 130
    assert load_prompts("short", "maths", model=embedded) == [prompt for prompt in short if prompt.task == "maths"]
    assert len(load_prompts("short", model=embedded, max_tokens=20)) == 7
    with pytest.raises(MelensError, match=r"at most 130 tokens depends on the model: give model=model"):
        load_prompts("short")
    with pytest.raises(MelensError, match=r"no file shrt, and no prompts of that name; known are default, short"):
        load_prompts("shrt")
    with pytest.raises(MelensError, match=r"model is 'smollm2'; it must be what melens.load_model"):
        load_prompts("short", model="smollm2")


def test_random_tokens_replace_the_projects_prompts_alone(embedded, caplog):
    model = with_context(embedded, 64)
    model.tokenizer = None
    for max_tokens, n_tokens in ((None, 64), (20, 20), (130, 64)):
        assert {len(ids) for ids in choose_prompts(model, load_prompts(), max_tokens=max_tokens).tokens} == {n_tokens}
    assert "no tokenizer: 36 prompts of random tokens replace the texts" in caplog.text
    with pytest.raises(MelensError, match=r"no tokenizer.*prompts\.file"):
        choose_prompts(model, [Prompt("Mine")])


def test_unknown_task_missing_file_and_wrong_bos_are_told(embedded, tmp_path):
    with pytest.raises(MelensError, match="'poetry'"):
        load_prompts(tasks=["poetry"])
    with pytest.raises(MelensError, match="There is no file"):
        load_prompts(tmp_path / "nope.txt")


def test_random_tokens_have_distinct_first_tokens():
    prompts = random_tokens(20, 8, vocabulary=25)
    assert len({int(prompt[0]) for prompt in prompts}) == 20
    assert all(torch.equal(a, b) for a, b in zip(prompts, random_tokens(20, 8, vocabulary=25), strict=True))


def test_a_prompt_that_is_shared_shows_in_the_trace(embedded):
    trace = melens.trace(embedded, ["The sky is blue.", "The sea is wide."], [melens.AbsMedian()])
    assert trace.prompts["first_token"].tolist() == ["The", "The"]
    assert trace.prompts["first_token_id"].nunique() == 1
