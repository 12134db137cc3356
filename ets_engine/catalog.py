"""Published policies and PRMs that people bring: sizes, and the memory that a search of some width takes; data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A published checkpoint, as its config and model card say.

    Attributes:
        name: On the Hugging Face hub.
        role: What it is for.
        format: Preset of a policy, or format of a PRM.
        parameters: Count.
        layers: With attention (count).
        kv_heads: Per layer (count).
        head_dim: Numbers per head.
        context_tokens: Longest text.
    """

    name: str
    role: Literal["policy", "verifier"]
    format: str
    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    context_tokens: int

    @property
    def weight_bytes(self) -> int:
        """Weights in bfloat16."""
        return self.parameters * BF16_BYTES

    @property
    def token_bytes(self) -> int:
        """KV of one token over all layers, in bfloat16.

        Example:
            >>> find_known("Qwen/Qwen2.5-Math-7B-Instruct").token_bytes
            57344
        """
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16_BYTES

    def kv_bytes(self, width: int, path_tokens: int, sharing_ratio: float = 1.0) -> int:
        """KV of `width` paths of `path_tokens` each, prompt included, in bfloat16.

        Args:
            width: Trajectories kept alive (count).
            path_tokens: Of one whole path, prompt included.
            sharing_ratio: Path tokens per distinct token, >= 1; 1 = nothing shared, which is the most it can take.

        Example:
            >>> find_known("Qwen/Qwen2.5-Math-7B-Instruct").kv_bytes(16, 1024) / 1e9
            0.939524096
        """
        return round(width * path_tokens / sharing_ratio) * self.token_bytes


KNOWN_MODELS = (
    KnownModel("Qwen/Qwen2.5-Math-1.5B-Instruct", "policy", "qwen_math", 1_543_714_304, 28, 2, 128, 4096),
    KnownModel("Qwen/Qwen2.5-Math-7B-Instruct", "policy", "qwen_math", 7_615_616_512, 28, 4, 128, 4096),
    KnownModel("Qwen/Qwen3-1.7B", "policy", "qwen3", 1_720_574_976, 28, 8, 128, 40960),
    KnownModel("Qwen/Qwen3-8B", "policy", "qwen3", 8_190_735_360, 36, 8, 128, 40960),
    KnownModel("meta-llama/Llama-3.2-1B-Instruct", "policy", "llama3", 1_235_814_400, 16, 8, 64, 131072),
    KnownModel("meta-llama/Llama-3.2-3B-Instruct", "policy", "llama3", 3_212_749_824, 28, 8, 128, 131072),
    KnownModel("meta-llama/Llama-3.1-8B-Instruct", "policy", "llama3", 8_030_261_248, 32, 8, 128, 131072),
    KnownModel("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "policy", "deepseek_r1", 1_777_088_000, 28, 2, 128, 131072),
    KnownModel("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "policy", "deepseek_r1", 7_615_616_512, 28, 4, 128, 131072),
    KnownModel("peiyi9979/mistral-7b-sft", "policy", "math_shepherd", 7_241_732_096, 32, 8, 128, 32768),
    KnownModel("peiyi9979/math-shepherd-mistral-7b-prm", "verifier", "math_shepherd", 7_241_732_096, 32, 8, 128, 32768),
    KnownModel("tkitsers/Llemma-reward-model", "verifier", "llemma", 6_738_546_688, 32, 32, 128, 4096),
    KnownModel("RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", "verifier", "rlhflow", 8_030_261_248, 32, 8, 128, 131072),
    KnownModel("Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "verifier", "skywork", 1_543_715_841, 28, 2, 128, 4096),
    KnownModel("Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B", "verifier", "skywork", 7_615_620_097, 28, 4, 128, 4096),
    KnownModel("Qwen/Qwen2.5-Math-PRM-7B", "verifier", "qwen", 7_083_474_946, 28, 4, 128, 4096),
    KnownModel("HuggingFaceH4/Qwen2.5-Math-7B-Instruct-PRM-0.2", "verifier", "trl", 7_070_626_306, 28, 4, 128, 4096),
)


def find_known(name: str) -> KnownModel:
    """The model of this name.

    Raises:
        KeyError: It is not listed.
    """
    return {model.name: model for model in KNOWN_MODELS}[name]
