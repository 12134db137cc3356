"""Where steps end, and that their texts make up the trajectory's, whatever bytes the tokenizer cuts it into."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers import normalizers as norm

from ets_engine.errors import ConfigError
from ets_engine.runtime import StopFinder, StopRules
from ets_engine.runtime.stops import CONTEXT_TOKENS
from ets_engine.types import StopReason


class Words:
    """A tokenizer over a fixed list of pieces; the last one is special."""

    pieces = ("Step", " one", "\n", ".\n\nThen", "x", "\n\n", "<eos>", "")

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[i] for i in token_ids if i != 6 or not skip_special_tokens)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([0, 1], None),
        ([0, 2], None),
        ([0, 2, 2], StopReason.BOUNDARY),  # the stop string straddles two tokens
        ([0, 3], StopReason.BOUNDARY),  # and may lie inside one
        ([0, 5], StopReason.BOUNDARY),
        ([5], None),  # a blank line alone is no step
        ([2, 2], None),
        ([5, 4, 5], StopReason.BOUNDARY),
        ([4, 6], StopReason.FINISHED),
        ([4, 4, 4, 4], StopReason.BOUNDARY),  # max_step_tokens
        ([4, 4, 4, 4, 4, 4], StopReason.LENGTH),  # max_tokens
    ],
)
def test_where_steps_end(tokens: list[int], expected: StopReason | None) -> None:
    rules = StopRules(strings=("\n\n",), eos_ids=frozenset([6]), max_step_tokens=4)
    assert StopFinder(Words()).reason(rules, [0], tokens, tokens_left=6) is expected


def test_text_is_what_the_tokens_add() -> None:
    assert StopFinder(Words()).text([0], [1, 6]) == " one"
    with pytest.raises(ConfigError, match="stop strings"):
        StopRules(strings=("",))


class Decoder:
    """A tokenizer of the `tokenizers` library with the decode method of transformers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def byte_level() -> Decoder:
    """As GPT-2 and Qwen: every byte a token, and one token that ends inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, first_byte = "\u0120", "\u00e4"  # how " " and the byte E4 are spelt
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, space + first_byte])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(space, first_byte)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Decoder(tokenizer)


def byte_fallback() -> Decoder:
    """As Llama 2: characters outside the vocabulary as bytes, a leading space that only decoding in context shows."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u00e9", "\u2581a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = norm.Sequence([norm.Prepend("\u2581"), norm.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Decoder(tokenizer)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(text=st.text(alphabet="ab \n\u00e9\u4e2d\u4e8c\U0001f600", min_size=1, max_size=30), data=st.data())
def test_texts_of_steps_cut_anywhere_make_up_the_whole_text(make, text: str, data: st.DataObject) -> None:
    """Also inside a character: it then belongs to the step that completes it, and shows no replacement characters."""
    tokenizer = make()
    finder = StopFinder(tokenizer)
    ids = tokenizer.encode("ab" + text)  # the prompt is "ab"
    prompt = len(tokenizer.encode("ab"))
    assert tokenizer.decode(ids) == "ab" + text
    cuts = sorted(data.draw(st.sets(st.integers(prompt, len(ids)), max_size=6)) | {prompt, len(ids)})
    texts = [finder.text(ids[:start][-CONTEXT_TOKENS:], ids[start:stop]) for start, stop in pairwise(cuts)]
    assert "".join(texts) == text


def test_bytes_that_are_no_text_lose_nothing_around_them() -> None:
    tokenizer = byte_level()
    (wrong,) = {tokenizer.encode("\u4e2d")[1]}
    a, b = tokenizer.encode("a") + tokenizer.encode("b")
    for ids in ([a, *[wrong] * 6, b], [wrong] * 9 + [a], [a, wrong, b]):
        text = StopFinder(tokenizer).text(ids[:-1][-CONTEXT_TOKENS:], ids[-1:])
        assert text.lstrip("\N{REPLACEMENT CHARACTER}") == tokenizer.decode(ids[-1:])


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("stop", ["\n\n", "\u4e2d", "a ", "b\u00e9", " a"])
def test_stop_strings_are_found_at_the_token_that_completes_them(make, stop: str) -> None:
    tokenizer = make()
    finder, rules = StopFinder(tokenizer), StopRules((stop,), max_step_tokens=100)
    prompt = tokenizer.encode("ab")
    ids = tokenizer.encode(f"abb\n{stop}a")[len(prompt) :]
    for count in range(1, len(ids) + 1):
        reason = finder.reason(rules, prompt, ids[:count], tokens_left=100)
        text = finder.text(prompt, ids[:count])
        assert (reason is StopReason.BOUNDARY) == (stop in text)
        if reason is not None:
            break
    else:
        pytest.fail("never found")


# ---------------------------------------------------------------------- texts that finish a trajectory


def finals(*strings: str, **changes) -> StopRules:
    return StopRules(**{"final_strings": strings, "max_step_tokens": 100, **changes})


@pytest.mark.parametrize(
    ("stops", "before", "tokens", "expected"),
    [
        (("x",), [], [0, 4], "Step"),  # "Step" "x"
        ((".",), [], [0, 3], "Step"),  # inside the token ".\n\nThen", which is cut
        (("\nThen",), [], [0, 3], "Step.\n"),
        (("one\nx",), [], [0, 1, 2, 4], "Step "),  # straddles three tokens
        (("\nx",), [0, 2], [4], ""),  # begins in the step before: its beginning stays there
        (("\nx",), [0, 2], [1, 4], None),
        (("\n",), [0, 2], [4], None),  # ended before the step
        (("Then", ".", "one"), [], [1, 3], " "),  # the earliest of several, whatever their order
        ((".", "\nThen"), [], [3], ""),
        (("one", " one"), [], [1], ""),
        (("x",), [], [6], None),
        (("<eos>",), [], [4, 6], None),  # special tokens are no text
        ((), [0], [4], None),
    ],
)
def test_where_final_texts_cut(
    stops: tuple[str, ...], before: list[int], tokens: list[int], expected: str | None
) -> None:
    finder, rules = StopFinder(Words()), finals(*stops, strings=())
    assert finder.cut(rules, before, tokens, len(before)) == expected
    finishes = finder.reason(rules, before, tokens, 100, len(before)) is StopReason.FINISHED
    assert finishes == (expected is not None)


def test_a_final_text_never_begins_in_the_prompt() -> None:
    """The prompt of a plain policy ends with a line end; a stop text that begins with one would end it at once."""
    finder, rules = StopFinder(Words()), finals("\nx")
    prompt = [0, 2]
    assert finder.cut(rules, prompt, [4], 0) is None is finder.reason(rules, prompt, [4], 100, 0)
    assert (
        finder.cut(rules, [0, 0, 2], [4], 1) == "" and finder.reason(rules, [0, 2], [4], 100, 1) is StopReason.FINISHED
    )
    assert finder.cut(rules, prompt, [2, 4], 0) == ""
    assert finder.cut(finals("Step\nx"), [0, 2], [4], 1) is None is finder.cut(finals("Step\nx"), [0, 2], [4], 0)
    assert finder.cut(finals("Step\nx"), [0, 2], [4], 2) == finder.cut(finals("Step\nx"), [0, 2], [4], 50) == ""


def test_a_final_text_goes_before_a_boundary_and_a_limit() -> None:
    finder = StopFinder(Words())
    assert finder.reason(finals("\n\n"), [], [0, 5], 100) is StopReason.FINISHED
    assert finder.reason(finals("x", max_step_tokens=2), [], [0, 4], 2) is StopReason.FINISHED
    assert finder.reason(finals("x"), [], [5], 100) is None, "of a blank line it is said nothing"
    assert finder.reason(finals("\n\n"), [], [5], 100) is StopReason.FINISHED, "but where it is the final text"


def test_an_empty_final_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop strings"):
        StopRules(final_strings=("a", ""))


def test_what_is_known_of_tokens_does_not_grow_with_every_callers_texts() -> None:
    finder = StopFinder(Words())
    for number in range(1000):
        finder.may_end(finals(f"{number}x"), [], [0], 4, 100)
    assert len(finder._closing) <= 64
    assert finder.may_end(finals("x"), [], [0], 4, 100) and not finder.may_end(finals("x"), [], [0], 0, 100)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(
    text=st.text(alphabet="ab \n\u00e9\u4e2d", max_size=12),
    stops=st.lists(st.text(alphabet="ab \n\u00e9\u4e2d", min_size=1, max_size=2), min_size=1, max_size=3),
    data=st.data(),
)
def test_final_texts_are_cut_where_a_search_in_the_whole_text_finds_them(
    make, text, stops, data: st.DataObject
) -> None:
    """Step after step, cut anywhere, also inside a character; a stop text of two characters spans 6 tokens at most."""
    tokenizer, rules = make(), finals(*stops, strings=())
    finder = StopFinder(tokenizer)
    prompt = tokenizer.encode("ab")
    ids = tokenizer.encode("ab" + text)[len(prompt) :]
    starts = [text.find(stop) for stop in stops]
    end = min((start + len(stop) for start, stop in zip(starts, stops, strict=True) if start >= 0), default=None)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=6)) | {0, len(ids)})
    written = ""
    for start, stop in pairwise(cuts):
        recent, num_written = [*prompt, *ids[:start]][-CONTEXT_TOKENS:], start
        for count in range(1, stop - start + 1):
            tokens = ids[start : start + count]
            found = finder.cut(rules, recent, tokens, num_written)
            reason = finder.reason(rules, recent, tokens, 100, num_written)
            so_far = written + finder.text(recent, tokens)
            assert (found is not None) == (reason is StopReason.FINISHED) == (end is not None and len(so_far) >= end)
            if found is not None:
                first = min(place for place in map(so_far.find, stops) if place >= 0)
                assert found == so_far[: max(first, len(written))][len(written) :]
                return
        written += finder.text(recent, ids[start:stop])
    assert end is None and written == text


# ---------------------------------------------------------------------- strings that begin a step, and other boundaries


@pytest.mark.parametrize(
    ("openers", "carry", "text", "expected"),
    [
        (("## Step",), "", "## Step 1: add", None),  # its own
        (("## Step",), "", "\n\n## Step 1: add", None),
        (("## Step",), "", "so ## Step", ("so ", "## Step")),
        (("## Step",), "## Step", " 1: add\n## Step", ("## Step 1: add\n", "## Step")),
        (("\n## Step",), "", "x ## Step\n## Step", ("x ## Step", "\n## Step")),  # only at the start of a line
        (("\n## Step",), "\n## Step", " 2\n## Step", ("\n## Step 2", "\n## Step")),
        (("Step", "## Step"), "", "## Step 1", None),  # the longer one opens this step
        (("Wait", "But"), "", "x But Wait", ("x ", "But Wait")),  # the first of several
        (("##",), "##", "##", ("##", "##")),
        (("Step",), "", "  ", None),
    ],
)
def test_a_step_ends_where_the_next_one_begins(
    openers: tuple[str, ...], carry: str, text: str, expected: tuple[str, str] | None
) -> None:
    tokenizer = byte_level()
    finder, rules = StopFinder(tokenizer), StopRules((), max_step_tokens=100, openers=openers)
    recent, tokens = tokenizer.encode(carry), tokenizer.encode(text)
    reason = finder.reason(rules, recent, tokens, 100, 100, carry)
    assert reason is (None if expected is None else StopReason.BOUNDARY)
    assert finder.split(rules, recent, tokens, carry) == (expected or (carry + text, ""))


def test_a_step_ends_where_a_function_says_so() -> None:
    asked: list[str] = []

    def is_over(text: str) -> bool:
        asked.append(text)
        return text.endswith("one")

    finder, rules = StopFinder(Words()), StopRules((), max_step_tokens=100, is_over=is_over)
    for tokens, expected in (([2], None), ([2, 0], None), ([2, 0, 1], StopReason.BOUNDARY)):
        assert finder.reason(rules, [], tokens, 100) is expected
    assert asked == ["\nStep", "\nStep one"], "blank lines alone are no step"
    assert finder.reason(rules, [], [0, 1], 2, carry="x") is StopReason.BOUNDARY and asked[-1] == "xStep one"


def test_a_function_that_raises_fails_its_step_alone() -> None:
    finder, rules = StopFinder(Words()), StopRules(is_over=lambda text: bool(1 / 0))
    assert finder.reason(rules, [], [0], 100) is StopReason.ERROR
    assert finder.reason(StopRules(), [], [0], 100) is None


# ---------------------------------------------------------------------- the quick look that goes before the slow one


@pytest.mark.parametrize(
    ("rules", "tokens", "expected"),
    [
        (StopRules(), [4], False),
        (StopRules(), [2], False),  # "\n" ends nothing alone
        (StopRules(), [0, 2], False),
        (StopRules(), [2, 2], True),
        (StopRules(), [0, 5], True),
        (StopRules(), [2, 0], False),  # not the newest token
        (StopRules((), openers=("Step one",)), [0], False),
        (StopRules((), openers=("Step one",)), [4, 0, 1], True),
        (StopRules((), openers=("Step one",)), [0, 4, 1], False),
        (finals("one\nS"), [1, 2, 0], True),
        (finals("xS"), [2, 0], False),
        (finals(".\n", "pone"), [0, 1], True),  # which spaces are shown depends on the tokenizer
        (StopRules(("x ",)), [4, 1], True),
        (StopRules(("x ",)), [1, 2], False),
        (StopRules(eos_ids=frozenset([4])), [4], True),
        (StopRules(max_step_tokens=3), [4, 4], False),
        (StopRules(max_step_tokens=3), [4, 4, 4], True),
        (StopRules(), [4] * 9, True),  # of the trajectory's
        (StopRules((), is_over=bool), [4], True),
        (StopRules(()), [5], False),
    ],
)
def test_what_the_quick_look_sees(rules: StopRules, tokens: list[int], expected: bool) -> None:
    assert StopFinder(Words()).may_end(rules, [4], tokens[:-1], tokens[-1], 9) == expected


def test_the_quick_look_goes_back_to_what_was_carried_over() -> None:
    finder, rules = StopFinder(Words()), StopRules(("xStep",), openers=("x",), max_step_tokens=9)
    assert finder.may_end(rules, [4], [], 4, 100, "x"), "of the carry, nothing is known yet"
    assert finder.may_end(rules, [4], [1], 0, 100, "x one")
    assert not finder.may_end(rules, [4], [1], 2, 100, "x one")
    assert not finder.may_end(rules, [4], [1, 1], 0, 100, "x one one")


def test_a_stop_string_before_an_incomplete_character_is_seen_when_that_is_complete() -> None:
    class Bytes:
        pieces = (b"a", b"b\xe4", b"\xb8", b"\xad")

        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
            return b"".join(self.pieces[token] for token in token_ids).decode(errors="replace")

    finder, rules, tokens = StopFinder(Bytes()), StopRules(("ab",), max_step_tokens=100), [0, 1, 2, 3]
    reasons = [finder.reason(rules, [], tokens[: count + 1], 100) for count in range(4)]
    assert reasons == [None, None, None, StopReason.BOUNDARY]
    assert finder.may_end(rules, [], tokens[:-1], tokens[-1], 100)
    assert finder.may_end(rules, tokens[:2], tokens[2:-1], tokens[-1], 100), "also where it ended the step before"
    assert not finder.may_end(rules, [], [*tokens, 0], 0, 100) and not finder.may_end(rules, [], [0, 2], 3, 100)


def test_the_quick_look_decodes_each_token_once() -> None:
    class Counting(Words):
        decoded = 0

        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
            self.decoded += 1
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    tokenizer = Counting()
    finder, rules = StopFinder(tokenizer), StopRules(("\n\n",), max_step_tokens=100, openers=("nStep one",))
    for other in (rules, finals("Step\n"), rules):
        for count in range(50):
            finder.may_end(other, [4, 4], [count % 3] * count, count % 3, 100)
    assert tokenizer.decoded <= 2 * len(Words.pieces)


def long_lines(text: str) -> bool:
    return len(text.splitlines()[-1]) >= 4


BOUNDARIES = {
    "ends": {"strings": ("\n", "b\u00e9")},
    "begins": {"strings": (), "openers": ("\nab", "\u4e2d", "ba")},
    "both": {"strings": ("\n\n",), "openers": ("\u00e9a", "\nb")},
    "every so many tokens": {"strings": (), "max_step_tokens": 3},
    "a function": {"strings": (), "is_over": long_lines},
    "all": {"strings": ("\n",), "openers": ("ab",), "is_over": long_lines, "max_step_tokens": 7},
}


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@given(text=st.text(alphabet="ab \n\u00e9\u4e2d", min_size=1, max_size=40))
def test_texts_of_steps_make_up_the_whole_text_whatever_divides_them(make, boundary: str, text: str) -> None:
    tokenizer = make()
    finder, rules = StopFinder(tokenizer), StopRules(**{"max_step_tokens": 1000, **BOUNDARIES[boundary]})
    recent, ids = tokenizer.encode("ab"), tokenizer.encode("ab" + text)
    steps, tokens, carry = list[str](), list[int](), ""
    for token in ids[len(recent) :]:
        tokens.append(token)
        if finder.reason(rules, recent, tokens, 1000, 1000, carry) is StopReason.BOUNDARY:
            step, carry = finder.split(rules, recent, tokens, carry)
            steps.append(step)
            recent, tokens = [*recent, *tokens][-CONTEXT_TOKENS:], []
    steps.append(carry + finder.text(recent, tokens))
    assert "".join(steps) == text
    for step in steps:
        own = max((len(opener) for opener in rules.openers if step.lstrip().startswith(opener)), default=0)
        inside = step.lstrip()[max(own, 1) :]
        assert not any(opener in inside for opener in rules.openers), "an opener begins a step"
    if "max_step_tokens" not in BOUNDARIES[boundary]:
        assert all(step.strip() for step in steps[:-1]), "blank lines alone are no step"


@pytest.mark.parametrize(
    ("stop", "carry", "tokens", "num_written", "expected"),
    [
        ("Step one", "Step", [1], 1, ""),  # begins in what the step before carries over
        ("one", "Step", [1], 1, "Step "),
        ("xStep", "Step", [1], 2, None),  # ended before the step
        ("p one", "Step", [1], 1, "Ste"),
        ("zzz", "Step", [1], 1, None),
    ],
)
def test_final_texts_cut_what_was_carried_over_too(
    stop: str, carry: str, tokens: list[int], num_written: int, expected: str | None
) -> None:
    finder, rules = StopFinder(Words()), finals(stop, strings=(), openers=("Step",))
    assert finder.cut(rules, [4, 0], tokens, num_written, carry) == expected
    finishes = finder.reason(rules, [4, 0], tokens, 100, num_written, carry) is StopReason.FINISHED
    assert finishes == (expected is not None)


def test_an_opener_longer_than_the_tokens_decoded_along_is_cut_too() -> None:
    tokenizer = byte_level()
    opener = "Alternatively, "
    recent = tokenizer.encode(opener)[-CONTEXT_TOKENS:]
    finder, rules = StopFinder(tokenizer), finals("natively, a", strings=(), openers=(opener,))
    assert finder.cut(rules, recent, tokenizer.encode("a"), 50, opener) == "Alter"
