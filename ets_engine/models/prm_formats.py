"""What each published PRM reads: ids above the first step, and ids that a step adds; it runs no model.

Every format is append-only and causal, so the score of a step depends on nothing after its mark. The mark is always the
last id that a step adds: whatever the published text puts behind it (a line end, a judged turn) begins the next step.
Each step is tokenised once. On the border of two pieces stands a special token, or white space that no tokenizer of
these models joins to the text before it, so the pieces are what the published code makes of the whole text; problems
and steps are stripped of white space at both ends first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.models.formats import begin_ids, encode
from ets_engine.models.presets import BOXED, STEP_MARK

QWEN_MARK = "<extra_0>"


class PrmFormat(Protocol):
    """What one PRM reads."""

    @property
    def name(self) -> str:
        """As `EngineConfig.verifier_format` has it."""
        ...

    @property
    def details(self) -> str:
        """Where a step's score is read, and from what, for people."""
        ...

    def root_ids(self, problem: str) -> list[int]:
        """Ids above the first step."""
        ...

    def step_ids(self, step: str, *, is_first: bool) -> list[int]:
        """Ids that a step adds; the last one is the mark, where its score is read."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TrlFormat:
    r"""TRL's `PRMTrainer`: `[bos] problem separator`, then every step and a separator, each piece on its own.

    TRL trains on the problem without a separator behind it; its documentation, and the shipped PRM, have one.

    Attributes:
        tokenizer: The PRM's.
        separator: Ends every step; must be the one of the PRM's training.

    Raises:
        ConfigError: The tokenizer drops the separator.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from ets_engine.reference import prm_path
        >>> format = TrlFormat(AutoTokenizer.from_pretrained(prm_path()))
        >>> format.tokenizer.decode(format.step_ids("7-3=4 left 1 4 17", is_first=True))
        '7-3=4 left 1 4 17\n'
    """

    tokenizer: PreTrainedTokenizerBase
    separator: str = "\n"

    def __post_init__(self) -> None:
        """Refuse a separator without a token, which would leave steps without a mark."""
        _check_separator(self.tokenizer, self.separator)

    @property
    def name(self) -> str:
        """As `EngineConfig.verifier_format` has it."""
        return "trl"

    @property
    def details(self) -> str:
        """Where a step's score is read, and from what, for people."""
        return f"at the end of {self.separator!r} after each step, softmax of two classes"

    def root_ids(self, problem: str) -> list[int]:
        """Ids above the first step."""
        return begin_ids(self.tokenizer, problem, self.separator)

    def step_ids(self, step: str, *, is_first: bool = False) -> list[int]:
        """Ids that a step adds, its own boundary replaced by the separator; the last one is the mark."""
        return [*encode(self.tokenizer, step.strip()), *encode(self.tokenizer, self.separator)]


@dataclass(frozen=True, slots=True, eq=False)
class SkyworkFormat:
    """Skywork-o1-Open-PRM: `[bos] problem newline`, then every line of the solution and the token of the separator.

    Its published code (SkyworkAI/skywork-o1-prm-inference) cuts the solution at every separator, so a step of several
    lines has several marks, and its score is read at the last.

    Attributes:
        tokenizer: The PRM's.
        separator: Ends every line; its last token is the mark.

    Raises:
        ConfigError: The tokenizer drops the separator.
    """

    tokenizer: PreTrainedTokenizerBase
    separator: str = "\n"

    def __post_init__(self) -> None:
        """Refuse a separator without a token, which would leave steps without a mark."""
        _check_separator(self.tokenizer, self.separator)

    @property
    def name(self) -> str:
        """As `EngineConfig.verifier_format` has it."""
        return "skywork"

    @property
    def details(self) -> str:
        """Where a step's score is read, and from what, for people."""
        return f"at the end of {self.separator!r} after each step, sigmoid of a value head"

    def root_ids(self, problem: str) -> list[int]:
        """Ids above the first step."""
        return begin_ids(self.tokenizer, problem)

    def step_ids(self, step: str, *, is_first: bool = False) -> list[int]:
        """Ids that a step adds; the last one is the mark."""
        mark = encode(self.tokenizer, self.separator)[-1]
        return [i for line in step.strip().split(self.separator) for i in (*encode(self.tokenizer, line), mark)]


@dataclass(frozen=True, slots=True, eq=False)
class TagFormat:
    """Math-Shepherd and Llemma's reward model: `problem step ки newline step ки ...`, the mark being `ки`.

    A step that its policy ended with the tag already gets no second one.

    Attributes:
        tokenizer: The PRM's.
        tag_ids: Of a tag after a space; the last is the mark.
        kind: Which of the two, which read the same.
    """

    tokenizer: PreTrainedTokenizerBase
    tag_ids: tuple[int, ...]
    kind: Literal["math_shepherd", "llemma"]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, kind: Literal["math_shepherd", "llemma"]) -> TagFormat:
        """The format with a tokenizer's own ids.

        Raises:
            ModelLoadError: The tag is no token of its own.
        """
        tag_ids = _ids_after(tokenizer, "a", f" {STEP_MARK}")
        is_whole = bool(tag_ids) and str(tokenizer.decode(tag_ids[-1:])).strip() == STEP_MARK
        starts = encode(tokenizer, STEP_MARK)
        if not is_whole or any(encode(tokenizer, STEP_MARK + text)[: len(starts)] != starts for text in (" a", "\na")):
            raise ModelLoadError(
                f"{type(tokenizer).__name__} has no token {STEP_MARK!r}, at which this format reads scores; load the "
                "tokenizer of the PRM's training, or pass another verifier_format"
            )
        return cls(tokenizer, tuple(tag_ids), kind)

    @property
    def name(self) -> str:
        """As `EngineConfig.verifier_format` has it."""
        return self.kind

    @property
    def details(self) -> str:
        """Where a step's score is read, and from what, for people."""
        return f"at {STEP_MARK!r} after each step, " + (
            "softmax of '+' and '-'" if self.kind == "math_shepherd" else "sigmoid of the mean logit"
        )

    def root_ids(self, problem: str) -> list[int]:
        """Ids above the first step."""
        return begin_ids(self.tokenizer, problem, "")

    def step_ids(self, step: str, *, is_first: bool) -> list[int]:
        """Ids that a step adds; the last one is the mark."""
        text = step.strip().removesuffix(STEP_MARK).rstrip()
        return [*_ids_after(self.tokenizer, STEP_MARK, f" {text}".rstrip() if is_first else f"\n{text}"), *self.tag_ids]


@dataclass(frozen=True, slots=True, eq=False)
class TurnFormat:
    """RLHFlow's PRMs: every step is a user turn and the assistant answers `+`, whatever the step's score.

    The mark is the token before the answer, which predicts it; the first step shares its turn with the problem. What
    stands around the turns comes from the tokenizer's chat template, the system block that Llama 3.1's adds included.

    Attributes:
        tokenizer: The PRM's.
        head: Text before the problem.
        to_mark: Text from a step to the answer.
        to_step: Text from one step's mark to the next step, the answer included.
    """

    tokenizer: PreTrainedTokenizerBase
    head: str
    to_mark: str
    to_step: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TurnFormat:
        """The format around a tokenizer's chat template.

        Raises:
            ModelLoadError: There is none, its turns are not all alike, or the answer is no token of its own.
        """
        names = [f"{role}{number}" for number in range(3) for role in ("user", "assistant")]
        turns = [{"role": name[:-1], "content": f"<{name}>"} for name in names]
        head, *between = _between(tokenizer, turns)
        to_mark, answered = between[0], between[1]
        right, _ = verdict_ids(tokenizer)
        whole = encode(tokenizer, f"{to_mark}+{answered}")
        marked = encode(tokenizer, to_mark)
        if between[:5] != [to_mark, answered, to_mark, answered, to_mark] or whole[: len(marked) + 1] != [
            *marked,
            right,
        ]:
            raise ModelLoadError(
                f"the chat template of {type(tokenizer).__name__} does not put '+' into a turn of its own each time, "
                "as this format needs; load the tokenizer of the PRM's training, or pass another verifier_format"
            )
        return cls(tokenizer, head, to_mark, f"+{answered}")

    @property
    def name(self) -> str:
        """As `EngineConfig.verifier_format` has it."""
        return "rlhflow"

    @property
    def details(self) -> str:
        """Where a step's score is read, and from what, for people."""
        return "before the answer '+' to each step, softmax of '+' and '-'"

    def root_ids(self, problem: str) -> list[int]:
        """Ids above the first step."""
        return encode(self.tokenizer, self.head + problem.strip())

    def step_ids(self, step: str, *, is_first: bool) -> list[int]:
        """Ids that a step adds; the last one is the mark."""
        text = f" {step.strip()}".rstrip() if is_first else self.to_step + step.strip()
        return encode(self.tokenizer, text + self.to_mark)


@dataclass(frozen=True, slots=True, eq=False)
class QwenFormat:
    """Qwen2.5-Math-PRM: system prompt, the problem as user turn, and steps, each ended by `<extra_0>`, as the answer.

    Attributes:
        tokenizer: The PRM's.
        head: Text before the problem.
        to_answer: Text from the problem to the first step.
        mark: Id of `<extra_0>`.
    """

    tokenizer: PreTrainedTokenizerBase
    head: str
    to_answer: str
    mark: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> QwenFormat:
        """The format around a tokenizer's chat template.

        Raises:
            ModelLoadError: There is none, or `<extra_0>` is no token.
        """
        mark = encode(tokenizer, QWEN_MARK)
        if len(mark) != 1 or mark[0] == tokenizer.unk_token_id:
            raise ModelLoadError(
                f"{type(tokenizer).__name__} has no token {QWEN_MARK!r}, at which this format reads scores; load the "
                "tokenizer of the PRM's training, or pass another verifier_format"
            )
        turns = [("system", BOXED), ("user", "<user0>"), ("assistant", "<assistant0>")]
        head, to_answer, _ = _between(tokenizer, [{"role": role, "content": text} for role, text in turns])
        return cls(tokenizer, head, to_answer, mark[0])

    @property
    def name(self) -> str:
        """As `EngineConfig.verifier_format` has it."""
        return "qwen"

    @property
    def details(self) -> str:
        """Where a step's score is read, and from what, for people."""
        return f"at {QWEN_MARK!r} after each step, softmax of two classes"

    def root_ids(self, problem: str) -> list[int]:
        """Ids above the first step."""
        return encode(self.tokenizer, self.head + problem.strip() + self.to_answer)

    def step_ids(self, step: str, *, is_first: bool = False) -> list[int]:
        """Ids that a step adds; the last one is the mark."""
        return [*encode(self.tokenizer, step.strip()), self.mark]


def verdict_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of `+` (right) and `-` (wrong).

    Raises:
        ModelLoadError: One of them is no token of its own.
    """
    right, wrong = encode(tokenizer, "+"), encode(tokenizer, "-")
    if len(right) != 1 or len(wrong) != 1 or right == wrong:
        raise ModelLoadError(
            f"{type(tokenizer).__name__} has no tokens '+' and '-', between which this format decides; load the "
            "tokenizer of the PRM's training, or pass another verifier_format"
        )
    return right[0], wrong[0]


def _check_separator(tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
    if not encode(tokenizer, separator):
        raise ConfigError(
            f"step_separator={separator!r}: {type(tokenizer).__name__} has no token for it, so there is no place to "
            "read a score at; load the tokenizer of the PRM's training"
        )


def _ids_after(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Ids of a text as it stands behind another one: SentencePiece would put a space before it on its own."""
    return encode(tokenizer, before + text)[len(encode(tokenizer, before)) :]


def _between(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]]) -> list[str]:
    """What a chat template puts before, between and after the contents `<...>` of some turns."""
    if not tokenizer.chat_template:
        raise ModelLoadError(
            f"{type(tokenizer).__name__} has no chat template, which this format renders its turns with; load the "
            "tokenizer of the PRM's training, or pass another verifier_format"
        )
    marks = [turn["content"] for turn in turns if turn["role"] != "system"]
    try:
        rest = str(tokenizer.apply_chat_template(list(turns), tokenize=False))
    except Exception as error:  # templates raise whatever their author thought of
        raise ModelLoadError(f"the PRM's chat template refuses user and assistant turns: {error}") from error
    pieces: list[str] = []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:
            raise ModelLoadError("the PRM's chat template leaves turns out; load the tokenizer of the PRM's training")
        pieces.append(piece)
    return [*pieces, rest]
