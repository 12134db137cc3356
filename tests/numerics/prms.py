"""Tiny random PRMs of every published format, as folders, and what the published code makes of their texts.

The tokenizers behave as the real ones: SentencePiece pieces (Mistral's as its old files are, Llama's as transformers
builds them), and byte-level BPE with the splits of Llama 3 and of Qwen2, where white space and full stops merge.
"""

from __future__ import annotations

import copy
import functools
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
)

PROBLEM = "What is 3+4 times 12 - 5, in $x^2$ terms?"
STEPS = [
    "Step 1: We add 3 and 4.",
    "12 + 3 = 15, so that\nit is more than 4",
    "$x^2$ gives 144. (Which is right.)",
    "- then 7*12 = 84.\nSo it is.\n\nYes.",
    "The answer is: \\boxed{79}",
]
WORDS = [" ки", " +", " -", "+", "Step", " Step", " is", " add", " so", "The", " The", " answer", " 12", " We", "What"]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")  # up to three digits at a time
LLAMA_TEMPLATE = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def _pieces(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A SentencePiece vocabulary of bytes, characters and some words, and its merges."""
    merges: dict[tuple[str, str], None] = {}
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [char for char in string.printable if char.isprintable() and char != " "] + ["к", "и"]
    for word in words:
        word = word.replace(" ", "▁")
        for end in range(2, len(word) + 1):
            merges[word[: end - 1], word[end - 1]] = None
            pieces.append(word[:end])
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, list(merges)


@functools.cache
def mistral_tokenizer(words: tuple[str, ...] = tuple(WORDS)) -> PreTrainedTokenizerBase:
    """Pieces behind the old normalizer, which puts a space before every text, even before one that has it."""
    vocabulary, merges = _pieces(words)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@functools.cache
def llemma_tokenizer() -> PreTrainedTokenizerBase:
    vocabulary, merges = _pieces(WORDS)
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def _bytes(split: str, special: Sequence[str]) -> Tokenizer:
    """Byte-level BPE trained on the texts of this file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["\n\n".join([PROBLEM, *STEPS, "So it is.\nYes.\n\n"])] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


@functools.cache
def llama_tokenizer() -> PreTrainedTokenizerBase:
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _bytes(LLAMA_SPLIT, special)
    begin = tokenizer.token_to_id(special[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], begin)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[3])
    made.chat_template = LLAMA_TEMPLATE
    return made


@functools.cache
def qwen_tokenizer(*extra: str, bos: str | None = None) -> PreTrainedTokenizerBase:
    model = json.loads(_bytes(QWEN_SPLIT, []).to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    made = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, bos_token=bos, extra_special_tokens=special)
    made.chat_template = QWEN_TEMPLATE
    return made


COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
Ids = Callable[[PreTrainedTokenizerBase, list[str]], tuple[list[int], list[int]]]
"""Whole text of a problem and steps -> its ids, and the position of every step's mark."""


def shepherd_ids(tokenizer: PreTrainedTokenizerBase, steps: list[str]) -> tuple[list[int], list[int]]:
    """The model card of peiyi9979/math-shepherd-mistral-7b-prm: one text, scores where the tag's id stands."""
    tag = tokenizer.encode("ки")[-1]
    ids = tokenizer.encode(f"{PROBLEM} " + " ки\n".join(steps) + " ки")
    return ids, [place for place, token in enumerate(ids) if token == tag]


def rlhflow_ids(tokenizer: PreTrainedTokenizerBase, steps: list[str]) -> tuple[list[int], list[int]]:
    """RLHFlow's prm_evaluate.py: the conversation so far, anew for every step, read at -3."""
    turns: list[dict[str, str]] = []
    ids: Any = []
    marks = []
    for number, step in enumerate(steps):
        text = step if number else f"{PROBLEM} {step}"
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": "+"}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        marks.append(len(ids) - 3)
    return ids, marks


def skywork_ids(tokenizer: PreTrainedTokenizerBase, steps: list[str]) -> tuple[list[int], list[int]]:
    """`prepare_input` of skywork-o1-prm-inference with the step token newline; every line has a mark."""
    ids = tokenizer.encode(f"{tokenizer.bos_token}{PROBLEM}\n")
    newline = tokenizer.encode("\n")[-1]
    marks = []
    for step in steps:
        for line in step.split("\n"):
            ids += [*(tokenizer.encode(line) if line else []), newline]
        marks.append(len(ids) - 1)
    return ids, marks


def qwen_ids(tokenizer: PreTrainedTokenizerBase, steps: list[str]) -> tuple[list[int], list[int]]:
    """The model card of Qwen/Qwen2.5-Math-PRM-7B."""
    turns = [("system", QWEN_SYSTEM), ("user", PROBLEM), ("assistant", "<extra_0>".join(steps) + "<extra_0>")]
    text: Any = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=False
    )
    ids = tokenizer.encode(text)
    mark = tokenizer.encode("<extra_0>")[0]
    return ids, [place for place, token in enumerate(ids) if token == mark]


def trl_ids(tokenizer: PreTrainedTokenizerBase, steps: list[str]) -> tuple[list[int], list[int]]:
    """TRL's PRMTrainer: pieces on their own, the problem with a separator as its documentation has it."""
    pieces = [f"{PROBLEM}\n", *(piece for step in steps for piece in (step, "\n"))]
    encoded: Any = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    if tokenizer.bos_token_id is not None:
        encoded.insert(0, [tokenizer.bos_token_id])
    ids = [token for piece in encoded for token in piece]
    ends = [sum(map(len, encoded[: len(encoded) - 2 * left])) - 1 for left in range(len(steps) - 1, -1, -1)]
    return ids, ends


@dataclass(frozen=True)
class Published:
    """One published format.

    Attributes:
        kind: Its name in the settings.
        folder: Name of its checkpoint.
        config: Of the decoder, without the vocabulary.
        architecture: As its config.json says.
        tokenizer: Makes it.
        ids: What its published code reads.
        head: Makes tensors besides the decoder's.
        read: (logits of the language model [T, V], hidden [T, H], tensors, tokenizer) -> scores at all places [T].
    """

    kind: str
    folder: str
    config: PretrainedConfig
    architecture: str
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    ids: Ids
    head: Callable[[], dict[str, torch.Tensor]]
    read: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], PreTrainedTokenizerBase], torch.Tensor]

    @functools.cached_property
    def decoder(self) -> torch.nn.Module:
        """A random causal LM."""
        torch.manual_seed(5)
        config = copy.deepcopy(self.config)
        config.vocab_size = len(self.tokenizer())
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.2)
            model.lm_head.weight += torch.randn(32)  # in all rows: a mean logit that is not zero
        return model

    @functools.cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that its checkpoint holds."""
        torch.manual_seed(6)
        head = self.head()
        own = self.decoder.state_dict()
        kept = {name: tensor for name, tensor in own.items() if name != "lm_head.weight" or self.kind in LANGUAGE}
        return {name: tensor.contiguous() for name, tensor in (kept | head).items()}

    @torch.inference_mode()
    def scores(self, steps: list[str]) -> list[float]:
        """Scores of every step by plain transformers, from scratch."""
        tokenizer, model = self.tokenizer(), self.decoder
        ids, marks = self.ids(tokenizer, steps)
        output = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        right = self.read(output.logits[0], output.hidden_states[-1][0], self.tensors, tokenizer)
        return right[marks].tolist()

    def save(self, parent: Path, shards: int = 1, folder: str | None = None, **changes: Any) -> str:
        """Its checkpoint below a folder; `changes` replaces tensors (None = left out) and fields of the config."""
        path = parent / (folder or self.folder)
        path.mkdir(parents=True)
        config = copy.deepcopy(self.config)
        config.vocab_size = len(self.tokenizer())
        config.architectures = [self.architecture]
        for name in [name for name in changes if "." not in name]:
            setattr(config, name, changes.pop(name))
        config.save_pretrained(path)
        tensors = {name: tensor for name, tensor in (self.tensors | changes).items() if tensor is not None}
        save_shards(path, tensors, shards)
        self.tokenizer().save_pretrained(path)
        return str(path)


def save_shards(path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Write tensors into one file, or into several with an index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _random(scale: float, *shapes: tuple[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) * scale for name, shape in shapes}


def _pair(logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return logits[:, [tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]]].softmax(-1)[:, 0]


def _qwen(hidden: torch.Tensor, head: dict[str, torch.Tensor]) -> torch.Tensor:
    inner = torch.relu(hidden @ head["score.0.weight"].T + head["score.0.bias"])
    return (inner @ head["score.2.weight"].T + head["score.2.bias"]).softmax(-1)[:, 1]


LANGUAGE = {"math_shepherd", "llemma", "rlhflow", "skywork"}  # their checkpoints hold an output layer of language
QWEN_HEAD = (("score.0.weight", (32, 32)), ("score.0.bias", (32,)), ("score.2.weight", (2, 32)), ("score.2.bias", (2,)))
PUBLISHED = {
    one.kind: one
    for one in (
        Published(
            "math_shepherd",
            "math-shepherd-mistral-7b-prm",
            MistralConfig(**COMMON, sliding_window=None, head_dim=8),
            "MistralForCausalLM",
            mistral_tokenizer,
            shepherd_ids,
            dict,
            lambda logits, hidden, head, tokenizer: _pair(logits, tokenizer),
        ),
        Published(
            "llemma",
            "Llemma-reward-model",
            LlamaConfig(**COMMON),
            "LlamaForCausalLM",
            llemma_tokenizer,
            shepherd_ids,
            dict,
            lambda logits, hidden, head, tokenizer: logits.mean(-1).sigmoid(),
        ),
        Published(
            "rlhflow",
            "Llama3.1-8B-PRM-Deepseek-Data",
            LlamaConfig(**COMMON),
            "LlamaForCausalLM",
            llama_tokenizer,
            rlhflow_ids,
            dict,
            lambda logits, hidden, head, tokenizer: _pair(logits, tokenizer),
        ),
        Published(
            "skywork",
            "prm-of-skywork",
            Qwen2Config(**COMMON, use_sliding_window=False),
            "Qwen2ForPrmModel",
            lambda: qwen_tokenizer(bos="<|endoftext|>"),
            skywork_ids,
            lambda: _random(0.2, ("v_head.summary.weight", (1, 32)), ("v_head.summary.bias", (1,))),
            lambda logits, hidden, head, tokenizer: (
                hidden @ head["v_head.summary.weight"].T + head["v_head.summary.bias"]
            )[:, 0].sigmoid(),
        ),
        Published(
            "qwen",
            "prm-of-qwen",
            Qwen2Config(**COMMON, use_sliding_window=False),
            "Qwen2ForProcessRewardModel",
            lambda: qwen_tokenizer("<extra_0>"),
            qwen_ids,
            lambda: _random(0.4, *QWEN_HEAD),
            lambda logits, hidden, head, tokenizer: _qwen(hidden, head),
        ),
        Published(
            "trl",
            "prm-of-trl",
            Qwen2Config(**COMMON, use_sliding_window=False),
            "Qwen2ForTokenClassification",
            qwen_tokenizer,
            trl_ids,
            lambda: _random(0.1, ("score.weight", (2, 32)), ("score.bias", (2,))),
            lambda logits, hidden, head, tokenizer: (hidden @ head["score.weight"].T + head["score.bias"]).softmax(-1)[
                :, 1
            ],
        ),
    )
}
