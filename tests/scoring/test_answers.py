"""Which letter a reply chooses: what is stated, in whatever markup, and nothing that is asked, denied or an article."""

import pytest

from melens.benchmarks.answers import chosen_letter, read_letters

CHOICES = ["Bury it in the garden", "Hang it in the sun", "Wait", "Use an oven."]

STATED = [
    (r"\boxed{B}", "B"), (r"$\boxed{\text{B}}$", "B"), ("Answer:\n**B**", "B"), ("Answer: `B`", "B"),
    ("Answer: (B)", "B"), ("Answer: [B]", "B"), ('Answer: "B"', "B"), ("Answer: 'B'", "B"), ("Answer: ‘B’", "B"),
    ("Answer：Ｂ", "B"), ("Answer：（Ｂ）", "B"), ("Answer: 『B』", "B"), ("answer: b", "B"), ("ANSWER: B", "B"),
    ("my answer is d", "D"), ("Answer: a", "A"), ("Answer: {b}.", "B"),
    ("The answer cannot be A. It must be B.", "B"), ("It's not A, so the answer is B", "B"),
    ("The answer is not B but C.", "C"), ("A is not correct. B is correct.", "B"), ("A is wrong, so B.", "B"),
    ("Answer: B", "B"), ("Answer = B", "B"), ("Answer - B", "B"), ("Answer B.", "B"), ("Answer: B)", "B"),
    ("Answer: B, not A.", "B"), ("Answer: B because the sun is hot", "B"), ("Answer: B Hang it in the sun", "B"),
    ("## Answer\n\nB", "B"), ("**Answer**: B", "B"), ("**Answer:** B. Hang it in the sun", "B"),
    (r"Final answer: \(\text{B}\)", "B"), (r"\[\boxed{\textbf{(B)}}\]", "B"), (r"Answer: $\mathbf{B}$", "B"),
    (r"So \boxed{\text{B. Hang it in the sun}}.", "B"), (r"\boxed{A} No: \boxed{B}", "B"),
    ("<answer>B</answer>", "B"), ("<answer>\n(B)\n</answer>", "B"), ("Answer: <b>B</b>", "B"),
    ("The answer is **D**.", "D"), ("the correct answer to this would be B.", "B"), ("The answer is: B", "B"),
    ("So the answer is B: hang it.", "B"), ("Therefore, the answer is: **Option B**", "B"), ("Therefore, B.", "B"),
    ("The correct option is B", "B"), ("The best choice is option (c).", "C"), ("The answer B is right", "B"),
    ("The answer, given that water is wet, is B", "B"), ("Option B is correct.", "B"), ("Answer: The answer is B", "B"),
    ("The answer is B) Hang it in the sun", "B"), ("I choose B.", "B"), ("I'd go with C.", "C"),
    ("Answer: A or not.\nAnswer: (C)", "C"), ("I think A... wait, actually C", "C"), ("A? No, B.", "B"),
    ("Answer: A\n\nCorrection: B", "B"), ("Is the answer A? No. The answer is B.", "B"),
    ("A dog is better. Answer: C", "C"), ("Answer with the letter: A, B, C or D.\nAnswer: C", "C"),
    ("A. Bury it in the garden\nB. Hang it in the sun\nC. Wait\nAnswer: B", "B"),
]  # fmt: skip

LABELLED = [
    ("B", "B"), ("b", "B"), ("(b)", "B"), ("b) Hang it", "B"), ("**B**", "B"), ("B.", "B"), ("B. the sun", "B"),
    ("B: Hang it", "B"), ("(B) Hang it", "B"), ("B Hang it in the sun", "B"), ("A Bury it in the garden", "A"),
    ("D. Use an oven. A. is wrong.", "D"), ("Let me think. The sun dries.\n\nB", "B"),
    ("Let me think. The sun dries.\n\n**B.**", "B"),
]  # fmt: skip

NOT_STATED = [
    "", "Answer:", "Answer: Because A", "Could the answer be A?", "Is the answer A? No. Is it B? Yes.",
    "If the answer is A, the shirt is dirty.", "I don't think the answer is A.", "I would not choose A.",
    "The answer isn't B. It can't be C.", "Neither A nor B is correct.", "A, B and C are wrong",
    "Answer: A or B", "Answer: A, B", "Answer: A/B", "Answer: A and C", "Answer: either A or B",
    "The answer is both B and C.", "The answer is A. Hmm. Answer: A or B", r"\boxed{A \text{ or } B}",
    "A. B. C.", "A\nB\nC", "A. Bury it in the garden\nB. Hang it in the sun\nC. Wait\nD. Use an oven.",
    "A. Bury it in the garden B. Hang it in the sun", "Answer choices: A. Bury it",
    "Answer with the letter: A, B, C or D",
    "A man walks in", "A dog", "A Dog barks", "Answer: A dog", "The answer is A bit odd", "The answer is a dog.",
    "Vitamin A is good. Vitamin C is best.", "The answer is B's neighbour", "Plan B is what I would do",
    "The answer is hanging it in the sun.", "Hang it in the sun", "Answer: None of them",
    "Answer: E", "Answer: I would say so", r"\boxed{72}",
]  # fmt: skip

PLANETS = ["Mercury", "Venus", "Earth", "Mars"]

OF_PLANETS = [  # B, whatever is said of the others
    # An explanation of another option follows on the next line.
    "The correct answer is B\n\nA: wrong", "The correct answer is **B**\n\n**A**: Mercury is small.",
    "The correct answer is **B**\n\n(A) Mercury is small.", "The correct answer is (B)\n(A) is too small",
    "The correct answer is B) Venus\n\nA) Mercury is small", "The best option is B\n\nA - too small\nC - too cool",
    "The answer is B\nC: too cool", "Answer is B\n\nA. Mercury: no air", "The answer is B: (A) is too small",
    "The correct answer is option B\nA. Mercury: too small\nC. Earth: too cold\nD. Mars: too cold",
    "The answer is\n\nB", "The correct answer is as follows:\n\nB. Venus", "Answer to the question\nB",
    # A condition or another's opinion follows.
    "The answer is B. A would be correct if the question asked for the closest planet.",
    "The answer is B. Option A is correct for the nearest planet, but not for the hottest.",
    "The answer is B. Option A would be the best choice for closeness.",
    "The correct answer is B. If the question had asked for the closest planet, the answer would be A.",
    "The correct answer is (B) Venus.\n\nHowever, if the phrase meant closest, it would be A.",
    "The correct answer is B. Many people think it's A because it is closest to the Sun.",
    "The correct answer is B. Students often choose A because it is closest.",
    "The correct answer is B. A common misconception is that the answer is A.",
    "The correct answer is B. At first glance, the answer is A.",
    "The answer is B, although many people think it's A.", "Many people think it's A, but it's B.",
    "The answer is B because A would have been correct only if it asked for the closest.",
    "The answer is B. A would have been correct for the closest.", "B. Venus\n\nMany people think it's A.",
    "The answer is B. A is correct if it asks for the closest.", "The answer is B. If closest, it would be A or C.",
    "Many people think the answer is A. It would be B.", "I first thought the answer is A. The answer would be B.",
    "The answer is A. No, wait, it would be B.", "The answer is A. So, the answer would be B? No. So it would be B.",
    "The answer is A.\n\nIf we read it again, it asks for the hottest, so the answer is B.",
    "The answer is A. Hmm, actually it would be B.", "It's A. Sorry, the answer would be B.",
    "The answer would be B.", "If it asks for the hottest, the answer is B.",
    # Short answers.
    "Option B", "Option (B)", "**Option B**", "Option B: Venus", "Choice B", "Letter B", "B - Venus", "B – Venus",
    "B = Venus", "Venus (B)", "**Venus (B)**.", "The hottest planet in the solar system is:\n\n**B. Venus**",
    "The hottest planet is **B. Venus**", "The hottest planet is (B) Venus.", "Venus is the hottest.\n\nOption B.",
    "B. Venus\n\nExplanation:\nA. Mercury is wrong.\nC. Earth is wrong.\nD. Mars is wrong.",
    "A) Mercury\nB) Venus\nC) Earth\nD) Mars\n\nB", "Options:\nA) Mercury\nB) Venus\nC) Earth\nD) Mars\n\n(B)",
    "Ans: B", "答案：B", "正确答案：B", "✅ **B. Venus**", "The correct letter is B", "That leaves B.",
    "This leaves only option B.", "The answer is B rather than A.", "I choose B instead of A.", "It is B and not A.",
    "- A: no\n- B: yes\n- C: no\n\nB", "- A: no\n- C: no\n\nB", "A: no\nB: yes\nC: no\n\nB", "Answer choice B",
    "Between choice A and choice B: B", "- **B. Venus**: Correct. It is hot.", "B—Venus", "B-Venus",
    "The answer is B. Venus. The closest planet is A. Mercury.",
]  # fmt: skip

OF_NO_PLANET = [
    "Mercury (A)\nVenus (B)\nEarth (C)\nMars (D)", "- A: small\n- B: hot\n- C: cool", "A - small\nB - hot",
    "Option A: small\nOption B: hot", "B\nC", "A\nB\nD", "a - no", "A – D",
    "- A: small\n- C: cool\nIt is hot.", "A) Mercury\nB) Venus\nC", "The closest planet is not A. Mercury",
    "That leaves B and C.", "Is the hottest planet B. Venus?", "Option A or B", "B = hot, A = small", "A = B",
    "Options: A. Mercury", "A-level physics", "Choice A is small. Choice B is hot.", "If the hottest is B. Venus",
]  # fmt: skip


@pytest.mark.parametrize(("reply", "letter"), [*STATED, *LABELLED, *((reply, None) for reply in NOT_STATED)])
def test_the_letter_is_the_one_that_a_reply_states(reply, letter):
    assert chosen_letter(reply, CHOICES) == letter


@pytest.mark.parametrize(
    ("reply", "letter"), [*((reply, "B") for reply in OF_PLANETS), *((reply, None) for reply in OF_NO_PLANET)]
)
def test_what_is_said_of_other_options_changes_no_answer(reply, letter):
    assert chosen_letter(reply, PLANETS) == letter


def test_a_letter_is_one_of_the_options():
    assert chosen_letter("Answer: D", CHOICES) == "D"
    assert chosen_letter("Answer: D", CHOICES[:2]) is None
    assert chosen_letter("Answer: J", [str(number) for number in range(10)]) == "J"


def test_the_article_is_a_letter_before_its_own_options_text():
    assert chosen_letter("Answer: A dog", ["dog", "cat"]) == "A"
    assert chosen_letter("A dog.", ["“Dog”", "cat"]) == "A"
    assert chosen_letter("Answer: A dog", ["cat", "A dog"]) is None


def test_an_options_own_text_may_name_a_letter():
    assert chosen_letter("B. Vitamin C.", ["Vitamin A.", "Vitamin C."]) == "B"
    assert chosen_letter("B. Vitamin C.", ["one", "two", "three"]) is None  # as a list may begin


def test_the_harness_gets_a_letter_for_every_reply():
    docs = [{"choices": CHOICES}, {"choices": CHOICES[:2]}]
    assert read_letters([["Answer: D"], ["Answer: D", "B"]], docs) == [["D"], ["[invalid]", "B"]]
