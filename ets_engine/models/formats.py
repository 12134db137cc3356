"""Token formats: how a problem becomes a prompt, where its steps end, and what a PRM reads; it runs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ets_engine.errors import ConfigError
from ets_engine.messages import Message, Prompt, last_user_text, to_messages


@dataclass(frozen=True, slots=True, eq=False)
class PolicyFormat:
    """Prompt ids and step boundaries of one policy.

    Attributes:
        tokenizer: The policy's.
        prompt: "line" is the problem on a line of its own after the begin-of-text token: no instructions and no
            earlier turns; "chat" is the conversation in the tokenizer's chat template.
        boundaries: Strings that end a step.
        eos_ids: Tokens that finish a solution.
        max_step_tokens: A longer step is no step of this policy, None = no such limit.

    Example:
        PolicyFormat.of(tokenizer, eos_ids=frozenset({2})).prompt_ids("What is 1+1?")
    """

    tokenizer: PreTrainedTokenizerBase
    prompt: str
    boundaries: tuple[str, ...]
    eos_ids: frozenset[int]
    max_step_tokens: int | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> PolicyFormat:
        """The usual format: a chat turn where the tokenizer has a chat template, steps end with a blank line."""
        return cls(tokenizer, "chat" if tokenizer.chat_template else "line", ("\n\n",), eos_ids)

    def prompt_ids(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of the prompt, to be continued by the first step.

        Args:
            prompt: A problem, or a conversation; "line" reads the last user turn of it.
            tools: Functions that the policy may call, as JSON schemas in OpenAI's layout.

        Raises:
            ConfigError: The policy's prompt has no place for tools, or its chat template refuses the messages.
        """
        messages = to_messages(prompt)
        if self.prompt == "chat":
            return encode(self.tokenizer, self._render(messages, tools))
        if tools:
            raise ConfigError("tools: this policy has no chat template, so it cannot be told of tools; leave them out")
        return begin_ids(self.tokenizer, last_user_text(messages))

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
        """The conversation in the policy's chat template."""
        turns, given = [dict(message) for message in messages], [dict(tool) for tool in tools]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tools=given or None, add_generation_prompt=True, tokenize=False
            )
            is_heard = not tools or text != self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise whatever their author thought of
            raise ConfigError(f"the policy's chat template refuses these messages: {error}") from error
        if not is_heard:
            raise ConfigError("tools: this policy's chat template leaves them out; take a model trained to call tools")
        assert isinstance(text, str)
        return text


@dataclass(frozen=True, slots=True, eq=False)
class PrmFormat:
    """What a token-classification PRM in TRL's layout reads: `[bos] problem newline`, then every step and a separator.

    Each piece is tokenised on its own, once; the score of a step is read at its separator's last token.

    Attributes:
        tokenizer: The PRM's.
        separator: Ends every step; must be the one of the PRM's training.
        right: Index of the class that says that all is right so far.

    Raises:
        ConfigError: The tokenizer drops the separator.
    """

    tokenizer: PreTrainedTokenizerBase
    separator: str = "\n"
    right: int = 1

    def __post_init__(self) -> None:
        """Refuse a separator without a token, which would leave steps without a mark."""
        if not encode(self.tokenizer, self.separator):
            raise ConfigError(
                f"separator={self.separator!r}: {type(self.tokenizer).__name__} has no token for it, so there is no "
                "place to read a score at; load the tokenizer of the PRM's training"
            )

    def root_ids(self, problem: str) -> list[int]:
        """Ids above the first step."""
        return begin_ids(self.tokenizer, problem)

    def step_ids(self, step: str) -> list[int]:
        """Ids that a step adds, its own boundary replaced by the separator; the last one is the mark."""
        return [*encode(self.tokenizer, step.strip()), *encode(self.tokenizer, self.separator)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a piece of text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def begin_ids(tokenizer: PreTrainedTokenizerBase, problem: str) -> list[int]:
    """`[bos] problem newline`, without the first where the tokenizer has none."""
    begin: Sequence[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*begin, *encode(tokenizer, problem.strip() + "\n")]
