"""The guard: a fixed model is left only where another one beats it with enough confidence, chosen on validation."""

import numpy as np

import metrics

CONFIDENCES = (*(np.arange(50, 100, 5) / 100).tolist(), 0.99)  # 1, the fallback itself, is a candidate, too


class GuardedRows:
    """Rows on which a guard with a fallback model is judged: what the guarded choice gains over the fallback.

    They are the rows of a score table that the fallback has a score on, or without a table the battles that contain it,
    each as a row of two models, of which the winner scores 1.

    Args:
        battles: of one side of a split.
        scores: a router's, (Q, M) of the distinct queries, or (1, M) for all.
        fallback_idx: the fallback.
        temperature: at which differences of scores are log-odds.
    """

    def __init__(self, battles, scores: np.ndarray, fallback_idx: int, temperature: float):
        self.fallback_idx, self.temperature = fallback_idx, temperature
        scores = np.broadcast_to(scores, (len(battles.unique_queries), scores.shape[1]))  # (Q, M)
        if (table := battles.table) is not None:
            kept = ~np.isnan(table.scores[:, fallback_idx])  # (R,)
            self.row, self.outcomes = battles.table_query_rows[kept], table.scores[kept]  # (R,), (R, M)
            self.scores = scores[self.row]  # (R, M)
            return
        rows, outcomes, router_scores = [np.empty(0, np.int64)], [np.empty((0, 2))], [np.empty((0, 2))]
        for pairs in battles.chunks():
            is_a = pairs.model_a_idx == fallback_idx  # (N,)
            kept = is_a | (pairs.model_b_idx == fallback_idx)  # (N,)
            other = np.where(is_a, pairs.model_b_idx, pairs.model_a_idx)[kept]  # (n,)
            won = np.where(is_a, pairs.outcome, 1 - pairs.outcome)[kept]  # (n,)
            rows.append(pairs.row[kept])
            outcomes.append(np.column_stack([won, 1 - won]))
            router_scores.append(np.column_stack([scores[rows[-1], fallback_idx], scores[rows[-1], other]]))
        self.fallback_idx, self.row = 0, np.concatenate(rows)  # (n,)
        self.outcomes, self.scores = np.concatenate(outcomes), np.concatenate(router_scores)  # (n, 2) each

    def gains(self, confidence: float | None) -> tuple[np.ndarray, np.ndarray]:
        """What the choice at a confidence scores beyond the fallback, and whether it is another model: (R,) each.

        None is the router without a guard.
        """
        scores = self.scores  # (R, M)
        if confidence is not None:
            scores = metrics.raise_fallback(scores, self.fallback_idx, confidence, self.temperature)  # (R, M)
        chosen = metrics.choices(scores, ~np.isnan(self.outcomes))  # (R, M)
        score = (chosen * np.nan_to_num(self.outcomes)).sum(1)  # (R,)
        return score - self.outcomes[:, self.fallback_idx], 1 - chosen[:, self.fallback_idx]

    def choose_confidence(self) -> float:
        """The confidence with the highest mean score, the highest of equals, to be chosen on validation.

        It is 1, which never leaves the fallback, unless the gain is more than its standard error over queries.
        """
        num_queries = len(np.unique(self.row))
        if num_queries < 2:
            return 1.0
        gain = {confidence: self.gains(confidence)[0] for confidence in CONFIDENCES}  # (R,) each
        best = max(CONFIDENCES, key=lambda confidence: (gain[confidence].mean(), confidence))
        mean = gain[best].mean()
        by_query = np.bincount(self.row, gain[best] - mean)  # (Q,); rows of one query are not independent
        error = np.sqrt((by_query**2).sum() * num_queries / (num_queries - 1)) / len(self.row)
        return best if mean > error else 1.0

    def evaluate(self, confidence: float, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The guarded router against its fallback, and against itself without a guard: means (S,) over the rows.

        `weights` (S, Q) are those of the distinct queries in each sample.
        """
        (gain, leaves), (unguarded, _) = self.gains(confidence), self.gains(None)  # (R,) each
        fallback = self.outcomes[:, self.fallback_idx]  # (R,)
        columns = {"score": fallback + gain, "fallback_score": fallback, "routed_away": leaves}
        columns |= {"difference": gain, "unguarded_difference": unguarded}
        return {name: metrics.weighted_means(values, weights[:, self.row]) for name, values in columns.items()}
