"""Evaluation on the test set: RankRouter and its baselines with paired intervals, and a description of each cluster."""

import numpy as np

import metrics
from support.evaluation.baselines import ranking_by_mean
from support.evaluation.cost import cost_evaluations
from support.evaluation.guard import GuardedRows

BIN_SAMPLE = 2**18  # test battles from which the bins of leads are computed
CENTRAL_QUERIES, QUERY_LENGTH = 3, 200  # shown of each cluster, and the characters shown of each query


class TestEvaluation:
    """Evaluates RankRouter and its baselines on the test side of a split.

    All methods are evaluated on the same bootstrap samples of the test queries, so their differences are paired. Where
    the test side has rows of a score table, methods are also evaluated as routers on these rows, between two bounds:
    the best single model, chosen on training, and an oracle that chooses the best model of each row. Where these rows
    have costs, cost is evaluated beside quality, too.

    Args:
        split: its test side is evaluated; settings are chosen on its validation side, and of its training side only a
            score table's means are used.
        scores, val_scores: RankRouter's scores of the distinct test and validation queries, float (Q, M) each.
        margin: at which RankRouter's uncalibrated scores are read as probabilities (`metrics.log_win_probability`).
        temperature: at which RankRouter is calibrated.
        confidence: of RankRouter's guard.
        single_model: the best one of training, the fallback of all guards.
        seed: of the bootstrap.
        prices: of each model per query; by default costs are those of the score table, if it has any.
    """

    __test__ = False  # pytest collects classes of this name

    def __init__(
        self,
        split,
        scores: np.ndarray,
        val_scores: np.ndarray,
        margin: float,
        temperature: float,
        confidence: float,
        single_model: str,
        seed: int,
        prices: dict[str, float] | None = None,
    ):
        self.split, self.battles, self.table = split, split.test, split.test.table
        self.single_model, self.costs = single_model, None
        self.scores, self.margin, self.temperature = scores, margin, temperature
        self.sample = self.battles.sample(BIN_SAMPLE, seed)
        self.weights = metrics.bootstrap_weights(len(self.battles.unique_queries), seed)  # (S, Q)
        if split.train.table is None or not split.train.table.differs().any():  # no best single model can be chosen
            self.table = None
        if self.table is not None:
            queries, row = np.unique(self.table.query_idx, return_inverse=True)  # (q,), (rows,)
            shares = metrics.bootstrap_weights(len(queries), seed)[:, row]  # (S, rows)
            self.row_shares = shares / shares.sum(1, keepdims=True)  # (S, rows)
            ranks = ranking_by_mean(split.train.table)  # (1, M)
            self.single, self.single_is_best = self.route(ranks)  # (rows,) each
            self.oracle = np.nanmax(self.table.scores, 1)  # (rows,)
            self.costs = cost_evaluations(split, prices, ranks, shares)
        self.router = self.evaluate(scores, val_scores, margin, temperature, confidence)

    def evaluate(
        self,
        scores: np.ndarray,
        val_scores: np.ndarray,
        margin: float,
        temperature: float,
        confidence: float | None = None,
    ) -> tuple[dict, dict, dict]:
        """Evaluates a method's scores (Q, M), or (1, M) for all queries, of the test and of the validation queries.

        `margin`, `temperature` and `confidence` are those of the method, as for the class; without a confidence it is
        chosen here. Returns all metrics on the test set, those on its samples (S,), and what else the history keeps.
        """
        bins = metrics.lead_bins(self.sample.margins(scores))
        row, samples = evaluate_samples(self.battles, scores, self.weights, bins, margin, temperature)
        details = {}
        if self.table is not None:
            means, mean_samples, details["groups"] = self.means(*self.route(scores))
            row, samples = row | means, samples | mean_samples
            gap = metrics.gap_closed(row["mean_score"], self.single.mean(), self.oracle.mean())
            row["gap_closed"] = None if np.isnan(gap) else float(gap)
            bounds = self.row_shares @ self.single, self.row_shares @ self.oracle  # (S,) each
            samples["gap_closed"] = metrics.gap_closed(samples["mean_score"], *bounds)  # (S,)
            chosen = metrics.choices(self.of_rows(scores), ~np.isnan(self.table.scores))  # (rows, M)
            details["choice_shares"] = self.choice_shares(chosen, self.row_shares)
        if self.costs is not None:
            numbers, details["costs"] = self.evaluate_costs(scores, val_scores)
            row |= {name: None if np.isnan(values[0]) else float(values[0]) for name, values in numbers.items()}
            samples |= {name: values[1:] for name, values in numbers.items()}
        details["guard"] = self.evaluate_guard(scores, val_scores, temperature, confidence)
        return row, samples, details

    def of_rows(self, scores: np.ndarray) -> np.ndarray:
        """Scores by row of the table, (rows, M), from those of the distinct queries (Q, M), or (1, M) for all."""
        return scores if len(scores) == 1 else scores[self.battles.table_query_rows]

    def route(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`metrics.route` of scores (Q, M), or (1, M) for all queries, on the rows of the table: (rows,) each."""
        return metrics.route(self.of_rows(scores), self.table.scores)

    def means(self, score: np.ndarray, is_best: np.ndarray) -> tuple[dict, dict, dict]:
        """Means of the scores (rows,) of chosen models and of whether they are best (rows,), and their samples (S,).

        Where the rows are of several groups, also the mean over groups of their mean scores; returns these last.
        """
        columns = {"mean_score": score, "top1_accuracy": is_best}
        means = {name: float(values.mean()) for name, values in columns.items()}
        samples = {name: self.row_shares @ values for name, values in columns.items()}  # (S,) each
        names, groups, by_sample = self.battles.group_names, {}, []
        for group in np.unique(self.table.group[self.table.group >= 0] if names else []):
            rows = self.table.group == group  # (rows,)
            groups[names[group]] = float(score[rows].mean())
            size = self.row_shares[:, rows].sum(1)  # (S,)
            total = self.row_shares[:, rows] @ score[rows]  # (S,)
            by_sample.append(np.divide(total, size, out=np.full(len(size), np.nan), where=size > 0))
        if len(groups) > 1:
            means["macro_score"] = float(np.mean(list(groups.values())))
            samples["macro_score"] = np.nanmean(by_sample, axis=0)  # (S,)
        return means, samples, groups

    def choice_shares(self, chosen: np.ndarray, row_shares: np.ndarray) -> dict:
        """The share of rows that each model is chosen for, by `metrics.choices` (r, M), with intervals over samples."""
        shares = zip(self.battles.model_names, chosen.mean(0).tolist(), (row_shares @ chosen).T, strict=True)
        return {name: {"share": share, "interval": metrics.interval(samples)} for name, share, samples in shares}

    def evaluate_costs(self, scores: np.ndarray, val_scores: np.ndarray) -> tuple[dict, dict]:
        """`CostEvaluation.evaluate` on the test, at settings chosen on validation."""
        val, test = self.costs
        return test.evaluate(scores, val.choose_settings(val_scores))

    def evaluate_guard(
        self, scores: np.ndarray, val_scores: np.ndarray, temperature: float, confidence: float | None
    ) -> dict:
        """The guard of a method with these scores (Q, M), or (1, M), and the best single model as its fallback."""
        fallback_idx = self.battles.model_names.index(self.single_model)
        if confidence is None:
            confidence = GuardedRows(self.split.val, val_scores, fallback_idx, temperature).choose_confidence()
        rows = GuardedRows(self.battles, scores, fallback_idx, temperature)
        results = rows.evaluate(confidence, self.weights)
        if self.costs is not None:
            both = (metrics.guarded(each, fallback_idx, confidence, temperature) for each in (scores, val_scores))
            numbers, _ = self.evaluate_costs(*both)
            samples = {name: metrics.interval(values[1:]) for name, values in numbers.items()}
            results["costs"] = {
                name: None if np.isnan(values[0]) else float(values[0]) for name, values in numbers.items()
            }
            results["costs"]["intervals"] = samples
        return results

    def results(self) -> dict:
        """RankRouter's results for the history: metrics, intervals, calibration, and the bounds of a score table."""
        calibrated, uncalibrated = metrics.Reliability(temperature=self.temperature), metrics.Reliability(self.margin)
        for battles in self.battles.chunks():
            for reliability in (calibrated, uncalibrated):
                reliability.add(battles.margins(self.scores), battles.outcome)
        calibration = {"temperature": self.temperature, **calibrated.as_dict(), "uncalibrated": uncalibrated.as_dict()}
        row, samples, details = self.router
        results = {
            "test_metrics": row,
            "test_intervals": metrics.intervals(samples),
            "calibration": calibration,
            "guard": {"fallback": self.single_model, "on": "battles" if self.battles.table is None else "rows"}
            | details["guard"],
        }
        if self.costs is not None:
            results["costs"] = details["costs"] | self._priced_models()
        if self.table is not None:
            shown = {name: details[name] for name in ("groups", "choice_shares")}
            results["score_table"] = {"rows": len(self.table.scores)} | shown
            for name, values in {
                "best_single": (self.single, self.single_is_best),
                "oracle": (self.oracle, np.ones_like(self.oracle)),
            }.items():
                means, samples, groups = self.means(*values)
                results["score_table"][name] = means | {"groups": groups, "intervals": metrics.intervals(samples)}
            results["score_table"]["best_single"]["model"] = self.single_model
            # Of several best models the oracle chooses the cheapest, where costs are known.
            best = metrics.choices(np.zeros((1, 1)), self.table.scores == self.oracle[:, None])  # (rows, M)
            chosen = (best, self.row_shares) if self.costs is None else self.costs[1].optimal_choices()
            results["score_table"]["oracle"]["choice_shares"] = self.choice_shares(*chosen)
        return results

    def _priced_models(self) -> dict:
        """Expected price, mean cost and mean score of each model, and the hull of these points as a router."""
        test, names = self.costs[1], self.battles.model_names
        columns = {"price": test.prices, "mean_cost": test.model_costs[0], "mean_score": test.model_scores[0]}
        models = {
            name: {column: float(values[i]) for column, values in columns.items()} for i, name in enumerate(names)
        }
        aiq = test.zero_router  # (1 + S,)
        return {
            "rows": len(test.query_rows),
            "rows_left_out": test.num_left_out,
            "strong": names[test.strong],
            "weak": names[test.weak],
            "models": models,
            "aiq_of_models": None if np.isnan(aiq[0]) else float(aiq[0]),
            "aiq_of_models_interval": metrics.interval(aiq[1:]),
        }

    def compare(self, fitted: dict[str, tuple]) -> dict:
        """For each baseline of `baselines.fit`: metrics, intervals, and RankRouter's paired differences from it."""
        rows = {}
        for name, (chosen, val_scores, test_scores) in fitted.items():
            val = self.split.val_pairs
            temperature = metrics.fit_temperature(val.margins(val_scores), val.outcome)
            row, samples, details = self.evaluate(test_scores, val_scores, 0.0, temperature)
            router, router_samples, _ = self.router
            differences = {key: router_samples[key] - samples[key] for key in samples}
            rows[name] = (
                row
                | details
                | {
                    "chosen": chosen,
                    "intervals": metrics.intervals(samples),
                    "difference": {key: None if value is None else router[key] - value for key, value in row.items()},
                    "difference_intervals": metrics.intervals(differences),
                }
            )
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
