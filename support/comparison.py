"""Methods compared on one test set, with paired intervals; what a score table says of them, and what each cluster."""

import argparse

import numpy as np

import metrics
from support import baselines
from support.baselines import best_single_model, ranking_by_mean
from support.runs import timed

CENTRAL_QUERIES, QUERY_SHOWN = 3, 200  # of a cluster, and how many characters of each


class Judge:
    """Judges RankRouter and its baselines on the test side of a split, on the same bootstrap samples of its queries.

    Where the side has rows of a score table, they say what the highest-scored model of each is worth, between the best
    single model, chosen on training, and an oracle that knows the row.

    Args:
        split: its test side is looked at; of training, only a score table's means.
        scores: RankRouter's, of the distinct test queries (Q, M).
        margin, temperature: at which RankRouter's scores are read as they are, and calibrated.
        seed: of the bootstrap.
    """

    def __init__(self, split, scores: np.ndarray, margin: float, temperature: float, seed: int):
        self.split, battles = split, split.test
        self.scores, self.margin, self.temperature = scores, margin, temperature
        self.weights = metrics.bootstrap_weights(battles.query_idx, seed)  # (R, N)
        self.table = battles.table
        if self.table is not None:
            weights = metrics.bootstrap_weights(self.table.query_idx, seed)  # (R, rows)
            self.row_shares = weights / weights.sum(1, keepdims=True)  # (R, rows)
            self.query_of_row = np.searchsorted(battles.fought[0], self.table.query_idx)  # (rows,)
            self.single, self.single_is_best = self.route(ranking_by_mean(split.train.table))  # (rows,) each
            self.oracle = np.nanmax(self.table.scores, 1)  # (rows,)
        self.router, self.router_samples = self.judge(scores, margin, temperature)

    def judge(self, scores: np.ndarray, margin: float, temperature: float) -> tuple[dict, dict]:
        """Metrics of scores (Q, M) of the test queries, or (1, M) for all, and the same on the samples (R,) each."""
        battles = self.split.test
        d = battles.margins(scores)  # (N,)
        columns = d, battles.outcome, battles.model_a_idx, battles.model_b_idx
        calibrated = metrics.log_loss(d, battles.outcome, temperature=temperature)
        row = metrics.evaluate(*columns, margin) | {"log_loss_calibrated": calibrated}
        samples = metrics.evaluate_resamples(*columns, self.weights, margin, temperature)
        if self.table is not None:
            for name, values in zip(("mean_score", "top1_accuracy"), self.route(scores), strict=True):  # (rows,) each
                row[name], samples[name] = float(values.mean()), self.row_shares @ values  # (R,)
            gap = metrics.gap_closed(row["mean_score"], self.single.mean(), self.oracle.mean())
            row["gap_closed"] = None if np.isnan(gap) else float(gap)
            ends = self.row_shares @ self.single, self.row_shares @ self.oracle  # (R,) each
            samples["gap_closed"] = metrics.gap_closed(samples["mean_score"], *ends)  # (R,)
        return row, samples

    def route(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `metrics.route` says of scores (Q, M), or (1, M) for all, on the rows of the table: (rows,) each."""
        return metrics.route(scores if len(scores) == 1 else scores[self.query_of_row], self.table.scores)

    def results(self) -> dict:
        """What a history holds of RankRouter's test: metrics, intervals, calibration, and the ends of the gap."""
        d, outcome = self.split.test.margins(self.scores), self.split.test.outcome  # (N,) each
        calibrated = metrics.reliability(d, outcome, temperature=self.temperature)
        raw = metrics.reliability(d, outcome, self.margin)
        found = {
            "test_metrics": self.router,
            "test_intervals": {name: metrics.interval(self.router_samples[name]) for name in self.router},
            "calibration": {"temperature": self.temperature, **calibrated, "uncalibrated": raw},
        }
        if self.table is not None:
            ends = {
                "best_single": (self.single, self.single_is_best),
                "oracle": (self.oracle, np.ones_like(self.oracle)),
            }
            found["score_table"] = {"rows": len(self.table.scores)}
            for end, columns in ends.items():
                columns = dict(zip(("mean_score", "top1_accuracy"), columns, strict=True))  # (rows,) each
                found["score_table"][end] = {name: float(values.mean()) for name, values in columns.items()}
                found["score_table"][end]["intervals"] = {
                    name: metrics.interval(self.row_shares @ values) for name, values in columns.items()
                }
            found["score_table"]["best_single"]["model"] = best_single_model(self.split)
        return found

    def compare(self, fitted: dict[str, tuple]) -> dict:
        """Each baseline that `baselines.fit` returns: metrics, intervals, and RankRouter's difference to it, paired."""
        rows = {}
        for name, (chosen, val_scores, test_scores) in fitted.items():
            temperature = metrics.fit_temperature(self.split.val.margins(val_scores), self.split.val.outcome)
            row, samples = self.judge(test_scores, 0.0, temperature)
            rows[name] = row | {
                "chosen": chosen,
                "intervals": {metric: metrics.interval(samples[metric]) for metric in row},
                "difference": {
                    metric: None if value is None else self.router[metric] - value for metric, value in row.items()
                },
                "difference_intervals": {
                    metric: metrics.interval(self.router_samples[metric] - samples[metric]) for metric in row
                },
            }
        return rows


def link_margin(args: argparse.Namespace) -> float:
    """The margin at which scores are read as probabilities as they are, by `metrics.log_win_probability`."""
    return args.margin if args.loss_type == "bpr" else 0.0


def test(args: argparse.Namespace, split, router, trained: tuple, pretrained: tuple, history: dict) -> None:
    """Test, once, with the weights that were kept, and beside the baselines; fills `history`.

    `trained` are the points (Q, H) and clusters (Q,) of the split's queries as the router sees them, `pretrained` those
    that it began with, which are what baselines get.
    """
    asked, timing = split.test.fought[0], history["timing"]
    with timed(timing, "evaluate"):
        test_scores = router.score(*(column[asked] for column in trained))  # (Q, M)
        judge = Judge(split, test_scores, link_margin(args), router.temperature, args.seed)
        history |= judge.results()
        if args.num_clusters:
            history["clusters"] = describe_clusters(router, *trained, split.train)
    if args.baselines != "none":
        with timed(timing, "baselines"):
            arrays = [column.cpu().numpy() for column in pretrained]
            fitted = baselines.fit(split, *arrays, args.num_clusters, args.baselines == "all", args.seed)
            history["baselines"] = judge.compare(fitted)


def compare_with_truth(battles, skills: np.ndarray, fixed_skills: np.ndarray, auc: float) -> dict:
    """Metrics of the demo's known truth on some battles, and the share of the gap in AUC that a router closes.

    `skills` (Q, M) are those of each query and model, `fixed_skills` (M,) the best that know no query; `auc` is the
    router's. The share is None where the truth gains nothing by knowing the query.
    """
    rows = {}
    for name, scores in (("fixed_ranking", fixed_skills[None]), ("true_margins", skills[battles.fought[0]])):
        d = battles.margins(scores)  # (N,)
        rows[name] = metrics.evaluate(d, battles.outcome, battles.model_a_idx, battles.model_b_idx)
    gap = metrics.gap_closed(auc, rows["fixed_ranking"]["auc"], rows["true_margins"]["auc"])
    return rows | {"gap_closed": None if np.isnan(gap) else float(gap)}


def describe_clusters(router, points, cluster_idx, train) -> list[dict]:
    """Each cluster's number of training queries, the most central of them, and every model's log-odds there.

    `points` (Q, H) and `cluster_idx` (Q,) are the tensors that the router takes. The log-odds are those of beating
    another model drawn at random, at the router's mean scores over the cluster's training queries.
    """
    clusters, (all_queries, _) = [], train.fought  # (Qt,)
    cluster_of_query = cluster_idx.cpu().numpy()[all_queries]  # (Qt,)
    for number, centroid in enumerate(router.query_tower.centroids):
        queries = all_queries[cluster_of_query == number]  # (q,)
        found = {"size": len(queries), "central_queries": [], "log_odds": None}
        if len(queries):
            distances = (points[queries] - centroid).square().sum(1).cpu().numpy()  # (q,)
            central = queries[distances.argsort(kind="stable")[:CENTRAL_QUERIES]]
            found["central_queries"] = [train.queries[query][:QUERY_SHOWN] for query in central]
            means = router.score(points[queries], cluster_idx[queries]).mean(0)  # (M,)
            odds = metrics.log_odds(means, router.temperature).tolist()
            found["log_odds"] = dict(zip(train.model_names, odds, strict=True))
        clusters.append(found)
    return clusters
