"""The router: scores of all models for a batch of queries, their ranking, a model more, and the checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model_profiling import ModelTower
from query_representation import ROWS_AT_ONCE, QueryTower
from support.cached_encoder import Encoder
from support.checkpoints import is_plain, not_ours, read_checkpoint, write_checkpoint
from support.files import UserError, one_line, valid_unicode

FORMAT_VERSION = 3
CHOICES = {"pooling": ("mean", "last"), "similarity_metric": ("dot", "cosine")}
MODELS_AT_ONCE = 32  # products of one size, so that no bit of a model's score depends on how many others there are


class RankRouter(nn.Module):
    """Query tower and model tower, scored together by dot product or by scaled cosine.

    Args:
        model_names: the M routed models, in the order of the scores.
        encoder_width: H, the width of the encoder's embeddings.
        args: the flags of `train.py` that shape the towers: embedding_dim, num_clusters, cluster_dim,
            capability_dim, no_capability, no_model_id, dropout, id_dropout, random_start, similarity_metric ("dot" or
            "cosine"), unscaled.
    """

    def __init__(self, model_names: list[str], encoder_width: int, args: Mapping):
        super().__init__()
        self.model_names = list(model_names)
        self.facts = {}  # what `load` found beside the weights
        self.encoder = None  # see `open_encoder`
        self.blocks = None  # of `_blocks`, once a router has ranked, until its weights may have changed
        self.register_load_state_dict_post_hook(lambda router, _: setattr(router, "blocks", None))
        self.query_tower = QueryTower(
            encoder_width,
            embedding_dim=args["embedding_dim"],
            num_clusters=args["num_clusters"],
            cluster_dim=args["cluster_dim"],
            dropout=args["dropout"],
            random_start=args["random_start"],
        )
        self.model_tower = ModelTower(
            len(model_names),
            embedding_dim=args["embedding_dim"],
            capability_dim=args["capability_dim"],
            use_capability=not args["no_capability"],
            use_model_id=not args["no_model_id"],
            dropout=args["dropout"],
            id_dropout=args["id_dropout"],
        )
        # Unscaled, a cosine's margin lies in [-2, 2], and BPR could not fall below softplus(-2) = 0.127.
        is_cosine = args["similarity_metric"] == "cosine"
        self.log_scale = nn.Parameter(torch.tensor(10.0).log()) if is_cosine else None
        # Unscaled, a step on all D coordinates at once moves a dot product so far that training overfits in an epoch.
        self.divisor = 1.0 if args["unscaled"] else args["embedding_dim"] ** 0.5

    def train(self, mode: bool = True) -> "RankRouter":
        """Training mode, or evaluation mode; what was computed from the weights is computed again."""
        self.blocks = None
        return super().train(mode)

    def forward(self, points: torch.Tensor, cluster_idx: torch.Tensor) -> torch.Tensor:
        """Scores (B, M) of every model for standardised embeddings (B, H) and their clusters (B,)."""
        return self.similarity(self.query_tower(points, cluster_idx), self.model_tower())  # (B, M)

    def similarity(self, q: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """Scores (B, M) of queries (B, D) and models (M, D) in the shared space."""
        if self.log_scale is None:
            return q @ m.T / self.divisor  # (B, M)
        return self.log_scale.exp() * F.normalize(q, dim=1) @ F.normalize(m, dim=1).T  # (B, M)

    @torch.no_grad()
    def score(self, points: torch.Tensor, cluster_idx: torch.Tensor, blocks: list | None = None) -> np.ndarray:
        """Scores (Q, M), float64, of every model for the queries of `forward`.

        `blocks` are those of `_blocks`, where they have been computed already. The router is left in evaluation mode.
        Raises `UserError` where a score is not finite.
        """
        if self.training:
            self.eval()
        blocks, scores = blocks or self._blocks(), []
        for some in zip(points.split(ROWS_AT_ONCE), cluster_idx.split(ROWS_AT_ONCE), strict=True):
            q = self.query_tower(*some)  # (B, D)
            scores.append(torch.cat([self.similarity(q, m) for m in blocks], dim=1))  # (B, M and the padding)
        scores = torch.cat(scores)[:, : len(self.model_names)]  # (Q, M)
        if not scores.isfinite().all():
            raise UserError("the router's scores are not finite; try a lower --lr")
        return scores.cpu().double().numpy()

    @torch.no_grad()
    def _blocks(self) -> list[torch.Tensor]:
        """All models in the shared space, padded blocks of them, float (32, D) each."""
        blocks = self.model_tower.features().split(MODELS_AT_ONCE)
        padded = [F.pad(block, (0, 0, 0, MODELS_AT_ONCE - len(block))) for block in blocks]  # (32, C + E) each
        return [self.model_tower.mlp(block) for block in padded]  # (32, D) each

    @property
    def temperature(self) -> float:
        """That at which a loaded router's differences of scores are read as log-odds."""
        return self.facts["temperature"]

    def open_encoder(self, model_path: str | None = None, device: str | torch.device = "cpu", **how) -> None:
        """Find the encoder that a loaded router was trained with, at its own path or at `model_path`.

        `how`: `tokens_per_batch`, `cache_dir`, `progress`, as `support.cached_encoder.Encoder` takes them. Raises
        `UserError` where there is no encoder, or another one.
        """
        args, trained = self.facts["args"], self.facts["encoder"]
        how = {"progress": False} | how | {name: args[name] for name in ("pooling", "max_length")}
        how |= {"dtype": trained["dtype"], "download": model_path is not None}  # a file may not make us fetch anything
        how["trained"] = self.facts.get("trained")
        encoder = Encoder(trained["path"] if model_path is None else model_path, torch.device(device), **how)
        found, expected = encoder.usage["fingerprint"], trained["fingerprint"]
        if found != expected:
            raise UserError(
                f"the encoder at {encoder.path} is not the one that the router was trained with: its fingerprint is "
                f"{found[:12]}, expected {expected[:12]}; name that one's folder with --model_path"
            )
        self.encoder, self.blocks = encoder, None
        self.to(device)

    def embed(self, queries: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised embeddings (Q, H) and clusters (Q,) of queries, any of which may come again.

        Raises `UserError` where a query is no text or is empty.
        """
        if isinstance(queries, str):
            raise UserError("queries is one text, expected a list of texts")
        queries = list(queries)
        for number, query in enumerate(queries, start=1):
            if not isinstance(query, str) or not query.strip():
                raise UserError(
                    f"query {number} is {'empty' if isinstance(query, str) else repr(query)}, expected text"
                )
        if self.encoder is None:
            self.open_encoder()
        place = {}  # query -> its number among the distinct
        row = [place.setdefault(valid_unicode(query.strip()), len(place)) for query in queries]  # (Q,)
        if not place:
            nothing = torch.empty(0, self.facts["encoder"]["width"], device=self.encoder.device)  # (0, H)
            return nothing, nothing.new_empty(0, dtype=torch.int64)
        embeddings, _ = self.encoder.embed(list(place))  # (distinct, H)
        points = self.query_tower.standardise(embeddings.to(self.encoder.device))  # (distinct, H)
        return points[row], self.query_tower.assign(points)[row]  # (Q, H), (Q,)

    def scores_of(self, queries: list[str]) -> np.ndarray:
        """A loaded router's scores (Q, M), float64, of every model for queries. Raises as `embed` does."""
        points, cluster_idx = self.embed(queries)
        if self.training:
            self.eval()
        self.blocks = self.blocks or self._blocks()
        return self.score(points, cluster_idx, self.blocks)  # (Q, M)

    def rank(
        self, queries: list[str], top_k: int | None = None, models: list[str] | None = None
    ) -> list[list[tuple[str, float]]]:
        """The best models for each query, the best first, with their scores: lists of (model name, score).

        `top_k` of them, all without it; `models` restricts to some. Scores of one query compare with each other, not
        with those of another query. Raises `UserError` on an unknown model, an empty query, or a missing encoder.
        """
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}, expected at least 1")
        chosen = self.indices(self.model_names if models is None else list(dict.fromkeys(models)))  # (m,)
        scores = self.scores_of(queries)[:, chosen]  # (Q, m)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]  # (Q, k)
        return [
            [(self.model_names[chosen[i]], float(row[i])) for i in best]
            for row, best in zip(scores, order, strict=True)
        ]

    def indices(self, names: list[str]) -> np.ndarray:
        """Indices (m,) of models by name. Raises `UserError` on one that is not routed."""
        place, names = {name: i for i, name in enumerate(self.model_names)}, list(names)
        unknown = [name for name in names if name not in place]
        if unknown:
            raise UserError(
                f"{', '.join(map(one_line, unknown))}: not among the models that the router knows; expected some of "
                f"{', '.join(map(one_line, self.model_names))}"
            )
        return np.array([place[name] for name in names], np.int64)

    def refuse_name(self, name: str) -> None:
        """Raise `UserError` where a new model may not have that name, or the router has no capability vectors."""
        if not name.strip() or name != valid_unicode(name):
            raise UserError(f"{name!r} is no name for a model; expected text, in valid Unicode")
        if name in self.model_names:
            raise UserError(f"the router knows {one_line(name)} already; a new model needs a name of its own")
        if self.model_tower.capability is None:
            raise UserError("the router was trained with --no_capability: nothing of a new model can be told to it")

    def add_model(self, name: str, vector: torch.Tensor) -> None:
        """Route one more model, of this capability vector (C,), NaN where it has no value; nothing else changes.

        Raises `UserError` as `refuse_name` does, or where the vector has no value at all.
        """
        self.refuse_name(name)
        if vector.isnan().all():
            raise UserError(f"nothing is known of {one_line(name)}: its capability vector has no value")
        self.model_tower.add_model(vector.float().to(self.model_tower.capability.weight.device))
        self.model_names.append(name)
        self.blocks = None
        if self.facts["profiles"]["kind"] == "win_rate":
            known = self.facts["profiles"]["known"]  # (M, K)
            self.facts["profiles"] = {"kind": "win_rate", "known": torch.cat([known, vector[None].to(known)])}

    def save(self, path: str | Path, **facts) -> None:
        """Write a checkpoint: weights and buffers, model names, and `facts` in plain Python types.

        `facts` must hold `args` and `encoder` (path, fingerprint, width, pooling, max_length), from which `load`
        builds the router again.
        """
        state = {name: tensor.cpu() for name, tensor in self.state_dict().items()}
        held = {"format_version": FORMAT_VERSION, "model_state_dict": state, "model_names": self.model_names}
        write_checkpoint(path, held | facts)

    @classmethod
    def load(cls, path: str | Path) -> "RankRouter":
        """The router of a checkpoint, on the CPU, in evaluation mode; `router.facts` holds what `save` was given.

        Nothing in the file is executed. Raises `UserError` where it is no checkpoint of ours.
        """
        checkpoint = read_checkpoint(path, FORMAT_VERSION)
        try:
            state, model_names = checkpoint.pop("model_state_dict"), checkpoint.pop("model_names")
            if not checkpoint["args"]["embedding_dim"] >= 1:  # torch would only warn
                raise ValueError("its shared space has no dimension")
            with torch.device("meta"):  # takes no memory, whatever widths the file claims
                router = cls(model_names, checkpoint["encoder"]["width"], checkpoint["args"])
            dtypes = {name: tensor.dtype for name, tensor in router.state_dict().items()}
            router.load_state_dict(state, assign=True)
            router.facts = checkpoint
            wrong = [what for what, holds in router._promises(dtypes) if not holds]
        except Exception as error:  # whatever a file raises that is whole, and not what training writes
            raise not_ours(path, error) from error
        if wrong:
            raise UserError(f"{path} is a damaged RankRouter checkpoint: {wrong[0]} is not what training writes")
        return router.eval()

    def _promises(self, dtypes: dict[str, torch.dtype]) -> Iterator[tuple[str, bool]]:
        """What routing relies on in a checkpoint, and whether it holds; raises whatever it may where one lacks.

        `dtypes` are those of the weights as training has them.
        """
        facts, profiles, names = self.facts, self.facts["profiles"], self.model_names
        args = facts["args"]
        weights = self.state_dict()
        yield "a model's name", all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        yield "the best single model", facts["best_single_model"] in names
        yield "a weight's layout", all(is_plain(tensor) for tensor in weights.values())
        yield "a weight's dtype", all(tensor.dtype == dtypes[name] for name, tensor in weights.items())
        yield "a weight", all(tensor.isfinite().all() for tensor in weights.values())
        yield "the temperature", 0 < self.temperature < np.inf
        encoder = facts["encoder"]
        yield "a fact of the encoder", all(isinstance(encoder[key], str) for key in ("path", "fingerprint"))
        yield "the encoder's dtype", encoder["dtype"] in ("float32", "bfloat16", "float16")
        for name, choices in CHOICES.items():
            yield f"--{name}", args[name] in choices
        for name in ("unscaled", "random_start"):
            yield f"--{name}", type(args[name]) is bool
        yield "--max_length", type(args["max_length"]) is int and 1 <= args["max_length"] <= 2**20
        yield "--seed", type(args["seed"]) is int and 0 <= args["seed"] < 2**32
        yield "--dropout", 0 <= args["dropout"] < 1
        further, asked = facts.get("trained"), args.get("finetune_encoder", False)
        yield "whether the encoder was trained", (further is not None) == asked
        if further is not None:
            sizes = further["layers"], further["lora_rank"]
            yield "what was trained of the encoder", sizes == (args["finetune_layers"], args["lora_rank"])
            yield "what was trained of the encoder", all(size is None or 1 <= size <= 8192 for size in sizes)
            for name, weight in further["weights"].items():
                yield "a weight of the encoder", type(name) is str and is_plain(weight)
                yield "a weight of the encoder", weight.dtype == torch.float32 and bool(weight.isfinite().all())
        seen = facts["seen_queries"]
        yield "the list of seen queries", is_plain(seen) and seen.dtype == torch.int64 and seen.ndim == 1
        if profiles["kind"] == "win_rate":
            yield "a profile", is_plain(profiles["known"])
            yield "a profile", profiles["known"].shape == self.model_tower.capability.weight.shape
        elif profiles["kind"] == "file":
            width = self.model_tower.capability.weight.shape[1]
            yield "a profile", all(len(profiles[key]) == width for key in ("columns", "mean", "scale"))
