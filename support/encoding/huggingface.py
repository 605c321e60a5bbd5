"""Hugging Face encoders: find, fingerprint and load them; a folder that does not load completely is refused."""

import json
import os
import platform
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from support.system import hub
from support.system.errors import UserError, is_out_of_memory, one_line, reason, valid_unicode
from support.system.files import LFS_POINTER, content_hash


def find_encoder(model_path: str, download: bool = True) -> Path:
    """The folder of an encoder, given as a folder or as a hub id; `download` allows fetching the latter on first use.

    Raises `UserError` where there is no such folder, or no model in it that can be read here.
    """
    folder = _from_hub(model_path, download) if hub.is_hub_id(model_path) else Path(os.path.expanduser(model_path))
    if str(folder) != valid_unicode(str(folder)):  # libraries refuse it with errors of their own
        raise UserError(f"{folder} is not valid UTF-8; rename the folder of the encoder")
    if model_path:
        _refuse_other_formats(folder)
    if not model_path or not os.path.isdir(folder):
        raise UserError(
            f"no model folder at {model_path}; get Qwen2-0.5B with `hf download Qwen/Qwen2-0.5B --local-dir "
            "../model/Qwen2-0.5B`, or name another folder or hub id (owner/name) with --model_path, or use --demo"
        )
    needed = {
        "config.json": ["config.json"],
        "weights (*.safetensors)": ["*.safetensors", "*.bin"],
        "a tokenizer": ["tokenizer*", "vocab*", "*.model"],
    }
    missing = [part for part, patterns in needed.items() if not any(any(folder.glob(name)) for name in patterns)]
    if missing:
        raise UserError(
            f"{model_path} is not a Hugging Face model: it lacks {', '.join(missing)}; expected what "
            "`hf download OWNER/NAME --local-dir FOLDER` or `save_pretrained(FOLDER)` leaves there"
        )
    return folder


def _refuse_other_formats(folder: Path) -> None:
    """Raise `UserError` on what is no model of transformers, and says what to do with it."""
    in_folder = sorted(folder.glob("*")) + sorted(folder.glob("[0-9]*/*"))  # such as 2_Dense/model.safetensors
    for path in in_folder:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe or a device would never end
            raise UserError(f"{path} is not a file; replace it by one")
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{path} is a Git LFS pointer in the place of the file; run `git lfs pull` in {folder}")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} has a PEFT adapter, which is not a model (adapter_config.json); merge it into its base model "
            "with `PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER)`, save the "
            "tokenizer there, too, and give that folder"
        )
    weights = [path for path in in_folder if path.suffix in (".safetensors", ".bin")]
    if folder.suffix == ".gguf" or (any(path.suffix == ".gguf" for path in in_folder) and not weights):
        raise UserError(
            f"{folder} has its weights as GGUF, quantized for llama.cpp; dequantize them with transformers' "
            "`AutoModel.from_pretrained(FOLDER, gguf_file=NAME)`, save model and tokenizer by `save_pretrained`, and "
            "give that folder"
        )


def _from_hub(hub_id: str, download: bool) -> Path:
    unused = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf"]  # formats that are not read here
    try:
        return hub.download(hub_id, ignore_patterns=unused, local_files_only=not download)
    except UserError as error:
        if download:
            raise
        problem = f"the encoder {hub_id} has not been downloaded; --model_path {hub_id} downloads it"
        raise UserError(problem) from error


def encoder_fingerprint(folder: Path, others: Iterable[Path] = ()) -> str:
    """SHA-256 (hex) of an encoder's weights, configuration and tokenizer; the folder's place does not matter.

    `others` are further files that its embeddings depend on, such as those of Dense layers.
    """
    kinds = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
    return content_hash([*sorted(file for kind in kinds for file in folder.glob(kind)), *others])


def own_code(folder: Path) -> list[str]:
    """The classes in code of its own that a folder names for its network and tokenizer; such code is never run."""
    names = []
    for file, kind in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            found = json.loads((folder / file).read_bytes())["auto_map"][kind]
            names += [one_line(name) for name in ([found] if isinstance(found, str) else found) if name]
    return names


def load_encoder(folder: Path, device: torch.device, dtype: torch.dtype):
    """An encoder's tokenizer and network, frozen, on `device`. Raises `UserError` where any weight is missing."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options = {"local_files_only": True, "trust_remote_code": False}
        with warnings.catch_warnings(action="ignore"):  # of torch, about damaged weights
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            if len(tokenizer) <= len(tokenizer.all_special_tokens):  # the library makes one of a lost file
                raise ValueError("its tokenizer has no vocabulary; get the model's files again")
            options |= {"dtype": dtype, "output_loading_info": True}
            network, info = transformers.AutoModel.from_pretrained(folder, **options)
    except Exception as error:  # a broken folder raises whatever its parsers raise
        problem = f"{folder} could not be loaded as a Hugging Face encoder"
        raise UserError(f"{problem}: {_cause(folder, error)}") from error
    # The configuration of an encoder that was saved without its decoder says that there is none.
    has_decoder = network.config.is_encoder_decoder or (hasattr(network, "encoder") and hasattr(network, "decoder"))
    encoder = network.get_encoder() if has_decoder else network
    # A decoder and a pooler are never used, so their weights may be missing; any other weight would stay random.
    used = {id(parameter) for parameter in encoder.state_dict(keep_vars=True).values()}
    unused = {name for name, weight in network.state_dict(keep_vars=True).items() if id(weight) not in used}
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name and name not in unused)
    if missing or info["mismatched_keys"]:
        raise UserError(
            f"the weights in {folder} do not fill the encoder of its config.json: {len(missing)} missing "
            f"({', '.join(missing[:3]) or 'none'}), {len(info['mismatched_keys'])} of a different shape"
        )
    network = encoder
    network.config.use_cache = False  # no text is generated, so keys and values are not needed
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no pad, eos or unk token; expected at least one of them")
    return tokenizer, network.to(device).eval().requires_grad_(False)


def _cause(folder: Path, error: Exception) -> str:
    """What a folder that could not be loaded needs, where that is known, else the error's message."""
    from transformers import CONFIG_MAPPING

    is_known = False
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # of a damaged file
        is_known = json.loads((folder / "config.json").read_bytes())["model_type"] in CONFIG_MAPPING
    code = own_code(folder)
    if code and (not is_known or "trust_remote_code" in str(error)):
        return f"it needs code of its own ({', '.join(code)}), and no remote code is run here; choose another encoder"
    is_installed = all(map(_is_installed, ("sentencepiece", "google.protobuf")))
    if not is_installed and any(folder.glob("*.model")) and not (folder / "tokenizer.json").exists():
        return "its tokenizer needs the packages sentencepiece and protobuf; `pip install sentencepiece protobuf`"
    return reason(error)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def longest_input(tokenizer, network) -> int:
    """The longest input of an encoder in tokens; `sys.maxsize` where it states no limit."""
    positions = getattr(network.config, "max_position_embeddings", None) or 0
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa and its relatives number positions from there
    stated = [limit for limit in (tokenizer.model_max_length, positions) if isinstance(limit, int) and limit > 0]
    return min(stated, default=sys.maxsize)


def pick_dtype(name: str, device: torch.device) -> str:
    """The dtype that `--dtype` names; "auto" is bfloat16 where the device multiplies it faster than float32."""
    if name != "auto":
        return name
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"


def vocabulary_size(network) -> int:
    """The size of an encoder's vocabulary; `sys.maxsize` where it has no table of tokens."""
    try:
        return network.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):  # an encoder of characters, for example
        return sys.maxsize


def count_layers(folder: Path) -> int | None:
    """The number of layers that a folder's `config.json` states; None where it states none."""
    names = ("num_hidden_layers", "num_layers", "encoder_layers", "n_layer", "n_layers")
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError, AttributeError):  # of a damaged file
        config = json.loads((folder / "config.json").read_bytes())
        stated = [part[name] for part in (config.get("text_config", {}), config) for name in names if name in part]
        return stated[0] if type(stated[0]) is int else None
    return None


def layers_of(network: nn.Module) -> nn.ModuleList:
    """The repeated layers: the list of modules of one type that holds most of the weights.

    Raises `UserError` where there is none.
    """
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList) and len(set(map(type, part))) == 1]
    if not lists:
        raise UserError(
            f"{type(network).__name__} has no list of layers; leave out --layers, --finetune_layers and --lora_rank"
        )
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def truncate(network: nn.Module, tokenizer, layers: list[int], num_layers: int) -> None:
    """Remove the layers above the highest of `layers`, so that they take neither memory nor time.

    Raises `UserError` where the outputs that are left are not the library's hidden states of these layers: some
    encoders share a layer's weights, or compute between their layers.
    """
    ids = torch.tensor([tokenizer("Which of these layers?")["input_ids"]], device=network.device)  # (1, T)
    mask = torch.ones_like(ids)  # (1, T)
    problem = f"the layers of {type(network).__name__} cannot be pooled one by one; leave out --layers"
    with torch.no_grad():
        try:
            stated = network(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        except Exception as error:  # one for images, for example, raises its own
            raise UserError(f"{problem} ({type(error).__name__}: {reason(error)})") from error
        if not len(layers_of(network)) == len(stated) - 1 == num_layers:
            raise UserError(problem)
        if max(layers) < num_layers:
            del layers_of(network)[max(layers) :]
        inner = [layer for layer in layers if layer < num_layers]
        hidden = hidden_states(network, ids, mask, inner)  # (1, T, W) each
    if not all(torch.allclose(hidden[layer], stated[layer], rtol=1e-2, atol=1e-2) for layer in inner):
        raise UserError(problem)


class PackedLinear(nn.Module):
    """A frozen linear layer on the CPU, whose weights oneDNN rearranges once and not in each call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.packed, self.bias = nn.Parameter(packed, requires_grad=False), bias

    def __reduce__(self) -> tuple:
        return PackedLinear, (self.packed.to_dense(), self.bias)  # oneDNN's tensors can be neither copied nor pickled

    @cached_property
    def weight(self) -> torch.Tensor:
        """The weights (out, in) as they were, kept from the first use on: a few encoders use them themselves."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From float (..., in) to (..., out)."""
        x = x.to(self.packed.dtype)  # a caller's autocast may have changed it
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # (..., out)


def pack_weights(network: nn.Module) -> None:
    """Let oneDNN multiply by a frozen network's weights, where this was measured to be faster: on x86 processors."""
    is_x86 = network.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    if not is_x86 or not torch.backends.mkldnn.is_available():
        return
    supported = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        supported.add(torch.bfloat16)
    for name in [name for name, part in network.named_modules() if type(part) is nn.Linear]:
        linear = network.get_submodule(name)
        if linear.weight.dtype in supported:
            network.set_submodule(name, PackedLinear(linear.weight, linear.bias))


def _keep(hidden: dict, layer: int, module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
    """A forward hook: the output of a layer goes into `hidden`."""
    hidden[layer] = output[0] if isinstance(output, tuple) else output  # (B, T, W)


def hidden_states(
    network: nn.Module, ids: torch.Tensor, mask: torch.Tensor, layers: Iterable[int | None] = (None,)
) -> dict[int | None, torch.Tensor]:
    """Hidden states (B, T, W) of token ids (B, T), by layer: the output of that layer, or for None of the network.

    Raises `UserError` where the encoder cannot take them.
    """
    hidden, hooks = {}, []
    try:
        # By hooks: after `truncate` the library's own hidden states would have the final normalization too early.
        for layer in (layer for layer in layers if layer is not None):
            hooks.append(layers_of(network)[layer - 1].register_forward_hook(partial(_keep, hidden, layer)))
        hidden[None] = network(input_ids=ids, attention_mask=mask).last_hidden_state
    except Exception as error:  # a model for images, for example, raises its own errors
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{type(network).__name__} cannot encode {ids.shape[0]} texts of {ids.shape[1]} tokens "
            f"({type(error).__name__}: {reason(error)}); expected a text encoder"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not all(layer in hidden and hidden[layer].shape[:2] == ids.shape for layer in layers):
        problem = f"the layers of {type(network).__name__} do not each give a state of each token"
        raise UserError(f"{problem}; leave out --layers")
    return hidden
