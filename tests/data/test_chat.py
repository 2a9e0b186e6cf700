"""Chat templates: which switch for thinking one has, which conversations it takes, what of a reply is the answer."""

from pathlib import Path

import pytest
import trl
from tokenizers import AddedToken

from melens import MelensError
from melens.data.chat import (
    PLAIN,
    Chat,
    chat_of,
    check_conversations,
    decode_reply,
    opened_thought,
    prompt_ids,
    prompt_text,
    read_reply,
)
from melens.data.prompts import byte_tokenizer
from melens.models.loading import load_tokenizer
from melens.storage.cache import tokenizer_fingerprint

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
"""Of real models, as TRL knows them."""

SYSTEM, USER, ASSISTANT = ({"role": role, "content": role.title()} for role in ("system", "user", "assistant"))


def tokenizer_of(template, **options):
    tokenizer = byte_tokenizer()
    path = TEMPLATES / f"{template}.jinja"
    tokenizer.chat_template = path.read_text() if path.is_file() else template
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_a_tokenizer_is_loaded_without_its_model(embedded, monkeypatch):
    monkeypatch.setattr("melens.models.loading.load_network", pytest.fail)
    alone = load_tokenizer("smollm2-135m")
    assert tokenizer_fingerprint(alone) == tokenizer_fingerprint(embedded.tokenizer)
    assert tokenizer_fingerprint(load_tokenizer("tiny")) == tokenizer_fingerprint(byte_tokenizer())
    assert load_tokenizer("random", tokenizer=None) is None
    with pytest.raises(MelensError, match="There is no folder /nowhere/at/all"):
        load_tokenizer("/nowhere/at/all")


# --- Thinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "switch", "opened_off", "opened_on"),
    [
        ("qwen3", "enable_thinking", "", ""),
        ("qwen3_5_think", "enable_thinking", "", "<think>"),
        ("glm4moe", "enable_thinking", "", ""),
        ("gemma4_v5", "enable_thinking", "", ""),
        ("nemotron_3_nano", "enable_thinking", "", "<think>"),
        ("{{ messages[0].content }}{{ '<think>' if thinking else '</think>' }}", "thinking", "", "<think>"),
        ("{{ messages[0].content }}{{ '[THINK]' if reasoning }}", "reasoning", "", "[THINK]"),
    ],
)  # fmt: skip
def test_a_template_shows_its_switch_and_whether_it_opens_a_thought(template, switch, opened_off, opened_on):
    tokenizer = tokenizer_of(template)
    assert chat_of(tokenizer) == chat_of(tokenizer, False) == Chat(switch, False, opened_off)
    assert chat_of(tokenizer, True) == Chat(switch, True, opened_on)


def test_qwen3_is_told_not_to_think_by_an_empty_thought():
    tokenizer = tokenizer_of("qwen3")
    off, on = (prompt_text(tokenizer, [USER], chat_of(tokenizer, thinking)) for thinking in (None, True))
    assert off == f"{on}<think>\n\n</think>\n\n"
    assert tokenizer.decode(prompt_ids(tokenizer, [USER], chat_of(tokenizer))) == off


@pytest.mark.parametrize(
    ("template", "opened"),
    [
        ("qwen2_5", ""),
        ("qwen3_instruct_2507", ""),
        ("gptoss", ""),
        ("lfm2_2_5_v2", ""),  # it has a variable `thinking`, which is no switch
        ("deepseek_r1_distill", "<think>"),
    ],
)
def test_without_a_switch_thinking_is_left_alone_and_what_is_asked_of_it_refused(template, opened):
    tokenizer = tokenizer_of(template)
    assert chat_of(tokenizer) == Chat(None, None, opened)
    assert chat_of(tokenizer).arguments == {}
    for thinking, word in ((True, "true"), (False, "false")):
        with pytest.raises(MelensError, match=rf"generate.thinking is {word}, but .* has no switch") as error:
            chat_of(tokenizer, thinking, option="generate.thinking")
        assert ("reasoning_effort" in str(error.value)) == (template == "gptoss")


def test_thoughts_whose_marks_are_not_known_are_not_asked_for():
    tokenizer = tokenizer_of("{{ messages[0].content }}{{ '<ponder>' if thinking }}")
    assert chat_of(tokenizer).thinking is False
    with pytest.raises(MelensError, match="does not know the marks of this model's thoughts"):
        chat_of(tokenizer, True)


def test_what_was_taken_is_told():
    told = [Chat("thinking", True), Chat("enable_thinking", False), Chat(opened="<think>"), PLAIN]
    assert [chat.in_words() for chat in told] == [
        "on (thinking=true)",
        "off (enable_thinking=false)",
        "on (the chat template opens a thought)",
        "as the model likes (no switch)",
    ]


@pytest.mark.parametrize("template", ["smolvlm", "{{ raise_exception('Only tools') }}"])
def test_a_template_that_takes_no_question_is_refused(template):
    with pytest.raises(MelensError, match=r"refuses a single user message \((it leaves|Only tools)"):
        chat_of(tokenizer_of(template))


def test_arguments_that_a_template_does_not_take_are_told():
    assert opened_thought(tokenizer_of("qwen3_5_think"), {"enable_thinking": True}) == "<think>"
    with pytest.raises(MelensError, match=r"refuses \{'enable_thinking': 1\} \(Not 1\)"):
        opened_thought(
            tokenizer_of("{{ raise_exception('Not 1') if enable_thinking else 'Hi' }}"), {"enable_thinking": 1}
        )


# --- Replies ----------------------------------------------------------------------------------------------------------

MARKS = [
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<|channel>thought\n", "<channel|>"), ("<|START_THINKING|>", "<|END_THINKING|>"), ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    (" to=self<|message|>", "<|end|><|start|>assistant to=user<|message|>"),
    ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("Here is my thought process:", "Here is my response:"),
]  # fmt: skip


@pytest.mark.parametrize(("begin", "end"), MARKS, ids=[begin.strip() for begin, _ in MARKS])
def test_thoughts_are_no_answer_in_any_family(begin, end):
    thought = f"{begin}Could it be A?\n\nIs this harmful? No.{end}"
    for text in (f"{thought}\n\nIt is B.", f"{thought}{thought}It is B."):
        reply = read_reply(text)
        assert (reply.answer, reply.is_finished) == ("It is B.", True)
        assert "Could it be A?" in reply.thoughts
    cut_off = read_reply(f"{begin}Could it be A?")
    assert (cut_off.answer, cut_off.is_finished, cut_off.thoughts) == ("", False, "Could it be A?")


@pytest.mark.parametrize(
    ("text", "opened", "answer", "is_finished"),
    [
        ("It is B.", "", "It is B.", True),
        (" It is B.\n", "", " It is B.\n", True),  # nothing is taken out, nothing changed
        ("", "", "", True),
        ("Hm, A?</think>\n\nIt is B.", "<think>", "It is B.", True),
        ("Hm, A?", "<think>", "", False),
        ("", "<think>", "", False),
        ("Hm, A?</think>It is B.", "", "It is B.", True),  # a thought whose beginning is not seen
        ("<think>A?</think>It is B.<think>Or", "", "", False),
        ("<think>A <think>B</think> C</think>D", "", "D", True),
        ("<think></think>B", "", "B", True),
        ("I think B", "", "I think B", True),
        ("<|channel|>final<|message|>B", "", "B", True),
    ],
)
def test_a_reply_is_read_behind_its_thoughts(text, opened, answer, is_finished):
    reply = read_reply(text, opened)
    assert (reply.answer, reply.is_finished) == (answer, is_finished)


def test_marks_that_are_special_tokens_are_decoded_and_other_special_tokens_are_not():
    tokenizer = byte_tokenizer()
    special = [AddedToken(token, special=True) for token in ("[THINK]", "[/THINK]", "<|end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    ids = tokenizer("[THINK]Hm[/THINK]B<|end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "HmB"  # where a thought would be read as an answer
    assert decode_reply(tokenizer, [*ids, tokenizer.eos_token_id]) == "[THINK]Hm[/THINK]B"
    assert read_reply(decode_reply(tokenizer, ids)).answer == "B"
    assert decode_reply(tokenizer, [*tokenizer("B")["input_ids"], tokenizer.eos_token_id]) == "B"


# --- Conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        ("gemma", [SYSTEM, USER, ASSISTANT], r"system, user, assistant \(System role not supported\).*first user"),
        ("gemma", [USER, USER, ASSISTANT], r"\(Conversation roles must alternate .*\)\. Let user and assistant take"),
        ("gemma", [ASSISTANT, USER, ASSISTANT], r"the roles assistant, user, assistant \(Conversation roles must alt"),
        (
            "{% for turn in messages if turn.role != 'system' %}{{ turn.content }}{% endfor %}",
            [SYSTEM, USER],
            "it leaves the system message out",
        ),
    ],
)  # fmt: skip
def test_a_conversation_that_a_template_does_not_take_is_told_by_its_row(template, turns, message):
    tokenizer = tokenizer_of(template)
    rows = [[USER, ASSISTANT], [USER], [{**turns[0], "content": "You are one\nof many."}, *turns[1:]]]
    with pytest.raises(
        MelensError, match=f"own, row 3 of the rows in use, which begins 'You are one of many.': .*{message}"
    ):
        check_conversations(tokenizer, rows, "own")


@pytest.mark.parametrize("template", ["gemma3", "qwen3", "llama3_1", "qwen2_5"])
def test_what_a_template_takes_is_let_pass(template):
    check_conversations(tokenizer_of(template), [[SYSTEM, USER, ASSISTANT], [USER, ASSISTANT, USER], [USER]], "own")


def test_each_sequence_of_roles_is_tried_once():
    tokenizer = tokenizer_of("qwen3")
    tried = []
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **options: tried.append(1) or apply(*args, **options)
    check_conversations(tokenizer, [[USER, ASSISTANT]] * 1000 + [[USER]] * 1000, "own")
    assert len(tried) == 2
