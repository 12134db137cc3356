"""Token formats of policies: how a problem or a conversation becomes the ids of a prompt; it runs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ets_engine.errors import ConfigError
from ets_engine.messages import Message, Prompt, last_user_text, split_reply, to_messages
from ets_engine.models.presets import THINK, THOUGHT, Preset, find_preset
from ets_engine.models.shapes import first_heard
from ets_engine.protocols import StepView

_QUESTION, _REPLY = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes, it is."}


@dataclass(frozen=True, eq=False)
class PolicyFormat:
    """Prompt ids, step boundaries and answers of one policy.

    Attributes:
        tokenizer: The policy's.
        preset: How its family is asked and read.
        eos_ids: Tokens that finish a solution.

    Example:
        PolicyFormat.of(tokenizer, eos_ids=frozenset({2})).prompt_ids("What is 1+1?")
    """

    tokenizer: PreTrainedTokenizerBase
    preset: Preset
    eos_ids: frozenset[int]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], preset: Preset | None = None
    ) -> PolicyFormat:
        """The format of a policy whose solutions also end where its chat template ends a turn.

        Args:
            tokenizer: The policy's.
            eos_ids: End-of-text tokens that the checkpoint names.
            preset: Of its family, None = "chat" where the tokenizer has a chat template, else "plain".

        Raises:
            ConfigError: There is no end-of-text token, so that no solution would ever finish.
        """
        preset = preset or find_preset("chat" if tokenizer.chat_template else "plain", "the policy", tokenizer)
        format = cls(tokenizer, preset, eos_ids)
        if format.is_chat:
            format = replace(format, eos_ids=eos_ids | format._turn_end_ids())
        if not format.eos_ids and not preset.stop:
            raise ConfigError(
                "the policy names no end-of-text token, so no solution would finish; set eos_token in its tokenizer or "
                "eos_token_id in its generation config"
            )
        return format

    @property
    def is_chat(self) -> bool:
        """Whether the policy reads conversations; any other reads the last user turn only."""
        return self.preset.prompt == "chat"

    @property
    def max_step_tokens(self) -> int | None:
        """A longer step is no step of this policy, None = no such limit."""
        return self.preset.boundary.tokens

    def describe(self) -> dict[str, str]:
        """What the policy reads and where its steps end, for people."""
        preset = self.preset
        prompts = {"chat": "the tokenizer's chat template", "line": "the problem on a line of its own"}
        return {
            "prompt": prompts.get(preset.prompt, repr(preset.prompt)),
            "system prompt": "none of ours" if preset.system is None else preset.system.partition("\n")[0],
            "steps": preset.boundary.describe(),
        }

    def prompt_ids(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of the prompt, to be continued by the first step.

        A conversation that ends with an assistant's text is gone on with: that text follows the ids that every reply
        follows, in ids of its own, with nothing of the template's end of a turn. It is a part of the prompt, so
        neither steps nor the solution's text repeat it.

        Args:
            prompt: A problem, or a conversation.
            tools: Functions that the policy may call, as JSON schemas in OpenAI's layout.

        Raises:
            ConfigError: The policy's prompt has no place for tools, or its chat template refuses the messages.
        """
        messages, begun = split_reply(to_messages(prompt))
        if not messages:
            raise ConfigError(
                "the conversation has no question before the reply to go on with; begin with a user message"
            )
        if self.is_chat:
            text = self._render(messages, tools)
            if text.rstrip().endswith(THINK) and begun.lstrip().startswith(THINK):
                begun = begun.lstrip().removeprefix(THINK).lstrip("\n")
            return [*self._begin_once(encode(self.tokenizer, text)), *self._go_on_ids(begun)]
        if tools:
            raise ConfigError("tools: this policy has no chat template, so it cannot be told of tools; leave them out")
        problem = last_user_text(messages)
        if self.preset.prompt == "line":
            return [*self._begin_once(begin_ids(self.tokenizer, problem)), *self._go_on_ids(begun)]
        asked = self.preset.prompt.replace("{problem}", problem.strip())
        return [*self._begin_once([*_begin(self.tokenizer), *encode(self.tokenizer, asked)]), *self._go_on_ids(begun)]

    def _begin_once(self, ids: list[int]) -> list[int]:
        """The ids with one begin-of-text token: some tokenizers put their own before whatever they read."""
        begin = _begin(self.tokenizer)
        return ids[1:] if begin and ids[:2] == begin * 2 else ids

    def _go_on_ids(self, begun: str) -> list[int]:
        """Ids of a reply's beginning, behind a prompt."""
        ids = encode(self.tokenizer, begun) if begun else []
        return ids[1:] if ids and ids[:1] == _begin(self.tokenizer) else ids

    def view(self, messages: Sequence[Message]) -> StepView:
        """How the solutions of a conversation map to answers."""
        _, begun = split_reply(messages)
        opened = (self._reply_opening if self.is_chat else "") + begun
        return self.preset.make_view(in_thought=opened.rfind(THINK) > opened.rfind(THOUGHT))

    def reader(self, read_step: Callable[[str], str] | None = None) -> Callable[[str], str]:
        """What a PRM reads of a step's text; see `Preset.make_reader`."""
        return self.preset.make_reader(read_step)

    @cached_property
    def _reply_opening(self) -> str:
        """What the template puts between a question and the reply to it."""
        return self._behind(_QUESTION)

    def _turn_end_ids(self) -> set[int]:
        """The special token that the template puts right behind a reply, if there is one."""
        behind = encode(self.tokenizer, self._behind(_QUESTION, _REPLY))[:1]
        known = self.tokenizer.added_tokens_decoder
        return {token for token in behind if token in known and known[token].special}

    def _behind(self, *turns: Message) -> str:
        """What the template puts behind the last of some turns, up to a reply where it is a question."""
        try:
            text = self._apply(turns, add_generation_prompt=turns[-1]["role"] == "user")
        except Exception:  # a template that refuses the plainest conversation is refused when it is used
            return ""
        _, found, behind = text.rpartition(turns[-1]["content"])
        return behind if found else ""  # it rewrites what it is given

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
        """The conversation in the policy's chat template, up to the beginning of a reply."""
        messages = self.preset.instruct(messages, has_tools=bool(tools))
        turns, text = self._heard(messages, tools)
        if tools and text == self._apply(turns):
            raise ConfigError("tools: this policy's chat template leaves them out; take a model trained to call tools")
        return text

    def _heard(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Message], str]:
        """The first shape of the conversation that the template takes with all its instructions, and its text."""
        try:
            return first_heard(
                messages, lambda turns: self._apply(turns, tools), says=lambda text, instruction: instruction in text
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"the policy's chat template refuses these messages: {reason:.300}") from error

    def _apply(
        self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in turns],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.preset.template_options,
        )
        assert isinstance(text, str)
        return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a piece of text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def begin_ids(tokenizer: PreTrainedTokenizerBase, problem: str, end: str = "\n") -> list[int]:
    """`[bos] problem end`, without the first where the tokenizer has none."""
    return [*_begin(tokenizer), *encode(tokenizer, problem.strip() + end)]


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
