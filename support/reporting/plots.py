"""Pictures of finished runs: training, calibration, RankRouter beside the baselines, the strong models per cluster."""

import functools
import io
import itertools
import logging
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage

from metrics import hull
from support.reporting.console import LABELS, bounds
from support.reporting.runs import Run
from support.system.files import atomic_write

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # of Okabe and Ito
STYLES = ("-", "--", ":", "-.")
MOST_ROWS, MOST_CLUSTERS = 12, 60  # the first rows and the largest clusters are drawn
QUERY_WIDTH, NAME_WIDTH = 60, 44  # of a label, in columns of text
# Those of these fonts that are installed supply the letters that matplotlib's own font lacks.
OTHER_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei")


def draw(groups: list[list[Run]], rows: list[dict], folder: Path) -> list[Path]:
    """Write the PNGs of groups of runs, and of their `rows` from `report.table`, to a folder; return their paths."""
    if len(rows) > MOST_ROWS:
        print(f"warning: the pictures show the first {MOST_ROWS} of {len(rows)} lines", file=sys.stderr)
        groups, rows = groups[:MOST_ROWS], rows[:MOST_ROWS]
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of every font that lacks a weight
    fonts = ["DejaVu Sans", *(name for name in OTHER_FONTS if name in font_manager.get_font_names())]
    with rc_context({"font.family": fonts, "font.size": 9}):
        figures = {
            "training": training(groups, rows),
            "reliability": reliability(groups, rows),
            "baselines": baselines(groups, rows, "auc"),
        }
        if any("mean_score" in row["test"] for row in rows):
            figures["scores"] = baselines(groups, rows, "mean_score")
        for members, row in zip(groups, rows, strict=True):
            best = max(members, key=lambda run: run.val_auc)
            name = re.sub(r"[^\w.-]+", "-", row["run"])[-80:].strip("-")
            while any(figure.endswith(f"-{name}") for figure in figures):
                name += "-"
            if best.clusters:
                figures[f"clusters-{name}"] = cluster_map(best)
            if best.choice_shares:
                figures[f"choices-{name}"] = choice_shares(best)
            if best.curves:
                figures[f"cost-{name}"] = cost_curve(best)
        paths = []
        for name, figure in figures.items():
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=130)
            paths.append(folder / f"{name}.png")
            atomic_write(paths[-1], png.getvalue())
    return paths


def training(groups: list[list[Run]], rows: list[dict]) -> Figure:
    """Training loss and validation AUC per epoch: a line per run, a color per group, a dot on the best validation."""
    names = [shorten_start(row["run"], 100) for row in rows]
    columns = 2 if max(map(len, names)) <= 60 else 1
    figure = Figure(figsize=(11, 4.2 + 0.2 * len(rows) / columns), layout="constrained")
    loss, auc = figure.subplots(1, 2)
    for number, (members, name) in enumerate(zip(groups, names, strict=True)):
        line = {"color": COLORS[number % len(COLORS)], "linestyle": STYLES[number // len(COLORS)]}
        dot = {"color": COLORS[number % len(COLORS)], "marker": "o", "markersize": 5}
        for run in members:
            label = name if run is members[0] else None
            loss.plot(run.train_losses, linewidth=1.3, alpha=0.8, label=label, **line)
            auc.plot(run.val_aucs, linewidth=1.3, alpha=0.8, **line)
            loss.plot(run.best_epoch, run.train_losses[run.best_epoch], **dot)
            auc.plot(run.best_epoch, run.val_auc, **dot)  # may be from within the epoch
    for axes, label in ((loss, "training loss, mean of a battle"), (auc, "validation AUC")):
        axes.set(xlabel="epoch (dot: kept)", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        tidy(axes)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def reliability(groups: list[list[Run]], rows: list[dict]) -> Figure:
    """Share of battles that the chosen model won over its predicted probability: a panel per group, seeds pooled."""
    num_columns = min(3, len(groups))
    num_rows = -(-len(groups) // num_columns)
    figure = Figure(figsize=(3.7 * num_columns + 0.3, 4.1 * num_rows + 0.5), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).flat
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes, members, row in zip(panels, groups, rows, strict=False):
        axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1)
        errors = {}
        for name, color in (("uncalibrated", "0.55"), ("calibrated", COLORS[0])):
            battles, probability, won = pool_bins([run.calibration[name]["bins"] for run in members])
            errors[name] = np.mean([run.calibration[name]["expected_calibration_error"] for run in members])
            axes.scatter(probability, won, s=4 + 600 * battles / battles.sum(), color=color, alpha=0.6, linewidth=0)
        title = "ECE {uncalibrated:.3f} as trained (grey), {calibrated:.3f} at the fitted T (blue)".format(**errors)
        axes.set_title(f"{shorten_start(row['run'], 46)}\n{title}", fontsize=8)
        axes.tick_params(labelbottom=True, labelleft=True)
        tidy(axes)
    figure.supxlabel("probability that the chosen model wins (area of a dot: battles)", fontsize=9)
    figure.supylabel("share that it won", fontsize=9)
    return figure


def pool_bins(bins_of_runs: list[list[dict]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of battles, mean probability and share won in every bin, over several runs."""
    pooled = []
    for low in sorted({row["low"] for bins in bins_of_runs for row in bins}):
        same = [row for bins in bins_of_runs for row in bins if row["low"] == low]
        battles = np.array([row["battles"] for row in same])
        means = [np.average([row[name] for row in same], weights=battles) for name in ("probability", "won")]
        pooled.append((battles.sum(), *means))
    return tuple(np.array(pooled).T)  # three of (bins,)


def baselines(groups: list[list[Run]], rows: list[dict], metric: str) -> Figure:
    """Test "auc" or "mean_score" of RankRouter and its baselines, with the differences beside: a panel per group.

    The panels share one axis where all have the same test battles.
    """
    same_test_set = len({members[0].test_set for members in groups}) == 1
    rows = [row for row in rows if metric in row["test"]]
    heights = [1.0 + 0.3 * len(row["baselines"]) for row in rows]
    figure = Figure(figsize=(9.5, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=same_test_set, height_ratios=heights).flat
    for axes, row in zip(panels, rows, strict=True):
        draw_baselines(axes, row, metric)
    return figure


def draw_baselines(axes: Axes, row: dict, metric: str) -> None:
    """Draw a panel of `baselines`."""
    # In AUC, random's 0.5 would squeeze all others.
    names = [name for name in row["baselines"] if (name, metric) != ("random", "auc")]
    labels = ["RankRouter", *(LABELS.get(name, name) for name in names)]
    beside = {"transform": axes.get_yaxis_transform(), "va": "center"}  # of a text to the right of the axes
    for place, test in enumerate([row["test"], *(row["baselines"][name]["test"] for name in names)]):
        value, color = test[metric], COLORS[0] if place == 0 else "0.35"
        low, high = value["interval"] or (value["mean"] - value["sd"], value["mean"] + value["sd"])
        axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot(value["mean"], place, "o", color=color, markersize=6)
    for place, name in enumerate(names, start=1):
        beyond = row["baselines"][name]["beyond"][metric]
        text = f"{beyond['mean']:+.4f} {bounds(beyond['interval'], '+')}"
        axes.text(1.02, place, text, family="monospace", **beside)
    if names:
        axes.text(1.02, 0, "RankRouter beyond it", **beside)
    label = "test AUC (random: 0.5)"
    if metric == "mean_score":
        label = "mean score of the chosen model (dotted: best single model; dashed: oracle)"
        for end, style in (("best_single", ":"), ("oracle", "--")):
            axes.axvline(row["score_table"][end]["mean"], color="0.5", linestyle=style, linewidth=1, zorder=0)
    spread = "± standard deviation over seeds" if len(row["seeds"]) > 1 else "95 % interval"
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel=f"{label}; {spread}", ylim=(len(labels) - 0.5, -0.5))
    axes.set_title(shorten_start(row["run"], 90), fontsize=9, loc="left")
    axes.tick_params(labelbottom=True)
    tidy(axes)


def cluster_map(run: Run) -> Figure:
    """Log-odds of every model in every cluster: similar clusters next to each other, models from strong to weak."""
    shown = sorted(run.clusters, key=lambda cluster: -cluster["size"])[:MOST_CLUSTERS]
    names = list(shown[0]["log_odds"])
    odds = np.array([[cluster["log_odds"][name] for name in names] for cluster in shown])  # (K, M)
    order = np.argsort(-np.average(odds, axis=0, weights=[cluster["size"] for cluster in shown]))  # (M,)
    rows = leaves_list(linkage(odds, "average", optimal_ordering=True)) if len(shown) > 1 else [0]  # (K,)
    odds = odds[rows][:, order]  # (K, M)

    figure = Figure(figsize=(max(9, 6 + 0.3 * len(names)), 3.8 + 0.19 * len(shown)), layout="constrained")
    axes = figure.subplots()
    limit = float(np.quantile(np.abs(odds), 0.99)) or 1.0
    image = axes.imshow(odds, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.plot(odds.argmax(1), range(len(odds)), ".", color="black", markersize=5)
    axes.set_xticks(range(len(names)), [shorten_start(names[i], NAME_WIDTH) for i in order], rotation=90)
    labels = [f"{shorten(shown[row]['central_queries'][0], QUERY_WIDTH)}  ({shown[row]['size']})" for row in rows]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.tick_params(length=0)
    num_left_out = len(run.clusters) - len(shown)
    figure.suptitle(
        f"{shorten_start(run.name, 80)}: who is strong where, as the router scores it\n"
        "a row is a cluster: its most central query (number of training queries); a dot is the strongest model;\n"
        "the color is the log-odds of beating another model drawn at random"
        + (f"\n{num_left_out} smaller clusters are left out" if num_left_out else ""),
        fontsize=9,
    )
    shrink = min(0.8, 5 / figure.get_figwidth())  # a bar of 5 inches at most
    figure.colorbar(image, ax=axes, location="top", shrink=shrink, aspect=40, pad=0.01, extend="both")
    return figure


def cost_curve(run: Run) -> Figure:
    """Mean score over mean cost: RankRouter's curve with its intervals, the hulls of all methods, and single models."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    models = np.array([[model["mean_cost"], model["mean_score"]] for model in run.priced_models.values()])  # (M, 2)
    corners = [hull(*models.T)]
    # Random routing is far below, and the best single model is one of the models.
    curves = {name: points for name, points in run.curves.items() if name not in ("random", "best_single")}
    for number, (name, points) in enumerate(curves.items()):
        cost, score = (np.array([point[key] for point in points]) for key in ("mean_cost", "mean_score"))  # (L,) each
        corners.append(hull(cost, score))
        style = {"color": COLORS[number % len(COLORS)], "linewidth": 1.0 if number else 2.0, "zorder": 3 - number / 100}
        axes.plot(*corners[-1], label=LABELS.get(name, name), **style)
        if not number:
            order = np.argsort(cost)  # (L,)
            low, high = np.array([points[i]["interval"] for i in order]).T  # (L,) each
            axes.fill_between(cost[order], low, high, color=COLORS[0], alpha=0.15, linewidth=0)
            axes.plot(cost, score, ".", color=COLORS[0], markersize=4)
    least, most = models[:, 0].min(), models[:, 0].max()
    axes.plot(*corners[0], "--", color="0.3", linewidth=1.2, label="single models", zorder=4)
    axes.plot(*models.T, "k.", markersize=6)
    for name, (cost, score) in zip(run.priced_models, models, strict=True):
        if score >= np.median(models[:, 1]):
            is_left = 2 * cost < least + most
            at = {"xytext": (4 if is_left else -4, -9), "ha": "left" if is_left else "right"}
            axes.annotate(shorten_start(name, NAME_WIDTH), (cost, score), textcoords="offset points", fontsize=7, **at)
    if least > 0 and most > 30 * least:
        axes.set_xscale("log")
    lowest = min(score.min() for _, score in corners)
    axes.set(xlabel="mean cost of a query", ylabel="mean score of the chosen model")
    axes.set_ylim(bottom=lowest - 0.1 * (max(score.max() for _, score in corners) - lowest))
    title = "lines are hulls, dots RankRouter's settings and single models; the band is a 95 % interval over queries"
    axes.set_title(f"{shorten_start(run.name, 90)}\n{title}", fontsize=9, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    tidy(axes)
    return figure


def choice_shares(run: Run) -> Figure:
    """The share of the test's rows that each model is chosen for, by RankRouter and by the oracle, with intervals."""
    router, oracle = run.choice_shares["RankRouter"], run.choice_shares["oracle"]
    names = sorted(router, key=lambda name: -max(router[name]["share"], oracle[name]["share"]))[:MOST_CLUSTERS]
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for offset, label, shares, color in ((-0.18, "RankRouter", router, COLORS[0]), (0.18, "oracle", oracle, "0.6")):
        share = np.array([shares[name]["share"] for name in names])  # (m,)
        ends = np.array([shares[name]["interval"] for name in names]).T  # (2, m)
        place = np.arange(len(names)) + offset  # (m,)
        axes.barh(place, share, 0.34, color=color, label=label, xerr=np.abs(ends - share), ecolor="0.2")
    axes.set_yticks(range(len(names)), [shorten_start(name, NAME_WIDTH) for name in names])
    axes.set(xlabel="share of the test rows; 95 % intervals over queries", ylim=(len(names) - 0.5, -0.5))
    axes.set_title(
        f"{shorten_start(run.name, 90)}\nwho is chosen, prices aside; the oracle takes the cheapest of the best",
        fontsize=9,
        loc="left",
    )
    axes.legend(frameon=False, loc="lower right")
    tidy(axes)
    return figure


def shorten(text: str, width: int) -> str:
    """A text on one line of at most `width` columns, without what matplotlib cannot draw or reads as a formula."""
    code_points = drawable(tuple(rcParams["font.family"]))
    text = "".join(letter if ord(letter) in code_points else "\0" for letter in " ".join(text.split()))
    text = re.sub("\0+", "…", text)
    columns = itertools.accumulate(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    fits = sum(column < width for column in columns)  # number of letters that leave room for the ellipsis
    return (text if fits >= len(text) - 1 else text[:fits] + "…").replace("$", r"\$")


def shorten_start(name: str, width: int) -> str:
    """`shorten`, but cut at the start: names of runs and models differ at their ends."""
    return shorten(name if len(name) <= width else "…" + name[1 - width :], width)


@functools.cache
def drawable(fonts: tuple[str, ...]) -> frozenset[int]:
    """The code points that at least one of the fonts has."""
    files = (font_manager.findfont(font_manager.FontProperties(family=[font])) for font in fonts)
    return frozenset().union(*(font_manager.get_font(file).get_charmap() for file in files))


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
