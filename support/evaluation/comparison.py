"""Evaluation on the test set: RankRouter and its baselines with paired intervals, and a description of each cluster."""

import numpy as np

import metrics
from support.evaluation.baselines import ranking_by_mean
from support.evaluation.cost import cost_evaluations, row_costs
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
        self.fallback, self.costs, self.prices = single_model, None, prices
        self.scores, self.margin, self.temperature = scores, margin, temperature
        self.sample = self.battles.sample(BIN_SAMPLE, seed)
        self.weights = all_and_samples(len(self.battles.unique_queries), seed)  # (1 + S, Q)
        if split.train.table is None or not split.train.table.differs().any():  # no best single model can be chosen
            self.table = None
        if self.table is not None:
            self.row_weights = self.weights[:, self.battles.table_query_rows]  # (1 + S, rows)
            ranks = ranking_by_mean(split.train.table)  # (1, M)
            self.single, self.single_is_best = metrics.route(ranks, self.table.scores)  # (rows,) each
            self.oracle = np.nanmax(self.table.scores, 1)  # (rows,)
            ends = self.single, self.oracle
            self.bounds = [metrics.weighted_means(end, self.row_weights) for end in ends]  # (1 + S,) each
            self.costs = cost_evaluations(split, prices, ranks, self.row_weights)
        self.router = self.evaluate(scores, val_scores, margin, temperature, confidence)

    def evaluate(
        self,
        scores: np.ndarray,
        val_scores: np.ndarray,
        margin: float,
        temperature: float,
        confidence: float | None = None,
    ) -> tuple[dict[str, np.ndarray], dict]:
        """Evaluates a method's scores (Q, M), or (1, M) for all queries, of the test and of the validation queries.

        `margin`, `temperature` and `confidence` are those of the method, as for the class; without a confidence it is
        chosen here. Returns all metrics on the test set and its samples (1 + S,), and what else the history keeps.
        """
        bins = metrics.lead_bins(self.sample.margins(scores))
        numbers, details = evaluate_samples(self.battles, scores, self.weights, bins, margin, temperature), {}
        if self.table is not None:
            of_rows = scores if len(scores) == 1 else scores[self.battles.table_query_rows]  # (rows, M) or (1, M)
            means, details["groups"] = self.means(*metrics.route(of_rows, self.table.scores))
            numbers |= means | {"gap_closed": metrics.gap_closed(means["mean_score"], *self.bounds)}
            chosen = metrics.choices(of_rows, ~np.isnan(self.table.scores))  # (rows, M)
            details["choice_shares"] = self.choice_shares(chosen)
        if self.costs is not None:
            val, test = self.costs
            cost_numbers, details["costs"] = test.evaluate(scores, val.choose_settings(val_scores))
            numbers |= cost_numbers
        details["guard"] = self.evaluate_guard(scores, val_scores, temperature, confidence)
        return numbers, details

    def means(self, score: np.ndarray, is_best: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Means (1 + S,) of the scores (rows,) of chosen models and of whether they are best (rows,).

        Where the rows are of several groups, also the mean over groups of their mean scores; returns these, too.
        """
        columns, by_group = {"mean_score": score, "top1_accuracy": is_best}, {}
        means = {name: metrics.weighted_means(values, self.row_weights) for name, values in columns.items()}
        for group in np.unique(self.table.group[self.table.group >= 0] if self.battles.group_names else []):
            rows, name = self.table.group == group, self.battles.group_names[group]  # (rows,)
            by_group[name] = metrics.weighted_means(score[rows], self.row_weights[:, rows])  # (1 + S,)
        if len(by_group) > 1:
            means["macro_score"] = np.nanmean(list(by_group.values()), axis=0)  # (1 + S,)
        return means, {name: float(values[0]) for name, values in by_group.items()}

    def choice_shares(self, chosen: np.ndarray) -> dict:
        """The share of rows that each model is chosen for, by `metrics.choices` (rows, M), with intervals."""
        shares = metrics.weighted_means(chosen, self.row_weights)  # (1 + S, M)
        shares, intervals = summarize(dict(zip(self.battles.model_names, shares.T, strict=True)))
        return {name: {"share": shares[name], "interval": intervals[name]} for name in shares}

    def evaluate_guard(
        self, scores: np.ndarray, val_scores: np.ndarray, temperature: float, confidence: float | None
    ) -> dict:
        """The guard of a method with these scores (Q, M), or (1, M), and the best single model as its fallback."""
        fallback_idx = self.battles.model_names.index(self.fallback)
        if confidence is None:
            confidence = GuardedRows(self.split.val, val_scores, fallback_idx, temperature).choose_confidence()
        rows = GuardedRows(self.battles, scores, fallback_idx, temperature)
        results = {"confidence": confidence, "rows": len(rows.row)}
        if len(rows.row):
            means, intervals = summarize(rows.evaluate(confidence, self.weights))
            results |= means | {"intervals": intervals}
        if self.costs is not None:
            guard = {"fallback_idx": fallback_idx, "confidence": confidence, "temperature": temperature}
            val, test = self.costs
            settings = val.choose_settings(metrics.raise_fallback(val_scores, **guard))
            means, intervals = summarize(test.evaluate(metrics.raise_fallback(scores, **guard), settings)[0])
            results["costs"] = means | {"intervals": intervals}
        return results

    def results(self) -> dict:
        """RankRouter's results for the history: metrics, intervals, calibration, guard, costs, score table."""
        calibrated, uncalibrated = metrics.Reliability(temperature=self.temperature), metrics.Reliability(self.margin)
        for battles in self.battles.chunks():
            for reliability in (calibrated, uncalibrated):
                reliability.add(battles.margins(self.scores), battles.outcome)
        calibration = {"temperature": self.temperature, **calibrated.as_dict(), "uncalibrated": uncalibrated.as_dict()}
        numbers, details = self.router
        row, intervals = summarize(numbers)
        guard = {"fallback": self.fallback, "on": "battles" if self.battles.table is None else "rows"}
        results = {"test_metrics": row, "test_intervals": intervals, "calibration": calibration}
        results["guard"] = guard | details["guard"]
        has_costs = self.battles.table is not None and self.battles.table.costs is not None
        if self.costs is None and (self.prices is not None or has_costs):
            results["costs"] = None  # they cannot be evaluated
        if self.costs is not None:
            aiq, interval = (each["aiq"] for each in summarize({"aiq": self.costs[1].aiq_of_models}))
            results["costs"] = details["costs"] | self.costs[1].describe(self.battles.model_names)
            results["costs"] |= {"aiq_of_models": aiq, "aiq_of_models_interval": interval}
        if self.table is not None:
            results["score_table"] = self._score_table(details)
        return results

    def _score_table(self, details: dict) -> dict:
        table = {"rows": len(self.table), "groups": details["groups"], "choice_shares": details["choice_shares"]}
        ends = {"best_single": (self.single, self.single_is_best), "oracle": (self.oracle, np.ones_like(self.oracle))}
        for name, columns in ends.items():
            means, groups = self.means(*columns)
            means, intervals = summarize(means)
            table[name] = means | {"groups": groups, "intervals": intervals}
        table["best_single"]["model"] = self.fallback
        # Of several best models the oracle chooses the cheapest, where costs are known.
        best, costs = self.table.scores == self.oracle[:, None], np.zeros((1, 1))  # (rows, M)
        if self.costs is not None:
            costs = row_costs(self.table, self.costs[1].prices, self.prices)  # (rows, M)
            costs = np.nan_to_num(costs, nan=np.nanmax(costs))  # (rows, M)
        table["oracle"]["choice_shares"] = self.choice_shares(metrics.choices(-costs, best))
        return table

    def compare(self, fitted: dict[str, tuple]) -> dict:
        """For each baseline of `baselines.fit`: metrics, intervals, and RankRouter's paired differences from it."""
        rows, (router, _) = {}, self.router
        for name, (chosen, val_scores, test_scores) in fitted.items():
            val = self.split.val_pairs
            temperature = metrics.fit_temperature(val.margins(val_scores), val.outcome)
            numbers, details = self.evaluate(test_scores, val_scores, 0.0, temperature)
            row, intervals = summarize(numbers)
            difference, difference_intervals = summarize({key: router[key] - numbers[key] for key in numbers})
            rows[name] = (
                row
                | details
                | {
                    "chosen": chosen,
                    "intervals": intervals,
                    "difference": difference,
                    "difference_intervals": difference_intervals,
                }
            )
        return rows


def all_and_samples(num_queries: int, seed: int) -> np.ndarray:
    """Weights of queries: once each, and then as in bootstrap samples, int (1 + S, Q)."""
    weights = metrics.bootstrap_weights(num_queries, seed)  # (S, Q)
    return np.concatenate([np.ones_like(weights[:1]), weights])


def summarize(numbers: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """The values on all queries, which come first, and the 95 % intervals over samples, from numbers (1 + S,)."""
    values = {name: float(values[0]) if np.isfinite(values[0]) else None for name, values in numbers.items()}
    return values, {name: metrics.interval(values[1:]) for name, values in numbers.items()}


def evaluate_samples(
    battles, scores: np.ndarray, weights: np.ndarray, bins: np.ndarray, margin: float, temperature: float
) -> dict[str, np.ndarray]:
    """The metrics (1 + S,) of scores (Q, M), or (1, M) for all queries, in samples of `all_and_samples` (1 + S, Q).

    The AUC on all battles is exact, that on samples as `metrics.Totals` has it with `bins`.
    """
    totals, leads = metrics.Totals(weights, scores.shape[1], margin, temperature, bins), []
    for listed in battles.chunks():
        d = listed.margins(scores)  # (N,)
        totals.add(*listed, d)
        leads.append(np.where(listed.outcome == 1, d, -d))
    numbers = totals.metrics()  # (1 + S,) each
    numbers["auc"][0] = metrics.auc_of_leads(np.concatenate(leads))
    return numbers


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
