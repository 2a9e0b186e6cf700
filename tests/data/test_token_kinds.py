"""Kinds of tokens, and the prompts that are made of them."""

import pytest
import torch

from melens.data.prompts import byte_tokenizer
from melens.data.provoking import provoking_prompts
from melens.data.token_kinds import kind_of_text, token_kinds, token_texts


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" fly", "word"), ("\n\n", "newline"), (".\n", "newline"), (".", "delimiter"),
        (" (", "delimiter"), ("€", "delimiter"), (" 12", "digits"), ("  ", "space"), ("�", "part of a character"),
        ("x\n", "word"), ("3a", "word"),
    ],
)  # fmt: skip
def test_the_text_of_a_token_tells_its_kind(text, kind):
    assert kind_of_text(text) == kind


def test_repeats_are_told_by_what_stands_before():
    ids = [5, 5, 9, 5, *[7] * 10, 5]
    expected = ["token 0", "run of token 0", "other", "token 0 again", *["other"] * 8, *["repeated in a row"] * 2]
    assert token_kinds(ids) == [*expected, "token 0 again"]
    assert token_texts(ids[:2], None) == ["5", "5"]


def test_special_tokens_are_known_by_the_tokenizer():
    tokenizer = byte_tokenizer()
    text, end = tokenizer("a.\n")["input_ids"], tokenizer.eos_token_id
    assert token_kinds([*text, end, end], tokenizer) == ["token 0", "delimiter", "newline", "special", "special"]


def test_provoking_prompts_hold_what_their_task_says():
    tokenizer = byte_tokenizer()
    made = provoking_prompts(tokenizer)
    kinds = {
        prompt.id: token_kinds(ids.tolist(), tokenizer) for prompt, ids in zip(made.prompts, made.tokens, strict=True)
    }
    for number in range(4):
        assert kinds[f"newlines-{number}"].count("newline") > 10
        assert kinds[f"delimiters-{number}"].count("delimiter") > 10
        assert kinds[f"digits-{number}"].count("digits") >= 32
        assert kinds[f"repeated in a row-{number}"].count("repeated in a row") == 24 - 8
        assert kinds[f"run of token 0-{number}"].count("run of token 0") >= 24
        assert kinds[f"token 0 again-{number}"].count("token 0 again") > 10
        assert kinds[f"<|im_end|> inside-{number}"].count("special") == 2
        assert kinds[f"<|endoftext|> first-{number}"].count("token 0 again") == 2
    firsts = {int(ids[0]) for prompt, ids in zip(made.prompts, made.tokens, strict=True) if "first" not in prompt.task}
    assert len(firsts) == 4


def test_provoking_prompts_begin_with_what_every_prompt_does():
    begun = provoking_prompts(byte_tokenizer(), [3])
    assert all(torch.equal(ids[:1], torch.tensor([3])) for ids in begun.tokens)
    run = next(ids for prompt, ids in zip(begun.prompts, begun.tokens, strict=True) if prompt.task == "run of token 0")
    assert run[:25].tolist() == [3] * 25
