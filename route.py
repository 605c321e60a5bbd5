"""Rank the models for new queries with a trained router, weigh them by price, add a model without retraining."""

from support.routing.options import parse_args
from support.system.command_line import run_command

if __name__ == "__main__":
    run_command(parse_args)  # --help and typos are answered before torch is imported

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_loader import load_battles
from metrics import log_win_probability
from rankrouter import BEST, RankRouter, best_first
from support.data.benchmarks import read_profiles, standardize
from support.data.cells import READ
from support.data.queries import read_queries
from support.encoding.precomputed import PrecomputedEmbeddings
from support.evaluation.comparison import all_and_samples, summarize
from support.evaluation.cost import CostEvaluation
from support.reporting import console
from support.reporting.card import model_card
from support.reporting.runs import NO_HISTORY
from support.routing.cost import cheapest_first, known_outcomes, mean_costs, read_prices, weight_for_budget
from support.routing.new_model import add_from_battles
from support.system import device
from support.system.errors import UserError, one_line
from support.system.files import atomic_file, cache_folder
from support.system.hub import is_hub_id
from support.system.progress import above_progress_bars, progress_bar
from support.training.history import is_history_of, read_history

MAX_DEVIATION = 10  # standard deviations of a benchmark: a value beyond is in another unit


def main(argv: list[str] | None = None) -> None:
    """Do what the flags say; exit code 1 if a line was left out. Raises `UserError` on what the user can fix."""
    args = parse_args(argv)
    device.tune_cpu()
    router = RankRouter.load(args.checkpoint)
    if args.embeddings is not None:
        router.open_embeddings(PrecomputedEmbeddings.read(args.embeddings, device.pick_device(args.device)))
    elif args.profile is None and (args.export is None or args.model_path is not None):  # the others need no encoder
        router.open_encoder(
            args.model_path,
            device.pick_device(args.device),
            tokens_per_batch=args.encode_tokens,
            cache_dir=cache_folder(args.cache_dir, args.no_cache),
            progress=args.input is None,
        )
    if args.add_model is not None:
        add_model(args, router)
    elif args.curve is not None:
        draw_curve(args, router)
    elif args.export is not None:
        export(args, router)
    elif not rank(args, router):
        sys.exit(1)


def export(args: argparse.Namespace, router: RankRouter) -> None:
    """Write the router as a folder for the hub, with a card of its test."""
    if args.model_path is not None:  # whose fingerprint was checked
        encoder = router.metadata.encoder | {"path": args.model_path, "from_hub": is_hub_id(args.model_path)}
        router.metadata = replace(router.metadata, encoder=encoder)
    checkpoint = Path(args.checkpoint)
    if not (checkpoint.is_file() or (checkpoint / BEST).is_file()):
        raise UserError(f"{args.checkpoint} is exported already; copy it, or get it by `hf download`")
    history = read_history(checkpoint.parent if checkpoint.is_file() else checkpoint)
    if not is_history_of(history, router.metadata):
        history = None
    try:
        card = model_card(router, history)
    except NO_HISTORY as error:
        raise UserError(f"training_history.json beside {args.checkpoint} is damaged ({one_line(error)})") from error
    router.save_pretrained(args.export, card)
    test = "" if history else ", without a test: no finished training_history.json is beside the checkpoint"
    print(f"saved    {one_line(args.export)}: model.safetensors, config.json, README.md (the model card{test})")
    encoder = router.metadata.encoder
    if not (encoder.get("from_hub") or encoder.get("precomputed")):
        name = one_line(Path(encoder["path"]).name)
        print(f"encoder  is named {name} there, as it is a folder; --model_path OWNER/NAME writes its hub id instead")


def candidates(
    args: argparse.Namespace, router: RankRouter, costs: dict[str, float] | None = None
) -> tuple[list[str], np.ndarray]:
    """The names of the models to choose from, and their prices (m,): of --prices, the `costs`, or 0 without either."""
    names = router.model_names if args.models is None else args.models
    router.indices(names)  # raises on an unknown model, before its price is missed
    if costs is not None:
        costs = {name: cost for name, cost in costs.items() if name in router.model_names}
        return cheapest_first(names, router.model_names, costs, args.curve)
    if args.prices is None:
        return names, np.zeros(len(names))
    prices = read_prices(args.prices, args.tokens_per_query)
    return cheapest_first(names, router.model_names, prices, args.prices)


def read(args: argparse.Namespace, malformed: list[int]) -> Iterator[list[str]]:
    """The queries chunk by chunk; malformed lines are reported on stderr, left out, and their numbers appended."""
    if args.input is None:
        yield args.queries
        return
    with progress_bar("route", unit=" queries") as bar:
        for chunk in read_queries(args.input, args.query_column, args.read or READ[0]):
            queries = []
            for number, query, problem in chunk:
                if query is not None:
                    queries.append(query)
                    continue
                message = f"{one_line(args.input)}, line {number}: {one_line(problem)}"
                if args.strict:
                    raise UserError(message)
                with above_progress_bars():
                    print(f"{message}; left out", file=sys.stderr)
                malformed.append(number)
            yield queries
            bar.update(len(queries))


def rank(args: argparse.Namespace, router: RankRouter) -> bool:
    """Print or write the ranking of each query; returns whether every line could be read."""
    if args.output is None and sys.stdout is None:
        raise UserError("standard output is closed; give --output")
    names, prices = candidates(args, router)  # (m,) each
    scores_to_rank_by(args, router, np.empty((0, len(router.model_names))))  # raises where it has no confidence
    malformed = []
    scored = ((queries, router.scores_of(queries)) for queries in read(args, malformed))  # (Q,), (Q, M)
    weight = args.cost_weight or 0.0
    if args.budget is not None:  # of all queries together
        scored = list(scored)
        ranked = [scores_to_rank_by(args, router, scores) for queries, scores in scored if queries]  # (Q, M) each
        parts = [scores[:, router.indices(names)] for scores in ranked]  # (Q, m) each
        weight = weight_for_budget(np.concatenate(parts), prices, args.budget) if parts else 0.0
    spent, count = write_rankings(args, router, scored, names, prices, weight)
    if args.prices is not None and count:
        of_budget = "" if args.budget is None else f" of at most {args.budget:.6g}"
        print(f"prices   mean {spent / count:.6g}{of_budget} per query, at cost weight {weight:.6g}", file=sys.stderr)
    return not malformed


def scores_to_rank_by(args: argparse.Namespace, router: RankRouter, scores: np.ndarray) -> np.ndarray:
    """The scores (Q, M) to rank by: with --fallback those of `RankRouter.with_fallback`."""
    if args.fallback is None:
        return scores
    return router.with_fallback(scores, args.fallback, args.confidence, args.models)


def write_rankings(
    args: argparse.Namespace, router: RankRouter, scored: Iterable, names: list[str], prices: np.ndarray, weight: float
) -> tuple[float, int]:
    """Rank by score - weight * price; JSON lines, or text on a terminal. Returns the sum of prices, and of queries.

    `scored` are chunks of queries with their scores (Q, M); `names` and `prices` (m,) are those of the candidates.
    """
    columns = router.indices(names)  # (m,)
    spent, count, as_text = 0.0, 0, args.input is None and args.output is None
    with nullcontext(sys.stdout.buffer) if args.output is None else atomic_file(args.output) as file:
        for queries, scores in scored:
            order = best_first(scores_to_rank_by(args, router, scores)[:, columns] - weight * prices)  # (Q, m)
            spent, count = spent + prices[order[:, 0]].sum(), count + len(queries)
            for query, row, best in zip(queries, scores, order, strict=True):  # (M,), (m,)
                if as_text:
                    price = None if args.prices is None else prices[best]  # (m,)
                    print_ranking(query, row, columns[best], router, price, args.top_k)
                    continue
                best = best[: args.top_k]  # (K,)
                ranking = [names[i] for i in best]
                line = {"query": query, "ranking": ranking, "scores": row[columns[best]].round(6).tolist()}
                if args.prices is not None:
                    line["prices"] = prices[best].tolist()
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
    return spent, count


def print_ranking(
    query: str, scores: np.ndarray, order: np.ndarray, router: RankRouter, prices: np.ndarray | None, top_k: int | None
) -> None:
    """A query's best models by their indices (m,), with what the scores (M,) say as probabilities."""
    names = [one_line(name) for name in router.model_names]
    single_idx = router.model_names.index(router.metadata.best_single_model)
    differences = scores[order[:-1]] - scores[order[1:]], scores[order] - scores[single_idx]  # (m - 1,), (m,)
    beats_next, beats_single = (np.exp(log_win_probability(d, temperature=router.temperature)) for d in differences)
    width = max(5, *(len(names[i]) for i in order[:top_k]))
    price = "" if prices is None else f"{'price':>12}"
    print(one_line(query))
    head = f"{'model':<{width}}{'score':>10}{price}  beats the next"
    print(f"      {head}  beats {names[single_idx]}, the best single model")
    for place, i in enumerate(order[:top_k]):
        price = "" if prices is None else f"{prices[place]:>12.6g}"
        for_next = f"{beats_next[place]:.0%}" if place < len(beats_next) else ""
        for_single = "" if i == single_idx else f"{beats_single[place]:.0%}"
        line = f"{place + 1:>4}  {names[i]:<{width}}{scores[i]:>10.4f}{price}{for_next:>16}{for_single:>7}"
        print(line.rstrip())
    print()


def draw_curve(args: argparse.Namespace, router: RankRouter) -> None:
    """Print, or write as JSON lines, quality by cost on known outcomes that the router was not trained on."""
    battles, counts = load_battles(args.curve, query_column=args.query_column)
    console.print_rows(counts)
    own_costs = args.prices is None
    costs = mean_costs(battles, args.curve) if own_costs else None
    names, prices = candidates(args, router, costs)  # (m,) each
    if battles.table is not None and {"conversations", "prompts"}.intersection(counts["layouts"]):
        raise UserError(f"{args.curve} holds both battles and score tables; a curve needs one kind")
    (queries, row, outcomes, costs), left_out = known_outcomes(battles, names, prices, router, own_costs)
    print("left out " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))
    scores = router.scores_of([battles.queries[i] for i in queries])[:, router.indices(names)]  # (Q, m)
    single = router.metadata.best_single_model
    ranks = scores.mean(0, keepdims=True).argsort().argsort().astype(float)  # (1, m), as the router ranks them
    ranks[:, [i for i, name in enumerate(names) if name == single]] = len(names)
    weights = all_and_samples(len(queries), router.metadata.args["seed"])[:, row]  # (1 + S, n)
    evaluation = CostEvaluation(outcomes, costs, row, prices, ranks, weights)
    numbers, details = evaluation.evaluate(scores, None)
    points = console.curve_points(details["curve"])
    unit = "battles, won" if battles.table is None else "rows of a score table, mean score"
    print(f"curve    on {len(row)} {unit} by the model chosen; random mix: the last row or the first, at random\n")
    if args.output is None:
        console.print_curve(points)
    else:
        with atomic_file(args.output) as file:
            file.writelines(json.dumps(point).encode() + b"\n" for point in points)
    if battles.table is not None and single in battles.model_names and single in names:
        numbers["aiq_of_models"] = evaluation.aiq_of_models
        console.print_curve_summary(single, names[evaluation.weak], *summarize(numbers), details["test_chosen"])


def add_model(args: argparse.Namespace, router: RankRouter) -> None:
    """Write a checkpoint that knows one more model, from its benchmark scores or battles; nothing is retrained."""
    router.check_new_name(args.add_model)
    if args.battles is None:
        router.add_model(args.add_model, vector_of_profile(args, router), {"from": "profile"})
    else:
        battles, counts = load_battles(args.battles, query_column=args.query_column)
        console.print_rows(counts)
        own = add_from_battles(router, args.add_model, battles, {"content_hash": counts["content_hash"]})
        queries, opponents = len(own.unique_queries), len(own.unique_models) - 1
        against = f"against {opponents} models; {len(battles) - len(own)} others left out"
        print(f"battles  {len(own)} of {one_line(args.add_model)} on {queries} queries, {against}")
    router.save(args.save)
    print(f"saved    {one_line(args.save)}: {len(router.model_names)} models")


def vector_of_profile(args: argparse.Namespace, router: RankRouter) -> torch.Tensor:
    """The new model's capability vector (C,) from its benchmark scores."""
    name, statistics = one_line(args.add_model), router.metadata.profiles
    if statistics["kind"] != "file":
        problem = "the router was not trained with --capability_file, so benchmark scores mean nothing to it"
        raise UserError(f"{problem}; use --battles")
    profiles, benchmarks = read_profiles(args.profile), statistics["columns"]
    missing = [benchmark for benchmark in benchmarks if benchmark not in profiles.columns]
    if missing:
        raise UserError(f"{args.profile} lacks {', '.join(map(one_line, missing))}, a benchmark of training; add it")
    scores = profiles.of([args.add_model])[:, [profiles.columns.index(benchmark) for benchmark in benchmarks]]  # (1, C)
    vector = standardize(scores, statistics)[0]  # (C,)
    if np.isnan(vector).all():
        raise UserError(f"{args.profile} has no number for {name}; expected at least one benchmark")
    far = [benchmark for benchmark, value in zip(benchmarks, vector, strict=True) if abs(value) > MAX_DEVIATION]
    if far:
        problem = f"lies more than {MAX_DEVIATION} standard deviations from the models of training"
        values = f"{', '.join(map(one_line, far))} of {name}"
        raise UserError(f"{args.profile}: {values} {problem}; expected the unit of --capability_file")
    print(f"profile  {name} by {int((~np.isnan(vector)).sum())} of {len(vector)} benchmarks")
    return torch.from_numpy(vector)


if __name__ == "__main__":
    run_command(main)
