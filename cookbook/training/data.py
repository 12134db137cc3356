"""Training data of the reference models: the tokenizer, and endless batches drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import takewhile
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ets_engine.reference import countdown, story
from ets_engine.reference.corruptions import corrupt, legal_moves
from ets_engine.reference.problems import FAMILIES, ReferenceProblem, draw, label_steps

TRAIN_LEVELS = {"countdown": (4, 5, 6), "story": tuple(range(1, 11))}
Judged = tuple[str, list[str], list[bool]]  # a problem, the lines of a solution, whether all is right up to each line
# Whatever leads to what is known of a person is one piece ("with Ana,", " Ben owns", " Ben has "): a small model finds
# what followed one token long before it learns to find what followed two. Else a piece is a word, a digit or a sign; a
# word takes the space before it along, and the space after it when a digit follows.
PIECES = Regex(
    r" Compared (?=with)|with [A-Z][a-z]+,?| and [A-Z][a-z]+,| ?[A-Z][a-z]+ (?:has|owns) (?=\d)| [A-Z][a-z]+ owns"
    r"|(?: ?[A-Za-z]+|[,:])(?: (?=\d))?|\d|[^A-Za-z\d]"
)
MAX_TOKENS = 768  # of a problem and its solution; the longest seen takes 530


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the pieces that the two families can produce; digits stand alone."""
    splitter = pre_tokenizers.Split(PIECES, behavior="isolated")
    rng = Random("vocabulary")
    pieces: set[str] = set("0123456789 \n.,:?+-*/=()")
    for family, levels in TRAIN_LEVELS.items():
        for level in levels:
            for _ in range(1500):
                problem, lines = draw(rng, family, level, held_out=False)
                for text in (problem.problem, *lines):
                    pieces.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {piece: i for i, piece in enumerate([*specials, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
    )


def adopt(model: PreTrainedModel, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> None:
    """Move a model to another tokenizer: pieces that it knows keep their embeddings, others begin as means."""
    embeddings, known = model.get_input_embeddings().weight.detach().clone(), old.get_vocab()
    pieces = sorted(new.get_vocab(), key=new.get_vocab().get)
    parts = [[known[piece]] if piece in known else old(piece, add_special_tokens=False).input_ids for piece in pieces]
    rows = [embeddings[ids].mean(0) for ids in parts]
    model.resize_token_embeddings(len(new))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.stack(rows))
    model.config.max_position_embeddings = MAX_TOKENS


class Encoder:
    """Text to ids, remembering pieces: many times faster than calling a tokenizer per line."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        (self.newline,) = self("\n")
        self.pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def solution(self, problem: ReferenceProblem, lines: list[str]) -> tuple[list[int], int]:
        """Ids of `<bos> problem newline lines <eos>` and where the solution begins."""
        prompt = [self.bos, *self(problem.problem + "\n")]
        return [*prompt, *self("\n".join(lines)), self.eos], len(prompt)

    def judged(self, problem: str, lines: list[str], labels: list[bool]) -> tuple[list[int], list[int]]:
        """The PRM's ids, every line ended by a newline, and the label of each line at its newline (-100 elsewhere)."""
        ids = [self.bos, *self(problem + "\n")]
        marks = [-100] * len(ids)
        for line, label in zip(lines, labels, strict=True):
            step = self(line + "\n")
            ids += step
            marks += [-100] * (len(step) - 1) + [int(label)]
        return ids, marks

    def prefix(self, ids: list[int], start: int, text: str) -> int:
        """How many of the ids from `start` on `text` begins with."""
        count, told = 0, ""
        while start + count < len(ids) and text.startswith(told := told + self.pieces[ids[start + count]]):
            count += 1
        return count


def pad(rows: list[list[int]], value: int, multiple: int = 8) -> Tensor:
    """Right-padded rows. Shape [B, T], T a multiple of `multiple`."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def policy_batch(rng: Random, encode: Encoder, family: str, num_tokens: int) -> tuple[Tensor, Tensor]:
    """About `num_tokens` tokens of one level of a family, and the same ids as targets (-100 = no loss)."""
    levels = TRAIN_LEVELS[family]
    (level,) = rng.choices(levels, [1 / level for level in levels])  # as many problems of each level, more or less
    return _policy_rows(lambda: encode.solution(*draw(rng, family, level, held_out=False)), encode.pad, num_tokens)


def drill_batch(rng: Random, encode: Encoder, num_tokens: int) -> tuple[Tensor, Tensor]:
    """As `policy_batch`: who has how many, then the same people's numbers over and over.

    Looking numbers up is learned in a million tokens of this, and hardly at all from stories, where it is one token in
    twenty.
    """

    def recall() -> tuple[list[int], int]:
        numbers = {name: rng.randint(3, 999) for name in rng.sample(story.NAMES, rng.randint(2, 8))}
        item = rng.choice(story.ITEMS)
        told = " ".join(f"{name} has {number} {item}." for name, number in numbers.items())
        asked = [rng.choice(list(numbers)) for _ in range(20)]
        prompt = [encode.bos, *encode(f"Some friends compare what they have. {told}\n")]
        return [*prompt, *encode("total:" + ",".join(f" {name} has {numbers[name]}" for name in asked))], len(prompt)

    return _policy_rows(recall, encode.pad, num_tokens)


def _policy_rows(make: Callable[[], tuple[list[int], int]], padding: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    rows: list[list[int]] = []
    targets: list[list[int]] = []
    while not rows or len(rows) * max(map(len, rows)) < num_tokens:
        ids, start = make()
        rows.append(ids)
        targets.append([-100] * start + ids[start:])
    return pad(rows, padding), pad(targets, -100)


def corrupted(rng: Random, family: str) -> Judged:
    """A problem and a solution of it, broken at one step four times out of five, with exact step labels."""
    module = FAMILIES[family]
    (level,) = rng.choices(module.LEVELS, [1 / level for level in module.LEVELS])
    problem, lines = draw(rng, family, level, held_out=False)
    if rng.random() < 0.2:
        return problem.problem, lines, [True] * len(lines)
    lines = corrupt(rng, module.parse(problem.problem), lines)
    return problem.problem, lines, label_steps(problem.problem, lines)


def shorten(rng: Random, sample: Judged) -> Judged:
    """Mostly without what follows the first wrong line: it is wrong too, and there is little to learn from it."""
    problem, lines, labels = sample
    if False not in labels or rng.random() < 0.25:
        return sample
    kept = labels.index(False) + 1
    return problem, lines[:kept], labels[:kept]


def candidates(problem: str, lines: list[str]) -> list[str]:
    """Every line that might be right after right lines, the numbers that a countdown move leaves in order."""
    if parsed := countdown.parse(problem):
        return [
            move.render() for move in legal_moves(countdown.walk(parsed, lines)[-1][1] if lines else parsed.numbers)
        ]
    told = story.parse(problem)
    assert told is not None
    return story.all_lines(told)


def slip_at(problem: str, lines: list[str]) -> int:
    """How many characters of the last line, the first wrong one, can still become a right line."""
    *before, wrong = lines
    shared = [(_count_shared(wrong + "\n", line + "\n"), line) for line in candidates(problem, before)]
    right = (count for count, line in sorted(shared, reverse=True) if label_steps(problem, [*before, line])[-1])
    return next(right, 0)


def _count_shared(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def verifier_batches(
    encode: Encoder, samples: Iterator[Judged], num_tokens: int, count: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches of about `num_tokens` tokens of labelled solutions, of about the same length within each: little padding.

    Returns:
        `count` batches, in order of length. Each: ids; step labels (-100 = not read); token labels, whether the line
        can still become a right one (-100 after the first wrong line): where a step goes wrong, not just that it did;
        next-token targets (-100 = no loss), which only the right lines have: they keep the arithmetic that the policy's
        weights brought along. Each of shape [B, T].
    """
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    total = 0
    while total < count * num_tokens:
        rows.append(_verifier_row(encode, *next(samples)))
        total += len(rows[-1][0])
    rows.sort(key=lambda row: len(row[0]))
    batches: list[list[tuple[list[int], list[int], list[int], list[int]]]] = [[] for _ in range(count)]
    seen = 0
    for row in rows:
        batches[min(seen * count // total, count - 1)].append(row)
        seen += len(row[0])
    fill = (encode.pad, -100, -100, -100)
    return [tuple(pad([row[i] for row in batch], fill[i]) for i in range(4)) for batch in batches if batch]


def _verifier_row(
    encode: Encoder, problem: str, lines: list[str], labels: list[bool]
) -> tuple[list[int], list[int], list[int], list[int]]:
    ids, marks = encode.judged(problem, lines, labels)
    begin = ids.index(encode.newline) + 1
    tokens, targets = [-100] * len(ids), [-100] * len(ids)
    ends = [i for i, mark in enumerate(marks) if mark >= 0]
    num_right = labels.index(False) if False in labels else len(labels)
    right_end = ends[num_right - 1] + 1 if num_right else begin
    targets[begin:right_end] = ids[begin:right_end]
    tokens[begin:right_end] = [1] * (right_end - begin)
    if num_right < len(lines):
        length = ends[num_right] + 1 - right_end
        wrong = lines[num_right]
        good = encode.prefix(ids, right_end, wrong[: slip_at(problem, lines[: num_right + 1])])
        tokens[right_end : right_end + length] = [1] * good + [0] * (length - good)
    return ids, marks, tokens, targets
