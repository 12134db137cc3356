"""Training data of the reference models: the tokenizer, and endless batches drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ets_engine.reference.corruptions import corrupt
from ets_engine.reference.problems import FAMILIES, ReferenceProblem, draw, label_steps

TRAIN_LEVELS = {"countdown": (4, 5, 6), "story": tuple(range(1, 11))}
PIECES = Regex(r" ?[A-Za-z]+|\d|[^A-Za-z\d]")  # a word with its space, one digit, one other character


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
        model_max_length=512,
    )


class Encoder:
    """Text to ids, remembering pieces: many times faster than calling a tokenizer per line."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        (self.newline,) = self("\n")

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


def pad(rows: list[list[int]], value: int, multiple: int = 16) -> Tensor:
    """Right-padded rows. Shape [B, T], T a multiple of `multiple`."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def policy_batch(rng: Random, encode: Encoder, family: str, num_tokens: int) -> tuple[Tensor, Tensor]:
    """About `num_tokens` tokens of one level of a family, and the same ids as targets (-100 = no loss)."""
    levels = TRAIN_LEVELS[family]
    (level,) = rng.choices(levels, [1 / level for level in levels])  # as many problems of each level, more or less
    rows: list[list[int]] = []
    targets: list[list[int]] = []
    while not rows or len(rows) * max(map(len, rows)) < num_tokens:
        ids, start = encode.solution(*draw(rng, family, level, held_out=False))
        rows.append(ids)
        targets.append([-100] * start + ids[start:])
    return pad(rows, encode.pad), pad(targets, -100)


def corrupted(rng: Random, family: str) -> tuple[str, list[str], list[bool]]:
    """A problem and a solution of it, broken at one step three times out of four, with exact step labels."""
    module = FAMILIES[family]
    problem, lines = draw(rng, family, rng.choice(module.LEVELS), held_out=False)
    if rng.random() < 0.25:
        return problem.problem, lines, [True] * len(lines)
    lines = corrupt(rng, module.parse(problem.problem), lines)
    return problem.problem, lines, label_steps(problem.problem, lines)


def verifier_batch(
    encode: Encoder, samples: Iterator[tuple[str, list[str], list[bool]]], num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """About `num_tokens` tokens of labelled solutions.

    Returns:
        Ids, step labels (-100 = not read) and next-token targets (-100 = no loss), which only the right lines have:
        they keep the arithmetic that the policy's weights brought along. Each of shape [B, T].
    """
    drawn: list[tuple[list[int], list[int]]] = []
    while not drawn or len(drawn) * max(len(ids) for ids, _ in drawn) < num_tokens:
        drawn.append(encode.judged(*next(samples)))
    targets: list[list[int]] = []
    for ids, marks in drawn:
        wrong = marks.index(0) if 0 in marks else len(marks)
        right = max((i for i, mark in enumerate(marks[:wrong]) if mark == 1), default=-1)
        start = len(ids) if right < 0 else ids.index(encode.newline) + 1
        targets.append([-100] * start + ids[start : right + 1] + [-100] * (len(ids) - max(start, right + 1)))
    rows, labels = [ids for ids, _ in drawn], [marks for _, marks in drawn]
    return pad(rows, encode.pad), pad(labels, -100), pad(targets, -100)
