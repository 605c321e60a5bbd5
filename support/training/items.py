"""What a step of training learns from: single battles, the pairs of rows of a score table, or their single scores."""

import numpy as np
import torch

from support.data.battles import PAIRS_AT_ONCE, Battles, pairs_and_ties


class BattleItems:
    """Single battles, each an item that a step can learn from."""

    at_once = PAIRS_AT_ONCE  # items

    def __init__(self, battles: Battles, device: torch.device):
        models = np.column_stack([battles.model_a_idx, battles.model_b_idx])  # (N, 2)
        self.query_idx = battles.query_idx  # (N,)
        self.models, self.outcome = (torch.from_numpy(column).to(device) for column in (models, battles.outcome))
        self.counts = torch.ones(len(models), dtype=torch.int64)  # (N,), battles of each item

    def targets(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of items (n,): each battle's place among them (B,), models (B, 2), and outcome (B,)."""
        return torch.arange(len(items), device=items.device), self.models[items], self.outcome[items]


class RowItems:
    """Rows of a score table, each an item with all its pairs of models; a single battle is a row of two scores.

    Pairs are listed for the rows of a step only: of all rows they may not fit into memory. Scores are compared by their
    ranks in the row, which float32 holds without making ties.
    """

    def __init__(self, battles: Battles, device: torch.device):
        winners = np.full((len(battles.outcome), len(battles.model_names)), np.nan, np.float32)  # (N, M)
        for models, outcome in ((battles.model_a_idx, battles.outcome), (battles.model_b_idx, 1 - battles.outcome)):
            winners[np.arange(len(models)), models] = outcome
        ranks = np.concatenate([winners, battles.table.ranks()])  # (I, M)
        self.query_idx, self.ties = np.concatenate(battles.query_columns()), battles.ties  # (I,)
        self.at_once = max(1, PAIRS_AT_ONCE // ranks.shape[1] ** 2)
        pairs, ties = pairs_and_ties(ranks)  # (I,) each
        self.ranks, self.counts = torch.from_numpy(ranks).to(device), torch.from_numpy(pairs)
        if not self.ties:
            self.counts -= torch.from_numpy(ties)

    def targets(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of items (n,): each battle's place among them (B,), models (B, 2), and outcome (B,)."""
        ranks = self.ranks[items]  # (n, M)
        d = ranks[:, :, None] - ranks[:, None, :]  # (n, M, M), NaN where a score is missing
        row, winner, loser = (d > 0).nonzero().T  # (B,) each
        outcome = torch.ones(len(row), device=row.device)  # (B,)
        if self.ties:
            tied_row, a, b = (d == 0).triu(1).nonzero().T  # (t,) each
            row, winner, loser = (torch.cat(pair) for pair in ((row, tied_row), (winner, a), (loser, b)))
            outcome = torch.cat([outcome, torch.full_like(a, 0.5, dtype=torch.float32)])  # (B,)
        return row, torch.stack([winner, loser], dim=1), outcome


class ScoreItems:
    """Rows of a score table, each an item with its single scores, for a pointwise loss.

    Args:
        battles: the training battles.
        label_range: the scores that are 0 and 1 as labels.
    """

    def __init__(self, battles: Battles, device: torch.device, label_range: list[float]):
        labels = battles.table.labels(label_range)  # (R, M), NaN where a score is missing
        self.query_idx, self.labels = battles.table.query_idx, torch.from_numpy(labels.astype(np.float32)).to(device)
        self.counts = torch.from_numpy((~np.isnan(labels)).sum(1))  # (R,)
        self.at_once = max(1, PAIRS_AT_ONCE // labels.shape[1])

    def targets(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of items (n,): each score's place among them (B,), model (B, 1), and label (B,)."""
        labels = self.labels[items]  # (n, M)
        row, model = (~labels.isnan()).nonzero().T  # (B,) each
        return row, model[:, None], labels[row, model]


Items = BattleItems | RowItems | ScoreItems


def make_items(battles: Battles, device: torch.device, label_range: list[float] | None) -> Items:
    """What a training learns from: scores where there is a label range, else rows of a score table, else battles."""
    if label_range is not None:
        return ScoreItems(battles, device, label_range)
    return BattleItems(battles, device) if battles.table is None else RowItems(battles, device)
