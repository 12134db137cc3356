"""Tiny random policies and PRMs with a tokenizer of one token per character, in memory and as folders."""

from __future__ import annotations

import copy
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerFast

from .conftest import CONFIGS, VOCABULARY, tiny_model

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = "\n .,?+-*/=()" + string.digits + "SU" + string.ascii_lowercase


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; by itself it begins with a begin-of-text token."""
    pieces = [*SPECIAL, *CHARACTERS]
    pieces += [chr(0x3B1 + i) for i in range(VOCABULARY - len(pieces))]  # Greek letters fill the vocabulary
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def tiny_prm(name: str, num_labels: int = 2) -> PreTrainedModel:
    """The same random PRM each time; its scores differ from step to step."""
    torch.manual_seed(12)
    config = copy.deepcopy(CONFIGS[name])
    config.num_labels = num_labels
    model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


def save(folder: Path, model: torch.nn.Module) -> str:
    """A folder that `from_pretrained` loads."""
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_policy(folder: Path) -> str:
    """A policy that ends its text now and then: token 2 is its end of text."""
    return save(folder, tiny_model("llama_gqa_rope_scaled"))


def save_prm(folder: Path) -> str:
    """A PRM of other weights and more KV heads; transformers loads a Qwen folder with its own tokenizer."""
    return save(folder, tiny_prm("llama"))
