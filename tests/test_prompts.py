from collections import Counter

import pytest
import torch

import melens
from melens import MelensError, Prompt, load_prompts
from melens.prompts import random_tokens, tokenize


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
    [(b"", "is empty"), (b"\n \n", "is empty"), (b"\xff\xfe", "UTF-8")],
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


def test_unknown_task_missing_file_and_wrong_bos_are_told(embedded, tmp_path):
    with pytest.raises(MelensError, match="'poetry'"):
        load_prompts(tasks=["poetry"])
    with pytest.raises(MelensError, match="no prompt file"):
        load_prompts(tmp_path / "nope.txt")


def test_random_tokens_have_distinct_first_tokens():
    prompts = random_tokens(20, 8, vocabulary=25)
    assert len({int(prompt[0]) for prompt in prompts}) == 20
    assert all(torch.equal(a, b) for a, b in zip(prompts, random_tokens(20, 8, vocabulary=25), strict=True))


def test_a_prompt_that_is_shared_shows_in_the_trace(embedded):
    trace = melens.trace(embedded, ["The sky is blue.", "The sea is wide."], [melens.AbsMedian()])
    assert trace.prompts["first_token"].tolist() == ["The", "The"]
    assert trace.prompts["first_token_id"].nunique() == 1
