"""Shapes of a conversation: which one a chat template takes with all its instructions; it knows no template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ets_engine.messages import Message
from ets_engine.models.presets import instructs, move_to_user_turn

Prompt = TypeVar("Prompt")


def first_heard(
    messages: Sequence[Message],
    write: Callable[[Sequence[Message]], Prompt],
    *,
    is_refusal: Callable[[Exception], bool] = lambda error: True,
    says: Callable[[Prompt, str], bool] = lambda prompt, said: True,
) -> tuple[Sequence[Message], Prompt]:
    r"""The first shape of a conversation whose prompt has all instructions, and that prompt.

    Args:
        messages: The conversation.
        write: Makes the prompt of a shape, or raises where the template refuses that.
        is_refusal: Whether another shape may help against what `write` raised; else it is raised at once.
        says: Whether a prompt holds an instruction; where none holds them all, the first prompt is taken: such a
            template rewrites what it is given.

    Raises:
        Exception: What `write` raised first, where every shape is refused.

    Example:
        >>> def write(turns):
        ...     return "".join(turn["content"] for turn in turns if turn["role"] == "user")
        >>> asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
        >>> first_heard(asked, write, says=lambda prompt, said: said in prompt)[1]
        'Be brief.\n\n1+1?'
    """
    instructions = [message["content"].strip() for message in messages if instructs(message)]
    taken: list[tuple[Sequence[Message], Prompt]] = []
    refusals: list[Exception] = []
    for turns in _shapes(messages):
        try:
            taken.append((turns, write(turns)))
        except Exception as error:  # templates raise whatever their author thought of
            if not is_refusal(error):
                raise
            refusals.append(error)
            continue
        if all(says(taken[-1][1], said) for said in instructions):
            return taken[-1]
    if not taken:
        raise refusals[0]
    return taken[0]


def _shapes(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The conversation as it is, then with its instructions where a template that knows no such role reads them."""
    yield messages
    if any(message["role"] == "developer" for message in messages):
        yield [{**message, "role": "system"} if instructs(message) else message for message in messages]
    if any(map(instructs, messages)):
        yield move_to_user_turn(messages)
