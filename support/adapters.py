"""What of an encoder learns: all of it, its last layers, or low-rank adapters in them."""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from support.files import UserError


class LowRank(nn.Module):
    """A linear map that stands, and a change of rank r that is learned: W x + b + B A x, at first W x + b.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, with its alpha equal to r.
    """

    def __init__(self, linear: nn.Linear, lora_rank: int):
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(linear.weight.new_empty(lora_rank, linear.in_features))  # A
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, lora_rank))  # B
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as torch begins a linear map

    @property
    def weight(self) -> torch.Tensor:
        """Of the map that stands: some encoders look at its dtype."""
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From float (..., in) to (..., out)."""
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)  # (..., out)


def let_learn(network: nn.Module, layers: int | None, lora_rank: int | None) -> dict[str, nn.Parameter]:
    """Let a frozen network learn: all of it or its last `layers`; of these, with `lora_rank`, only adapters.

    Adapters go to every linear map of a layer. Returns the parameters that learn, by name. Raises `UserError` where
    the network has not so many layers, or no linear map in them.
    """
    chosen = [network]
    if layers is not None or lora_rank is not None:
        chosen = list(_layers(network))
        if layers is not None and layers > len(chosen):
            raise UserError(f"--finetune_layers {layers}: the encoder has {len(chosen)} layers; give at most so many")
        chosen = chosen[-layers:] if layers is not None else chosen
    if lora_rank is None:
        for module in chosen:
            module.requires_grad_(True)
    else:
        for module in chosen:
            _adapt(module, lora_rank)
    # A pooler's output is never used; its weights may be of chance.
    for name, parameter in network.named_parameters():
        if "pooler" in name:
            parameter.requires_grad_(False)
    learned = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not learned:
        raise UserError(f"--lora_rank: {type(network).__name__} has no linear map in its layers; leave it out")
    return learned


def _layers(network: nn.Module) -> nn.ModuleList:
    """The repeated layers: the list of modules of one kind that holds most of the weights."""
    lists = [
        module
        for module in network.modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1
    ]
    if not lists:
        raise UserError(f"{type(network).__name__} has no list of layers; leave out --finetune_layers and --lora_rank")
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def _adapt(layer: nn.Module, lora_rank: int) -> None:
    linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        owner, _, last = name.rpartition(".")
        setattr(layer.get_submodule(owner), last, LowRank(linear, lora_rank))


def set_learned(learned: dict[str, nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Give the parameters that learn the weights of another training of the same kind.

    Raises `UserError` where these are of other names or shapes.
    """
    kinds = [{name: tuple(tensor.shape) for name, tensor in which.items()} for which in (learned, weights)]
    if kinds[0] != kinds[1]:
        raise UserError("the checkpoint's trained weights do not fit its encoder; it is damaged, train it again")
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(weights[name])


def weights_hash(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of named weights: their names, shapes, dtypes and numbers."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        whole.update(tensor.view(-1).view(torch.uint8).numpy())
    return whole.hexdigest()
