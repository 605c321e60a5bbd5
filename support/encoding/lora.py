"""Which parameters of an encoder are trained: all, its last layers, or low-rank adapters in them."""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from support.encoding.huggingface import layers_of
from support.system.errors import UserError, reason


class LowRank(nn.Module):
    """A frozen linear map and a trainable change of rank r: W x + b + B A x; initially B = 0, so W x + b.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, with its alpha equal to r.
    """

    def __init__(self, linear: nn.Linear, lora_rank: int):
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(linear.weight.new_empty(lora_rank, linear.in_features))  # A
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, lora_rank))  # B
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # torch's initialization of a linear map

    @property
    def weight(self) -> torch.Tensor:
        """That of the frozen map: some encoders look at its dtype."""
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From float (..., in) to (..., out)."""
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)  # (..., out)


def make_trainable(network: nn.Module, layers: int | None, lora_rank: int | None) -> dict[str, nn.Parameter]:
    """Make a frozen network trainable: all of it or its last `layers`; with `lora_rank` only adapters in these.

    Adapters are added to every linear map of a layer. Returns the trainable parameters by name. Raises `UserError`
    where the network has fewer layers, or no linear map in them.
    """
    modules = [network]
    if layers is not None or lora_rank is not None:
        modules = layers_of(network)
        count = len(modules) if layers is None else layers
        if count > len(modules):
            raise UserError(f"--finetune_layers {count}: the encoder has {len(modules)} layers; give at most that many")
        modules = modules[-count:]
    if lora_rank is None:
        for module in modules:
            module.requires_grad_(True)
    else:
        chosen = {part for module in modules for part in module.modules() if isinstance(part, nn.Linear)}
        for name, linear in [(name, part) for name, part in network.named_modules() if part in chosen]:
            network.set_submodule(name, LowRank(linear, lora_rank))
    # A pooler's output is never used; its weights may be random.
    for name, parameter in network.named_parameters():
        if "pooler" in name:
            parameter.requires_grad_(False)
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError(f"--lora_rank: {type(network).__name__} has no linear map in its layers; leave it out")
    return trainable


def checkpoint_activations(network: nn.Module) -> None:
    """Let a network recompute its hidden states in the backward pass instead of keeping them; dropout stays off.

    Raises `UserError` where the network cannot do that.
    """
    try:
        network.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {reason(error)}; leave it out") from error
    for module in network.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # which it needs, but then it may drop parts of its states, or itself
            for name in [name for name, value in vars(module).items() if "drop" in name and type(value) is float]:
                setattr(module, name, 0.0)


def load_weights(trainable: dict[str, nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Copy trained weights into the trainable parameters. Raises `UserError` where names or shapes differ."""
    expected, found = ({name: tensor.shape for name, tensor in some.items()} for some in (trainable, weights))
    if found != expected:
        raise UserError("the checkpoint's trained weights do not fit its encoder; it is damaged, train it again")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])


def weights_hash(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of named weights: their names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
