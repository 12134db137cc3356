"""The quick look at a token overlooks no end of a step that the slow one, which decodes everything, sees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ets_engine.reference import policy_path
from ets_engine.runtime import StopFinder, StopRules
from ets_engine.runtime.stops import CONTEXT_TOKENS

TEXT = (
    "## Step 1: Add the numbers.\n2 + 3 = 5.\n\n## Step 2: Wait, is it so?\n\nIt's 5, it isn't 6 .\nA step ки\n"
    "The answer is: 5 ки\nna\u00efve caf\u00e9 \u4e2d\u6587 \u4e2d \U0001f600\n\n\nQuestion: 'x' and 'y' are not z !\n"
)
SPECIAL = "<|end|>"
INCOMPLETE = ("b\xe4", " \xe4", "\xb8", "\xad", "\xad\n", "\xe4\xb8")  # bytes of "\u4e2d" and more


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and Qwen, but pieces are cut anywhere: across line ends, spaces and the bytes of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(".{7}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT * 2, TEXT[3:] * 2, TEXT[5:] * 2], trainer)
    return with_special(tokenizer)


class Bytes:
    """Few tokens, of which many end or begin inside a character."""

    pieces = tuple(piece.encode("latin-1") for piece in ["", *"ab \n", " a", "ab", "a\n", *INCOMPLETE])
    eos_token_id = 0

    def __len__(self) -> int:
        return len(self.pieces)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return b"".join(self.pieces[token] for token in token_ids).decode(errors="replace")


def sentence_pieces() -> PreTrainedTokenizerFast:
    """As Llama 2: spaces that only a decode in context shows, and bytes for characters that are no pieces."""
    words = ["\u2581", "\u2581\u2581", "\u2581a", "\u2581Step", "tep", "\n\n", "\u2581#", "##", ".\n", "ки", "\u2581'"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in "\n\u4e2d".encode()), *"abSt:.#\n'2", *words]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_special(tokenizer)


def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT: no token knows its own spaces, and those before punctuation are taken out afterwards."""
    pieces = [*"[UNK] step ##s ##tep a ##a . , ! n't do 's it 2 ##2 :".split(), "\n"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return with_special(tokenizer, clean_up_tokenization_spaces=True)


def with_special(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL, **options)


MAKERS = {
    "reference": lambda: AutoTokenizer.from_pretrained(policy_path()),
    "bytes": Bytes,
    "byte level": byte_level,
    "sentence pieces": sentence_pieces,
    "word pieces": word_pieces,
}


@cache
def finder_of(name: str) -> tuple[StopFinder, Any]:
    """One for all examples, as it remembers what it knows of tokens; and its tokenizer."""
    tokenizer = MAKERS[name]()
    return StopFinder(tokenizer), tokenizer


def token_lists(tokenizer: Any) -> st.SearchStrategy[list[int]]:
    """Any tokens, in any order: the bytes among them are mostly no text; and tokens of pieces of text."""
    any_tokens = st.lists(st.integers(0, len(tokenizer) - 1), max_size=8)
    if isinstance(tokenizer, Bytes):
        return any_tokens
    places = st.tuples(st.integers(0, len(TEXT)), st.integers(1, 12))
    of_text = places.map(lambda at: tokenizer(TEXT[at[0] : sum(at)], add_special_tokens=False)["input_ids"])
    return st.lists(any_tokens | of_text, max_size=4).map(lambda parts: [token for part in parts for token in part])


@st.composite
def stop_strings(draw: st.DrawFn, text: str) -> tuple[str, ...]:
    """Pieces of the text, which mostly begin and end inside tokens, and others."""
    texts = [st.sampled_from(["\n", "\n\n", "## Step", "\n## Step", ". ", " ", "p", "ки\n", "\u4e2d", "\ufffd"])]
    if text:
        places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 9))
        texts.append(places.map(lambda at: text[at[0] : sum(at)]))
    return tuple(draw(st.lists(st.one_of(texts), max_size=2)))


def limits() -> st.SearchStrategy[int]:
    return st.sampled_from([1, 5, 1000, 1000, 1000])


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=300)
@given(data=st.data())
def test_where_the_quick_look_sees_no_end_there_is_none(name: str, data: st.DataObject) -> None:
    finder, tokenizer = finder_of(name)
    recent = data.draw(token_lists(tokenizer))[-CONTEXT_TOKENS:]
    tokens = data.draw(token_lists(tokenizer))
    text = finder.text((), [*recent, *tokens])
    carry = data.draw(st.sampled_from(["", "", finder.text((), recent), finder.text((), recent)[-3:], "## Step"]))
    rules = StopRules(
        data.draw(stop_strings(text)),
        data.draw(st.sampled_from([frozenset[int](), frozenset([tokenizer.eos_token_id])])),
        data.draw(limits()),
        data.draw(stop_strings(text)),
        data.draw(stop_strings(text)),
    )
    check_until_it_ends(finder, rules, recent, tokens, data.draw(limits()), data.draw(st.integers(0, 9)), carry)


def check_until_it_ends(
    finder: StopFinder,
    rules: StopRules,
    recent: Sequence[int],
    tokens: Sequence[int],
    left: int,
    written: int,
    carry: str,
) -> None:
    quiet = finder.quiet_tokens(rules)
    assert quiet is not None
    for count, token in enumerate(tokens):
        if count and count + 1 < min(left, rules.max_step_tokens) and quiet[tokens[count - 1]] and quiet[token]:
            assert not finder.may_end(rules, recent, tokens[:count], token, left, carry)
        reason = finder.reason(rules, recent, tokens[: count + 1], left, written, carry)
        if reason is not None:
            assert finder.may_end(rules, recent, tokens[:count], token, left, carry)
            return
        finder.may_end(rules, recent, tokens[:count], token, left, carry)  # what it learns must not mislead it later
