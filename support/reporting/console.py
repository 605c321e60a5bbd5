"""What the commands print: data, progress, validations, and the tables of a finished run."""

from collections.abc import Iterator

from support.system import distributed
from support.system.errors import one_line
from support.system.progress import above_progress_bars, progress_bar

MOST_SHOWN = 4  # models of choice shares
MIN_QUERIES = 30  # below, a bootstrap interval gives no verdict

LABELS = {
    "random": "random",
    "best_single": "best single model",
    "bradley_terry": "Bradley-Terry",
    "cluster_bradley_terry": "per-cluster BT",
    "neighbours": "neighbors",
    "linear_head": "linear head",
    "factorisation": "factorization",
}


def print_rows(counts: dict) -> None:
    """The rows that were read and dropped, from the counts of `load_battles`."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["rows_dropped"].items()) or "none"
    print(f"data     {counts['rows_read']} rows, dropped: {dropped}; from {one_line(counts['path'])}")
    for columns in counts["columns"]:
        print(f"layout   {one_line(columns)}")
    for path in counts["files_skipped"]:
        print(f"skipped  {one_line(path)}: no data file")
    for texts, what in ((counts["unknown_winners"], "unknown winners"), (counts["scores_not_numbers"], "no numbers")):
        if texts:
            print(f"texts    {what}: " + ", ".join(f"{count} x {text!r}" for text, count in texts.items()))


def print_data(data: dict) -> None:
    """The counts of data and split, from the `data` of a history, and what was left out."""
    print_rows(data)
    for key, subject, note in (
        ("scores_odd", "scores  ", ": are they scores of one metric, the higher the better?"),
        ("costs_missing", "costs   ", " cells hold no cost"),
        ("queries_parsed", "parsed  ", " queries, from lists of turns or texts"),
        ("scores_averaged", "averaged", " scores with others of the same model and row"),
        ("scores_missing", "missing ", " single scores, in rows that have others"),
        ("queries_outside_limit", "limit    leaves out", " queries"),
        ("queries_repaired", "repaired", " texts with broken Unicode"),
    ):
        if data[key]:
            print(f"{subject} {data[key]}{note}")
    ties = f"{data['ties']} ties, {data['ties_left_out']} of them left out"
    print(f"battles  {data['battles']} on {data['queries']} queries, {data['models']} models; {ties}")
    sides = ", ".join(f"{name} {size['battles']} ({size['queries']} queries)" for name, size in data["split"].items())
    print(f"split    {sides}; test queries also in training: {data['test_queries_in_train']}")
    if data["groups"]:
        test, train = (", ".join(map(one_line, data["groups"][name])) for name in ("test", "train"))
        left_out = f"{data['groups']['left_out']} battles or rows are on neither side"
        print(f"groups   test on {test}; training and validation on {train}; {left_out}")
    if data["table_rows"]:
        rows = ", ".join(f"{name} {data['table_rows'][name]}" for name in ("train", "val", "test"))
        equal = data["table_rows"]["without_a_difference"]
        print(f"rows     {rows} of the score table; {equal} others, whose scores do not differ, are not evaluated")
        if not (data["table_rows"]["train"] and data["table_rows"]["test"]):
            print("rows     are not evaluated: training and test need some")
    if data["label_range"]:
        low, high = data["label_range"]
        print(f"labels   scores from {low:g} to {high:g} become labels from 0 to 1")
    if data["training_battles_held_out"]:
        print(f"held out {data['training_battles_held_out']} training battles, of the model of --hold_out_model")
    if data["unseen_model_battles"]:
        print(f"unseen   {data['unseen_model_battles']} val and test battles of models unseen in training: left out")


def print_profiles(profiles, model_names: list[str]) -> None:
    """How many models have benchmark scores in a file, and how many scores are missing."""
    scores = profiles.of(model_names, allow_missing=True)  # (M, C)
    found = sum(name in profiles.rows for name in model_names)
    missing = int((scores != scores).sum()) - (len(model_names) - found) * len(profiles.columns)
    cells = f"with {missing} cells missing, of {', '.join(map(one_line, profiles.columns))}"
    print(f"profiles {found} of {len(model_names)} models have a row in {one_line(profiles.path)}, {cells}")


def print_encoder(description: str) -> None:
    """How queries are embedded, and why so."""
    print(f"encoder  {one_line(description)}")


def print_encoding(encoder: dict, timing: dict, max_length: int) -> None:
    """How many queries were encoded and read from the cache, from the `encoder` and `timing` of a history."""
    if encoder.get("max_length", max_length) < max_length:
        print(f"encoder  reads at most {encoder['max_length']} tokens of a query, fewer than --max_length {max_length}")
    cached, encoded = timing["queries_from_cache"], timing["queries_encoded"]
    source = f"from {one_line(encoder['path'])}" if encoder.get("precomputed") else "from the cache"
    counts = f"{cached} {source}, {encoded} encoded, {timing['encode']:.1f} s"
    print(f"encode   {cached + encoded} queries, {encoder['width']} wide, {encoder['dtype']}: {counts}")


def print_resume(message: str, finished_auc: float | None, folder: str) -> bool:
    """Where a run continues; returns whether it is finished already, with that test AUC."""
    print(f"resume   {message}")
    if finished_auc is not None:
        print(f"finished already, with a test AUC of {finished_auc:.4f}: {one_line(folder)}")
    return finished_auc is not None


def print_clusters(sizes: list[int]) -> None:
    """The number of clusters and the range of their sizes."""
    print(f"cluster  {len(sizes)} clusters of {min(sizes)} to {max(sizes)} training queries")


def print_towers(epochs: int) -> None:
    """That the towers are trained before the encoder."""
    print(f"towers   first, on frozen embeddings, epochs: {epochs}")


def print_finetuning(parameters: dict, tokens: int) -> None:
    """How much of the encoder is trained: its trainable parameters by name, and the tokens of an epoch."""
    count = sum(parameter.numel() for parameter in parameters.values())
    print(f"finetune {count / 1e6:.3g} million weights of the encoder; an epoch has {tokens} tokens")


def print_ceiling(model: str) -> None:
    """That the training with the held-out model starts."""
    print(f"\nceiling  the same with the battles of {one_line(model)}")


def with_progress(batches: Iterator, state) -> Iterator:
    """The batches of an epoch of a `TrainingState`, with a bar: steps, loss, best validation AUC."""
    options = {"initial": state.step_in_epoch, "leave": False, "unit": " steps"}
    with progress_bar(f"epoch {state.epoch}", disable=distributed.rank() > 0, **options) as bar:
        for batch in batches:
            bar.total = len(state.planned)  # the epoch is planned with its first batch
            yield batch
            if bar.update():  # it was drawn; reading the loss makes a GPU wait
                best = state.curves.best
                auc = "none yet" if best is None else f"{best.metadata.val_metrics['auc']:.4f}"
                bar.set_postfix_str(f"loss {state.last_loss():.4f}, best val auc {auc}", refresh=False)


def print_validation(epoch: int, step: int | None, steps: int, loss: float, val: dict, is_best: bool) -> None:
    """A line for a validation: after `step` steps of an epoch, or at its end (None)."""
    head = f"epoch {epoch:<3}" if step is None else f"  {step}/{steps}".ljust(9)
    with above_progress_bars():
        print(
            f"{head}  loss {loss:.4f}   val  auc {val['auc']:.4f}  accuracy {val['accuracy']:.4f}  "
            f"log loss {val['log_loss']:.4f}{'  best' if is_best else ''}"
        )


def bounds(interval: list[float], sign: str = "") -> str:
    """An interval as text; `sign` "+" shows a plus, too."""
    low, high = interval
    return f"[{low:{sign}.4f}, {high:{sign}.4f}]"


def verdict(interval: list[float], name: str, num_queries: int) -> str:
    """What the 95 % interval of a difference over `num_queries` test queries shows, where more is better."""
    low, high = interval
    if num_queries < MIN_QUERIES:
        return f"no verdict on fewer than {MIN_QUERIES} queries"
    return f"better than {name}" if low > 0 else f"worse than {name}" if high < 0 else "no difference shown"


def print_test(history: dict) -> None:
    """The test table of a history, and those of its score table, held-out model and demo."""
    size, intervals = history["data"]["split"]["test"], history["test_intervals"]
    best = f"epoch {history['best_epoch']}"
    if history["best_step"] is not None:
        best += f" at step {history['best_step']}"
    print(f"\ntest     {best}, once, on {size['battles']} battles of {size['queries']} queries\n")
    rows = {"RankRouter": history["test_metrics"]}
    for end, label in enumerate(("  95 % from", "         to")):
        rows[label] = {name: interval and interval[end] for name, interval in intervals.items()}
    compared = {LABELS.get(name, name): row for name, row in history["baselines"].items()}
    rows |= compared
    demo = history.get("demo")
    if demo is not None:
        rows |= {"best fixed ranking": demo["fixed_ranking"], "true margins": demo["true_margins"]}
    beyond = "  RankRouter's AUC beyond it, 95 %" if compared else ""
    print(f"{'':<18}{'accuracy':>10}{'auc':>10}{'log loss':>10}{'calibrated':>12}{beyond}")
    for label, row in rows.items():
        line = f"{label:<18}" + "".join(f"{row[name]:>10.4f}" for name in ("accuracy", "auc", "log_loss"))
        line += f"{row['log_loss_calibrated']:>12.4f}" if "log_loss_calibrated" in row else ""
        print(line + _difference(row, "auc", label, size["queries"]))
    print("\nIntervals are over the test queries, for this one training.")
    calibration = history["calibration"]
    before, after = (part["expected_calibration_error"] for part in (calibration["uncalibrated"], calibration))
    chosen = f"at the temperature {calibration['temperature']:.2f} that validation chose"
    print(f"Expected calibration error {before:.4f}, and {after:.4f} {chosen}.")
    if "score_table" in history:
        _print_score_table(history, compared)
    if "costs" in history and history["costs"] is None:
        sides = "validation and test need rows whose scores differ and have costs, and each model one in training"
        print(f"\ncost     is not evaluated: {sides}")
    elif "costs" in history:
        _print_costs(history, compared)
    _print_guard(history["guard"])
    if "cold_start" in history:
        _print_cold_start(history["cold_start"])
    if demo is not None and demo["gap_closed"] is not None:
        print()
        between = "the best query-independent ranking and the true margins"
        print(f"RankRouter closes {demo['gap_closed']:.0%} of the gap in AUC between {between}.")
    print(f"\nsaved    {one_line(history['args']['output_dir'])}: best_model.pt, training_history.json")


def _print_cold_start(cold: dict) -> None:
    print(
        f"\nnew      {one_line(cold['model'])}, left out of training: {cold['test_battles']} test battles of "
        f"{cold['test_queries']} queries; {cold['draws']} draws of its {cold['calibration_battles']} training battles\n"
    )
    print(f"{'battles known':<22}{'RankRouter, AUC, 95 %':<26}{'Bradley-Terry, AUC, 95 %':<26}difference, 95 %")
    for row in cold["rows"]:
        source = {"battles": "", "profile": ", its profile", "training": ", trained with"}[row["from"]]
        line = f"{row['battles']}{source}".ljust(20)
        for name in ("rank_router", "bradley_terry"):
            line += f"{row[name]['auc']:>8.4f} {bounds(row[name]['intervals']['auc'])}"
        compared = {"difference": row["difference"], "difference_intervals": row["difference"]["intervals"]}
        print(line + _difference(compared, "auc", LABELS["bradley_terry"], cold["test_queries"]))


def _print_score_table(history: dict, compared: dict) -> None:
    table, router = history["score_table"], history["test_metrics"] | {"intervals": history["test_intervals"]}
    print(f"\nscores   of the chosen model, on {table['rows']} test rows of the score table")
    print(f"single   {one_line(table['best_single']['model'])} has the best mean score in training\n")
    beyond = "  RankRouter's mean score beyond it, 95 %" if compared else ""
    print(f"{'':<18}{'top-1':>8}{'mean score, 95 %':>26}{'gap closed, 95 %':>22}{beyond}")
    single = {} if compared else {LABELS["best_single"]: table["best_single"]}
    for label, row in ({"RankRouter": router} | single | compared | {"oracle": table["oracle"]}).items():
        interval = bounds(row["intervals"]["mean_score"])
        line = f"{label:<18}{row['top1_accuracy']:>8.4f}{row['mean_score']:>10.4f} {interval}"
        if row.get("gap_closed") is not None:
            low, high = row["intervals"]["gap_closed"]
            line += f"{row['gap_closed']:>7.0%} [{f'{low:.0%}, {high:.0%}]':<13}"
        print(line.rstrip() + _difference(row, "mean_score", label, table["rows"]))
    print()
    if "macro_score" in router:
        rows = {"RankRouter": router} | single | compared | {"oracle": table["oracle"]}
        means = ", ".join(f"{label} {row['macro_score']:.4f}" for label, row in rows.items())
        print(f"macro    mean over {len(table['groups'])} groups: {means}")
    shares, oracle = table["choice_shares"], table["oracle"]["choice_shares"]
    chosen = sorted(shares, key=lambda name: -shares[name]["share"])[:MOST_SHOWN]
    named = (f"{one_line(name)} {shares[name]['share']:.0%} (oracle {oracle[name]['share']:.0%})" for name in chosen)
    print(f"chosen   {', '.join(named)}")


def _print_costs(history: dict, compared: dict) -> None:
    costs, guard = history["costs"], history["guard"]["costs"]
    left_out = f"; {costs['rows_left_out']} rows without a cost left out" if costs["rows_left_out"] else ""
    print(f"\ncost     on {costs['rows']} test rows{left_out}")
    print(f"models   strong {one_line(costs['strong'])}, the best single model")
    print(f"         weak {one_line(costs['weak'])}, the cheapest\n")
    heads = f"{'AIQ, 95 %':>24}{'beyond single models':>27}"
    heads += f"{'APGR':>8}{'CPT(50%)':>10}{'PerfGain':>10}{'CostSave':>9}{'at':>9}"
    print(f"{'':<20}{heads}")
    router = history["test_metrics"] | {"intervals": history["test_intervals"]}
    rows = {"RankRouter": router, "RankRouter, guarded": guard} | compared
    models = {"aiq": costs["aiq_of_models"], "intervals": {"aiq": costs["aiq_of_models_interval"]}}
    forms = {"apgr": (8, "", ".4f"), "cpt_50": (10, "", ".0%"), "perf_gain": (10, "+", ".4f")}
    forms |= {"cost_save": (9, "", ".0%"), "cost_save_gain": (9, "+", ".4f")}
    for label, row in (rows | {"single models": models}).items():
        line = f"{label:<20}"
        for name, width, sign in (("aiq", 7, ""), ("aiq_beyond_models", 9, "+")):
            if row.get(name) is not None:
                line += f"{row[name]:{sign}{width}.4f} {bounds(row['intervals'][name], sign)}"
        for name, (width, sign, form) in forms.items():
            if name in row:
                line += f"{'-':>{width}}" if row[name] is None else f"{row[name]:{sign}{width}{form}}"
        print(line)
    print(
        "\nAIQ is the mean height of the hull over the curve, between the costs of the cheapest and the priciest model;"
    )
    print("RouterBench divides by the largest cost, with nothing left of the first point. PerfGain and CostSave are to")
    print("the best single model, at settings chosen on validation; `at` is CostSave's gain in score.")


def curve_points(curve: list[dict]) -> list[dict]:
    """The points of a curve from a `CostEvaluation`, beside random routing between its ends at the same mean cost."""
    (first, last), points = (curve[0], curve[-1]), []
    for point in curve:
        share = (point["mean_cost"] - last["mean_cost"]) / ((first["mean_cost"] - last["mean_cost"]) or 1)
        points.append(
            {
                "cost_weight": point["cost_weight"],
                "mean_price": point["mean_cost"],
                "worth": point["mean_score"],
                "interval": point["interval"],
                "random_mix": last["mean_score"] + share * (first["mean_score"] - last["mean_score"]),
            }
        )
    return points


def print_curve(points: list[dict]) -> None:
    """The points of a curve as a table."""
    print(f"{'cost weight':>12}{'mean price':>13}{'quality':>10}{'95 %':>20}{'random mix':>14}")
    for point in points:
        line = f"{point['cost_weight']:>12.6g} {point['mean_price']:>12.6g}{point['worth']:>10.4f}"
        print(f"{line}{bounds(point['interval']):>20}{point['random_mix']:>14.4f}")


def print_curve_summary(strong: str, weak: str, numbers: dict, intervals: dict, chosen_here: dict) -> None:
    """The summary numbers of a router's curve with their intervals, and those at settings chosen on the same rows."""
    print(f"\nstrong   {one_line(strong)}, the best single model of training")
    print(f"weak     {one_line(weak)}, the cheapest\n")
    for name, value in numbers.items():
        if value is not None:
            print(f"{name:<18}{value:>9.4f} {bounds(intervals[name])}")
    for name, value in chosen_here.items():
        if value is not None:
            print(f"{name:<18}{value:>9.4f} at a setting chosen on these rows")


def _print_guard(guard: dict) -> None:
    fallback, rows = one_line(guard["fallback"]), f"{guard['rows']} {guard['on']}"
    if not guard["rows"]:
        print(f"\nguard    not evaluated: no test battle of {fallback}")
        return
    unless = f"unless another model beats it with P > {guard['confidence']:g}"
    print(f"\nguard    stays with {fallback} {'always' if guard['confidence'] == 1 else unless}, chosen on validation:")
    gain, unguarded = (
        f"{guard[name]:+.4f} {bounds(guard['intervals'][name], '+')}" for name in ("difference", "unguarded_difference")
    )
    print(f"         leaves it on {guard['routed_away']:.0%} of {rows}, gain {gain}; without a guard {unguarded}")


def _difference(row: dict, metric: str, label: str, num_queries: int) -> str:
    """RankRouter's difference to a baseline, its interval and the verdict; empty where `row` is not a baseline."""
    if "difference" not in row:
        return ""
    interval = row["difference_intervals"][metric]
    return f"  {row['difference'][metric]:+.4f} {bounds(interval, '+')}  {verdict(interval, label, num_queries)}"
