"""What a sentence-transformers folder says of itself: pooling, Dense layers, prompts, maximum length."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from support.system.errors import UserError, is_out_of_memory, one_line, reason, valid_unicode

POOLINGS = ("mean", "cls", "last", "max", "mean+last")
# The modes of 1_Pooling/config.json that are applied here, by the library's names.
MODES = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max"}
# Earlier versions of the library write a switch for each mode.
SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")  # of torch.nn, without arguments


@dataclass(frozen=True)
class FolderSettings:
    """How a folder wants texts to be embedded; of a folder without these files, the defaults."""

    modes: tuple[str, ...] = ()  # of pooling, by the library's names; empty: nothing is said
    include_prompt: bool = True  # whether the tokens of a prompt are pooled, too
    dense: tuple[Path, ...] = ()  # the folders of the Dense layers after pooling, in their order
    normalize: bool = False  # whether vectors are scaled to length 1 in the end
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None  # the name of the one that is used where none is named
    max_length: int | None = None  # max_seq_length, in tokens
    lower_case: bool = False  # whether texts are lowercased before the tokenizer

    @property
    def dense_files(self) -> list[Path]:
        """Configuration and weights of the Dense layers."""
        return [file for folder in self.dense for file in (folder / "config.json", _weights_file(folder))]


def read_settings(folder: Path) -> FolderSettings:
    """What the files of sentence-transformers in `folder` say, where there are any.

    Raises `UserError` where they are damaged, or ask for something that is not applied here.
    """
    prompts, default_prompt = _read_prompts(folder / "config_sentence_transformers.json")
    max_length, lower_case = _read_transformer(folder / "sentence_bert_config.json")
    settings = FolderSettings(
        prompts=prompts, default_prompt=default_prompt, max_length=max_length, lower_case=lower_case
    )
    if not os.path.lexists(folder / "modules.json"):
        if os.path.lexists(folder / "1_Pooling"):
            problem = "has 1_Pooling, and no modules.json, which says how it is used"
            raise UserError(f"{folder} {problem}; get the model's files again, or remove 1_Pooling")
        return settings
    kinds, paths = _read_modules(folder / "modules.json")
    if "Pooling" in kinds:
        modes, include_prompt = _read_pooling(paths[1] / "config.json")
        settings = replace(settings, modes=modes, include_prompt=include_prompt)
    dense = tuple(path for kind, path in zip(kinds, paths, strict=True) if kind == "Dense")
    return replace(settings, dense=dense, normalize=kinds[-1] == "Normalize")


def choose_pooling(settings: FolderSettings, pooling: str, folder: Path) -> tuple[str, str]:
    """The pooling that `pooling` names, where "auto" is what the folder says, else the mean; and why it is taken.

    Raises `UserError` where the folder asks for another one than those of `POOLINGS`, or for several.
    """
    if pooling not in ("auto", *POOLINGS):
        raise UserError(f"--pooling {pooling!r} is unknown; expected auto or one of {', '.join(POOLINGS)}")
    wanted = " and ".join(settings.modes)
    if pooling != "auto":
        is_same = settings.modes in ((), *((mode,) for mode, name in MODES.items() if name == pooling))
        return pooling, "as --pooling says" + ("" if is_same else f", where the folder says {wanted}")
    if not settings.modes:
        return "mean", "as the folder names none"
    if len(settings.modes) > 1 or wanted not in MODES:
        problem = f"asks for the pooling {one_line(wanted)}, expected one of {', '.join(MODES)}"
        raise UserError(f"{folder} {problem}; choose with --pooling")
    return MODES[wanted], "as the folder says"


def choose_prefix(settings: FolderSettings, prefix: str | None, prompt: str | None, folder: Path) -> tuple[str, str]:
    """What is put before each query, and why: `prefix`, else the prompt of that name, else the default prompt.

    Raises `UserError` where the folder has no such prompt.
    """
    names = ", ".join(one_line(name) for name, text in settings.prompts.items() if text)
    if prefix is not None:
        return prefix, "as --query_prefix says"
    if prompt is not None:
        if prompt not in settings.prompts:
            raise UserError(f"--query_prompt {prompt!r} is not a prompt of {folder}; it has {names or 'none'}")
        return settings.prompts[prompt], f"its prompt {prompt!r}"
    if settings.default_prompt is not None:
        return settings.prompts[settings.default_prompt], f"its default prompt {settings.default_prompt!r}"
    return "", f"--query_prompt takes one of its prompts: {names}" if names else "as the folder has no prompts"


def describe(settings: FolderSettings, pooling: tuple[str, str], prefix: tuple[str, str], max_length: int) -> str:
    """One line that says how queries are embedded, and why so; `pooling` and `prefix` as they were chosen."""
    layers = ", ".join(path.name for path in settings.dense)
    parts = [
        f"{pooling[0]} pooling, {pooling[1]}",
        f"then {layers}" if layers else "no Dense layers",
        f"prefix {prefix[0]!r}, {prefix[1]}" if prefix[0] else f"no prefix, {prefix[1]}",
    ]
    if prefix[0] and not settings.include_prompt:
        parts[-1] += ", not pooled"
    if settings.normalize:
        parts.append("Normalize left out, as standardization follows")
    if settings.max_length not in (None, max_length):
        parts.append(f"max_seq_length {settings.max_length} of the folder gives way to --max_length {max_length}")
    return "; ".join(parts)


def lowercase(tokenizer) -> None:
    """Let a tokenizer lowercase each text first, as `do_lower_case` asks. Raises `UserError` where it cannot."""
    from tokenizers import normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("do_lower_case in sentence_bert_config.json needs a fast tokenizer; choose another encoder")
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])


def load_dense(folders: tuple[Path, ...], device: torch.device) -> nn.Sequential:
    """Dense layers, each a linear map and its activation, frozen, in float32; none of them is the identity.

    Raises `UserError` where one of them is damaged, or does more than that.
    """
    layers = []
    for folder in folders:
        linear, activation = _empty_dense(folder / "config.json")
        with _readable(_weights_file(folder)) as path:
            weights = _read_weights(path)
            linear.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
        layers += [linear, activation]
    return nn.Sequential(*layers).to(device).eval().requires_grad_(False)


def _empty_dense(path: Path) -> tuple[nn.Linear, nn.Module]:
    """The linear map of a Dense layer, without its weights, and its activation."""
    config = _read_json(path, dict)
    with _readable(path):
        places = [config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")]
        name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        kind = name.rpartition(".")[2] if name.startswith("torch.nn.") else None
        sizes = [config[key] for key in ("in_features", "out_features")]
        if not all(type(size) is int and 1 <= size <= 2**16 for size in sizes):
            raise ValueError(f"in_features and out_features are {sizes}")
    if places != ["sentence_embedding"] * 2 or config.get("use_residual") or kind not in ACTIVATIONS:
        problem = f"is of token embeddings, with a residual, or with the activation {one_line(name)}"
        raise UserError(f"{path} {problem}; expected an embedding's layer with one of {', '.join(ACTIVATIONS)}")
    linear = nn.utils.skip_init(nn.Linear, *sizes, bias=config.get("bias", True) is True)
    return linear, getattr(nn, kind)()


def _weights_file(folder: Path) -> Path:
    safe = folder / "model.safetensors"
    return safe if safe.exists() else folder / "pytorch_model.bin"


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    with warnings.catch_warnings(action="ignore"):  # of torch's unpickler, about a damaged file
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """Within the block, whatever a damaged file raises becomes a `UserError`."""
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError("it is no file")
        yield path
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} cannot be used ({reason(error)}); get the model's files again") from error


def _read_json(path: Path, kind: type) -> dict | list:
    """The content of a JSON file, which must be of the type `kind`."""
    with _readable(path):
        content = json.loads(path.read_bytes())
        if not isinstance(content, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    return content


def _read_modules(path: Path) -> tuple[list[str], list[Path]]:
    """The kinds of the modules in modules.json, such as "Pooling", and their folders, in their order."""
    modules = _read_json(path, list)
    with _readable(path):
        names, places = [module["type"] for module in modules], [Path(module["path"]) for module in modules]
        if any(place.is_absolute() or ".." in place.parts for place in places):
            raise ValueError("it leads out of its folder")
        kinds = [name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name for name in names]
    expected = ["Transformer", "Pooling"][: len(kinds)] + ["Dense"] * len(kinds[2:])
    if kinds[2:] and kinds[-1] == "Normalize":
        expected[-1] = "Normalize"
    if not kinds or kinds != expected:
        problem = f"has the modules {', '.join(map(one_line, kinds)) or 'none'}; expected a Transformer, Pooling"
        raise UserError(f"{path} {problem}, any Dense layers, and Normalize, in this order: choose another encoder")
    if places[0] != Path():
        problem = f"has its Transformer in {one_line(places[0])}, as early versions of the library left it"
        raise UserError(f"{path} {problem}; save the model again with a later one")
    return kinds, [path.parent / place for place in places]


def _read_pooling(path: Path) -> tuple[tuple[str, ...], bool]:
    """The modes of a Pooling module, and whether the tokens of a prompt are pooled, too."""
    config = _read_json(path, dict)
    with _readable(path):
        modes = config.get("pooling_mode", [mode for switch, mode in SWITCHES.items() if config.get(switch)])
        modes = [modes] if isinstance(modes, str) else modes or ["mean"]
        switches = [config.get(switch, False) for switch in SWITCHES] + [config.get("include_prompt", True)]
        if not all(isinstance(mode, str) for mode in modes) or not all(type(switch) is bool for switch in switches):
            raise ValueError(f"its values are of other types than those of a Pooling module: {config}")
    return tuple(modes), config.get("include_prompt", True)


def _read_transformer(path: Path) -> tuple[int | None, bool]:
    """`max_seq_length` in tokens, and whether texts are lowercased."""
    if not os.path.lexists(path):
        return None, False
    config, states = _read_json(path, dict), "last_hidden_state"
    with _readable(path):
        text = config.get("modality_config", {}).get("text", {"method_output_name": states})
        task, output = config.get("transformer_task", "feature-extraction"), text["method_output_name"]
        length, lower_case = config.get("max_seq_length"), config.get("do_lower_case", False)
        if not isinstance(length, int | None) or type(lower_case) is not bool:
            raise ValueError(f"max_seq_length is {length}, do_lower_case {lower_case}")
    if task != "feature-extraction" or output not in (states, [states]):
        problem = f"asks for the {one_line(output)} of {one_line(task)}; expected the {states} of feature-extraction"
        raise UserError(f"{path} {problem}: choose another encoder")
    return length, lower_case


def _read_prompts(path: Path) -> tuple[dict[str, str], str | None]:
    """The prompts of a folder by name, and the name of the default one."""
    if not os.path.lexists(path):
        return {}, None
    config = _read_json(path, dict)
    with _readable(path):
        prompts = {name: text or "" for name, text in (config.get("prompts") or {}).items()}
        default = config.get("default_prompt_name")
        if default in ("query", "document"):  # the library has these two always, empty where a folder has none
            prompts.setdefault(default, "")
        if default is not None and default not in prompts:
            raise ValueError(f"default_prompt_name is {default!r}, which is not among its prompts")
        if not all(isinstance(text, str) and text == valid_unicode(text) for text in prompts.values()):
            raise ValueError("a prompt is not text, in valid Unicode")
    return prompts, default
