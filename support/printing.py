"""What a run prints of itself, from its history."""

from support.files import one_line

FEWEST_QUERIES = 30  # that a bootstrap interval is trusted with

LABELS = {
    "random": "random",
    "best_single": "best single model",
    "bradley_terry": "Bradley-Terry",
    "cluster_bradley_terry": "per-cluster BT",
    "neighbours": "neighbours",
    "linear_head": "linear head",
    "factorisation": "factorisation",
}


def print_rows(counts: dict) -> None:
    """What was read of battles, and left out, from the counts of `load_battles`."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["rows_dropped"].items()) or "none"
    print(f"data     {counts['rows_read']} rows, dropped: {dropped}; from {counts['path']}")


def print_data(data: dict, split_by: str) -> None:
    """What was read and how it was split, from the `data` of a history and the flag."""
    print_rows(data)
    if data["score_columns"]:
        print(f"scores   of {', '.join(map(one_line, data['score_columns']))}")
    if data["scores_missing"]:
        print(f"missing  {data['scores_missing']} single scores, in rows that have others")
    if data["queries_outside_limit"]:
        print(f"limit    leaves out {data['queries_outside_limit']} queries")
    if data["queries_repaired"]:
        print(f"repaired {data['queries_repaired']} texts with broken Unicode")
    print(
        f"battles  {data['battles']} on {data['queries']} queries, {data['models']} models; "
        f"{data['ties']} ties, {data['ties_left_out']} of them left out"
    )
    sides = ", ".join(f"{name} {size['battles']} ({size['queries']} queries)" for name, size in data["split"].items())
    print(f"split    {sides}; test queries also in training: {data['test_queries_in_train']}")
    if data["table_rows"]:
        told = ", ".join(f"{name} {data['table_rows'][name]}" for name in ("train", "val", "test"))
        equal = data["table_rows"]["without_a_difference"]
        print(f"rows     {told} of the score table; {equal} whose scores do not differ are left out")
        if not (data["table_rows"]["train"] and data["table_rows"]["test"]):
            print("rows     are not judged: training and test need some")
    elif split_by == "battle" and {"wide", "nested", "long"}.intersection(data["layouts"]):
        print("rows     of the score table are not judged: --split_by battle puts battles of one row on several sides")
    if data["training_battles_held_out"]:
        print(f"held out {data['training_battles_held_out']} training battles, of the model of --hold_out_model")
    if data["training_battles_not_drawn"]:
        print(f"drawn    {data['training_battles_not_drawn']} training battles are left out by --pairs_per_query")
    if data["unseen_model_battles"]:
        print(f"unseen   {data['unseen_model_battles']} held-out battles of models that training never saw: left out")


def print_profiles(profiles, model_names: list[str]) -> None:
    """What a file of capability profiles says of the models of the battles."""
    scores = profiles.of(model_names, allow_missing=True)  # (M, C)
    lacking = sum(name not in profiles.rows for name in model_names)
    missing = sum(int((row != row).sum()) for row in scores) - lacking * len(profiles.columns)
    print(
        f"profiles {len(model_names) - lacking} of {len(model_names)} models have a row in {profiles.path}, with "
        f"{missing} cells missing, of {', '.join(map(one_line, profiles.columns))}"
    )


def print_encoding(encoder: dict, timing: dict, max_length: int) -> None:
    """What was encoded and what was read, from a checkpoint's facts of the encoder and the `timing` of a history."""
    if encoder["max_length"] < max_length:
        print(f"encoder  reads at most {encoder['max_length']} tokens of a query, fewer than --max_length {max_length}")
    cached, encoded = timing["queries_from_cache"], timing["queries_encoded"]
    print(
        f"encode   {cached + encoded} queries, {encoder['width']} wide, {encoder['dtype']}: "
        f"{cached} from the cache, {encoded} encoded, {timing['encode']:.1f} s"
    )


def print_cost(learned: dict, tokens: int, tokens_per_second: float, epochs: int) -> None:
    """What an encoder's training will take, before it begins: by its weights that learn, and the tokens of an epoch."""
    minutes, count = tokens / tokens_per_second / 60, sum(weight.numel() for weight in learned.values())
    print(
        f"finetune {count / 1e6:.3g} million weights of the encoder; an epoch has {tokens} tokens, at "
        f"{tokens_per_second:.0f} a second {minutes:.1f} minutes, {epochs} epochs {minutes * epochs:.1f} and validation"
    )


def print_validation(epoch: int, step: int | None, steps: int, loss: float, val: dict, improved: bool) -> None:
    """A line for a validation: after an epoch, or after so many of its steps."""
    head = f"epoch {epoch:<3}" if step is None else f"  {step}/{steps}".ljust(9)
    print(
        f"{head}  loss {loss:.4f}   val  auc {val['auc']:.4f}  accuracy {val['accuracy']:.4f}  "
        f"log loss {val['log_loss']:.4f}{'  best' if improved else ''}"
    )


def verdict(interval: list[float], name: str, num_queries: int) -> str:
    """What the 95 % interval of a difference, over so many test queries, shows in words, where more is better."""
    low, high = interval
    if num_queries < FEWEST_QUERIES:
        return f"no verdict on fewer than {FEWEST_QUERIES} queries"
    return f"better than {name}" if low > 0 else f"worse than {name}" if high < 0 else "no difference shown"


def print_test(history: dict) -> None:
    """The final table of a history, that of its score table, and on the demo the share of the gap closed."""
    size, intervals = history["data"]["split"]["test"], history["test_intervals"]
    moment = f"epoch {history['best_epoch']}"
    if history["best_step"] is not None:
        moment += f" at step {history['best_step']}"
    print(f"\ntest     {moment}, once, on {size['battles']} battles of {size['queries']} queries\n")
    rows = {"RankRouter": history["test_metrics"]}
    for end, label in enumerate(("  95 % from", "         to")):
        rows[label] = {name: bounds and bounds[end] for name, bounds in intervals.items()}
    compared = {LABELS[name]: row for name, row in history["baselines"].items()}
    rows |= compared
    if "demo" in history:
        rows["best fixed ranking"] = history["demo"]["fixed_ranking"]
        rows["true margins"] = history["demo"]["true_margins"]
    beyond = "  RankRouter's AUC beyond it, 95 %" if compared else ""
    print(f"{'':<18}{'accuracy':>10}{'auc':>10}{'log loss':>10}{'calibrated':>12}{beyond}")
    for label, row in rows.items():
        numbers = "".join(f"{row[name]:>10.4f}" for name in ("accuracy", "auc", "log_loss"))
        calibrated = f"{row['log_loss_calibrated']:>12.4f}" if "log_loss_calibrated" in row else ""
        print(f"{label:<18}{numbers}{calibrated}{_difference(row, 'auc', label, size['queries'])}")
    print("\nIntervals cover the drawing of the test queries, not the training.")
    raw, calibration = history["calibration"]["uncalibrated"], history["calibration"]
    print(
        f"Expected calibration error {raw['expected_calibration_error']:.4f}, and "
        f"{calibration['expected_calibration_error']:.4f} at the temperature {calibration['temperature']:.2f} "
        "that validation chose."
    )
    if "score_table" in history:
        _print_score_table(history, compared)
    if "cold_start" in history:
        _print_cold_start(history["cold_start"])
    if "demo" in history and history["demo"]["gap_closed"] is not None:
        print(
            f"RankRouter closes {history['demo']['gap_closed']:.0%} of the gap in AUC between the best "
            "query-independent ranking and the true margins."
        )
    print(f"\nsaved    {history['args']['output_dir']}: best_model.pt, training_history.json")


def _print_cold_start(cold: dict) -> None:
    print(
        f"\nnew      {one_line(cold['model'])}, left out of training: {cold['test_battles']} test battles of "
        f"{cold['test_queries']} queries; {cold['draws']} draws of its {cold['calibration_battles']} training battles\n"
    )
    print(f"{'battles known':<22}{'RankRouter, AUC, 95 %':<26}{'Bradley-Terry, AUC, 95 %':<26}difference, 95 %")
    for row in cold["rows"]:
        told = {"battles": "", "profile": ", its profile", "training": ", trained with"}[row["from"]]
        line = f"{row['battles']}{told}".ljust(20)
        for name in ("rank_router", "bradley_terry"):
            low, high = row[name]["intervals"]["auc"]
            line += f"{row[name]['auc']:>8.4f} [{low:.4f}, {high:.4f}]"
        low, high = row["difference"]["intervals"]["auc"]
        shown = verdict([low, high], LABELS["bradley_terry"], cold["test_queries"])
        print(f"{line}  {row['difference']['auc']:+.4f} [{low:+.4f}, {high:+.4f}]  {shown}")


def _print_score_table(history: dict, compared: dict) -> None:
    table, router = history["score_table"], history["test_metrics"] | {"intervals": history["test_intervals"]}
    print(
        f"\nscores   of the chosen model, on {table['rows']} test rows of the score table\n"
        f"single   {one_line(table['best_single']['model'])} has the best mean score in training\n"
    )
    beyond = "  RankRouter's mean score beyond it, 95 %" if compared else ""
    print(f"{'':<18}{'top-1':>8}{'mean score, 95 %':>26}{'gap closed, 95 %':>22}{beyond}")
    single = {} if compared else {LABELS["best_single"]: table["best_single"]}
    for label, row in ({"RankRouter": router} | single | compared | {"oracle": table["oracle"]}).items():
        low, high = row["intervals"]["mean_score"]
        told = f"{label:<18}{row['top1_accuracy']:>8.4f}{row['mean_score']:>10.4f} [{low:.4f}, {high:.4f}]"
        if row.get("gap_closed") is not None:
            low, high = row["intervals"]["gap_closed"]
            told += f"{row['gap_closed']:>7.0%} [{f'{low:.0%}, {high:.0%}]':<13}"
        print(told.rstrip() + _difference(row, "mean_score", label, table["rows"]))


def _difference(row: dict, metric: str, label: str, num_queries: int) -> str:
    """RankRouter's difference to a baseline, its interval and the verdict; nothing where `row` is no baseline's."""
    if "difference" not in row:
        return ""
    low, high = row["difference_intervals"][metric]
    return f"  {row['difference'][metric]:+.4f} [{low:+.4f}, {high:+.4f}]  {verdict([low, high], label, num_queries)}"
