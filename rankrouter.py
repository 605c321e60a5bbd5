"""The router: scores of all models for a batch of queries, and its checkpoint."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model_profiling import ModelTower
from query_representation import ROWS_AT_ONCE, QueryTower
from support.files import UserError, atomic_write

FORMAT_VERSION = 1


class RankRouter(nn.Module):
    """Query tower and model tower, scored together by dot product or by scaled cosine.

    Args:
        model_names: the M routed models, in the order of the scores.
        encoder_width: H, the width of the encoder's embeddings.
        args: the flags of `train.py` that shape the towers: embedding_dim, num_clusters, cluster_dim,
            capability_dim, no_capability, no_model_id, dropout, similarity_metric ("dot" or "cosine").
    """

    def __init__(self, model_names: list[str], encoder_width: int, args: Mapping):
        super().__init__()
        self.model_names = list(model_names)
        self.facts = {}  # what `load` found beside the weights
        self.query_tower = QueryTower(
            encoder_width,
            embedding_dim=args["embedding_dim"],
            num_clusters=args["num_clusters"],
            cluster_dim=args["cluster_dim"],
            dropout=args["dropout"],
        )
        self.model_tower = ModelTower(
            len(model_names),
            embedding_dim=args["embedding_dim"],
            capability_dim=args["capability_dim"],
            use_capability=not args["no_capability"],
            use_model_id=not args["no_model_id"],
            dropout=args["dropout"],
        )
        # Unscaled, a cosine's margin lies in [-2, 2], and BPR could not fall below softplus(-2) = 0.127.
        is_cosine = args["similarity_metric"] == "cosine"
        self.log_scale = nn.Parameter(torch.tensor(10.0).log()) if is_cosine else None

    def forward(self, points: torch.Tensor, cluster_idx: torch.Tensor) -> torch.Tensor:
        """Scores (B, M) of every model for standardised embeddings (B, H) and their clusters (B,)."""
        q = self.query_tower(points, cluster_idx)  # (B, D)
        m = self.model_tower()  # (M, D)
        if self.log_scale is None:
            return q @ m.T  # (B, M)
        return self.log_scale.exp() * F.normalize(q, dim=1) @ F.normalize(m, dim=1).T  # (B, M)

    @torch.no_grad()
    def score(self, points: torch.Tensor, cluster_idx: torch.Tensor, queries: np.ndarray) -> np.ndarray:
        """Scores (Q, M), float64, of every model for some of the queries of `forward`, by their indices (Q,).

        The router is left in evaluation mode. Raises `UserError` where a score is not finite.
        """
        self.eval()
        rows = torch.from_numpy(queries).to(points.device).split(ROWS_AT_ONCE)
        scores = torch.cat([self(points[some], cluster_idx[some]) for some in rows])  # (Q, M)
        if not scores.isfinite().all():
            raise UserError("the router's scores are not finite; try a lower --lr")
        return scores.cpu().double().numpy()

    def save(self, path: str | Path, **facts) -> None:
        """Write a checkpoint: weights and buffers, model names, and `facts` in plain Python types.

        `facts` must hold `args` and `encoder` (path, fingerprint, width, pooling, max_length), from which `load`
        builds the router again.
        """
        state = {name: tensor.cpu() for name, tensor in self.state_dict().items()}
        checkpoint = {"format_version": FORMAT_VERSION, "model_state_dict": state, "model_names": self.model_names}
        buffer = io.BytesIO()
        torch.save(checkpoint | facts, buffer)
        atomic_write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "RankRouter":
        """The router of a checkpoint, on the CPU, in evaluation mode; `router.facts` holds what `save` was given.

        Nothing in the file is executed. Raises `UserError` where it is no checkpoint of ours.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
        try:
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            version = checkpoint.pop("format_version")
        except Exception as error:  # whatever a foreign or damaged file raises in torch's reader, or lacks
            raise _not_ours(path, error) from error
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has checkpoint format {version}, expected {FORMAT_VERSION}; train it again")
        try:
            state, model_names = checkpoint.pop("model_state_dict"), checkpoint.pop("model_names")
            router = cls(model_names, checkpoint["encoder"]["width"], checkpoint["args"])
            router.load_state_dict(state)
        except Exception as error:  # as above
            raise _not_ours(path, error) from error
        router.facts = checkpoint
        return router.eval()


def _not_ours(path: str | Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0]
    return UserError(f"{path} is no RankRouter checkpoint ({type(error).__name__}: {reason})")
