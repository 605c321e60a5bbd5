"""Rank the models for new queries with a trained router, weigh them by price, bring in a model it does not know."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext

from support import printing, runs
from support.command_line import run_command
from support.files import UserError, atomic_file, cache_folder, one_line
from support.route_flags import parse_args

# torch and the files that need it are imported inside the functions below: --help and a typo answer at once.

FARTHEST = 10  # standard deviations of a benchmark: beyond is another unit


def candidates(args: argparse.Namespace, router) -> tuple:
    """The names of the models to choose from, and their prices (m,), 0 where there are none."""
    import numpy as np

    from support.prices import cheapest_first, read_prices

    names = router.model_names if args.models is None else args.models
    router.indices(names)  # an unknown one is told before its price is missed
    if args.prices is None:
        return names, np.zeros(len(names))
    prices = read_prices(args.prices, args.tokens_per_query)
    return cheapest_first(names, router.model_names, prices, args.prices)


def read(args: argparse.Namespace, malformed: list[int]) -> Iterator[list[str]]:
    """The queries chunk by chunk; lines that are malformed are told on stderr, left out, and noted by their numbers."""
    from tqdm import tqdm

    from support.query_files import read_queries

    if args.input is None:
        yield args.queries
        return
    is_seen = sys.stderr is not None and sys.stderr.isatty()
    every = 0.1 if is_seen else 30  # seconds; a log file need not hold every step
    with tqdm(desc="route", unit=" queries", delay=1, mininterval=every, disable=sys.stderr is None) as bar:
        for chunk in read_queries(args.input):
            for number, query, problem in chunk:
                if query is None:
                    if args.strict:
                        raise UserError(f"{args.input}, line {number}: {problem}")
                    if is_seen:
                        bar.clear()
                    print(f"{one_line(args.input)}, line {number}: {one_line(problem)}; left out", file=sys.stderr)
                    malformed.append(number)
            queries = [query for _, query, _ in chunk if query is not None]
            yield queries
            bar.update(len(queries))


def rank(args: argparse.Namespace, router) -> bool:
    """Print or write the ranking of each query; returns whether every line could be read."""
    import numpy as np

    from support.prices import weight_for_budget

    if args.output is None and sys.stdout is None:
        raise UserError("standard output is closed; give --output")
    names, prices = candidates(args, router)  # (m,) each
    columns, malformed, priced = router.indices(names), [], args.prices is not None  # (m,)
    scored = ((queries, router.scores_of(queries)) for queries in read(args, malformed))  # (Q,), (Q, M)
    weight, spent, count = args.cost_weight or 0.0, 0.0, 0
    if args.budget is not None:  # it is of the whole batch
        scored = list(scored)
        every = [scores[:, columns] for queries, scores in scored if queries]  # (Q, m) each
        weight = weight_for_budget(np.concatenate(every), prices, args.budget) if every else 0.0
    in_text = args.input is None and args.output is None
    with nullcontext(sys.stdout.buffer) if args.output is None else atomic_file(args.output) as file:
        for queries, scores in scored:
            order = np.argsort(weight * prices - scores[:, columns], axis=1, kind="stable")  # (Q, m)
            spent, count = spent + prices[order[:, 0]].sum(), count + len(queries)
            for query, row, best in zip(queries, scores, order, strict=True):  # (M,), (m,)
                if in_text:
                    print_ranking(query, row, columns[best], router, prices[best] if priced else None, args.top_k)
                    continue
                best = best[: args.top_k]  # (K,)
                scores_of_best = row[columns[best]].round(6).tolist()
                told = {"query": query, "ranking": [names[i] for i in best], "scores": scores_of_best}
                if priced:
                    told["prices"] = prices[best].tolist()
                file.write(json.dumps(told, ensure_ascii=False).encode() + b"\n")
            file.flush()
    if priced and count:
        of_budget = "" if args.budget is None else f" of at most {args.budget:.6g}"
        print(f"prices   mean {spent / count:.6g}{of_budget} per query, at cost weight {weight:.6g}", file=sys.stderr)
    return not malformed


def print_ranking(query: str, scores, order, router, prices, top_k: int | None) -> None:
    """The best of a query's models by their indices (m,), with what the scores (M,) say as probabilities."""
    import numpy as np

    from metrics import log_win_probability

    names, single = router.model_names, router.facts["best_single_model"]
    d_next = scores[order[:-1]] - scores[order[1:]]  # (m - 1,)
    d_single = scores[order] - scores[names.index(single)]  # (m,)
    beats_next, beats_single = (
        np.exp(log_win_probability(d, temperature=router.temperature)) for d in (d_next, d_single)
    )
    width = max(5, *(len(one_line(names[i])) for i in order[:top_k]))
    print(one_line(query))
    head = "" if prices is None else f"{'price':>12}"
    print(
        f"      {'model':<{width}}{'score':>10}{head}  beats the next  beats {one_line(single)}, the best single model"
    )
    for place, i in enumerate(order[:top_k]):
        price = "" if prices is None else f"{prices[place]:>12.6g}"
        for_next = f"{beats_next[place]:.0%}" if place < len(beats_next) else ""
        for_single = "" if names[i] == single else f"{beats_single[place]:.0%}"
        line = f"{place + 1:>4}  {one_line(names[i]):<{width}}{scores[i]:>10.4f}{price}{for_next:>16}{for_single:>7}"
        print(line.rstrip())
    print()


def draw_curve(args: argparse.Namespace, router) -> None:
    """Print, or write as JSON lines, quality by cost where outcomes are known and the router was not trained."""
    from data_loader import load_battles
    from support.prices import curve, options

    names, prices = candidates(args, router)  # (m,) each
    battles, counts = load_battles(args.curve)
    printing.print_rows(counts)
    if battles.table is not None and {"conversations", "prompts"}.intersection(counts["layouts"]):
        raise UserError(f"{args.curve} holds both battles and score tables; a curve is of one kind")
    (query_idx, *choices), left_out = options(battles, names, prices, router)  # (n,), (n, m) each
    print("left out " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))
    points = curve(*choices, query_idx, router.facts["args"]["seed"])
    unit = "battles, won" if battles.table is None else "rows of a score table, mean score"
    print(f"curve    on {len(query_idx)} {unit} by the model chosen; a random mix is of the ends of the curve\n")
    if args.output is not None:
        with atomic_file(args.output) as file:
            file.writelines(json.dumps(point).encode() + b"\n" for point in points)
        return
    print(f"{'cost weight':>12}{'mean price':>13}{'worth':>10}{'95 %':>20}{'random mix':>14}")
    for point in points:
        low, high = point["interval"]
        line = f"{point['cost_weight']:>12.6g} {point['mean_price']:>12.6g}{point['worth']:>10.4f}"
        print(f"{line}{f'[{low:.4f}, {high:.4f}]':>20}{point['random_mix']:>14.4f}")


def add_model(args: argparse.Namespace, router) -> None:
    """Write a checkpoint that knows one more model, by its row of benchmarks or by battles; nothing is retrained."""
    name, facts = args.add_model, router.facts
    router.refuse_name(name)
    vector, source = (
        vector_of_profile(args, router) if args.battles is None else vector_of_battles(args, router)
    )  # (C,)
    router.add_model(name, vector)
    added = [*facts.get("added_models", []), {"model": name, **source}]
    router.save(args.save, **router.facts | {"added_models": added})
    print(f"saved    {args.save}: {len(router.model_names)} models")


def vector_of_profile(args: argparse.Namespace, router) -> tuple:
    """The new model's capability vector (C,) by its row of benchmarks, and what to record of it."""
    import numpy as np
    import torch

    from support.profiles import read_profiles, standardise

    facts = router.facts["profiles"]
    if facts["kind"] != "file":
        raise UserError(
            "the router was not trained with --capability_file, so a profile tells it nothing; use --battles"
        )
    profiles = read_profiles(args.profile)
    lacking = [column for column in facts["columns"] if column not in profiles.columns]
    if lacking:
        raise UserError(f"{args.profile} lacks {', '.join(map(one_line, lacking))}, a benchmark of training; add it")
    scores = profiles.of([args.add_model])[:, [profiles.columns.index(column) for column in facts["columns"]]]  # (1, C)
    vector = standardise(scores, facts)[0]  # (C,)
    if np.isnan(vector).all():
        raise UserError(f"{args.profile} has no number for {one_line(args.add_model)}; expected at least one benchmark")
    far = [name for name, value in zip(facts["columns"], vector, strict=True) if abs(value) > FARTHEST]
    if far:
        raise UserError(
            f"{args.profile}: {', '.join(map(one_line, far))} of {one_line(args.add_model)} lies more than {FARTHEST} "
            "standard deviations from the models of training; expected the unit of --capability_file"
        )
    known = int((~np.isnan(vector)).sum())
    print(f"profile  {one_line(args.add_model)} by {known} of {len(vector)} benchmarks")
    return torch.from_numpy(vector), {"from": "profile"}


def vector_of_battles(args: argparse.Namespace, router) -> tuple:
    """The new model's capability vector (C,) by battles against models that the router knows, and what to record."""
    import torch

    from data_loader import load_battles, query_ids
    from support.layouts import listed
    from support.new_models import battles_of, in_view_of, vector_from_battles

    battles, counts = load_battles(args.battles)
    printing.print_rows(counts)
    name = args.add_model
    own = battles_of(battles, name, router.model_names)
    if not len(own):
        found = listed(map(one_line, battles.model_names))
        raise UserError(
            f"{args.battles} has no battle of {one_line(name)} against a model of the router; it has {found}"
        )
    queries, row = own.fought  # (Q,), (n,)
    points, cluster_idx = router.embed([battles.queries[i] for i in queries])  # (Q, H), (Q,)
    _, opponents, outcome = in_view_of(name, own, router)  # (n,) each
    print(
        f"battles  {len(own)} of {one_line(name)} on {len(queries)} queries, against {len(opponents.unique())} models; "
        f"{len(battles) - len(own)} others left out"
    )
    vector = vector_from_battles(router, points[row], cluster_idx[row], opponents, outcome)  # (C,)
    seen = torch.from_numpy(query_ids([battles.queries[i] for i in queries]))  # (Q,)
    router.facts["seen_queries"] = torch.cat([router.facts["seen_queries"], seen]).unique()
    return vector, {"from": "battles", "battles": len(own), "content_hash": counts["content_hash"]}


def main(argv: list[str] | None = None) -> None:
    """Do what the flags say; exit code 1 where a line was left out. Raises `UserError` on what the user can mend."""
    args = parse_args(argv)

    from rankrouter import RankRouter

    runs.tune_cpu()
    router = RankRouter.load(args.checkpoint)
    if args.profile is None:  # which has nothing to encode
        folder = cache_folder(args.cache_dir, args.no_cache)
        how = {"tokens_per_batch": args.encode_tokens, "cache_dir": folder, "progress": args.input is None}
        router.open_encoder(args.model_path, runs.pick_device(args.device), **how)
    if args.add_model is not None:
        add_model(args, router)
    elif args.curve is not None:
        draw_curve(args, router)
    elif not rank(args, router):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
