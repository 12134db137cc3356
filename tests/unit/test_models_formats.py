"""Prompts and steps become the ids that the models were trained on, each piece of text tokenised once."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ets_engine.errors import ConfigError
from ets_engine.models import PolicyFormat, TrlFormat
from ets_engine.models.formats import begin_ids, encode

PIECES = Regex(r" ?[A-Za-z]+|\d|[^A-Za-z\d]")  # a word with its space, one digit, one other character
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789\n .+=?", "What", " is", "So", " it", "user", "bot"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}user\n{{ m.content }}<eos>\n{% endfor %}{{ 'bot\n' }}"


def words(*, begins: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer as the shipped models have; by itself it puts a begin-of-text token before everything."""
    vocabulary = {piece: i for i, piece in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(PIECES, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"bos_token": "<bos>"} if begins else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", **special
    )
    made.chat_template = template
    return made


def pairs() -> PreTrainedTokenizerFast:
    """A tokenizer that reads a full stop and a line end that touch as one token."""
    vocabulary = {piece: i for i, piece in enumerate(["a", ".", "\n", ".\n"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [(".", "\n")])))


def ids(*pieces: str) -> list[int]:
    return [WORDS.index(piece) for piece in pieces]


QUESTION = "What is 1+1?"
QUESTION_IDS = ids("What", " is", " ", "1", "+", "1", "?")


def test_a_plain_prompt_is_a_line_after_one_begin_token() -> None:
    format = PolicyFormat.of(words(), eos_ids=frozenset({2}))
    assert (format.preset.name, format.is_chat, format.max_step_tokens) == ("plain", False, None)
    assert format.prompt_ids(QUESTION) == [*ids("<bos>"), *QUESTION_IDS, *ids("\n")]
    assert format.prompt_ids(f"  {QUESTION}\n") == format.prompt_ids(QUESTION)


def test_a_tokenizer_without_a_begin_token_gets_none() -> None:
    assert begin_ids(words(begins=False), QUESTION) == [*QUESTION_IDS, *ids("\n")]


def test_a_chat_prompt_is_one_user_turn() -> None:
    tokenizer = words(template=TEMPLATE)
    format = PolicyFormat.of(tokenizer, eos_ids=frozenset({2}))
    assert format.is_chat
    expected = [*ids("<bos>", "user", "\n"), *QUESTION_IDS, *ids("<eos>", "\n", "bot", "\n")]
    assert format.prompt_ids(QUESTION) == expected, "the template's begin token is the only one"
    assert expected == tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )


def test_the_prm_reads_steps_and_separators() -> None:
    format = TrlFormat(words())
    assert format.separator == "\n"
    assert format.root_ids(QUESTION) == [*ids("<bos>"), *QUESTION_IDS, *ids("\n")]
    step = ids("So", " it", " is", " ", "2", "\n")
    assert (
        format.step_ids("So it is 2\n") == format.step_ids(" So it is 2") == format.step_ids("So it is 2\n\n") == step
    )
    assert format.step_ids("\n\n") == ids("\n"), "a step without text still has its mark"


def test_the_mark_is_the_last_id_of_the_separator() -> None:
    format = TrlFormat(words(), separator="\n\n.")
    assert format.step_ids("So")[-3:] == ids("\n", "\n", ".")


def test_a_separator_without_a_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="separator"):
        TrlFormat(pairs(), separator="#")


def test_pieces_are_never_merged() -> None:
    """Whole texts tokenise to something else; PRMs in TRL's layout were trained on pieces."""
    tokenizer = pairs()
    assert encode(tokenizer, "a.\n") == [0, 3]
    format = TrlFormat(tokenizer)
    assert format.step_ids("a.") == [0, 1, 2]
    whole = [*format.root_ids("a"), *format.step_ids("a."), *format.step_ids("a")]
    assert whole == [0, 2, 0, 1, 2, 0, 2]


def test_a_path_of_steps_is_what_the_shipped_prm_was_trained_on() -> None:
    tokenizer = words()
    format = TrlFormat(tokenizer)
    pieces = [format.root_ids(QUESTION), *map(format.step_ids, ["So it is 2\n", "So is 2"])]
    assert [*itertools.chain(*pieces)] == tokenizer(f"{QUESTION}\nSo it is 2\nSo is 2\n")["input_ids"]
