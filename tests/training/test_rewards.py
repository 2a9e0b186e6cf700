"""What GRPO rewards: the same text, number or mathematics, and which right answers no completion could ever give."""

import json
import os
import threading
from pathlib import Path

import pytest
from tokenizers import AddedToken

from melens import MelensError
from melens.data.prompts import byte_tokenizer
from melens.training.rewards import check_answers, is_right, reward_answer, reward_format

RIGHT = [
    ("50%", r"\boxed{50\%}"), ("50%", r"$\boxed{50\%}$"), ("50%", "The answer is 50%."), ("50%", r"\boxed{50}"),
    ("50%", r"\boxed{0.5}"), ("50%", r"\boxed{\frac12}"), (r"50\%", "50%"), ("50 percent", r"\boxed{50\%}"),
    ("yes", r"\boxed{yes}"), ("yes", "The answer is Yes."), ("yes", r"\boxed{\text{Yes}}"), ("yes", "Hm.\nYes"),
    ("yes", "The answer is yes, because it is."), ("New York", "**Answer:** New York"), ("no", "#### no"),
    ("(A)", "(A)"), ("(A)", r"\boxed{A}"), ("(A)", "The answer is (A)."), ("A", r"\boxed{\text{(A)}}"),
    ("2:30", "The answer is 2:30."), ("2:30", r"\boxed{2:30}"), ("2:30", r"$\boxed{\text{2:30}}$"),
    ("12 dollars", r"\boxed{12}"), ("12 dollars", "She pays 12 dollars."), ("12 dollars", r"\boxed{\$12}"),
    ("12 dollars", r"\boxed{12\text{ dollars}}"), ("12 dollars", "So she pays $12."), ("10 apples", r"\boxed{10}"),
    ("€20", "The answer is €20."), ("€20", r"\boxed{20}"), ("€20", r"\boxed{€20}"), ("€20", "#### 20"),
    ("1e3", r"\boxed{1000}"), ("1e3", "The answer is 1,000."), ("1e3", r"\boxed{1e3}"), ("1e3", "It is $10^3$."),
    (r"2.5 \times 10^3", r"\boxed{2500}"), (r"\$20", r"\boxed{20}"), ("-3", "The answer is −3."),
    ("(3, 4)", "The answer is $(3,4)$."), ("[0,100)", r"\boxed{[0, 100)}"), (r"11,\! 111", r"\boxed{11111}"),
    ("1234.5", "So she has $1,234.50 left."), ("0.5", r"\boxed{1/2}"), ("72", "So, the final answer is 72."),
    ("5", "#### 5"), ("7", "x = 7, so 7"), ("x=3", r"\boxed{x = 3}"), ("x=3", r"\boxed{3}"), ("3", "It is 3."),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{\sqrt2}{2}}"), ("x^2+1", r"\boxed{1+x^2}"), ("90°", r"\boxed{90^\circ}"),
    ("1.5 million", r"\boxed{1500000}"), ("1500000", "The answer is 1.5 million dollars."), ("5 (five)", r"\boxed{5}"),
    ("5 feet", r"\boxed{5\text{ ft}}"), ("5 hours", "The answer is 5 hrs."), ("5 feet", r"\boxed{5}"),
    ("0.5", r"\boxed{50\%}"), ("10", r"She earned \$10."), ("10", "She earned $10."),
    ("5", "The answer is 5, because 2 and 3 make 5."), ("1000", "The answer is 1,000."), ("(1, 2)", r"\boxed{(1,2)}"),
    ("1/2", r"The answer is $\frac{1}{2}$, as 1, 2 and 3 show."), ("1,2", r"\boxed{2, 1}"),
    ("x<3", r"\boxed{(-\infty,3)}"),
    (r"x=1 \text{ or } x=2", r"\boxed{x=1 \text{ or } x=2}"), ("5 and 6", "The answer is 5 and 6."), ("<", "#### <"),
    ("10", "The answer is 10 apples and pears."), ("5", "The answer is 5, and we are done."),
    (r"\infty", r"\boxed{\infty}"), ("∞", r"\boxed{∞}"), ("yes", "The answer is yes, 5 of them do."),
    (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}"), (r"\{1,2\}", r"\boxed{1, 2}"), ("1/2", r"\boxed{50\%}"),
    (r"30^\circ", r"\boxed{30°}"), (r"30^\circ", "The answer is 30 degrees."), ("60 mph", "#### 60 miles per hour"),
    ("10 apples", "The answer is 10 apples left."), ("2 dozen", r"\boxed{24}"), ("70000", r"\boxed{70{,}000}"),
    (r"\frac{1}{3}", r"The answer is $\frac{1}{3}$ of it."), ("x=3", "The answer is 3 apples."),
]  # fmt: skip

WRONG = [
    ("5 cubic meters", r"\boxed{5 \text{ cm}}"),
    ("50%", r"\boxed{5\%}"), ("50%", "0.05"), ("yes", "no"), ("yes", "The answer is no."), ("yes", r"\boxed{eys}"),
    ("no", r"\boxed{on}"), ("yes", "Yes or no, who knows?"), ("yes", ""), ("(A)", r"\boxed{B}"),
    ("(A)", "The answer is not A. It is B."), ("2:30", r"\boxed{2}"), ("2:30", "2:31"), ("2:30", r"\boxed{1/15}"),
    ("12 dollars", r"\boxed{13}"), ("12 dollars", "The answer is 12 cents."), ("12 dollars", r"\boxed{120}"),
    ("€20", "€21"), ("1e3", r"\boxed{3e}"), ("1e3", "1"), ("1e3", "103"), ("5 million", "5"), ("12 pm", "12 am"),
    ("5", r"The answer is 5. Wait, \boxed{6}"), ("1234", "So she has $1,234.50 left."), ("2", r"\boxed{1/2}"),
    ("7", "?"), ("72", "The answer is 7."), ("3", "?"), ("50", "#### 5"), ("", r"\boxed{}"),
    ("5", "The answer is 5 or 6 or 7."), ("5", "The answer is 5 and 6."), ("5", "The answer is 5, 6."),
    ("2", "The answer is 2 to 5."), ("1", "answer: 1 or 2 or 3 or 4 or 5"), ("5", "The answer is 5, maybe 6."),
    ("2", "The answer is 2 hours and 20 minutes."), ("3", r"\boxed{3 \text{ hours and } 20 \text{ minutes}}"),
    ("yes", "The answer is yes, or no."), ("Paris", "The answer is Paris; or London."), ("6", r"\boxed{5, 6}"),
    ("1/2", r"\boxed{\frac12 \text{ or } \frac13}"), ("5", r"\boxed{(5 \text{ or } 6)}"),
    ("7", "The answer is 5 or 6 or 7."), ("5 feet", r"\boxed{5\text{ hrs}}"), ("50%", r"\boxed{5000\%}"),
    ("0.5", r"\boxed{5\%}"), ("1.5 million", "1.5"), ("?", "#### ?"), ("-", r"\boxed{-}"), ("N/A", "#### N/A"),
    ("None", "The answer is None."), ("see below", "See below."), ("5", "The answer is 5 & 6."),
    ("no", "#### no, or yes"), ("5", "The answer is 5 million."), ("5 million", r"\boxed{5}"),
    ("5", r"\boxed{\{5, 6\}}"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "completion"), RIGHT)
def test_the_right_answer_is_rewarded_in_every_way_to_write_it(right, completion):
    assert is_right(completion, right)


@pytest.mark.parametrize(("right", "completion"), WRONG)
def test_another_answer_is_not(right, completion):
    assert not is_right(completion, right)


def test_completions_are_texts_or_conversations_and_read_behind_their_thoughts():
    conversations = [[{"role": "assistant", "content": text}] for text in ("It is 3.", "<think>3</think>It is 4.")]
    assert reward_answer(conversations, ["3", "3"]) == [1, 0]
    texts = ["<think>It is 5.</think>It is 4.", "<think>It is 4.", "5?</think>It is 4."]
    assert reward_answer(texts, ["4"] * 3) == [1, 0, 1]
    assert reward_answer(["It is 4.", "5?</think>It is 4."], ["4"] * 2, opened="<think>") == [0, 1]
    assert reward_format(["#### 4", "<think>#### 4"]) == [1, 0]


def test_marks_of_thoughts_that_are_special_tokens_are_seen():
    tokenizer = byte_tokenizer()
    special = [AddedToken(token, special=True) for token in ("[THINK]", "[/THINK]")]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("[THINK]5[/THINK]4", "[THINK]4")]
    told = {"completion_ids": ids, "tokenizer": tokenizer}
    assert reward_answer(["54", "4"], ["4", "4"], **told) == [1, 0]


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (r"So \boxed{3}", 1), (r"So $\boxed{\frac{1}{2}}$.", 1), ("#### 3", 1), ("the answer is 3", 1),
        ("The answer is: **3**.", 1), ("3 it was", 0), (r"\boxed{3} or so, I guess", 0), (r"\boxed{3", 0),
        ("The answer is 3.\nOr so.", 0), (r"\boxed{}", 0), ("The answer is unclear", 0), ("The answer is yes.", 1),
    ],
)  # fmt: skip
def test_the_format_is_an_answer_at_the_end(text, ends):
    assert reward_format([text]) == [ends]


def test_answers_are_graded_in_a_thread_too():
    found = []
    thread = threading.Thread(target=lambda: found.extend(reward_answer([r"\boxed{1/2}"], ["0.5"])))
    thread.start()
    thread.join()
    assert found == [1]


# --- Right answers that cannot be graded ------------------------------------------------------------------------------

GRADED = [
    "50%", r"50\%", "yes", "(A)", "2:30", "12 dollars", "€20", "1e3", "$5", "1,234", "1/2", "x=3", "(3, 4)", "[0,100)",
    "A", "Paris", "1e-3", "12:30 PM", "3:4", r"\text{yes}", "5 %", "½", "12 dollars and 50 cents", "3 1/2",
    r"x \in [1,2)", r"\begin{pmatrix}1\\2\end{pmatrix}", "x^2 + y^2 = 1", "1.5 million", "5 (five)",
    "5 feet", "5 hours", "5 and 6", "1 or 2", "2 to 5", "∞", "x, y",
    "red, white and blue", r"\pi",
]  # fmt: skip
SENTENCE = "She has 5 + 5 = 10 apples. Then she eats two of them."


@pytest.mark.parametrize("right", GRADED)
def test_a_right_answer_is_right_itself(right, recwarn):
    check_answers([right], "own")
    assert not recwarn.list


def test_some_that_are_not_are_counted_and_named_by_their_row():
    rows = [SENTENCE if row in (3, 10, 50) else "" if row == 9 else str(row) for row in range(1, 51)]
    told = r"own: 4 of 50 right answers can never be rewarded.*: row 3 \('She .*'\), row 9 \(''\), row 10 .*, \.\.\."
    with pytest.warns(UserWarning, match=told):
        check_answers(rows, "own")


@pytest.mark.parametrize("right", ["?", "-", "...", "N/A", "n/a", "None", "see below", "", " "])
def test_what_stands_for_no_answer_is_not_graded(right):
    with pytest.raises(MelensError, match="own: 1 of 1 right answers can never be rewarded"):
        check_answers([right], "own")


def test_many_are_refused():
    with pytest.raises(MelensError, match=r"own: 2 of 10 right answers .*: row 1 .*, row 2 .*\. At most 10%"):
        check_answers([SENTENCE] * 2 + ["4"] * 8, "own")
    with pytest.warns(UserWarning, match="1 of 10"):
        check_answers([SENTENCE] + ["4"] * 9, "own")


@pytest.mark.data
@pytest.mark.parametrize("file", ["gsm8k.train", "gsm8k.test", "math500", "aime22-24"])
def test_real_right_answers_are_right_themselves(file, recwarn):
    lines = (Path(os.environ["MELENS_DATA"]) / f"{file}.jsonl").read_text("utf-8").strip().split("\n")
    check_answers([json.loads(line)["answer"] for line in lines], file)
    assert not recwarn.list
