"""PNGs of finished runs: training, calibration, RankRouter beside the baselines, and who is strong in which cluster."""

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
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage

from support.files import atomic_write
from support.history import Run
from support.printing import LABELS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
STYLES = ("-", "--", ":", "-.")
MOST_ROWS, MOST_CLUSTERS = 12, 60  # that are drawn: the first, and the largest
QUERY_SHOWN, NAME_SHOWN = 60, 44  # columns of a label
# Of these, what is installed is asked for letters that matplotlib's own font lacks.
OTHER_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei")


def draw(groups: list[list[Run]], rows: list[dict], folder: Path) -> list[Path]:
    """Write the PNGs of groups of runs, of which `rows` tells what `report.py` makes of them; return their paths."""
    if len(rows) > MOST_ROWS:
        print(f"warning: the pictures show the first {MOST_ROWS} of {len(rows)} lines", file=sys.stderr)
        groups, rows = groups[:MOST_ROWS], rows[:MOST_ROWS]
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of every font that lacks a weight
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
            name = "clusters-" + re.sub(r"[^\w.-]+", "-", row["run"])[-80:].strip("-")
            while name in figures:
                name += "-"
            if best.clusters:
                figures[name] = cluster_map(best)
        paths = []
        for name, figure in figures.items():
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=130)
            paths.append(folder / f"{name}.png")
            atomic_write(paths[-1], png.getvalue())
    return paths


def training(groups: list[list[Run]], rows: list[dict]) -> Figure:
    """Training loss and validation AUC per epoch, a line a run, a colour a group; a dot on the moment that was kept."""
    names = [ending(row["run"], 100) for row in rows]
    columns = 2 if max(map(len, names)) <= 60 else 1
    figure = Figure(figsize=(11, 4.2 + 0.2 * len(rows) / columns), layout="constrained")
    loss, auc = figure.subplots(1, 2)
    for number, (members, name) in enumerate(zip(groups, names, strict=True)):
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS)]}
        for place, run in enumerate(members):
            for axes, values in ((loss, run.train_losses), (auc, run.val_aucs)):
                label = name if place == 0 and axes is loss else None
                axes.plot(values, **style, linewidth=1.3, alpha=0.8, label=label)
                kept = run.val_auc if axes is auc else values[run.best_epoch]  # which may lie within the epoch
                axes.plot(run.best_epoch, kept, "o", color=style["color"], markersize=5)
    loss.set_ylabel("training loss, mean of a battle")
    auc.set_ylabel("validation AUC")
    for axes in (loss, auc):
        axes.set_xlabel("epoch (dot: kept)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        tidy(axes)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def reliability(groups: list[list[Run]], rows: list[dict]) -> Figure:
    """How often the chosen model won, against the probability it was given, a panel a group; seeds are pooled."""
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(3.7 * across + 0.3, 4.1 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes, members, row in zip(panels, groups, rows, strict=False):
        axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1)
        errors = {}
        for name, colour in (("uncalibrated", "0.55"), ("calibrated", COLOURS[0])):
            battles, probability, won = pooled([run.calibration[name]["bins"] for run in members])
            errors[name] = np.mean([run.calibration[name]["expected_calibration_error"] for run in members])
            axes.scatter(probability, won, s=4 + 600 * battles / battles.sum(), color=colour, alpha=0.6, linewidth=0)
        told = "ECE {uncalibrated:.3f} as trained (grey), {calibrated:.3f} at the fitted T (blue)".format(**errors)
        axes.set_title(f"{ending(row['run'], 46)}\n{told}", fontsize=8)
        axes.tick_params(labelbottom=True, labelleft=True)
        tidy(axes)
    figure.supxlabel("probability that the chosen model wins (area of a dot: battles)", fontsize=9)
    figure.supylabel("share that it won", fontsize=9)
    return figure


def pooled(bins_of_runs: list[list[dict]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Battles, mean probability and share won of the bins of several runs, bin by bin."""
    found = []
    for low in sorted({part["low"] for bins in bins_of_runs for part in bins}):
        same = [part for bins in bins_of_runs for part in bins if part["low"] == low]
        battles = np.array([part["battles"] for part in same])
        means = [np.average([part[name] for part in same], weights=battles) for name in ("probability", "won")]
        found.append((battles.sum(), *means))
    return tuple(np.array(found).T)


def baselines(groups: list[list[Run]], rows: list[dict], metric: str) -> Figure:
    """Test "auc" or "mean_score" of RankRouter and its baselines, a panel a group, with the differences beside them.

    Panels of the same test battles have the same axis.
    """
    alike = len({members[0].test_set for members in groups}) == 1
    rows = [row for row in rows if metric in row["test"]]
    heights = [1.0 + 0.3 * len(row["baselines"]) for row in rows]
    figure = Figure(figsize=(9.5, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=alike, height_ratios=heights).flat
    for axes, row in zip(panels, rows, strict=True):
        # In AUC, random's 0.5 would squeeze all others.
        names = [name for name in row["baselines"] if (name, metric) != ("random", "auc")]
        labels = ["RankRouter", *(LABELS.get(name, name) for name in names)]
        for place, test in enumerate([row["test"], *(row["baselines"][name]["test"] for name in names)]):
            value, colour = test[metric], COLOURS[0] if place == 0 else "0.35"
            low, high = value["interval"] or (value["mean"] - value["sd"], value["mean"] + value["sd"])
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(value["mean"], place, "o", color=colour, markersize=6)
        for place, name in enumerate(names, start=1):
            beyond = row["baselines"][name]["beyond"][metric]
            told = "{:+.4f} [{:+.4f}, {:+.4f}]".format(beyond["mean"], *beyond["interval"])
            axes.text(1.02, place, told, transform=axes.get_yaxis_transform(), va="center", family="monospace")
        if names:
            axes.text(1.02, 0, "RankRouter beyond it", transform=axes.get_yaxis_transform(), va="center")
        where = "test AUC (random: 0.5)"
        if metric == "mean_score":
            where = "mean score of the chosen model (dotted: best single model; dashed: oracle)"
            for end, style in (("best_single", ":"), ("oracle", "--")):
                axes.axvline(row["score_table"][end]["mean"], color="0.5", linestyle=style, linewidth=1, zorder=0)
        spread = "± standard deviation over seeds" if len(row["seeds"]) > 1 else "95 % interval"
        axes.set_xlabel(f"{where}; {spread}")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_title(ending(row["run"], 90), fontsize=9, loc="left")
        axes.tick_params(labelbottom=True)
        tidy(axes)
    return figure


def cluster_map(run: Run) -> Figure:
    """Log-odds of every model in every cluster, rows that are alike together, models from strong to weak."""
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
    axes.set_xticks(range(len(names)), [ending(names[i], NAME_SHOWN) for i in order], rotation=90)
    labels = [f"{plain(shown[row]['central_query'], QUERY_SHOWN)}  ({shown[row]['size']})" for row in rows]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.tick_params(length=0)
    left_out = len(run.clusters) - len(shown)
    figure.suptitle(
        f"{ending(run.name, 80)}: who is strong where, as the router scores it\n"
        "a row is a cluster, told by its most central query and its training queries; a dot is the strongest model;\n"
        "the colour is the log-odds of beating another model drawn at random"
        + (f"\n{left_out} smaller clusters are left out" if left_out else ""),
        fontsize=9,
    )
    shrink = min(0.8, 5 / figure.get_figwidth())  # a bar of 5 inches at most
    figure.colorbar(image, ax=axes, location="top", shrink=shrink, aspect=40, pad=0.01, extend="both")
    return figure


def plain(text: str, most: int) -> str:
    """A text on one line, cut to so many columns, without what matplotlib cannot draw or takes for a formula."""
    letters = drawable(tuple(rcParams["font.family"]))
    text = "".join(letter if ord(letter) in letters else "\0" for letter in " ".join(text.split()))
    text = re.sub("\0+", "…", text)
    columns = itertools.accumulate(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    fits = sum(column < most for column in columns)  # letters, with room for the dots
    return (text if fits >= len(text) - 1 else text[:fits] + "…").replace("$", r"\$")


def ending(name: str, most: int) -> str:
    """A name as `plain` gives it, but cut at its start: names of runs and models differ at their ends."""
    return plain(name if len(name) <= most else "…" + name[1 - most :], most)


@functools.cache
def drawable(fonts: tuple[str, ...]) -> frozenset[int]:
    """The code points that some of the fonts have."""
    files = (font_manager.findfont(font_manager.FontProperties(family=[font])) for font in fonts)
    return frozenset().union(*(font_manager.get_font(file).get_charmap() for file in files))


def tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
