"""What is known of families of policies: their prompts, where their steps end, how they state answers; no model runs.

Prompts are quoted from the model cards and from the projects that search with these models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ets_engine.answers import MathView, ReferenceView
from ets_engine.errors import ConfigError
from ets_engine.messages import Message
from ets_engine.protocols import StepView
from ets_engine.reference import REFERENCE

THINK, THOUGHT = "<think>", "</think>"
"""Around what a reasoning model thinks before it replies."""

STEP_MARK = "ки"
"""Math-Shepherd's end of a step (arXiv 2312.08935), which its generators write; its PRM and Llemma's read it."""

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
"""Qwen2.5-Math's system prompt, and what the cards of Qwen3 and DeepSeek-R1 advise for mathematics."""

STEP_BY_STEP = r"""Solve the following math problem efficiently and clearly:

- For simple problems (2 steps or fewer):
Provide a concise solution with minimal explanation.

- For complex problems (3 steps or more):
Use this step-by-step format:

## Step 1: [Concise description]
[Brief explanation and calculations]

## Step 2: [Concise description]
[Brief explanation and calculations]

...

Regardless of the approach, always conclude with:

Therefore, the final answer is: $\boxed{answer}$. I hope it is correct.

Where [answer] is just the final number or expression that solves the problem."""
"""The system prompt of search-and-learn, Hugging Face's search with Llama 3."""

INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{problem}\n\n### Response: Let's think step by step."
)
"""MetaMath's prompt (arXiv 2309.12284)."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that tells families apart."""

    chat_template: Any


@dataclass(frozen=True, slots=True)
class StepBoundary:
    r"""What divides a solution into steps; `SearchConfig.max_step_tokens` does so too.

    Attributes:
        ends: Strings that end a step and are its last characters.
        begins: Strings that begin a step, wherever they follow content; one that must stand at the start of a line
            begins with a line end.
        tokens: A step ends after so many tokens, None = no limit of its own.
        is_over: Called after every token with the step's text so far; see `StopRules`.

    Example:
        >>> by_paragraph = StepBoundary(ends=("\n\n",))
        >>> by_heading = StepBoundary(begins=("\n## Step",))
        >>> by_length = StepBoundary(tokens=64)
        >>> by_sentence = StepBoundary(is_over=lambda text: text.endswith((". ", "! ", "? ")))
    """

    ends: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()
    tokens: int | None = None
    is_over: Callable[[str], bool] | None = None

    def describe(self) -> str:
        r"""What divides the steps, in a few words.

        Example:
            >>> StepBoundary(ends=("\n\n",), begins=("\n## Step",)).describe()
            "end with '\\n\\n', begin with '\\n## Step'"
        """
        parts = [f"end with {end!r}" for end in self.ends] + [f"begin with {begin!r}" for begin in self.begins]
        parts += [f"have at most {self.tokens} tokens"] if self.tokens else []
        parts += ["end where a function says so"] if self.is_over else []
        return ", ".join(parts) or "have at most max_step_tokens"


PARAGRAPHS = StepBoundary(ends=("\n\n",))


@dataclass(frozen=True, slots=True)
class Preset:
    r"""How one family of policies is asked and read.

    Attributes:
        name: What `EngineConfig.preset` says.
        about: Which checkpoints it is for, in words.
        checkpoint: A checkpoint whose name this pattern matches is one of them; lower case, without its owner. None =
            no name is enough.
        marks: A checkpoint whose chat template holds all of these is one of them; empty = no template is enough.
        prompt: "chat" is the conversation in the tokenizer's chat template; "line" is the problem on a line of its
            own; any other text is the prompt, with the problem in place of "{problem}". The last two know no
            instructions and no earlier turns.
        system: Instruction for a conversation that brings none and no tools, None = no such instruction.
        in_user_turn: Whether that instruction goes before the first user message, not into a system turn.
        boundary: Where its steps end.
        stop: Texts that finish a solution, besides the end-of-text tokens; they are no part of it.
        template_options: Further arguments of its chat template.
        step_mark: What it writes at the end of a step for a PRM's sake; neither answers nor PRMs are to see it.
        view: How its texts map to answers, None = `MathView`.
    """

    name: str
    about: str
    checkpoint: str | None = None
    marks: tuple[str, ...] = ()
    prompt: str = "chat"
    system: str | None = None
    in_user_turn: bool = False
    boundary: StepBoundary = PARAGRAPHS
    stop: tuple[str, ...] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    step_mark: str | None = None
    view: StepView | None = None

    def __post_init__(self) -> None:
        """Refuse a prompt that would not contain the problem."""
        if self.prompt not in ("chat", "line") and self.prompt.count("{problem}") != 1:
            raise ConfigError(f"prompt={self.prompt!r:.100}: give 'chat', 'line', or a text with one {{problem}} in it")

    def make_view(self, in_thought: bool = False) -> StepView:
        """How the texts of solutions map to answers.

        Args:
            in_thought: Whether the prompt has opened a <think> section, which a solution must close to answer.
        """
        return self.view or MathView(in_thought, self.step_mark)

    def make_reader(self, read_step: Callable[[str], str] | None = None) -> Callable[[str], str]:
        """What a PRM reads of a step's text: no tags of thoughts, no end-of-step mark, which its own format may add.

        Args:
            read_step: What the caller has it read of the rest, None = all.
        """
        marks = [mark for mark in (THINK, THOUGHT, self.step_mark) if mark]

        def read(text: str) -> str:
            for mark in marks:
                text = text.replace(mark, "")
            return text if read_step is None else read_step(text)

        return read

    def instruct(self, messages: Sequence[Message], has_tools: bool = False) -> Sequence[Message]:
        """The conversation with the family's instruction, where it brings neither instructions nor tools.

        Example:
            >>> Preset("brief", "for tests", system="Be brief.").instruct([{"role": "user", "content": "1+1?"}])
            [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '1+1?'}]
        """
        if not self.system or has_tools or any(map(instructs, messages)):
            return messages
        messages = [{"role": "system", "content": self.system}, *messages]
        return move_to_user_turn(messages) if self.in_user_turn else messages


_QWEN3 = Preset(
    "qwen3",
    "Qwen3 and other models of its chat template, thinking in a <think> section",
    checkpoint=r"qwen3-[\d.]+b(-a[\d.]+b)?(-thinking-.*)?",
    marks=("enable_thinking", "<|im_start|>"),
    system=BOXED,
    template_options={"enable_thinking": True},
)

PRESETS: tuple[Preset, ...] = (
    Preset(
        REFERENCE,
        "the shipped policy",
        prompt="line",
        boundary=StepBoundary(ends=("\n",), tokens=48),
        view=ReferenceView(),
    ),
    Preset(
        "qwen_math_base",
        "Qwen2.5-Math and Qwen2-Math base models, asked as in their evaluation",
        checkpoint=r"qwen2(\.5)?-math-[\d.]+b",
        prompt="Question: {problem}\nAnswer:",
        stop=("\n\nQuestion:",),
    ),
    Preset(
        "qwen_math",
        "Qwen2.5-Math and Qwen2-Math Instruct models",
        checkpoint=r"qwen2(\.5)?-math-.*",
        marks=("Please reason step by step, and put your final answer within", "<|im_start|>"),
        system=BOXED,
    ),
    Preset(
        "deepseek_r1",
        "DeepSeek-R1 and its distilled models, thinking in a <think> section that the prompt opens",
        checkpoint=r"deepseek-r1(-.*)?",
        marks=("<\uff5cAssistant\uff5c>", "<think>"),
        system=BOXED,
        in_user_turn=True,  # its card: all instructions belong into the user's turn
    ),
    _QWEN3,
    replace(
        _QWEN3,
        name="qwen3_direct",
        about="the same without thinking; never chosen by itself",
        checkpoint=None,
        marks=(),
        template_options={"enable_thinking": False},
    ),
    Preset(
        "llama3",
        "Llama 3.x Instruct and other models of its chat template, asked as by search-and-learn",
        marks=("<|start_header_id|>",),
        system=STEP_BY_STEP,
        boundary=StepBoundary(ends=("\n\n",), begins=("\n## Step",)),
    ),
    Preset(
        "math_shepherd",
        f"generators that end steps with {STEP_MARK}: Math-Shepherd's Mistral",
        checkpoint=r"(math-shepherd-)?mistral-7b-sft",
        prompt="line",
        boundary=StepBoundary(ends=(f"{STEP_MARK}\n",)),
        step_mark=STEP_MARK,
    ),
    Preset(
        "llemma",
        f"generators that end steps with {STEP_MARK}: Llemma trained on MetaMath, REBASE's and ETS's policy",
        checkpoint=r"llemma-metamath-.*",
        prompt="line",
        boundary=StepBoundary(ends=(f"{STEP_MARK}\n",)),
        step_mark=STEP_MARK,
    ),
    Preset(
        "metamath",
        "MetaMath models, asked in their training's prompt",
        checkpoint=r"metamath-.*",
        prompt=INSTRUCTION,
        boundary=StepBoundary(ends=("\n",)),
    ),
    Preset("chat", "any model with a chat template, without instructions of ours"),
    Preset("plain", "any base model: the problem on a line of its own", prompt="line"),
)
"""All presets; of several that a checkpoint answers to, the first is taken."""


def find_preset(name: str, checkpoint: str, tokenizer: Tokenizer | None) -> Preset:
    """The preset of a policy.

    Args:
        name: Of a preset; "auto" = what the checkpoint's name, else its chat template says, else "chat" or "plain".
        checkpoint: Folder or hub name of the policy; "reference" is the shipped one, "./reference" a folder.
        tokenizer: The policy's, None = it is not known here whether there is a chat template: with "auto" the name
            alone tells, else it is "chat".

    Example:
        >>> find_preset("auto", "Qwen/Qwen2.5-Math-7B-Instruct", None).name, find_preset("auto", "mine", None).name
        ('qwen_math', 'chat')

    Raises:
        ConfigError: There is no preset of this name, or it needs a chat template that the tokenizer lacks.
    """
    check_preset(name)
    by_name = {preset.name: preset for preset in PRESETS}
    template = "" if tokenizer is None else _text(tokenizer.chat_template)
    may_chat = tokenizer is None or bool(template)
    if name == "auto" and checkpoint == REFERENCE:
        return by_name[REFERENCE]
    if name != "auto":
        if by_name[name].prompt == "chat" and not may_chat:
            raise ConfigError(f"preset={name!r} needs a chat template, and {checkpoint!r} has none; choose 'plain'")
        return by_name[name]
    called = _own_name(checkpoint)
    usable = [preset for preset in PRESETS if may_chat or preset.prompt != "chat"]
    for preset in usable:
        if preset.checkpoint is not None and re.fullmatch(preset.checkpoint, called):
            return preset
    for preset in usable:
        if preset.marks and all(mark in template for mark in preset.marks):
            return preset
    return by_name["chat" if may_chat else "plain"]


def check_preset(name: str) -> None:
    """Refuse a name that no preset has; nothing is loaded for that.

    Raises:
        ConfigError: There is no preset of this name.
    """
    names = [preset.name for preset in PRESETS]
    if name not in ("auto", *names):
        raise ConfigError(f"preset={name!r} is unknown; choose 'auto' or one of {', '.join(names)}")


def instructs(message: Message) -> bool:
    """Whether a message instructs the policy."""
    return message["role"] in ("system", "developer")


def move_to_user_turn(messages: Sequence[Message]) -> list[Message]:
    """The conversation with its instructions before the text of the first user turn."""
    said = [message["content"] for message in messages if instructs(message)]
    turns = [message for message in messages if not instructs(message)]
    first = next((place for place, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(said)}, *turns]
    asked = {**turns[first], "content": "\n\n".join([*said, turns[first]["content"]])}
    return [*turns[:first], asked, *turns[first + 1 :]]


def _own_name(checkpoint: str) -> str:
    """Lower-case name of a checkpoint without its folders, its owner and the hub cache's."""
    path = re.sub(r"[/\\]snapshots[/\\][^/\\]+$", "", checkpoint.rstrip("/\\"))
    return re.split(r"[/\\]", path)[-1].split("--")[-1].lower()


def _text(template: Any) -> str:
    """All of a tokenizer's chat templates: there may be several by name."""
    named = template if isinstance(template, Mapping) else {"default": template or ""}
    return "\n".join(map(str, named.values()))
