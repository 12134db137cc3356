"""What plays a replay: the peers, each through a model of its own; ours is `replay_searches.py`.

They go on with what they draw. `generate` reads whole padded paths anew each round; transformers' continuous batching
and vLLM find read prefixes in their caches.
"""

from __future__ import annotations

import copy
import inspect
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from replay import Replay, Round
from replay_floors import Shape, model_config
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

WARM_UP = Replay("warm-up", 8, (Round((0, 0), (3, 2)), Round((1, 1), (2, 2))))
T = TypeVar("T")
Ids = list[list[int]]  # of each node


class Unavailable(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True, slots=True)
class Played:
    """One replay by one side; KV figures are None where a side does not show them.

    Attributes:
        seconds, cpu_seconds: From the prompt to the last token.
        step_seconds: Of each decode step from the end of the one before, drawing included, in the order of
            `decode_steps`; empty for peers.
        mean_kv_tokens, peak_kv_tokens: Held, over decode steps.
        peak_kv_bytes: Memory behind the peak, rounding up to pages included.
    """

    seconds: float
    cpu_seconds: float
    step_seconds: tuple[float, ...] = ()
    mean_kv_tokens: float | None = None
    peak_kv_tokens: int | None = None
    peak_kv_bytes: int | None = None


Player = Callable[[Replay, Ids], Played]


def build_models(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models over the same random weights: one for the runner, which changes its attention, one for the peers."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(shape), dtype=dtype).eval()
    return model, share_weights(model)


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with a config of its own over the same weights."""
    return copy.deepcopy(model, {id(one): one for one in model.parameters()})


def token_ids(tree: Replay, vocabulary: int, seed: int) -> Ids:
    """Random ids for every node, as many as were recorded; 0 is padding and left out."""
    rng = np.random.default_rng(seed)
    counts = [tree.prompt_tokens, *(count for one in tree.rounds for count in one.num_tokens)]
    return [rng.integers(1, vocabulary, count).tolist() for count in counts]


def generate_player(model: PreTrainedModel) -> Player:
    """One `generate` per round on whole paths, left-padded, each with KV of its own."""
    generate: Any = model.generate

    def play(replay: Replay, ids: Ids) -> Played:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        paths, held, peak_bytes = {0: ids[0]}, [], 0
        for one, children in replay.numbered():
            new = max(one.num_tokens)
            longest = max(len(paths[parent]) for parent in one.parents)
            padding = [longest - len(paths[parent]) for parent in one.parents]
            rows = [[0] * pad + paths[parent] for pad, parent in zip(padding, one.parents, strict=True)]
            mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
            output = generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                do_sample=True,
                top_k=0,
                min_new_tokens=new,
                max_new_tokens=new,
                return_dict_in_generate=True,
            )
            cached = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
            peak_bytes = max(peak_bytes, sum(tensor.nbytes for tensor in cached))
            held += [len(rows) * (longest + done) for done in range(1, new)]
            drawn = output.sequences[:, longest:].tolist()
            paths = {
                child: paths[parent] + drawn[row][:count]
                for row, (child, parent, count) in enumerate(zip(children, one.parents, one.num_tokens, strict=True))
            }
        seconds = time.perf_counter() - began_s, time.process_time() - cpu_s
        return Played(*seconds, (), statistics.mean(held or [0]), max(held, default=0), peak_bytes)

    return play


def continuous_player(model: PreTrainedModel) -> Player:
    """Continuous batching of transformers: paged, finds read prefixes again, ends every path with its step."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    page_tokens = 32  # short enough for steps to be shared; the default of 256 would share little
    known = inspect.signature(ContinuousBatchingConfig).parameters
    size: Any = {"page_size" if "page_size" in known else "block_size": page_tokens}  # transformers renamed it
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=1, eos_token_id=-1, pad_token_id=0)
    serve: Any = model.continuous_batching_context_manager

    def play(replay: Replay, ids: Ids) -> Played:
        pages = (replay.longest_path_tokens // page_tokens + 2) * widest(replay)  # nothing shared at worst
        on_cpu = model.device.type == "cpu"  # where it cannot tell how much memory is free
        config = ContinuousBatchingConfig(
            **size,
            num_blocks=pages if on_cpu else None,
            max_batch_tokens=max(2048, widest(replay)) if on_cpu else None,
        )
        with serve(settings, continuous_batching_config=config) as manager:
            began_s, cpu_s = time.perf_counter(), time.process_time()
            paths = {0: ids[0]}
            for one, children in replay.numbered():
                asked = {
                    manager.add_request(paths[parent], max_new_tokens=count): (child, parent)
                    for child, parent, count in zip(children, one.parents, one.num_tokens, strict=True)
                }
                grown: dict[int, list[int]] = {}
                while len(grown) < len(asked):
                    result = manager.get_result(timeout=1)
                    if result is None and not manager.is_running():
                        raise Unavailable("its generation thread ended")
                    if result is None or not result.is_finished():
                        continue
                    if result.error is not None:
                        raise Unavailable(f"it failed: {result.error}")
                    child, parent = asked[result.request_id]
                    grown[child] = paths[parent] + list(result.generated_tokens)
                paths = grown
            return Played(time.perf_counter() - began_s, time.process_time() - cpu_s)

    return play


def vllm_player(model: PreTrainedModel, dtype: torch.dtype, context_tokens: int) -> Player:
    """A vLLM with random weights of the same shape and its prefix cache on; half of the GPU is its own.

    It runs in this process unless `VLLM_ENABLE_V1_MULTIPROCESSING=1` is set, so that its CPU seconds are counted.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Unavailable("vllm is not installed") from None
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            enable_prefix_caching=True,
            max_model_len=context_tokens,
            gpu_memory_utilization=0.5,
        )

    def play(replay: Replay, ids: Ids) -> Played:
        llm.reset_prefix_cache()  # of the last replay, which began with the same prompt
        began_s, cpu_s = time.perf_counter(), time.process_time()
        paths = {0: ids[0]}
        for one, children in replay.numbered():
            outputs = llm.generate(
                [{"prompt_token_ids": paths[parent]} for parent in one.parents],
                [vllm.SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False) for count in one.num_tokens],
                use_tqdm=False,
            )
            paths = {
                child: paths[parent] + list(output.outputs[0].token_ids)
                for child, parent, output in zip(children, one.parents, outputs, strict=True)
            }
        return Played(time.perf_counter() - began_s, time.process_time() - cpu_s)

    return play


def attempt(name: str, work: Callable[[], T]) -> T | None:
    """What the work returns; None, and a line that says why, where a peer fails. A failure of ours is raised."""
    try:
        return work()
    except Exception as error:
        if name == "ours":
            raise
        print(f"{name}: skipped, {(str(error) or type(error).__name__).splitlines()[0]:.200}")
        return None


def widest(replay: Replay) -> int:
    """Branches of the widest round (count)."""
    return max(len(one.parents) for one in replay.rounds)
