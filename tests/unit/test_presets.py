"""Each known family of policies is asked in its own prompt, divided into its own steps, and read in its own way."""

from __future__ import annotations

import string
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ets_engine.errors import ConfigError
from ets_engine.models import PRESETS, PolicyFormat, Preset, StepBoundary, find_preset
from ets_engine.models.presets import BOXED, STEP_BY_STEP
from ets_engine.runtime import StopFinder, StopRules
from ets_engine.runtime.stops import CONTEXT_TOKENS
from ets_engine.types import StopReason

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_MATH = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    r"Please reason step by step, and put your final answer within \\boxed{}."
    "<|im_end|>\n{% endif %}" + CHATML
)
QWEN3 = (
    CHATML.removesuffix("{% endif %}")
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
SILENT = "{{ bos_token }}{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<\uff5cAssistant\uff5c>{{ m.content.split('</think>')[-1] }}<\uff5cend▁of▁sentence\uff5c>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<\uff5cAssistant\uff5c><think>\n{% endif %}"
)

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"),
]


def characters(
    template: Any = None, begin: str | None = "<s>", end: str | None = "</s>", *, stubborn: bool = False
) -> PreTrainedTokenizerFast:
    """One token per character and per special text; `stubborn` puts a begin-of-text token before whatever it reads."""
    pieces = [*SPECIAL, "<unk>", *string.printable, "к", "и"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": begin, "eos_token": end}
    made = (Stubborn if stubborn else PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token is not None},
    )
    made.chat_template = template
    return made


class Stubborn(PreTrainedTokenizerFast):
    def __call__(self, text: Any, **options: Any) -> Any:
        return super().__call__(text, **{**options, "add_special_tokens": True})


def make(checkpoint: str, template: Any = None, name: str = "auto", **settings: Any) -> PolicyFormat:
    tokenizer = characters(template, **settings)
    return PolicyFormat.of(tokenizer, frozenset({1}), find_preset(name, checkpoint, tokenizer))


def prompt(format: PolicyFormat, asked: Any = "1+1?", **options: Any) -> str:
    return format.tokenizer.decode(format.prompt_ids(asked, **options))


# ---------------------------------------------------------------------- which preset


@pytest.mark.parametrize(
    ("checkpoint", "template", "name"),
    [
        ("reference", None, "reference"),
        ("Qwen/Qwen2.5-Math-1.5B-Instruct", QWEN_MATH, "qwen_math"),
        ("/models/Qwen2-Math-7B-Instruct/", CHATML, "qwen_math"),
        ("/models/tuned", QWEN_MATH, "qwen_math"),
        ("Qwen/Qwen2.5-Math-7B", QWEN_MATH, "qwen_math_base"),
        ("/cache/models--Qwen--Qwen2.5-Math-7B/snapshots/0123abcd", QWEN_MATH, "qwen_math_base"),
        ("Qwen/Qwen2.5-7B-Instruct", CHATML, "chat"),
        ("Qwen/Qwen3-4B", QWEN3, "qwen3"),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", CHATML, "qwen3"),
        ("Qwen/Qwen3-4B-Instruct-2507", CHATML, "chat"),
        ("meta-llama/Llama-3.2-1B-Instruct", LLAMA3, "llama3"),
        ("meta-llama/Llama-3.2-1B", None, "plain"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", LLAMA3, "deepseek_r1"),
        ("reference", None, "reference"),
        ("./reference", None, "plain"),  # somebody's folder of that name
        ("/models/mine", DEEPSEEK_R1, "deepseek_r1"),
        ("mistralai/Mistral-7B-Instruct-v0.3", MISTRAL, "chat"),
        ("mistralai/Mistral-7B-Instruct-v0.3", {"default": MISTRAL, "tool_use": MISTRAL}, "chat"),
        ("peiyi9979/mistral-7b-sft", None, "math_shepherd"),
        ("HuggingFaceH4/mistral-7b-sft-beta", CHATML, "chat"),
        ("tkitsers/Llemma-metamath-7b", None, "llemma"),
        ("EleutherAI/llemma_7b", None, "plain"),
        ("meta-math/MetaMath-Mistral-7B", None, "metamath"),
        ("/runs/qwen2.5-math-1.5b-instruct/policy", None, "plain"),  # a folder above says nothing
    ],
)
def test_a_checkpoint_says_what_it_is(checkpoint: str, template: Any, name: str) -> None:
    assert find_preset("auto", checkpoint, characters(template)).name == name


def test_names_are_found_and_others_refused() -> None:
    for preset in PRESETS:
        assert find_preset(preset.name, "anything", characters(CHATML)) is preset
    assert len({preset.name for preset in PRESETS}) == len(PRESETS)
    with pytest.raises(ConfigError, match="preset='qwen' is unknown; choose 'auto' or one of reference, qwen"):
        find_preset("qwen", "anything", characters())
    with pytest.raises(ConfigError, match="preset='chat' needs a chat template, and 'here' has none; choose 'plain'"):
        find_preset("chat", "here", characters())
    with pytest.raises(ConfigError, match=r"one \{problem\} in it"):
        Preset("own", "", prompt="Question:")


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("checkpoint", "template", "expected"),
    [
        (
            "Qwen2.5-Math-7B-Instruct",
            QWEN_MATH,
            f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("Qwen2.5-Math-7B", QWEN_MATH, "<s>Question: 1+1?\nAnswer:"),
        (
            "Qwen3-8B",
            QWEN3,
            f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "Llama-3.1-8B-Instruct",
            LLAMA3,
            f"<s><|start_header_id|>system<|end_header_id|>\n\n{STEP_BY_STEP}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("DeepSeek-R1", DEEPSEEK_R1, f"<s><\uff5cUser\uff5c>{BOXED}\n\n1+1?<\uff5cAssistant\uff5c><think>\n"),
        ("Mistral-7B-Instruct", MISTRAL, "<s>[INST] 1+1? [/INST]"),
        ("mistral-7b-sft", None, "<s>1+1?\n"),
        ("llemma-metamath-34b", None, "<s>1+1?\n"),
        (
            "MetaMath-7B-V1.0",
            None,
            "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\n1+1?\n\n### Response: Let's think step by step.",
        ),
        ("gpt", None, "<s>1+1?\n"),
    ],
)
def test_prompts(checkpoint: str, template: str | None, expected: str) -> None:
    assert prompt(make(checkpoint, template)) == expected


def test_a_problem_may_look_like_a_template() -> None:
    assert prompt(make("Qwen2.5-Math-7B"), " {problem} {x}% ") == "<s>Question: {problem} {x}%\nAnswer:"


def test_thinking_can_be_left_out() -> None:
    assert prompt(make("Qwen3-8B", QWEN3, "qwen3_direct")).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_of_the_callers_own_replace_the_presets(role: str) -> None:
    turns = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    text = prompt(make("Qwen2.5-Math-7B-Instruct", CHATML), turns)
    assert text == f"<|im_start|>{role}\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def test_a_policy_with_tools_is_told_nothing_of_mathematics() -> None:
    tools = "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert prompt(make("Qwen3-8B", tools + QWEN3), tools=[tool]).startswith("add\n<|im_start|>user\n1+1?")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MISTRAL, "<s>[INST] Be brief.\n\n1+1? [/INST]2</s>[INST] Twice? [/INST]"),
        (SILENT, "<s>[Be brief.\n\n1+1?][2][Twice?]"),
    ],
    ids=["refuses", "drops"],
)
def test_instructions_go_before_the_question_where_a_template_knows_no_system_turn(
    template: str, expected: str
) -> None:
    said = [("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", "Twice?")]
    turns = [{"role": role, "content": content} for role, content in said]
    assert prompt(make("any", template), turns) == expected
    assert prompt(make("any", template, "qwen_math")).startswith(expected[: expected.index("Be")] + BOXED + "\n\n1+1?")


def test_a_template_that_takes_system_turns_gets_developers_as_such() -> None:
    template = "{% for m in messages if m.role in ['system', 'user'] %}({{ m.role }}: {{ m.content }}){% endfor %}"
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert prompt(make("any", template), turns) == "(system: Be brief.)(user: 1+1?)"


def test_a_template_that_refuses_everything_is_named_in_one_line() -> None:
    format = make("any", "{{ raise_exception('not\nthis way') }}")
    with pytest.raises(ConfigError, match=r"^the policy's chat template refuses these messages: not this way$"):
        format.prompt_ids([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}])
    assert format.view([{"role": "user", "content": "1+1?"}]).answer("", "It is 2.") == "2"


@pytest.mark.parametrize(
    "template", [LLAMA3, LLAMA3.replace("{{ bos_token }}", ""), None], ids=["own", "left", "plain"]
)
def test_a_prompt_begins_once(template: str | None) -> None:
    """Whether the template writes a begin-of-text token, the tokenizer adds one regardless, or both."""
    format = make("any", template, "plain" if template is None else "chat", stubborn=True)
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is"}]
    for asked in ("1+1?", turns):
        ids = format.prompt_ids(asked)
        assert ids[0] == 0 and ids.count(0) == 1


# ---------------------------------------------------------------------- replies that are gone on with


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL], ids=["chatml", "llama3", "mistral"])
def test_a_reply_is_gone_on_with_as_transformers_does(template: str) -> None:
    format = make("any", template, "chat")
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "The sum"}]
    expected: Any = format.tokenizer.apply_chat_template(turns, continue_final_message=True, return_dict=False)
    assert format.prompt_ids(turns) == expected
    assert format.prompt_ids(turns)[: -len("The sum")] == format.prompt_ids(turns[:1])
    assert format.prompt_ids([turns[0], {"role": "assistant", "content": ""}]) == format.prompt_ids(turns[:1])


def test_a_reply_is_gone_on_with_after_any_prompt() -> None:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "The sum"}]
    assert prompt(make("any"), turns) == "<s>1+1?\nThe sum"
    assert prompt(make("Qwen2.5-Math-7B"), turns) == "<s>Question: 1+1?\nAnswer:The sum"
    for format in (make("any"), make("any", CHATML)):
        with pytest.raises(ConfigError, match="no question before the reply to go on with; begin with a user message"):
            format.prompt_ids(turns[1:])


def test_a_call_is_no_reply_to_go_on_with() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    assert prompt(make("any", CHATML), [{"role": "user", "content": "1+1?"}, call]).count("assistant") == 2


@pytest.mark.parametrize(
    ("begun", "end", "answer"),
    [
        ("", "<\uff5cAssistant\uff5c><think>\n", None),
        ("It is", "<\uff5cAssistant\uff5c><think>\nIt is", None),
        ("<think>\nIt is", "<\uff5cAssistant\uff5c><think>\nIt is", None),  # not twice
        ("<think>\nYes.\n</think>\n", "<\uff5cAssistant\uff5c><think>\nYes.\n</think>\n", "3"),
    ],
)
def test_thoughts_are_gone_on_with(begun: str, end: str, answer: str | None) -> None:
    format = make("DeepSeek-R1", DEEPSEEK_R1)
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": begun}]
    assert prompt(format, turns).endswith(end)
    assert format.view(turns).answer("1+1?", "Or 3") == answer
    assert format.view(turns).answer("1+1?", "Or 3.\n</think>\n\nIt is 2.") == "2"


@pytest.mark.parametrize(
    ("name", "begun", "text", "answer"),
    [
        ("qwen3", "", "<think>\nMaybe 5.\n</think>\n\nIt is 2.", "2"),
        ("qwen3", "", "<think>\nMaybe 5.", None),
        ("qwen3", "", "It is 2.", "2"),  # it did not think
        ("qwen3", "<think>\nLet", " me see: 5.", None),
        ("qwen3_direct", "", "It is 2.", "2"),
    ],
)
def test_answers_follow_thoughts(name: str, begun: str, text: str, answer: str | None) -> None:
    turns = [{"role": "user", "content": "1+1?"}, *([{"role": "assistant", "content": begun}] if begun else [])]
    assert make("any", QWEN3, name).view(turns).answer("1+1?", text) == answer


# ---------------------------------------------------------------------- ends


@pytest.mark.parametrize(
    ("template", "ends"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL, "</s>"), (DEEPSEEK_R1, "<\uff5cend▁of▁sentence\uff5c>")],
    ids=["chatml", "llama3", "mistral", "deepseek_r1"],
)
def test_a_solution_ends_where_a_turn_ends(template: str, ends: str) -> None:
    """Also where the checkpoint forgets to say so, as base models with a chat template do."""
    assert make("any", template).eos_ids == {1, SPECIAL.index(ends)}


def test_a_template_that_rewrites_replies_names_no_end() -> None:
    assert make("any", "{{ bos_token }}{% for m in messages %}{{ m.content | upper }}{% endfor %}").eos_ids == {1}


def test_a_policy_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no end-of-text token, so no solution would finish; set eos_token"):
        PolicyFormat.of(characters(end=None), frozenset())
    with pytest.raises(ConfigError, match="names no end-of-text token"):
        PolicyFormat.of(characters(SILENT, end=None), frozenset())
    assert PolicyFormat.of(characters(CHATML, end=None), frozenset()).eos_ids == {SPECIAL.index("<|im_end|>")}
    assert not PolicyFormat.of(characters(end=None), frozenset(), Preset("own", "", prompt="line", stop=("#",))).eos_ids


# ---------------------------------------------------------------------- steps and answers of realistic solutions

SOLUTIONS = {
    "reference": (["19-4=15 left 6 10 15\n", "6*10=60 left 15 60\n", "60/15=4"], "(10*6)/(19-4)"),
    "qwen_math_base": (["We add the two numbers.\n\n", "1 + 1 = 2, so the answer is 2."], "2"),
    "qwen_math": (["To find the sum, we add:\n\n", "\\[1 + 1 = 2\\]\n\n", "The sum is \\(\\boxed{2}\\)."], "2"),
    "deepseek_r1": (["Hmm, 1 + 1 is 3?\n\n", "No, 2.\n</think>\n\n", "It is \\boxed{2}."], "2"),
    "qwen3": (["<think>\nIs it 3?\n\n", "No.\n</think>\n\n", "**Answer**: $\\boxed{2}$"], "2"),
    "qwen3_direct": (["Adding them up.\n\n", "$\\boxed{2}$"], "2"),
    "llama3": (
        [
            "## Step 1: Add\n1 + 1 = 2\n\n",
            "## Step 2: Check\n2 - 1 = 1",  # a heading without a blank line before it
            "\n## Step 3: Conclude\nIt holds.\n\n",
            "Therefore, the final answer is: $\\boxed{2}$. I hope it is correct.",
        ],
        "2",
    ),
    "math_shepherd": (["Step 1: 1+1 = <<1+1=2>>2. ки\n", "Step 2: It is 2. The answer is: 2 ки"], "2"),
    "llemma": (["Step 1: We add. ки\n", "Step 2: The sum is $2$. The answer is: 2 ки"], "2"),
    "metamath": (["We add 1 and 1.\n", "1 + 1 = 2.\n", "The answer is: 2"], "2"),
    "chat": (["We add.\n\n", "The answer is **2**."], "2"),
    "plain": (["We add.\n\n", "The answer is 2."], "2"),
}


@pytest.mark.parametrize("name", [preset.name for preset in PRESETS])
def test_steps_and_answers(name: str) -> None:
    template = DEEPSEEK_R1 if name == "deepseek_r1" else QWEN3
    format = make("any", template, name)
    steps, answer = SOLUTIONS[name]
    text, boundary = "".join(steps), format.preset.boundary
    rules = StopRules(boundary.ends, format.eos_ids, 400, format.preset.stop, boundary.begins, boundary.is_over)
    finder, recent, tokens, carry = StopFinder(format.tokenizer), list[int](), list[int](), ""
    found: list[str] = []
    for token in format.tokenizer(text, add_special_tokens=False)["input_ids"]:
        tokens.append(token)
        if finder.reason(rules, recent, tokens, 1000, 1000, carry) is StopReason.BOUNDARY:
            step, carry = finder.split(rules, recent, tokens, carry)
            found.append(step)
            recent, tokens = [*recent, *tokens][-CONTEXT_TOKENS:], []
    assert [*found, carry + finder.text(recent, tokens)] == steps
    problem = "Use 4, 6, 10 and 19 to make 16." if name == "reference" else "1+1?"
    assert format.view([{"role": "user", "content": problem}]).answer(problem, text) == answer


def test_a_base_model_ends_where_it_asks_the_next_question() -> None:
    format = make("Qwen2.5-Math-7B")
    rules, finder = StopRules(final_strings=format.preset.stop), StopFinder(format.tokenizer)
    tokens = format.tokenizer("It is 2.\n\nQuestion:", add_special_tokens=False)["input_ids"]
    assert finder.cut(rules, [], tokens, 0) == "It is 2."


@pytest.mark.parametrize(
    ("name", "step", "read"),
    [
        ("llemma", "Step 1: We add. ки\n", "Step 1: We add. \n"),
        ("qwen3", "<think>\nIs it 3?\n\n", "\nIs it 3?\n\n"),
        ("deepseek_r1", "No.\n</think>\n\n", "No.\n\n\n"),
        ("plain", "We add. ки\n\n", "We add. ки\n\n"),
    ],
)
def test_what_a_prm_reads(name: str, step: str, read: str) -> None:
    format = make("any", QWEN3, name)
    assert format.reader()(step) == read
    assert format.reader(str.upper)(step) == read.upper()


def test_steps_of_so_many_tokens_are_a_choice_of_their_own() -> None:
    preset = Preset("own", "", prompt="line", boundary=StepBoundary(tokens=64))
    format = PolicyFormat.of(characters(), frozenset({1}), preset)
    assert (format.max_step_tokens, format.preset.boundary.ends) == (64, ())
