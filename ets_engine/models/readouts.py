"""Read-outs of PRMs: small heads on hidden states of marks, in fp32, and how their outputs become probabilities.

A head gives one output, the log-odds that all is right so far, or two, the logits of "wrong" and "right".
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ets_engine.errors import ModelLoadError
from ets_engine.runtime import Checkpoint


class Float32Head(torch.nn.Module):
    """Layers that run in fp32 whatever the decoder's dtype. [..., hidden] -> [..., outputs].

    Args:
        layers: Turned to fp32.

    Example:
        >>> head = Float32Head(torch.nn.Linear(8, 1))
        >>> head(torch.zeros(3, 8, dtype=torch.bfloat16)).shape, head(torch.zeros(8)).dtype
        (torch.Size([3, 1]), torch.float32)
    """

    def __init__(self, layers: torch.nn.Module) -> None:
        """See the class."""
        super().__init__()
        self.layers = layers.float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., outputs]."""
        return self.layers(hidden.float())


def probabilities(outputs: torch.Tensor) -> torch.Tensor:
    """Probability that all is right, from the outputs of a head. [B, 1 or 2] -> [B], in [0, 1], fp32.

    Example:
        >>> probabilities(torch.tensor([[0.0], [100.0]])), probabilities(torch.tensor([[1.0, 1.0], [0.0, 100.0]]))
        (tensor([0.5000, 1.0000]), tensor([0.5000, 1.0000]))
    """
    outputs = outputs.float()
    return outputs[:, 0].sigmoid() if outputs.shape[-1] == 1 else outputs.softmax(-1)[:, 1]


def pair_head(model: PreTrainedModel, right: int, wrong: int) -> Float32Head:
    """Logits of two tokens alone, of a whole vocabulary's.

    Raises:
        ModelLoadError: The model's output layer is quantised, or none.
    """
    weight, bias = _language_head(model)
    rows = [wrong, right]
    return Float32Head(_linear(weight[rows], None if bias is None else bias[rows]))


def mean_head(model: PreTrainedModel) -> Float32Head:
    """Mean of all logits: one product with the mean row of the output layer.

    Raises:
        ModelLoadError: The model's output layer is quantised, or none.
    """
    weight, bias = _language_head(model)
    mean = weight.mean(0, keepdim=True, dtype=torch.float32)
    return Float32Head(_linear(mean, None if bias is None else bias.mean(0, keepdim=True, dtype=torch.float32)))


def stored_head(checkpoint: Checkpoint, names: tuple[str, ...], outputs: int) -> Float32Head:
    """Linear layers of a checkpoint, with a ReLU between each two.

    Args:
        checkpoint: Holds `{name}.weight` and maybe `{name}.bias` for every name.
        names: Of the layers, the first one on top of the decoder.
        outputs: Of the last layer (count).

    Raises:
        ModelLoadError: A layer is missing, or has another shape.
    """
    tensors = checkpoint.tensor_files()
    layers: list[torch.nn.Module] = []
    width = checkpoint.config.get_text_config(decoder=True).hidden_size
    for name in names:
        weight = checkpoint.read_tensor(f"{name}.weight")
        bias = checkpoint.read_tensor(f"{name}.bias") if f"{name}.bias" in tensors else None
        rows = outputs if name == names[-1] else len(weight)
        if weight.shape != (rows, width) or (bias is not None and bias.shape != (rows,)):
            shapes = tuple(weight.shape), None if bias is None else tuple(bias.shape)
            raise ModelLoadError(
                f"{name} has shapes {shapes}, where this format has weights of ({rows}, {width}); it is another kind "
                "of head"
            )
        if not weight.is_floating_point():
            raise ModelLoadError(f"{name} is quantised; a PRM's head must be stored in floating point")
        layers += [_linear(weight, bias), torch.nn.ReLU()]
        width = rows
    return Float32Head(torch.nn.Sequential(*layers[:-1]))


def _language_head(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    head = model.get_output_embeddings()
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ModelLoadError(
            f"the output layer of {type(model).__name__} has no rows to read; leave it out of the quantization "
            "(llm_int8_skip_modules, modules_to_not_convert)"
        )
    return weight.detach(), None if bias is None else bias.detach()


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    outputs, width = weight.shape
    layer = torch.nn.Linear(width, outputs, bias=bias is not None, dtype=torch.float32, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(False)
