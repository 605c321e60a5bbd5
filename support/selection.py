"""Which moment of a training counts: the highest validation AUC, the earlier of two that are equal."""

import math


def moments(history: dict) -> list[tuple[int, int | None, dict]]:
    """Each validation in its order: the epoch, the steps taken in it (None: all), and the metrics."""
    ends = [(epoch, None, val) for epoch, val in enumerate(history["val_metrics"])]
    within = [(val["epoch"], val["step"], val) for val in history["validations"]]
    return sorted(ends + within, key=lambda moment: (moment[0], math.inf if moment[1] is None else moment[1]))


def best_moment(history: dict) -> tuple[int, int | None, dict] | None:
    """That of the highest validation AUC, the earliest of such; None before the first."""
    return max(moments(history), key=lambda moment: moment[2]["auc"], default=None)


def waited(history: dict) -> int:
    """How many validations there were since the best one."""
    found = moments(history)
    return len(found) - 1 - found.index(best_moment(history)) if found else 0
