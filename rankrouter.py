"""The router: both towers scored together, rankings, adding a model without retraining, and the checkpoint."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import metrics
from model_profiling import ModelTower
from query_representation import ROWS_AT_ONCE, SURFACE_FEATURES, QueryTower, query_features
from support.data.queries import as_query
from support.encoding import reopen
from support.encoding.precomputed import PrecomputedEmbeddings
from support.system import hub
from support.system.errors import UserError, one_line, valid_unicode
from support.system.safe_torch import is_plain, not_ours, read_checkpoint, write_checkpoint

Query = str | list[dict]  # a text, or chat messages
FORMAT_VERSION = 4
LIBRARY = "rankrouter"  # as the hub names it
BEST = "best_model.pt"  # in a run's output folder
PATH_FLAGS = (
    *("data_path", "model_path", "output_dir", "cache_dir", "demo_dir"),
    *("capability_file", "prices", "embeddings"),
)
MODELS_AT_ONCE = 32  # products of one size, so that no bit of a model's score depends on the number of models


@dataclass(frozen=True)
class RouterConfig:
    """What shapes a router: `RankRouter(["model-a", "model-b"], encoder_width=896, config=RouterConfig())`."""

    embedding_dim: int = 512  # D, the width of the shared space and of the ID embedding
    surface_features: tuple[str, ...] = ()  # names of `SURFACE_FEATURES`
    num_clusters: int = 50  # K; 0: no cluster embedding
    cluster_dim: int = 32
    capability_dim: int = 64  # C
    use_capability: bool = True
    use_model_id: bool = True
    dropout: float = 0.5
    id_dropout: float = 0.1
    similarity_metric: str = "dot"  # or "cosine"
    scale_dot: bool = True  # a dot product is divided by sqrt(D)
    zero_init: bool = True  # the query tower's last layer starts at 0

    def __post_init__(self):
        if self.similarity_metric not in ("dot", "cosine"):
            raise ValueError(f"similarity_metric is {self.similarity_metric!r}, expected 'dot' or 'cosine'")
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim is {self.embedding_dim}, expected at least 1")


@dataclass
class Metadata:
    """What routing needs of a training beside the weights; its fields are keys of the checkpoint."""

    args: dict  # the flags
    encoder: dict  # path, fingerprint, width, pooling, layers, prefix, include_prompt, lower_case, max_length, dtype
    content_hash: str  # of the data
    seen_queries: torch.Tensor  # int64 (Q,), `query_ids` of training and validation queries
    profiles: dict  # kind of the capability vectors, and what a new model's vector is computed from
    best_single_model: str
    epoch: int | None = None  # of the best validation
    step: int | None = None  # within that epoch; None: at its end
    val_metrics: dict = field(default_factory=dict)
    temperature: float = 1.0  # at which differences of scores are log-odds
    confidence: float | None = None  # of the guard: P(beats the best single model) from which another one is chosen
    trained: dict | None = None  # a finetuned encoder's layers, lora_rank and weights
    added_models: list = field(default_factory=list)
    label_range: list[float] | None = None  # of a pointwise loss: the scores whose labels are 0 and 1
    label_temperature: float | None = None  # of a pointwise loss: at which scores are the logits of labels


class RankRouter(nn.Module):
    """Query tower and model tower, scored together by scaled dot product or by scaled cosine.

    Args:
        model_names: the M routed models, in the order of the scores.
        encoder_width: H, the width of the encoder's embeddings.
        config: see `RouterConfig`.
    """

    def __init__(self, model_names: list[str], encoder_width: int, config: RouterConfig):
        super().__init__()
        self.model_names, self.encoder_width, self.config = list(model_names), encoder_width, config
        self.metadata = None  # of a trained router
        self.encoder = None  # see `open_encoder`
        self.model_blocks = None  # see `_model_blocks`; None while the weights may change
        self.query_tower = QueryTower(
            encoder_width,
            len(config.surface_features),
            embedding_dim=config.embedding_dim,
            num_clusters=config.num_clusters,
            cluster_dim=config.cluster_dim,
            dropout=config.dropout,
            zero_init=config.zero_init,
        )
        self.model_tower = ModelTower(
            len(model_names),
            embedding_dim=config.embedding_dim,
            capability_dim=config.capability_dim,
            use_capability=config.use_capability,
            use_model_id=config.use_model_id,
            dropout=config.dropout,
            id_dropout=config.id_dropout,
        )
        # Without a scale a cosine's margin lies in [-2, 2], and BPR could not fall below softplus(-2) = 0.127.
        is_cosine = config.similarity_metric == "cosine"
        self.log_scale = nn.Parameter(torch.tensor(10.0).log()) if is_cosine else None
        # Without it, a step on all D coordinates at once moves a dot product so far that training overfits in an epoch.
        self.divisor = config.embedding_dim**0.5 if config.scale_dot else 1.0

    def train(self, mode: bool = True) -> "RankRouter":
        """Training mode, or evaluation mode; what was computed from the weights is computed again."""
        self.model_blocks = None
        return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        """As of every module; what was computed from the weights is computed again."""
        self.model_blocks = None
        return super().load_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor, cluster_idx: torch.Tensor) -> torch.Tensor:
        """Scores (B, M) of every model for standardized features (B, F) and their clusters (B,)."""
        return self.similarity(self.query_tower(x, cluster_idx), self.model_tower())  # (B, M)

    def similarity(self, q: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """Scores (B, M) of queries (B, D) and models (M, D) in the shared space."""
        if self.log_scale is None:
            return q @ m.T / self.divisor  # (B, M)
        return self.log_scale.exp() * F.normalize(q, dim=1) @ F.normalize(m, dim=1).T  # (B, M)

    @torch.no_grad()
    def score(self, x: torch.Tensor, cluster_idx: torch.Tensor) -> np.ndarray:
        """Scores (Q, M), float64, of every model for queries as `forward` takes them; sets evaluation mode.

        Raises `UserError` where a score is not finite.
        """
        if self.training:
            self.eval()
        return self._score(x, cluster_idx, self._model_blocks())  # (Q, M)

    def _score(self, x: torch.Tensor, cluster_idx: torch.Tensor, blocks: list[torch.Tensor]) -> np.ndarray:
        scores = []
        for some in zip(x.split(ROWS_AT_ONCE), cluster_idx.split(ROWS_AT_ONCE), strict=True):
            q = self.query_tower(*some)  # (B, D)
            scores.append(torch.cat([self.similarity(q, m) for m in blocks], dim=1))  # (B, M and the padding)
        scores = torch.cat(scores)[:, : len(self.model_names)]  # (Q, M)
        if not scores.isfinite().all():
            raise UserError("the router's scores are not finite; try a lower --lr")
        return scores.cpu().double().numpy()

    @torch.no_grad()
    def _model_blocks(self) -> list[torch.Tensor]:
        """All models in the shared space, in padded blocks of them, float (32, D) each."""
        blocks = self.model_tower.features().split(MODELS_AT_ONCE)
        padded = [F.pad(block, (0, 0, 0, MODELS_AT_ONCE - len(block))) for block in blocks]  # (32, C + E) each
        return [self.model_tower.mlp(block) for block in padded]  # (32, D) each

    @property
    def temperature(self) -> float:
        """The temperature at which a trained router's differences of scores are log-odds."""
        return self._trained().temperature

    def _trained(self) -> Metadata:
        if self.metadata is None:
            raise UserError("the router is not trained: it has no metadata; load a checkpoint that training wrote")
        return self.metadata

    def open_encoder(
        self,
        model_path: str | None = None,
        device: str | torch.device = "cpu",
        *,
        tokens_per_batch: int | None = None,
        cache_dir: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        """Open the encoder that a loaded router was trained with, at its path in training or at `model_path`.

        The other arguments are those of `QueryEncoder`. Raises `UserError` where there is no encoder, or another one.
        """
        metadata, named = self._trained(), {"tokens_per_batch": tokens_per_batch, "cache_dir": cache_dir}
        self.encoder = reopen.open_again(
            metadata.encoder, metadata.args, metadata.trained, model_path, device, progress=progress, **named
        )
        self.model_blocks = None
        self.to(device)

    def open_embeddings(self, embeddings: PrecomputedEmbeddings | str | Path) -> None:
        """Take precomputed embeddings, or a file of them, in the encoder's place, for a router trained on such.

        Raises `UserError` for another router, or where they are of another width. Embeddings of another encoder are
        not always recognized: there is a warning where they are unlike those of training.
        """
        trained = self._trained().encoder
        if not trained.get("precomputed"):
            raise UserError(f"the router was trained with the encoder {trained['path']}; leave out --embeddings")
        if isinstance(embeddings, (str, Path)):
            embeddings = PrecomputedEmbeddings.read(str(embeddings))
        if embeddings.vectors.shape[1] != self.encoder_width:
            problem = f"{embeddings.path} has embeddings of width {embeddings.vectors.shape[1]}"
            raise UserError(f"{problem}, training had {self.encoder_width}; expected those of the same encoder")
        mean, scale = (each[: self.encoder_width].cpu() for each in (self.query_tower.mean, self.query_tower.scale))
        embeddings.warn_if_unlike(mean, scale)
        if embeddings.device != self.query_tower.mean.device:
            self.model_blocks = None
        self.encoder = embeddings
        self.to(embeddings.device)

    def embed(self, queries: list[Query], read: str = "first") -> tuple[torch.Tensor, torch.Tensor]:
        """Standardized features (Q, F) and clusters (Q,) of queries, which may repeat.

        A query is a text, or a list of chat messages, of which `read` says what the router reads: the "first" turn of
        the user, as in training, the "last", or "all". Raises `UserError` where there is no such text.
        """
        if isinstance(queries, str):
            raise UserError("queries is one text, expected a list of texts")
        queries = list(queries)
        if queries and all(isinstance(query, dict) for query in queries):
            raise UserError("queries is one list of chat messages, expected a list of such lists")
        queries = [as_query(query, read, f"query {number}") for number, query in enumerate(queries, start=1)]
        if self.encoder is None:
            self.open_encoder()
        row_of_query = {}  # distinct query -> row
        rows = [row_of_query.setdefault(query, len(row_of_query)) for query in queries]  # (Q,)
        if not rows:
            nothing = torch.empty(0, len(self.query_tower.scale), device=self.encoder.device)  # (0, F)
            return nothing, nothing.new_empty(0, dtype=torch.int64)
        distinct = list(row_of_query)
        embeddings, _ = self.encoder.embed(distinct)  # (q, H)
        if embeddings.shape[1] != self.encoder_width:
            problem = f"the encoder's embeddings are {embeddings.shape[1]} wide, in training {self.encoder_width}"
            raise UserError(f"{problem}; expected the same encoder, or the checkpoint is damaged")
        features = query_features(distinct, embeddings, self.config.surface_features)  # (q, F)
        x, cluster_idx = self.query_tower.inputs(features.to(self.encoder.device))  # (q, F), (q,)
        return x[rows], cluster_idx[rows]  # (Q, F), (Q,)

    @torch.no_grad()
    def scores_of(self, queries: list[Query], read: str = "first") -> np.ndarray:
        """A loaded router's scores (Q, M), float64, of every model for queries as `embed` takes them; raises as it."""
        x, cluster_idx = self.embed(queries, read)
        if self.training:
            self.eval()
        self.model_blocks = self.model_blocks or self._model_blocks()
        return self._score(x, cluster_idx, self.model_blocks)  # (Q, M)

    def expected_scores(self, queries: list[Query], read: str = "first") -> np.ndarray:
        """What each model is expected to score on queries, float64 (Q, M), in the units of the score table.

        Where those scores are 0 and 1, it is the probability that the model is right. NaN for models that were added,
        of which only battles or benchmarks are known. For a router that was trained by `--loss_type pointwise`; raises
        `UserError` for others, and as `embed` does.
        """
        metadata = self._trained()
        if metadata.label_range is None:
            raise UserError("the router was not trained by --loss_type pointwise, so its scores only rank models")
        low, high = metadata.label_range
        logits = self.scores_of(queries, read) / metadata.label_temperature  # (Q, M)
        expected = low + (high - low) / (1 + np.exp(-logits))  # (Q, M)
        expected[:, self.indices([added["model"] for added in metadata.added_models])] = np.nan
        return expected

    def with_fallback(
        self, scores: np.ndarray, fallback: str, confidence: float | None = None, models: list[str] | None = None
    ) -> np.ndarray:
        """Scores (Q, M) by which a model ranks above the fallback only where it beats it with this probability.

        "best" is the best single model of training, whose `confidence` (0.5 to 1) is by default the one that training
        chose on validation. Raises `UserError` where the fallback is unknown or not one of `models`, or where there is
        no such default.
        """
        metadata = self._trained()
        single = metadata.best_single_model
        is_single = fallback == single or (fallback == "best" and "best" not in self.model_names)
        fallback = single if is_single else fallback
        (fallback_idx,) = self.indices([fallback])
        if models is not None and fallback not in models:
            raise UserError(f"the fallback {one_line(fallback)} is not one of the models to rank; add it to them")
        if confidence is None:
            confidence = metadata.confidence if is_single else None
        if confidence is None:
            chosen = f"training chose none for {one_line(fallback)}"
            raise UserError(f"{chosen}; expected a confidence from 0.5 to 1 with this fallback")
        if not isinstance(confidence, (int, float)) or not 0.5 <= confidence <= 1:
            raise UserError(f"confidence is {confidence!r}, expected 0.5 to 1")
        return metrics.raise_fallback(scores, fallback_idx, confidence, metadata.temperature)

    def rank(
        self,
        queries: list[Query],
        top_k: int | None = None,
        models: list[str] | None = None,
        fallback: str | None = None,
        confidence: float | None = None,
        read: str = "first",
    ) -> list[list[tuple[str, float]]]:
        """The best models for each query, the best first, with their scores: lists of (model name, score).

        `top_k` of them, all by default; `models` restricts to some. With a `fallback`, other models rank above it only
        as `with_fallback` has it; the scores stay the router's own. Queries are texts or chat messages, see `embed`.
        Scores of one query compare with each other, not with those of another query. Raises `UserError` on an unknown
        model, an empty query, or a missing encoder.
        """
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}, expected at least 1")
        if isinstance(models, str):
            raise UserError("models is one text, expected a list of names")
        model_idx = self.indices(self.model_names if models is None else list(dict.fromkeys(models)))  # (m,)
        scores = self.scores_of(queries, read)  # (Q, M)
        ranked = scores if fallback is None else self.with_fallback(scores, fallback, confidence, models)  # (Q, M)
        order = model_idx[best_first(ranked[:, model_idx], top_k)]  # (Q, k)
        return [[(self.model_names[i], float(row[i])) for i in best] for row, best in zip(scores, order, strict=True)]

    def indices(self, names: list[str]) -> np.ndarray:
        """Indices (m,) of models by name. Raises `UserError` on one that is not routed."""
        index, names = {name: i for i, name in enumerate(self.model_names)}, list(names)
        unknown = [name for name in names if name not in index]
        if unknown:
            raise UserError(
                f"{', '.join(map(one_line, unknown))}: not among the models that the router knows; expected some of "
                f"{', '.join(map(one_line, self.model_names))}"
            )
        return np.array([index[name] for name in names], np.int64)

    def check_new_name(self, name: str) -> None:
        """Raise `UserError` where a new model cannot have this name, or the router has no capability vectors."""
        if not isinstance(name, str) or not name or name != valid_unicode(name.strip()):
            raise UserError(f"{name!r} cannot name a model; expected text in valid Unicode, without spaces around it")
        if name in self.model_names:
            raise UserError(f"the router knows {one_line(name)} already; a new model needs a name of its own")
        if self.model_tower.capability is None:
            raise UserError("the router was trained with --no_capability: a new model cannot be described to it")

    def add_model(self, name: str, vector: torch.Tensor, source: dict | None = None) -> None:
        """Add a model with this capability vector (C,), NaN where it has no value, without retraining.

        `source` says where the vector comes from, for `metadata.added_models`. Raises `UserError` as `check_new_name`
        does, or where the vector is of another shape, not finite, or has no value at all.
        """
        self.check_new_name(name)
        metadata, weight = self._trained(), self.model_tower.capability.weight  # (M, C)
        vector = torch.as_tensor(vector)
        if vector.shape != weight.shape[1:] or vector.isinf().any():
            raise UserError(f"a capability vector has {weight.shape[1]} finite values, got {list(vector.shape)}")
        if vector.isnan().all():
            raise UserError(f"nothing is known of {one_line(name)}: its capability vector has no value")
        self.model_tower.add_model(vector.float().to(weight.device))
        self.model_names.append(name)
        self.model_blocks = None
        profiles = metadata.profiles
        if profiles["kind"] == "win_rate":
            profiles = profiles | {
                "known": torch.cat([profiles["known"], vector[None].to(profiles["known"])])
            }  # (M, K)
        added = [*metadata.added_models, {"model": name, **(source or {})}]
        self.metadata = replace(metadata, profiles=profiles, added_models=added)

    def _as_checkpoint(self) -> dict:
        """All that a router is: config, weights and buffers, model names, and `metadata`, which must be there."""
        checkpoint = {
            "format_version": FORMAT_VERSION,
            "model_state_dict": {name: tensor.cpu() for name, tensor in self.state_dict().items()},
            "model_names": self.model_names,
            "config": asdict(self.config),
        }
        return checkpoint | vars(self._trained())

    def save(self, path: str | Path) -> None:
        """Write a checkpoint. Raises `UserError` where it cannot be written, or the router is not trained."""
        write_checkpoint(path, self._as_checkpoint())

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> None:
        """Write a new folder for `from_pretrained`, as the Hugging Face hub keeps models.

        It holds `model.safetensors`, `config.json` and, where there is one, the card as `README.md`, such as
        `support.reporting.card.model_card` writes it. Of local paths, only the last part is kept. Raises `UserError`
        where the folder cannot be written or is not empty, or the router is not trained.
        """
        content = self._as_checkpoint() | vars(without_local_paths(self._trained()))
        hub.write_folder(folder, content.pop("model_state_dict"), {"library_name": LIBRARY} | content, card)

    def push_to_hub(
        self, hub_id: str, card: str | None = None, private: bool = False, token: str | None = None, **options
    ) -> str:
        """Upload what `save_pretrained` writes to a hub repository, created where there is none; returns its URL.

        The options are those of `HfApi.upload_folder`, such as `commit_message`. Raises `UserError` where that fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card)
            return hub.push_folder(Path(folder), hub_id, private=private, token=token, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options) -> "RankRouter":
        """The router of a folder that `save_pretrained` wrote, or of a hub id, as `load` returns it.

        The options are those of `huggingface_hub.snapshot_download`, such as `revision`. Only `config.json` and
        `model.safetensors` are downloaded, and nothing is executed. Raises `UserError` where there is no such router.
        """
        folder = Path(os.path.expanduser(name))
        if hub.is_hub_id(str(name)):
            folder = hub.download(str(name), allow_patterns=[hub.CONFIG, hub.WEIGHTS], **options)
        weights, content = hub.read_folder(folder, LIBRARY, FORMAT_VERSION)
        return cls._checked(folder, content | {"model_state_dict": weights})

    @classmethod
    def load(cls, path: str | Path) -> "RankRouter":
        """The router of a checkpoint or of a run's output folder, on the CPU, in evaluation mode.

        Other folders and hub ids are read by `from_pretrained`. Nothing in a file is executed. Raises `UserError` where
        there is no router that training wrote.
        """
        path = Path(os.path.expanduser(path))
        path = path / BEST if os.path.isfile(path / BEST) else path
        is_hub_id = hub.is_hub_id(str(path)) and path.suffix != ".pt" and not os.path.isdir(path.parent)
        if is_hub_id or os.path.isdir(path):
            return cls.from_pretrained(path)
        return cls._checked(path, read_checkpoint(path, FORMAT_VERSION))

    @classmethod
    def _checked(cls, path: str | Path, checkpoint: dict) -> "RankRouter":
        """The router of a checkpoint that was read from a path. Raises `UserError` as `load` does."""
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch, about odd values
                router, dtypes = cls._from_checkpoint(checkpoint)
                damaged = [part for part, is_valid in router._checks(dtypes) if not is_valid]
        except Exception as error:  # a file that is not ours raises anything
            raise not_ours(path, error) from error
        if damaged:
            raise UserError(f"{path} is a damaged RankRouter checkpoint: {damaged[0]} is not what training writes")
        if unknown := set(router.config.surface_features) - set(SURFACE_FEATURES):
            raise UserError(
                f"{path} was trained with surface features that this version does not compute: "
                f"{', '.join(map(one_line, sorted(unknown)))}; expected some of {', '.join(SURFACE_FEATURES)}"
            )
        return router.eval()

    @classmethod
    def _from_checkpoint(cls, checkpoint: dict) -> tuple["RankRouter", dict[str, torch.dtype]]:
        """The router, and the dtypes that its weights should have."""
        features = tuple(checkpoint["config"].get("surface_features", ()))  # a list in JSON
        config = RouterConfig(**checkpoint["config"] | {"surface_features": features})
        checkpoint = dict.fromkeys(("label_range", "label_temperature", "confidence")) | checkpoint  # of later versions
        metadata = Metadata(**{each.name: checkpoint[each.name] for each in fields(Metadata)})
        with torch.device("meta"):  # takes no memory, whatever widths the file claims
            if type(checkpoint["model_names"]) is not list:
                raise TypeError("model_names is no list")
            router = cls(checkpoint["model_names"], metadata.encoder["width"], config)
        dtypes = {name: tensor.dtype for name, tensor in router.state_dict().items()}
        router.load_state_dict(checkpoint["model_state_dict"], assign=True)
        router.metadata = metadata
        return router, dtypes

    def _checks(self, dtypes: dict[str, torch.dtype]) -> Iterator[tuple[str, bool]]:
        """Names, sizes and finiteness of what routing relies on; raises anything where a part is missing."""
        names, metadata, weights = self.model_names, self.metadata, self.state_dict()
        args, profiles = metadata.args, metadata.profiles
        yield "a path", all(isinstance(args.get(name), str | None) for name in PATH_FLAGS)
        yield "a model's name", all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        yield "the best single model", metadata.best_single_model in names
        yield "a weight", all(is_plain(weight) and weight.dtype == dtypes[name] for name, weight in weights.items())
        yield "a weight", all(weight.isfinite().all() for weight in weights.values())
        yield (
            "a switch of the config",
            all(type(getattr(self.config, name)) is bool for name in ("scale_dot", "zero_init")),
        )
        features = self.config.surface_features
        yield "the list of surface features", all(type(name) is str for name in features)
        yield "the list of surface features", len(set(features)) == len(features)
        yield "the dropout", 0 <= self.config.dropout < 1
        yield "the temperature", type(metadata.temperature) is float and 0 < metadata.temperature < np.inf
        added = metadata.added_models
        yield "an added model", type(added) is list and all(each["model"] in names for each in added)
        text = metadata.content_hash
        yield "the hash of the data", isinstance(text, str) and text == valid_unicode(text)
        yield from reopen.checks(metadata.encoder, args, metadata.trained)
        yield "--seed", type(args["seed"]) is int and 0 <= args["seed"] < 2**32
        if metadata.label_range is not None:
            low, high = metadata.label_range
            yield "the label range", type(low) is type(high) is float and -np.inf < low < high < np.inf
            yield "the label temperature", type(metadata.label_temperature) is float
            yield "the label temperature", 0 < metadata.label_temperature < np.inf
        if metadata.confidence is not None:
            yield "the confidence", type(metadata.confidence) is float and 0.5 <= metadata.confidence <= 1
        seen = metadata.seen_queries
        yield "the list of seen queries", is_plain(seen) and seen.dtype == torch.int64 and seen.ndim == 1
        if profiles["kind"] == "win_rate":
            yield "a profile", is_plain(profiles["known"])
            yield "a profile", profiles["known"].shape == self.model_tower.capability.weight.shape
        elif profiles["kind"] == "file":
            width = self.model_tower.capability.weight.shape[1]
            yield "a profile", all(len(profiles[key]) == width for key in ("columns", "mean", "scale"))


def without_local_paths(metadata: Metadata) -> Metadata:
    """The same with the last part only of each path, as the others are of this machine; an encoder's hub id stays."""
    args, encoder = metadata.args, metadata.encoder
    names = {name: Path(os.path.abspath(args[name])).name for name in PATH_FLAGS if args.get(name)}
    name = encoder["path"] if encoder.get("from_hub") else Path(os.path.abspath(encoder["path"])).name
    if args["model_path"] is not None:
        names["model_path"] = name
    return replace(metadata, args=args | names, encoder=encoder | {"path": name})


def best_first(scores: np.ndarray, top_k: int | None = None) -> np.ndarray:
    """The columns of scores (Q, m), the highest first, of equals the first: int64 (Q, k)."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :top_k]  # (Q, k)
