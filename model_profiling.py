"""Model tower: a learnable capability vector and an ID embedding per model, mapped into the shared space."""

import torch
from torch import nn


class ModelTower(nn.Module):
    """Maps every routed model to a vector of the shared space.

    A model's capability vector (`capability_dim` wide) and its ID embedding (`embedding_dim` wide) are
    concatenated and combined by an MLP. Either part can be left out (`use_capability`, `use_model_id`), not
    both: raises `ValueError` then.
    """

    def __init__(
        self,
        num_models: int,
        embedding_dim: int = 512,
        capability_dim: int = 64,
        use_capability: bool = True,
        use_model_id: bool = True,
        dropout: float = 0.1,
    ):
        super().__init__()
        if not (use_capability or use_model_id):
            raise ValueError("a model tower needs capability vectors, ID embeddings, or both")
        self.capability = nn.Embedding(num_models, capability_dim) if use_capability else None
        self.model_id = nn.Embedding(num_models, embedding_dim) if use_model_id else None
        width = use_capability * capability_dim + use_model_id * embedding_dim
        self.mlp = nn.Sequential(
            nn.Linear(width, embedding_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(embedding_dim, embedding_dim),
        )

    def forward(self) -> torch.Tensor:
        """All models in the shared space: float (M, D)."""
        parts = [part.weight for part in (self.capability, self.model_id) if part is not None]
        return self.mlp(torch.cat(parts, dim=1))  # (M, D)
