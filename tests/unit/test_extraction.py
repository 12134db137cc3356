"""Answers behind labels and in sentences, and numbers that only look like one, in solutions as models write them."""

from __future__ import annotations

import time

import pytest

from ets_engine.answers import extract_answer, same_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: C", "C"),
        ("**Answer: C**", "C"),
        ("**Answer:** 12", "12"),
        ("ANSWER: (C)", "(C)"),
        ("So it is. Final answer: C", "C"),
        ("Correct answer: 5", "5"),
        ("Therefore the answer = 1/2", "1/2"),
        ("Therefore, the correct option is C.", "C"),
        ("So the correct choice is (C).", "(C)"),
        ("The answer is `C`.", "C"),
        ("Answer: D. 12 cm", "D"),
        ("**Answer: D.** 12 cm", "D"),
        (r"Answer: $\frac{3}{4}$", r"\frac{3}{4}"),
        (r"Answer: $2\sqrt{3}$", r"2\sqrt{3}"),
        ("Answer: x+1", "x+1"),
        ("Answer: C\n\nOf 3 options, only this is right.", "C"),
        ("**Final Answer**\n\n$\\frac{14}{3}$", r"\frac{14}{3}"),
        ("### Final Answer:\n\n73", "73"),
        ("### Answer\nThe answer is **5**.", "5"),
        ("Answer: Yes", "Yes"),
        ("Answer: The Eiffel tower", "The Eiffel tower"),
        ("Answer: A is right because 3 + 4 = 7.", "A is right"),
        ("Answer: Option C, 12 cm", "Option C, 12 cm"),
        ("Answer: 12 square feet. That is 3 times 4.", "12 square feet"),
        ("Answer: y - 2x = 3", "y - 2x = 3"),
        ("Answer: 3.\nThe answer is 4.", "4"),
        ("The answer is 4.\nAnswer: 3.", "3"),
        ("Answer:\n- 12", "12"),
        ("Answer:\n> 12", "12"),
        ("Answer:\n-5", "-5"),
        ("### Answer\n---\n12", "12"),
        ("__Answer:__ 12", "12"),
        ("Answer: __12__", "12"),
        ("The answer is:\n\n### 12", "12"),
        ("The answer is > 12.", "> 12"),
        ('The answer is "C".', "C"),
        ("The answer is the letter C.", "C"),
        ("Answer: Rs. 12", "12"),
        ("Answer: \u20ac12", "12"),
        ("Answer: \u20ac12 million", "12 million"),
        ("Answer: 12 USD", "12"),
        ("Answer: 12 kWh", "12"),
        ("Answer: 12.5 km/h", "12.5"),
        ("Answer: $12/day", "12"),
        ("Answer: 3m/n", "3m/n"),
        ("Answer: 1/alpha", "1/alpha"),
        ("Answer: B; 3 is prime", "B; 3 is prime"),
        ("Answer: 12 apples!", "12 apples"),
        ("Answer: 12 apples (in total)", "12 apples"),
        ("The answer is 2/3 (approximately 0.67).", "2/3"),
        ("The answer is 2 (mod n).", "2 (mod n)"),
        ("Answer: \u2248 7", "7"),
        ("Answer: Roughly 12", "12"),
        ("Answer: So 12", "12"),
        ("Final Answer: In 12 days", "12 days"),
        ("Answer: Total 12 apples", "12 apples"),
        ("Answer: Total: $12", "12"),
        ("Final Answer: Josh's profit: $12.", "12"),
        ("Answer: Apollo 11", "Apollo 11"),
        ("Answer: (B) The price will rise by 10%", "(B) The price will rise by 10%"),
        ("Answer: D, because 3 is prime and 4 is not.", "D"),
        ("Answer: Yes, 12 is divisible by 3.", "Yes"),
        ("Answer: True, False, True", "True, False, True"),
    ],
)
def test_answers_behind_labels(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: There are 3 cats and 4 dogs, so 7 pets.", "7"),
        ("Answer: 5 + 3 = 8 apples. With the others it makes 16.", "16"),
        ("Answer:\nFirst, 2 + 2 = 4. Then 4 + 5 = 9.", "9"),
        ("Answer: 30 comic books weigh 7.5 pounds. Then 30 / 7.5 = 4.", "4"),
        ("Answer: For the seeds, Mr. Ho pays 5 and 6: 11", "11"),
        ("Answer: Mr. Ho pays 5 and Mrs. Ho pays 6: 11", "11"),
        ("Answer: A year has twelve months, so he pays 12 * 3 = 36.", "36"),
        ("**Final Answer**\n\nThe total of both is 12 apples.", "12"),
        ("I check my answer: 3 + 4 = 7, and 7 + 5 = 12.", "12"),
        ("The answer is not 7, it is 8.", "8"),
        ("The answer isn't 7, it is 8.", "8"),
        ("The answer is 8. As 8 = 5 + 3, the answer is correct.", "8"),
        ("The correct choice is to add 5 and 7, giving 12.", "12"),
        ("Now the final answer: multiply 3 by 4, so 12.", "12"),
        ("Let answer = x. Then x = 12.", "12"),
        ("    answer = a + b\n    return answer\nThe result is 12.", "12"),
        ("Answer: $20 - $8 = $12", "12"),
        ("Answer: 3 x 4 = 12", "12"),
        ("Answer: 60% of 20 = 12", "12"),
        (r"Answer: $\frac{2}{4} = \frac{1}{2}$", r"\frac{1}{2}"),
    ],
)
def test_prose_and_sums_behind_a_label_are_no_answers(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12 because we have 3 cows.", "12"),
        ("The answer is $5$ because it is.", "5"),
        ("The answer is 12, since we have 3 cows.", "12"),
        ("The answer is 12, so there are 3 left.", "12"),
        ("The answer is C as A and B are wrong", "C"),
        ("The answer is approximately 3.5.", "3.5"),
        ("The answer is therefore $3$.", "3"),
        ("The answer is thus simply 7.", "7"),
        ("The answer is equal to 7.", "7"),
        ("The answer is given by $7$.", "7"),
        ("The answer is clearly $7$ apples in the end.", "7"),
        ("The answer is $7$ (see above).", "7"),
        ("The answer is about $3.5$ million.", "3500000"),
        ("The answer is 5 + 7 = 12.", "12"),
        (r"The answer is $\frac{10}{2} = 5$ apples.", "5"),
        (r"The answer is $2^{10} = 1024$.", "1024"),
        ("The answer is 2x = 6", "2x=6"),
        ("The answer is $2 = x$", "2 = x"),
        ("The answer is twice as many.", "twice as many"),
        ("The answer is the same as before.", "the same as before"),
        (r"The answer is $3 \times 4 = 12$.", "12"),
        ("The answer is twelve (12).", "12"),
        ("The answer is twenty-one (21).", "21"),
        ("The answer is 12 (twelve).", "12"),
        (r"The answer is 12 $\text{cm}^2$.", "12"),
        ("The answer is $2$ and $3$.", "2,3"),
        ("The answer is x = 7.", "7"),
        ("The answer is y = 2x + 3", "y=2x+3"),
        (r"The answer is **(C) $\frac12$**.", r"(C) $\frac12$"),
        ("The answer is C, $12$ cm.", r"C, $12$ cm"),
    ],
)
def test_the_rest_of_a_sentence_is_no_part_of_the_answer(text: str, answer: str) -> None:
    found = extract_answer(text)
    assert found is not None and same_answer(found, answer), found


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the result is 10^6.", "10^6"),
        ("So it is 10^{-6}.", "10^{-6}"),
        ("x = 2.5e3", "2.5e3"),
        ("it is at 7:30", "7:30"),
        ("They stand in the ratio 3:4.", "3:4"),
        ("It is \N{MINUS SIGN}5", "-5"),
        ("So it is 101_2.", "101_2"),
        ("He has 1{,}000 of them", "1{,}000"),
        (r"So the value is $\frac{3}{4}$.", r"\frac{3}{4}"),
        (r"So the value is \(2\sqrt{3}\).", r"2\sqrt{3}"),
        (r"So the value is" "\n" r"$$2\sqrt{3}$$" "\n", r"2\sqrt{3}"),
        ("Hence $7^2 = 49$.", "49"),
        (r"Hence $x \approx 1.41$.", "1.41"),
        ("Hence\n\\[\nx = \\frac{3}{4}.\n\\]", r"\frac{3}{4}"),
        ("The answer is\n\\[\n\\frac{\\pi}{4}\n\\]", r"\frac{\pi}{4}"),
        ("So\n\\[\nx = \\underline{12}\n\\]", "12"),
        ("So\n\\[\n12 = x\n\\]", "12"),
        ("The answer is\n$$\nx^2 + 1\n$$", "x^2 + 1"),
        ("Thus the answer is\n\\[\n\\text{Speed} = 24 / 2 = 12 \\text{ km/h}\n\\]", "12"),
        ("Thus\n\\[\n\\begin{aligned}\nx &= 5 + 7 \\\\\n&= 12\n\\end{aligned}\n\\]", "12"),
        (r"There are $\frac{3}{4}$ cups.", None),  # neither 3 nor 4
        (r"It is $2\sqrt{3}$ cm.", None),
        ("So we get x^6.", None),
        (r"So \textbf{12} of them", "12"),
        ("He pays $5 each for a total of $20.", "20"),
        ("It costs 5$ and then 20$.", "20"),
        ("Now 3 + 4 = 7 apples at 2:1", "2:1"),
    ],
)
def test_the_last_number_is_a_whole_one(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "answer: " * 30_000,
        "answer\n" * 30_000,
        "answer" + " " * 200_000,
        "*" * 200_000 + "answer",
        ("final answer" + "*" * 9) * 10_000,
        "correct option is " * 10_000,
        "answer is therefore " * 10_000,
        "answer is " + "therefore " * 20_000,
        "answer is " + "twenty" * 40_000,
        "answer is " + "twenty-" * 42 + "(",
        "answer is " + "1+" * 149 + "x",
        "answer is " + " so" * 70_000,
        "$" * 200_000,
        "$a" * 100_000,
        "\\(" * 100_000,
        "\\(a" * 40_000 + "\\)",
        "answer: " + "a" * 299,
        "answer: " + "a1 " * 99,
        "answer: " + "= abc" * 59,
        "\\[" * 100_000,
        "\\[a" * 60_000,
        "$$a" * 60_000,
        "answer:" + "\n> " * 60_000,
        "answer:" + "\n###### " * 20_000,
        "answer is 1 (" + "a " * 140,
        "answer is 1" + " (aaa)" * 48,
        "answer is aaa: " + "1 " * 140,
        "answer is " + "1.1" * 99,
        "answer is " + "1 of x " * 42,
        "answer is " + "in " * 99,
        "answer = " * 30_000,
        "yes, " * 60_000,
        "answer is " + "yes, " * 59,
        "1:" * 100_000,
        "1^" * 100_000,
        "1e" * 100_000,
        "1{,}000" * 30_000 + "x",
        "1" * 200_000,
        "\n" * 200_000,
    ],
)
def test_nonsense_is_quick(text: str) -> None:
    started_s = time.process_time()
    extract_answer(text)
    assert time.process_time() - started_s < 1.0
