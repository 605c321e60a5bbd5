"""Rank the models for new queries with a trained router, weigh them by price, bring in a model it does not know."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext

from support import runs
from support.command_line import OneLineParser, comma_separated, real_number, run_command, whole_number
from support.files import UserError, atomic_file, one_line, user_cache_folder

# torch and the files that need it are imported inside the functions below: --help and a typo answer at once.

CHECKPOINT = "./outputs/best_model.pt"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises `UserError` where they do not go together."""
    parser = OneLineParser("Rank the models for queries with a trained router, or bring in a new model.")
    positive, not_negative = real_number("above 0", lambda x: x > 0), real_number("of at least 0", lambda x: x >= 0)
    parser.add_argument("queries", nargs="*", help="rank the models for these")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="best_model.pt of a run of train.py")
    parser.add_argument("--top_k", metavar="K", type=whole_number(1), help="only the K best models")
    parser.add_argument("--models", metavar="A,B,...", type=comma_separated, help="rank only these")

    batch = parser.add_argument_group("batches")
    batch.add_argument(
        "--input",
        metavar="FILE",
        help="queries: a text per line, JSON lines, parquet or CSV with `query` or `prompt`; - is standard input",
    )
    batch.add_argument("--output", metavar="FILE", help="JSON lines of query, ranking, scores; else standard output")
    batch.add_argument("--strict", action="store_true", help="stop at the first malformed line")

    money = parser.add_argument_group("prices")
    money.add_argument(
        "--prices", metavar="FILE", help="table of `model` and `price_per_query` or `price_per_million_tokens`"
    )
    money.add_argument(
        "--tokens_per_query", metavar="N", type=positive, help="of query and answer, for prices per million tokens"
    )
    money.add_argument("--cost_weight", metavar="W", type=not_negative, help="rank by score - W * price per query")
    money.add_argument("--budget", metavar="PRICE", type=not_negative, help="mean price per query, met by the best W")
    money.add_argument(
        "--curve",
        metavar="DATA",
        help="quality by cost, on battles or a score table; of the training data, on its test",
    )

    new = parser.add_argument_group("a new model")
    new.add_argument("--add_model", metavar="NAME", help="write a checkpoint that knows this model too; no retraining")
    new.add_argument("--battles", metavar="DATA", help="its battles against known models, a few dozen")
    new.add_argument("--profile", metavar="FILE", help="or its row of benchmarks, as in --capability_file of training")
    new.add_argument("--save", metavar="FILE", help="the new checkpoint")

    encoder = parser.add_argument_group("encoder")
    encoder.add_argument("--model_path", help="where it is now; without it, where it was in training")
    encoder.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps; auto: cuda, else mps, else cpu")
    encoder.add_argument("--encode_tokens", metavar="N", type=whole_number(1), help="tokens per batch of queries")
    encoder.add_argument("--cache_dir", metavar="DIR", help="where embeddings are kept, else the user's cache folder")
    encoder.add_argument("--no_cache", action="store_true", help="neither read nor keep embeddings")
    args = parser.parse_args(argv)

    tasks = {"queries": args.queries, "--input": args.input, "--curve": args.curve, "--add_model": args.add_model}
    chosen = [name for name, value in tasks.items() if value not in (None, [])]
    if len(chosen) != 1:
        parser.error(f"expected one of {', '.join(tasks)}, got {' and '.join(chosen) or 'none'}")
    if args.add_model is not None and ((args.battles is None) == (args.profile is None) or args.save is None):
        parser.error("--add_model needs --save, and one of --battles and --profile")
    if args.add_model is None and (args.battles, args.profile, args.save) != (None, None, None):
        parser.error("--battles, --profile and --save are for --add_model")
    if args.prices is None and not (args.cost_weight is args.budget is args.tokens_per_query is args.curve is None):
        parser.error("--cost_weight, --budget, --tokens_per_query and --curve need --prices")
    if args.cost_weight is not None and args.budget is not None:
        parser.error("--cost_weight and --budget exclude each other")
    return args


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
    is_seen = sys.stderr.isatty()
    every = 0.1 if is_seen else 30  # seconds; a log file need not hold every step
    with tqdm(desc="route", unit=" queries", delay=1, mininterval=every) as bar:
        for chunk in read_queries(args.input):
            for number, query, problem in chunk:
                if query is None:
                    if args.strict:
                        raise UserError(f"{args.input}, line {number}: {problem}")
                    told = f"{one_line(args.input)}, line {number}: {one_line(problem)}; left out"
                    (bar.write if is_seen else print)(told, file=sys.stderr)  # the one puts the bar below it
                    malformed.append(number)
            queries = [query for _, query, _ in chunk if query is not None]
            yield queries
            bar.update(len(queries))


def rank(args: argparse.Namespace, router) -> bool:
    """Print or write the ranking of each query; returns whether every line could be read."""
    import numpy as np

    from support.prices import weight_for_budget

    names, prices = candidates(args, router)  # (m,) each
    columns, malformed = router.indices(names), []  # (m,)
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
                    print_ranking(query, row, columns[best], router, prices[best] if args.prices else None, args.top_k)
                    continue
                best = best[: args.top_k]  # (K,)
                scores_of_best = row[columns[best]].round(6).tolist()
                told = {"query": query, "ranking": [names[i] for i in best], "scores": scores_of_best}
                if args.prices:
                    told["prices"] = prices[best].tolist()
                file.write(json.dumps(told, ensure_ascii=False).encode() + b"\n")
            file.flush()
    if args.prices is not None and count:
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
    beats_next, beats_single = (np.exp(log_win_probability(d, *router.link)) for d in (d_next, d_single))
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
    """Print, or write as JSON lines, quality by cost on battles or on a score table whose outcomes are known."""
    from data_loader import data_files, load_battles, split_battles
    from support.files import content_hash
    from support.prices import curve, options

    names, prices = candidates(args, router)  # (m,) each
    trained = router.facts["args"]
    if content_hash(data_files(args.curve)) == router.facts["data"]["content_hash"]:  # it has seen all but the test
        battles, _ = load_battles(args.curve, trained["score_columns"], trained["limit"], trained["split_seed"])
        how = (trained[flag] for flag in ("split_seed", "split_by", "ties", "pairs_per_query", "hold_out_model"))
        battles, which = split_battles(battles, *how)[0].test, "test "
    else:
        battles, which = load_battles(args.curve)[0], ""
    query_idx, scores, costs, worth = options(battles, names, prices, router)  # (n,), (n, m) each
    points = curve(scores, costs, worth, query_idx, trained["seed"])
    if args.output is not None:
        with atomic_file(args.output) as file:
            file.writelines(json.dumps(point).encode() + b"\n" for point in points)
        return
    unit = "battles, won" if battles.table is None else "rows of a score table, mean score"
    print(f"curve    on {len(worth)} {which}{unit} by the model chosen; a random mix is of the ends of the curve\n")
    print(f"{'cost weight':>12}{'mean price':>12}{'worth':>10}{'95 %':>20}{'random mix':>14}")
    for point in points:
        low, high = point["interval"]
        line = f"{point['cost_weight']:>12.6g}{point['mean_price']:>12.6g}{point['worth']:>10.4f}"
        print(f"{line}{f'[{low:.4f}, {high:.4f}]':>20}{point['random_mix']:>14.4f}")


def add_model(args: argparse.Namespace, router) -> None:
    """Write a checkpoint that knows one more model, by its row of benchmarks or by battles; nothing is retrained."""
    name, facts = args.add_model, router.facts
    router.refuse_known(name)
    if os.path.realpath(args.save) == os.path.realpath(args.checkpoint):
        raise UserError("--save is the checkpoint itself; expected a new file")
    vector, source = (
        vector_of_profile(args, router) if args.battles is None else vector_of_battles(args, router)
    )  # (C,)
    router.add_model(name, vector)
    added = [*facts.get("added_models", []), {"model": name, **source}]
    router.save(args.save, **router.facts | {"added_models": added})
    print(f"saved    {args.save}: {len(router.model_names)} models")


def vector_of_profile(args: argparse.Namespace, router) -> tuple:
    """The new model's capability vector (C,) by its row of benchmarks, and what to record of it."""
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
    print(f"profile  {one_line(args.add_model)} by its row of {args.profile}")
    return torch.from_numpy(standardise(scores, facts)[0]), {"from": "profile"}


def vector_of_battles(args: argparse.Namespace, router) -> tuple:
    """The new model's capability vector (C,) by battles against models that the router knows, and what to record."""
    from data_loader import load_battles
    from support.cold_start import battles_of, in_view_of
    from support.layouts import listed

    battles, counts = load_battles(args.battles)
    name, known = args.add_model, router.model_names
    own = battles_of(battles, name, known) if name in battles.model_names else battles.select([])
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
    vector = router.vector_from_battles(points[row], cluster_idx[row], opponents, outcome)  # (C,)
    return vector, {"from": "battles", "battles": len(own), "content_hash": counts["content_hash"]}


def main(argv: list[str] | None = None) -> None:
    """Do what the flags say; exit code 1 where a line was left out. Raises `UserError` on what the user can mend."""
    args = parse_args(argv)

    from rankrouter import RankRouter

    runs.tune_cpu()
    router = RankRouter.load(args.checkpoint)
    cache_dir = None if args.no_cache else args.cache_dir
    if not args.no_cache and cache_dir is None:
        cache_dir = user_cache_folder()
    how = {"tokens_per_batch": args.encode_tokens, "cache_dir": cache_dir, "progress": args.input is None}
    router.open_encoder(args.model_path, runs.pick_device(args.device), **how)
    if args.add_model is not None:
        add_model(args, router)
    elif args.curve is not None:
        draw_curve(args, router)
    elif not rank(args, router):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
