"""The public layouts of battles and score tables, told by their columns; their rows as numbered battles."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from support.files import UserError, valid_unicode
from support.tables import Chunk, Table, as_number

OUTCOMES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}
ONE_HOT = {"winner_model_a": 1.0, "winner_model_b": 0.0, "winner_tie": 0.5}
# Numeric columns that public score tables carry beside the models' scores.
NOT_MODELS = {"", "id", "prompt_id", "question_id", "sample_id", "index", "cluster_id", "turn", "tstamp"}
LARGEST_SCORE = 1e30
NOT_MODELS_PREFIX = ("unnamed:", "__index_level_")  # what pandas makes of an index
LAYOUTS = (
    "model_a, model_b, winner, conversation_a (Arena); or model_a, model_b, prompt and winner or one-hot "
    "winner_model_a, winner_model_b, winner_tie (Kaggle); or prompt or question with one numeric column per "
    "model or nested scores (wide score table); or prompt, model_name, label or score (long score table)"
)


@dataclass(frozen=True)
class Layout:
    """How a file holds battles, and in which columns.

    kind: "conversations" or "prompts" (others: model a, model b, winner, the last as one column or as three);
    "wide" (others: the score columns); "nested" (the column of all scores); "long" (model, score and, where there
    is one, prompt_id).
    """

    kind: str
    query: str
    others: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        return [self.query, *self.others]

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are columns of a wide score table."""
        return self.others if self.kind == "wide" else ()


def find_layout(table: Table, score_columns: list[str] | None = None) -> Layout:
    """Tell a file's layout by its columns. Raises `UserError` where it has none that we know."""
    found = set(table.columns)
    prompt = next((name for name in ("prompt", "question") if name in found), None)
    model = model_column(table)
    score = next((name for name in ("label", "score") if name in found), None)
    winner = ("winner",) if "winner" in found else tuple(ONE_HOT)
    if score_columns:
        missing = [name for name in score_columns if name not in found]
        if missing:
            raise UserError(f"{table.file} has no column {listed(missing)}; found {listed(table.columns)}")
        if prompt:
            return Layout("wide", prompt, tuple(score_columns))
    elif found.issuperset({"model_a", "model_b", *winner}):
        if "conversation_a" in found:
            return Layout("conversations", "conversation_a", ("model_a", "model_b", *winner))
        if prompt:
            return Layout("prompts", prompt, ("model_a", "model_b", *winner))
    elif prompt and model and score:
        return Layout("long", prompt, (model, score, *found.intersection({"prompt_id"})))
    elif prompt and "scores" in found:
        return Layout("nested", prompt, ("scores",))
    elif prompt:
        models = [name for name in table.numeric if name != prompt and is_score_column(name)]
        if models:
            return Layout("wide", prompt, tuple(models))
    raise UserError(f"{table.file} has the columns {listed(table.columns)}; expected {LAYOUTS}")


def model_column(table: Table) -> str | None:
    """The column of models' names, if there is one."""
    return next((name for name in ("model_name", "model") if name in table.columns), None)


def is_score_column(column: str) -> bool:
    """Whether a column of numbers is one of scores by its name, and no id or index."""
    name = column.strip().lower()
    return "|" not in name and name not in NOT_MODELS and not name.startswith(NOT_MODELS_PREFIX)


class Rows:
    """Numbers queries and models as rows come in, and counts each row left out under one reason."""

    def __init__(self):
        self.read = 0
        self.dropped = Counter()  # reason -> rows
        self.scores_missing = 0  # or not finite, in rows of wide and nested tables that are kept
        self.repaired = 0  # texts in which lone surrogates were replaced
        self.queries = []  # the first spelling of each
        self.query_number = {}  # query with white space folded -> its place in queries
        self.model_number = {}
        self.battles = []  # (query, model a, model b, outcome)
        self.scores = []  # (group, query, model, score): the pairs within a group are battles
        self.group_number = {}  # a row of a wide table, or a prompt of a long one -> its group
        self.scored = set()  # (group, model) of long tables

    def add(self, chunk: Chunk, layout: Layout) -> None:
        """Take in the rows of a chunk, read with the layout's columns."""
        columns = [chunk[name] for name in layout.others]
        for query, *cells in zip(chunk[layout.query], *columns, strict=True):
            text = self.clean(_first_turn(query) if layout.kind == "conversations" else _prompt(query)).strip()
            if not text:
                reason = "without query text"
            elif layout.kind in ("conversations", "prompts"):
                reason = self.add_battle(text, *cells)
            elif layout.kind == "long":
                reason = self.add_score(text, *cells)
            elif layout.kind == "nested":
                reason = self.add_scores(text, _nested(cells[0]))
            else:
                reason = self.add_scores(text, zip(layout.models, cells, strict=True))
            if reason:
                self.dropped[reason] += 1
            self.read += 1

    def add_battle(self, text: str, model_a: object, model_b: object, *winner: object) -> str | None:
        a, b, outcome = self.name(model_a), self.name(model_b), _outcome(winner)
        if not a or not b:
            return "without a model name"
        if a == b:
            return "model against itself"
        if outcome is None:
            return "with an unknown winner"
        self.battles.append((self.query(text), self.model(a), self.model(b), outcome))
        return None

    def add_score(self, text: str, model: object, score: object, prompt_id: object = None) -> str | None:
        name, value = self.name(model), as_score(score)
        if not name:
            return "without a model name"
        if value is None:
            return "without a score"
        query = self.query(text)
        # An id alone would mix prompts where shards count from 0 each, or where it is left empty.
        group = self.group_number.setdefault((str(prompt_id), query), len(self.group_number))
        if (group, name) in self.scored:
            return "scoring a model again"
        self.scored.add((group, name))
        self.scores.append((group, query, self.model(name), value))
        return None

    def add_scores(self, text: str, scores: Iterable[tuple[object, object]]) -> str | None:
        values = {self.name(model): as_score(score) for model, score in scores}
        valid = [(name, value) for name, value in values.items() if name and value is not None]
        if len(valid) < 2:
            return "with fewer than two scores"
        self.scores_missing += len(values) - len(valid)
        group = self.group_number.setdefault((None, self.read), len(self.group_number))  # an id is never None there
        self.scores += [(group, self.query(text), self.model(name), value) for name, value in valid]
        return None

    def clean(self, text: str) -> str:
        whole = valid_unicode(text)
        self.repaired += whole != text
        return whole

    def name(self, value: object) -> str:
        missing = value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()
        return "" if missing else self.clean(str(value))

    def query(self, text: str) -> int:
        number = self.query_number.setdefault(" ".join(text.split()), len(self.queries))
        if number == len(self.queries):
            self.queries.append(text)
        return number

    def model(self, name: str) -> int:
        return self.model_number.setdefault(name, len(self.model_number))

    def finish(self, limit: int | None, seed: int) -> tuple[list[str], list[str], np.ndarray, np.ndarray, int]:
        """Queries (Q,), model names (M,) sorted, battles (N, 4) as query, model a, model b, outcome, scores (S, 4) as
        row, query, model, score, and how many queries with battles `limit` leaves out, by a draw of `seed`.
        """
        battles = np.array(self.battles, np.float64).reshape(-1, 4)  # (N, 4)
        scores = np.array(self.scores, np.float64).reshape(-1, 4)  # (S, 4)
        _, group_idx, group_sizes = np.unique(scores[:, 0], return_inverse=True, return_counts=True)
        alone = group_sizes[group_idx] == 1  # (S,)
        self.dropped += Counter({"alone with their query": int(alone.sum())})
        scores = scores[~alone]
        fighting = np.union1d(battles[:, 0], scores[:, 1])  # (queries,)
        left_out = max(0, len(fighting) - limit) if limit else 0
        if left_out:  # before the pairs are made, which a large table has no room for
            kept = np.random.default_rng(seed).choice(fighting, limit, replace=False)
            battles = battles[np.isin(battles[:, 0], kept)]
            scores = scores[np.isin(scores[:, 1], kept)]
        battles = np.concatenate([battles, _pairs(scores)])  # (N, 4)
        model_names = sorted(self.model_number)
        place = np.empty(len(model_names))  # number as met -> place among the sorted names
        place[[self.model_number[name] for name in model_names]] = np.arange(len(model_names))
        battles[:, 1:3] = place[battles[:, 1:3].astype(np.int64)]
        scores[:, 2] = place[scores[:, 2].astype(np.int64)]
        return self.queries, model_names, battles, scores, left_out


def _pairs(scored: np.ndarray) -> np.ndarray:
    """Battles (N, 4) between all models scored in a group: the better score wins, equal scores tie."""
    scored = scored[np.argsort(scored[:, 0], kind="stable")]  # (S, 4): group, query, model, score
    _, starts, sizes = np.unique(scored[:, 0], return_index=True, return_counts=True)  # (G,)
    battles = [np.empty((0, 4))]
    for size in np.unique(sizes):
        rows = starts[sizes == size, None] + np.arange(size)  # (groups of this size, size)
        first, second = np.triu_indices(size, 1)  # (pairs,)
        a, b = scored[rows[:, first].ravel()], scored[rows[:, second].ravel()]  # (groups * pairs, 4)
        outcome = (1 + np.sign(a[:, 3] - b[:, 3])) / 2  # (groups * pairs,)
        battles.append(np.column_stack([a[:, 1], a[:, 2], b[:, 2], outcome]))  # (groups * pairs, 4)
    return np.concatenate(battles)  # (N, 4)


def _outcome(winner: tuple) -> float | None:
    """P(a is better) from the cell of `winner`, or from the three of `ONE_HOT`; None where they do not say."""
    if len(winner) == 1:
        return OUTCOMES.get(str(winner[0]).strip())
    flags = [as_number(flag) == 1 for flag in winner]
    return list(ONE_HOT.values())[flags.index(True)] if sum(flags) == 1 else None


def as_score(cell: object) -> float | None:
    """The score that a cell holds; None where it has none, or one that is not finite or beyond the bound."""
    score = as_number(cell)  # a sum of ones above the bound could overflow
    return score if score is not None and math.isfinite(score) and abs(score) < LARGEST_SCORE else None


def _first_turn(conversation: object) -> str:
    """The first user turn of a conversation: a list of turns, or JSON of one."""
    turns = _json(conversation) if isinstance(conversation, str) else conversation
    turns = turns if isinstance(turns, list) else []
    users = (turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user")
    return _content(next(users, {}).get("content"))


def _content(content: object) -> str:
    """The text of a turn: a string, or a list of parts of which the texts count."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _prompt(prompt: object) -> str:
    """A prompt: a string, a number, or a list of turns (also as JSON) whose first element counts."""
    turns = prompt if isinstance(prompt, list) else _json(prompt)
    if isinstance(turns, list) and all(turn is None or isinstance(turn, str) for turn in turns):
        return (turns[0] if turns else None) or ""
    is_number = type(prompt) is int or (isinstance(prompt, float) and math.isfinite(prompt))
    return str(prompt) if isinstance(prompt, str) or is_number else ""


def _nested(scores: object) -> list[tuple]:
    """(model, score) pairs of one cell: a mapping, its items (as parquet's map type comes), or JSON of a mapping."""
    scores = _json(scores) if isinstance(scores, str) else scores
    items = scores.items() if isinstance(scores, dict) else scores if isinstance(scores, list) else []
    return [item for item in items if isinstance(item, tuple) and len(item) == 2]


def _json(text: object) -> object:
    """What JSON holds, or None where a text is not JSON."""
    try:
        return json.loads(text) if isinstance(text, str) and text.lstrip()[:1] in ("[", "{") else None
    except (ValueError, RecursionError):
        return None


def listed(names: Iterable[str]) -> str:
    """Names for a message, sorted, the first twenty of them."""
    names = sorted(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
