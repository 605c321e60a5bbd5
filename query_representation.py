"""Query tower: a frozen Hugging Face encoder, K-means clusters of its embeddings, and an MLP over both."""

import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from support.files import UserError, content_hash

# Tokens per batch: enough to keep the device busy, few enough that long queries still fit.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768, "mps": 8192}
ASSIGN_ROWS = 65536  # queries compared with the centroids at a time


def is_hub_id(model_path: str) -> bool:
    """Whether `model_path` is no folder here and has the form of a hub id, `owner/name`."""
    return not os.path.exists(os.path.expanduser(model_path)) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", model_path))


def find_encoder(model_path: str) -> Path:
    """The folder of an encoder, given as a folder or as a hub id, which is downloaded on first use.

    Raises `UserError` where there is no such folder, or no model in it.
    """
    folder = _download(model_path) if is_hub_id(model_path) else Path(os.path.expanduser(model_path))
    if not model_path or not os.path.isdir(folder):
        raise UserError(
            f"no model folder at {model_path}; get Qwen2-0.5B with `hf download Qwen/Qwen2-0.5B --local-dir "
            "../model/Qwen2-0.5B`, or name another folder or hub id (owner/name) with --model_path, or use --demo"
        )
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        missing.append("weights (*.safetensors)")
    if not any([*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("*.model")]):
        missing.append("a tokenizer")
    if missing:
        raise UserError(
            f"{model_path} is not a Hugging Face model: it lacks {', '.join(missing)}; expected what "
            "`hf download OWNER/NAME --local-dir FOLDER` or `save_pretrained(FOLDER)` leaves there"
        )
    return folder


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    elsewhere = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf"]  # formats we do not read
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=elsewhere))
    except Exception as error:  # the hub's client has no common base for what it raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{hub_id} is no folder here and could not be downloaded as a hub id: {reason}") from error


def encoder_fingerprint(folder: Path) -> str:
    """SHA-256 (hex) over an encoder's weights, configuration and tokenizer, wherever its folder lies."""
    kinds = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
    return content_hash(sorted(file for kind in kinds for file in folder.glob(kind)))


def load_encoder(folder: Path, device: torch.device, dtype: torch.dtype):
    """An encoder's tokenizer and network, frozen, on `device`. Raises `UserError` where they do not load whole."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        local = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        network, info = transformers.AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True, **local)
    except Exception as error:  # a broken folder raises whatever its parsers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder} could not be loaded as a Hugging Face encoder: {reason}") from error
    # A pooler's output is never used, so a checkpoint may lack it; anything else would stay random.
    lacking = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if lacking or info["mismatched_keys"]:
        raise UserError(
            f"the weights in {folder} do not fill the encoder of its config.json: {len(lacking)} missing "
            f"({', '.join(lacking[:3]) or 'none'}), {len(info['mismatched_keys'])} of another shape"
        )
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
    network.config.use_cache = False  # no text is generated, so keys and values need not be kept
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no pad, eos or unk token; expected at least one of them")
    return tokenizer, network.to(device).eval().requires_grad_(False)


def hidden_states(network, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, T, H) of token ids (B, T). Raises `UserError` where the encoder cannot take them."""
    try:
        return network(input_ids=ids, attention_mask=mask).last_hidden_state
    except Exception as error:  # whatever a model for images, or one without memory left, makes of it
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{type(network).__name__} cannot encode {ids.shape[0]} texts of {ids.shape[1]} tokens "
            f"({type(error).__name__}: {reason}); expected a text encoder, and memory for it"
        ) from error


def longest_input(tokenizer, network) -> int:
    """The most tokens that an encoder takes; a very large number where it states no limit."""
    positions = getattr(network.config, "max_position_embeddings", None) or 0
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa and its kin number positions from there
    stated = [limit for limit in (tokenizer.model_max_length, positions) if isinstance(limit, int) and limit > 0]
    return min(stated, default=sys.maxsize)


def tokenize(queries: list[str], tokenizer, max_length: int) -> list[torch.Tensor]:
    """Token ids of each query, cut to `max_length` tokens, without padding: Q int64 tensors (T,), T >= 1."""
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:  # the tokenizer would then not cut at all
        raise UserError(f"--max_length {max_length} leaves no room beside {special} special tokens; give more")
    ids = tokenizer(queries, truncation=True, max_length=max_length)["input_ids"]
    # A text may leave no token at all (control characters, say); the pad token stands for it.
    return [torch.tensor(query_ids or [tokenizer.pad_token_id]) for query_ids in ids]


def plan_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Batches of indices into `lengths` (Q,), longest first, each of at most `tokens_per_batch` tokens once padded.

    Queries of like length share a batch, so that little of it is padding; the longest first shows at once
    whether they fit. A query longer than the budget has a batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")  # (Q,)
    batches, start = [], 0
    while start < len(order):
        rows = max(1, tokens_per_batch // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per query, in float32, from hidden states (B, T, H) and a right-padded mask (B, T).

    `pooling` is "mean" over the tokens that are no padding, or "last" for the last of them.
    """
    hidden = hidden.float()
    lengths = mask.sum(1)  # (B,)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]  # (B, H)
    return (hidden * mask[:, :, None]).sum(1) / lengths[:, None]  # (B, H)


def _vocabulary(network) -> int:
    try:
        return network.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):  # an encoder without a table of tokens, of characters say
        return sys.maxsize


@torch.inference_mode()
def encode(queries: list[str], tokenizer, network, max_length: int = 512, pooling: str = "mean") -> torch.Tensor:
    """Embeddings of `queries` in their order: float32 (Q, H), on the CPU.

    Queries longer than `max_length` tokens (at most `longest_input`) are cut. A progress bar on stderr counts
    tokens. Raises `UserError` where embeddings are not finite.
    """
    from tqdm import tqdm

    ids = tokenize(queries, tokenizer, max_length)
    lengths = np.array([len(query_ids) for query_ids in ids])  # (Q,)
    device = network.device
    probe = torch.ones(1, 8, dtype=torch.int64, device=device)  # (1, T)
    width = hidden_states(network, probe, probe).shape[2]  # H: not every configuration states it
    vocabulary = _vocabulary(network)
    highest = max(int(query_ids.max()) for query_ids in ids)
    if highest >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {highest}, the encoder knows {vocabulary}: they are not of one model"
        )
    embeddings = torch.empty(len(queries), width)  # (Q, H)
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file need not hold every step
    with tqdm(total=int(lengths.sum()), desc="encode", unit="tok", unit_scale=True, delay=1, mininterval=every) as bar:
        for batch in plan_batches(lengths, TOKENS_PER_BATCH[device.type]):
            # Padding is masked, so any token does; a pad token may lie outside the encoder's vocabulary.
            padded = pad_sequence([ids[i] for i in batch], batch_first=True, padding_value=0).to(device)  # (B, T)
            ends = torch.from_numpy(lengths[batch]).to(device)  # (B,)
            mask = (torch.arange(padded.shape[1], device=device) < ends[:, None]).long()  # (B, T)
            hidden = hidden_states(network, padded, mask)  # (B, T, H)
            embeddings[batch] = pool(hidden, mask, pooling).cpu()  # (B, H)
            bar.update(int(lengths[batch].sum()))
    bad = int((~embeddings.isfinite()).any(dim=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(queries)} embeddings are not finite in {network.dtype}; "
            "try --dtype float32, and if it is that already, get the encoder's weights again"
        )
    return embeddings


def fit_centroids(points: torch.Tensor, num_clusters: int, seed: int) -> torch.Tensor:
    """K-means centroids (K, H) of points (Q, H), Q >= K, by one k-means++ start."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():  # with more threads one seed gives several results
        warnings.simplefilter("ignore", ConvergenceWarning)  # where fewer than K points differ, clusters stay empty
        kmeans = KMeans(num_clusters, n_init=1, random_state=seed).fit(points.numpy())
    return torch.from_numpy(kmeans.cluster_centers_)  # (K, H)


class QueryTower(nn.Module):
    """Maps queries into the shared space.

    Embeddings are standardised with training statistics: decoder states have a few huge dimensions that would
    own every distance. The standardised embedding, projected, and the learned embedding of its nearest K-means
    centroid are concatenated and go through an MLP. Statistics and centroids are buffers, so a checkpoint holds
    them. With `num_clusters` 0 there are no cluster features.
    """

    def __init__(
        self,
        encoder_width: int,
        embedding_dim: int = 512,
        num_clusters: int = 50,
        cluster_dim: int = 32,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.register_buffer("mean", torch.zeros(encoder_width))
        self.register_buffer("scale", torch.ones(encoder_width))
        self.register_buffer("centroids", torch.zeros(num_clusters, encoder_width))
        self.semantic = nn.Linear(encoder_width, embedding_dim)
        self.cluster = nn.Embedding(num_clusters, cluster_dim) if num_clusters else None
        self.mlp = nn.Sequential(
            nn.Linear(embedding_dim + (cluster_dim if num_clusters else 0), embedding_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(embedding_dim, embedding_dim),
        )

    def fit(self, embeddings: torch.Tensor, seed: int) -> None:
        """Take statistics and centroids from the embeddings (Q, H) of the distinct training queries."""
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(embeddings.double().numpy())  # gives constant dimensions the scale 1
        self.mean.copy_(torch.from_numpy(scaler.mean_))
        self.scale.copy_(torch.from_numpy(scaler.scale_))
        if len(self.centroids):
            self.centroids.copy_(fit_centroids(self.standardise(embeddings), len(self.centroids), seed))

    def standardise(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Encoder embeddings (Q, H) in the space of the centroids and of `forward` (Q, H)."""
        return (embeddings - self.mean) / self.scale  # (Q, H)

    def assign(self, points: torch.Tensor) -> torch.Tensor:
        """Index of the nearest centroid of each standardised embedding (Q, H): int64 (Q,), zeros if K is 0."""
        if not len(self.centroids):
            return torch.zeros(len(points), dtype=torch.int64, device=points.device)
        # |x - c|² without |x|², which is the same for every centroid
        offset = self.centroids.square().sum(1)  # (K,)
        chunks = points.split(ASSIGN_ROWS)
        return torch.cat([(offset - 2 * chunk @ self.centroids.T).argmin(1) for chunk in chunks])  # (Q,)

    def forward(self, points: torch.Tensor, cluster_idx: torch.Tensor) -> torch.Tensor:
        """Standardised embeddings (B, H) and their clusters (B,), as `standardise` and `assign` give them: (B, D)."""
        features = self.semantic(points)  # (B, D)
        if self.cluster is not None:
            features = torch.cat([features, self.cluster(cluster_idx)], dim=1)  # (B, D + cluster_dim)
        return self.mlp(features)  # (B, D)
