"""Evaluation on the test set: RankRouter and its baselines with paired intervals, and a description of each cluster."""

import numpy as np

import metrics
from support.evaluation.baselines import best_single_model, ranking_by_mean

BIN_SAMPLE = 2**18  # test battles from which the bins of leads are computed
CENTRAL_QUERIES, QUERY_LENGTH = 3, 200  # shown of each cluster, and the characters shown of each query


class TestEvaluation:
    """Evaluates RankRouter and its baselines on the test side of a split.

    All methods are evaluated on the same bootstrap samples of the test queries, so their differences are paired. Where
    the test side has rows of a score table, methods are also evaluated as routers on these rows, between two bounds:
    the best single model, chosen on training, and an oracle that chooses the best model of each row.

    Args:
        split: its test side is evaluated; of its training side, only a score table's means are used.
        scores: RankRouter's scores of the distinct test queries, float (Q, M).
        margin: at which RankRouter's uncalibrated scores are read as probabilities (`metrics.log_win_probability`).
        temperature: at which RankRouter is calibrated.
        seed: of the bootstrap.
    """

    __test__ = False  # pytest collects classes of this name

    def __init__(self, split, scores: np.ndarray, margin: float, temperature: float, seed: int):
        self.split, self.battles, self.table = split, split.test, split.test.table
        self.scores, self.margin, self.temperature = scores, margin, temperature
        self.sample = self.battles.sample(BIN_SAMPLE, seed)
        self.weights = metrics.bootstrap_weights(len(self.battles.unique_queries), seed)  # (S, Q)
        if split.train.table is None or not split.train.table.differs().any():  # no best single model can be chosen
            self.table = None
        if self.table is not None:
            queries, row = np.unique(self.table.query_idx, return_inverse=True)  # (q,), (rows,)
            shares = metrics.bootstrap_weights(len(queries), seed)[:, row]  # (S, rows)
            self.row_shares = shares / shares.sum(1, keepdims=True)  # (S, rows)
            self.single, self.single_is_best = self.route(ranking_by_mean(split.train.table))  # (rows,) each
            self.oracle = np.nanmax(self.table.scores, 1)  # (rows,)
        self.router_metrics, self.router_samples = self.evaluate(scores, margin, temperature)

    def evaluate(self, scores: np.ndarray, margin: float, temperature: float) -> tuple[dict, dict]:
        """All metrics of a method's scores (Q, M), or (1, M) for all queries: on the test set, and on its samples (S,).

        `margin` and `temperature` are those of the method, as for the class.
        """
        bins = metrics.lead_bins(self.sample.margins(scores))
        row, samples = evaluate_samples(self.battles, scores, self.weights, bins, margin, temperature)
        if self.table is not None:
            for name, values in zip(("mean_score", "top1_accuracy"), self.route(scores), strict=True):  # (rows,) each
                row[name], samples[name] = float(values.mean()), self.row_shares @ values  # (S,)
            gap = metrics.gap_closed(row["mean_score"], self.single.mean(), self.oracle.mean())
            row["gap_closed"] = None if np.isnan(gap) else float(gap)
            bounds = self.row_shares @ self.single, self.row_shares @ self.oracle  # (S,) each
            samples["gap_closed"] = metrics.gap_closed(samples["mean_score"], *bounds)  # (S,)
        return row, samples

    def route(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`metrics.route` of scores (Q, M), or (1, M) for all queries, on the rows of the table: (rows,) each."""
        return metrics.route(scores if len(scores) == 1 else scores[self.battles.table_query_rows], self.table.scores)

    def results(self) -> dict:
        """RankRouter's results for the history: metrics, intervals, calibration, and the bounds of a score table."""
        calibrated, uncalibrated = metrics.Reliability(temperature=self.temperature), metrics.Reliability(self.margin)
        for battles in self.battles.chunks():
            for reliability in (calibrated, uncalibrated):
                reliability.add(battles.margins(self.scores), battles.outcome)
        calibration = {"temperature": self.temperature, **calibrated.as_dict(), "uncalibrated": uncalibrated.as_dict()}
        results = {
            "test_metrics": self.router_metrics,
            "test_intervals": metrics.intervals(self.router_samples),
            "calibration": calibration,
        }
        if self.table is not None:
            single = self._routing_metrics(self.single, self.single_is_best)
            results["score_table"] = {
                "rows": len(self.table.scores),
                "best_single": single | {"model": best_single_model(self.split)},
                "oracle": self._routing_metrics(self.oracle, np.ones_like(self.oracle)),
            }
        return results

    def _routing_metrics(self, score: np.ndarray, is_best: np.ndarray) -> dict:
        """Means of the scores (rows,) of chosen models and of whether they are best (rows,), with their intervals."""
        samples = {"mean_score": self.row_shares @ score, "top1_accuracy": self.row_shares @ is_best}  # (S,) each
        means = {"mean_score": float(score.mean()), "top1_accuracy": float(is_best.mean())}
        return means | {"intervals": metrics.intervals(samples)}

    def compare(self, fitted: dict[str, tuple]) -> dict:
        """For each baseline of `baselines.fit`: metrics, intervals, and RankRouter's paired differences from it."""
        rows = {}
        for name, (chosen, val_scores, test_scores) in fitted.items():
            val = self.split.val_pairs
            temperature = metrics.fit_temperature(val.margins(val_scores), val.outcome)
            row, samples = self.evaluate(test_scores, 0.0, temperature)
            router, differences = self.router_metrics, {key: self.router_samples[key] - samples[key] for key in samples}
            rows[name] = row | {
                "chosen": chosen,
                "intervals": metrics.intervals(samples),
                "difference": {key: None if value is None else router[key] - value for key, value in row.items()},
                "difference_intervals": metrics.intervals(differences),
            }
        return rows


def evaluate_samples(
    battles, scores: np.ndarray, weights: np.ndarray, bins: np.ndarray, margin: float, temperature: float
) -> tuple[dict, dict]:
    """The metrics of scores (Q, M), or (1, M) for all queries: on all battles, and on the samples (S,) of `weights`.

    The AUC on all battles is exact, that on samples as `metrics.Totals` has it with `bins`.
    """
    weights, leads = np.concatenate([np.ones_like(weights[:1]), weights]), []  # (1 + S, Q), all battles first
    totals = metrics.Totals(weights, scores.shape[1], margin, temperature, bins)
    for listed in battles.chunks():
        d = listed.margins(scores)  # (N,)
        totals.add(*listed, d)
        leads.append(np.where(listed.outcome == 1, d, -d))
    results = totals.metrics()  # (1 + S,) each
    row = {name: None if np.isnan(values[0]) else float(values[0]) for name, values in results.items()}
    row["auc"] = metrics.auc_of_leads(np.concatenate(leads))
    return row, {name: values[1:] for name, values in results.items()}


def compare_with_truth(battles, skills: np.ndarray, fixed_skills: np.ndarray, auc: float) -> dict:
    """Metrics of the demo's true skills on some battles, and the share of the gap in AUC that a router closes.

    `skills` (Q, M) are those of each query and model, `fixed_skills` (M,) the best ranking that ignores the query;
    `auc` is the router's. The share is None where knowing the query gains nothing.
    """
    rows = {}
    for name, scores in (("fixed_ranking", fixed_skills[None]), ("true_margins", skills[battles.unique_queries])):
        (pairs,) = battles.chunks()
        d = pairs.margins(scores)  # (N,)
        rows[name] = metrics.evaluate(d, pairs.outcome, pairs.model_a_idx, pairs.model_b_idx)
    gap = metrics.gap_closed(auc, rows["fixed_ranking"]["auc"], rows["true_margins"]["auc"])
    return rows | {"gap_closed": None if np.isnan(gap) else float(gap)}


def describe_clusters(router, x, cluster_idx, train) -> list[dict]:
    """Each cluster's number of training queries, its most central queries, and every model's log-odds there.

    The log-odds are those of beating another model drawn at random, at the router's mean scores over the cluster's
    training queries; None for a cluster without any. `router` is a trained `RankRouter`, `x` (Q, F) and `cluster_idx`
    (Q,) are its inputs for the split's queries, `train` the training battles.
    """
    clusters, train_queries = [], train.unique_queries  # (Qt,)
    cluster_of_query = cluster_idx.cpu().numpy()[train_queries]  # (Qt,)
    for number, centroid in enumerate(router.query_tower.centroids):
        queries = train_queries[cluster_of_query == number]  # (q,)
        cluster = {"size": len(queries), "central_queries": [], "log_odds": None}
        if len(queries):
            distances = (x[queries] - centroid).square().sum(1).cpu().numpy()  # (q,)
            central = queries[distances.argsort(kind="stable")[:CENTRAL_QUERIES]]
            cluster["central_queries"] = [train.queries[query][:QUERY_LENGTH] for query in central]
            means = router.score(x[queries], cluster_idx[queries]).mean(0)  # (M,)
            odds = metrics.log_odds(means, router.temperature).tolist()
            cluster["log_odds"] = dict(zip(train.model_names, odds, strict=True))
        clusters.append(cluster)
    return clusters
