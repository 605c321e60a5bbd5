"""Columns of a table: what their cells are, and which names are those of ids, costs and metrics, not of models."""

import math
import re
from dataclasses import dataclass, field

import numpy as np

from support.data.cells import COSTS, NO_NUMBER, SCORES, as_number, as_score
from support.data.formats import Table
from support.system.errors import one_line

IDS = {
    *("", "id", "index", "idx", "key", "qid", "uid", "nr", "no", "turn", "tstamp"),
    *("prompt_id", "question_id", "sample_id", "cluster_id"),
}
INDEX = ("unnamed:", "__index_level_")  # what pandas names an index
GOLD = (
    *("answer", "target", "gold", "golden_answer", "ground_truth", "reference", "expected", "labels", "gt", "truth"),
    *("solution", "ref", "choice", "correct_answer", "gold_label", "answer_idx"),
)
SUMMARIES = (
    *("human", "average", "best", "worst", "oracle", "router", "majority", "overall", "random"),
    *("best_model", "best_score"),
)
METRICS = (
    *("bleu", "rouge", "helpfulness", "helpful", "honest", "correctness", "coherence", "complexity", "verbosity"),
    *("difficulty", "level", "safety", "harmlessness", "toxicity", "f1", "em", "exact_match", "rouge1", "rouge2"),
    *("rougel", "meteor", "bertscore", "pass@1", "mrr", "ndcg", "precision", "recall", "win_rate", "elo", "grade"),
    *("points", "threshold", "margin", "shots"),
)
FACTS = ("turns", "timestamp", "seed", "split", "fold", "row", "line", "step", "epoch", "year", "weight")
NO_MODEL = {*GOLD, *SUMMARIES, *METRICS, *FACTS, *SCORES, *COSTS}
# A column is no model where the first or last word of its name is one of these; a unit may follow: gpt-4_latency_s.
DETAILS = {
    *("cost", "price", "usd", "latency", "time", "duration", "seconds", "ms", "tokens", "token", "length", "len"),
    *("loss", "nll", "ppl", "perplexity", "wer", "error", "rank", "confidence", "logp", "logprob", "temperature"),
    *("chars", "words", "count", "size", "num", "id", "idx", "index", "rating", "votes", "vote", "annotator", "judge"),
}
FIRST = {"n", "num", "nb", "number", "count", "total", "max", "min", "mean", "avg", "batch", "is", "has", "score"}
UNITS = {"s", "ms", "usd", "in", "out", "a", "b", "0", "1", "2", "3", "ratio"}
# The answers of one model, or the two answers or models of a comparison: such a table has no column per model.
ANSWERS = re.compile(r"(response|completion|generation|prediction)s?|(chosen|rejected)(_\w+)?|\w*_(chosen|rejected)")
COMPARED = re.compile(r"(model|system|assistant|llm|generator|response|output|answer)s?[_ -]?[\dab]")
# What people write for numbers, and float() does not read.
OTHER_NUMBERS = re.compile(
    r"\s*(-?\d+,\d+|-?[\d.]+ *%|[$€] *\d.*|\d+ */ *\d+|yes|no|pass(ed)?|fail(ed)?|(in)?correct|right|wrong)\s*", re.I
)
OTHER_SCALE = 8  # times the largest score of another model: hardly the same metric


@dataclass
class Column:
    """What the filled cells of a column are."""

    filled: int = 0
    numbers: int = 0
    other_numbers: int = 0  # cells of the form `OTHER_NUMBERS`
    example: str = ""  # one of these
    low: float = math.inf  # of the finite numbers, as `high`
    high: float = -math.inf
    finite: int = 0
    distinct: set[float] | None = field(default_factory=set)  # whole numbers; None once one occurs again

    def add(self, cells: list) -> None:
        for cell in cells:
            if cell is None or (isinstance(cell, (str, float)) and (cell in NO_NUMBER or cell != cell)):
                continue
            self.filled += 1
            score = as_score(cell)
            self.numbers += score is not None or as_number(cell) is not None  # also an infinite one
            if score is not None:
                self._add_number(score)
            elif isinstance(cell, str) and OTHER_NUMBERS.fullmatch(cell[:40]):
                self.other_numbers, self.example = self.other_numbers + 1, cell

    def _add_number(self, score: float) -> None:
        self.finite += 1
        if self.distinct is not None:
            self.distinct.add(score)
            self.distinct = self.distinct if score == int(score) and len(self.distinct) == self.finite else None
        self.low, self.high = min(self.low, score), max(self.high, score)

    @property
    def is_score(self) -> bool:
        """Whether it is mostly numbers, some of them finite."""
        return 2 * self.numbers > self.filled and self.low <= self.high

    @property
    def is_cost(self) -> bool:
        """Whether it is mostly numbers, with or without a dollar sign."""
        return 2 * (self.numbers + self.other_numbers) > self.filled

    @property
    def numbers_rows(self) -> bool:
        """Whether it holds consecutive whole numbers, each once, as an index does."""
        return self.distinct is not None and self.finite > 4 and self.high - self.low == self.finite - 1

    @property
    def is_other_numbers(self) -> bool:
        """Whether it is mostly numbers that float() does not read, such as 85% or 0,5."""
        return 2 * self.other_numbers > self.filled


def read_columns(tables: list[Table], names: list[str]) -> dict[str, Column]:
    """What the columns of these names hold in all tables together. Reads the files."""
    columns = {name: Column() for name in names}
    for table in tables:
        for chunk in table.read([name for name in names if name not in table.unreadable]):
            for name, cells in chunk.items():
                columns[name].add(cells)
    return columns


def is_model_column(column: str) -> bool:
    """Whether a numeric column can be a model, by its name: it is no id, counter, cost, metric or detail of a model."""
    name = column.strip().lower()
    words = [word for word in re.split(r"[\W_]+", name) if word] or [""]
    is_detail = words[0] in DETAILS | FIRST or words[-1] in DETAILS
    has_unit = len(words) > 1 and words[-1] in UNITS and words[-2] in DETAILS | {"score"}
    return not (is_id_column(column) or name in NO_MODEL or "|" in name or has_unit or is_detail)


def is_id_column(column: str) -> bool:
    """Whether a column numbers rows or queries, by its name."""
    name = column.strip().lower()
    return name in IDS or name.startswith(INDEX)


def odd_scores(scores: np.ndarray, model_names: list[str]) -> str | None:
    """What makes the scores (R, M) of a table look like those of several metrics, or like ranks; else None."""
    import pandas as pd

    table = pd.DataFrame(scores, columns=[one_line(name) for name in model_names])
    largest = table.abs().max()
    largest = largest[largest > 0].sort_values()
    if len(largest) and largest.iloc[-1] > 1 and largest.iloc[-1] > OTHER_SCALE * largest.iloc[0]:
        low, high = (f"{largest.index[i]} up to {largest.iloc[i]:g}" for i in (0, -1))
        return f"scores on several scales, {low} and {high}"
    table = table[table.max(axis=1) > table.min(axis=1)]  # a row of equal scores says nothing
    for method, first in (("min", 1), ("dense", 1), ("min", 0), ("dense", 0)):
        ranks = table.rank(axis=1, method=method) + (first - 1)
        least = 3 if first == 1 and len(model_names) > 2 else 2  # scores of 0 and 1, or 1 and 2, rank themselves
        if len(table) > 1 and table.max(axis=None) >= least and ranks.equals(table):
            return f"each row is a ranking from {first}, and the highest score wins"
    return None
