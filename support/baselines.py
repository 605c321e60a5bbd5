"""What RankRouter must beat on the same split."""

import numpy as np

import metrics


def compare_with_truth(battles, skills: np.ndarray, fixed_skills: np.ndarray, auc: float) -> dict:
    """Metrics of the demo's known truth on some battles, and the share of the gap in AUC that a router closes.

    `skills` (Q, M) are those of each query and model, `fixed_skills` (M,) the best that know no query; `auc` is the
    router's. The share is None where the truth gains nothing by knowing the query.
    """
    rows = {}
    for name, scores in (("fixed_ranking", np.broadcast_to(fixed_skills, skills.shape)), ("true_margins", skills)):
        score_a, score_b = (scores[battles.query_idx, idx] for idx in (battles.model_a_idx, battles.model_b_idx))
        rows[name] = metrics.evaluate(score_a - score_b, battles.outcome, battles.model_a_idx, battles.model_b_idx)
    fixed, true = rows["fixed_ranking"]["auc"], rows["true_margins"]["auc"]
    return rows | {"gap_closed": (auc - fixed) / (true - fixed) if true > fixed else None}
