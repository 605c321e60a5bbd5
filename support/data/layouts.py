"""The public layouts of battles and score tables: recognized by their columns, read as rows of numbers."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from support.data.formats import Chunk, Table, as_number
from support.system.errors import UserError, valid_unicode

MODEL_COLUMNS = ("model_name", "model")
OUTCOMES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}
ONE_HOT = {"winner_model_a": 1.0, "winner_model_b": 0.0, "winner_tie": 0.5}
# Numeric columns of public score tables that are no scores; the prefixes are what pandas names an index.
NOT_MODELS = {"", "id", "prompt_id", "question_id", "sample_id", "index", "cluster_id", "turn", "tstamp"}
NOT_MODELS_PREFIX = ("unnamed:", "__index_level_")
LARGEST_SCORE = 1e30  # a sum of larger ones could overflow
LAYOUTS = (
    "model_a, model_b, winner, conversation_a (Arena); or model_a, model_b, prompt and winner or one-hot "
    "winner_model_a, winner_model_b, winner_tie (Kaggle); or prompt or question with one numeric column per "
    "model or nested scores (wide score table); or prompt, model_name, label or score (long score table)"
)


@dataclass(frozen=True)
class Layout:
    """Which columns of a file hold its battles or scores.

    kind: "conversations" or "prompts" (battles), "wide", "nested" or "long" (score tables).
    query: the column of the query.
    others: model a, model b and winner, in one column or in the three of `ONE_HOT`, for battles; the models for
        "wide"; the one column of all scores for "nested"; model, score and prompt_id, if there is one, for "long".
    """

    kind: str
    query: str
    others: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        return [self.query, *self.others]

    @property
    def models(self) -> tuple[str, ...]:
        """The models of a wide score table, each a column."""
        return self.others if self.kind == "wide" else ()


def find_layout(table: Table, score_columns: list[str] | None = None) -> Layout:
    """The layout of a file by its columns. Raises `UserError` if it is none of `LAYOUTS`.

    score_columns: the models of a wide score table; by default every numeric column that is no id or index.
    """
    columns = set(table.columns)
    prompt, score, model = table.first("prompt", "question"), table.first("label", "score"), table.first(*MODEL_COLUMNS)
    winner = ("winner",) if "winner" in columns else tuple(ONE_HOT)
    if score_columns:
        if missing := set(score_columns) - columns:
            raise UserError(f"{table.file} has no column {listed(missing)}; found {listed(table.columns)}")
        if prompt:
            return Layout("wide", prompt, tuple(score_columns))
    elif columns.issuperset({"model_a", "model_b", *winner}):
        if "conversation_a" in columns:
            return Layout("conversations", "conversation_a", ("model_a", "model_b", *winner))
        if prompt:
            return Layout("prompts", prompt, ("model_a", "model_b", *winner))
    elif prompt and model and score:
        return Layout("long", prompt, (model, score, *columns.intersection({"prompt_id"})))
    elif prompt and "scores" in columns:
        return Layout("nested", prompt, ("scores",))
    elif prompt:
        models = [name for name in table.numeric if name != prompt and is_score_column(name)]
        if models:
            return Layout("wide", prompt, tuple(models))
    raise UserError(f"{table.file} has the columns {listed(table.columns)}; expected {LAYOUTS}")


def is_score_column(column: str) -> bool:
    """Whether a numeric column holds scores, by its name: it is no id, index or `model|detail` column."""
    name = column.strip().lower()
    return "|" not in name and name not in NOT_MODELS and not name.startswith(NOT_MODELS_PREFIX)


class Rows:
    """Collects battles and scores from rows as they are read, and counts each dropped row under one reason.

    Queries and models are indexed in the order in which they occur.
    """

    def __init__(self):
        self.num_read = 0
        self.dropped = Counter()  # reason -> rows
        self.scores_missing = 0  # cells without a finite score, in rows of wide and nested tables that are kept
        self.repaired = 0  # texts in which lone surrogates were replaced
        self.queries = {}  # query with white space folded -> index, first spelling
        self.model_idx = {}  # name -> index
        self.battles = []  # (query, model a, model b, outcome)
        self.scores = {}  # (table row, query, model) -> score; every pair of scores in a table row is a battle
        self.table_row_idx = {}  # a row of a wide or nested table, or a prompt of a long one -> index

    def add(self, chunk: Chunk, layout: Layout) -> None:
        """Add the rows of a chunk with the layout's columns."""
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
            self.num_read += 1

    def add_battle(self, text: str, model_a: object, model_b: object, *winner: object) -> str | None:
        """Add a battle; returns the reason if it is dropped."""
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
        """Add a row of a long table; returns the reason if it is dropped."""
        name, value = self.name(model), as_score(score)
        if not name:
            return "without a model name"
        if value is None:
            return "without a score"
        query = self.query(text)
        # By the id alone, prompts would mix where each shard counts from 0, or where the id is empty.
        table_row = self.table_row_idx.setdefault((str(prompt_id), query), len(self.table_row_idx))
        cell = (table_row, query, self.model(name))
        if cell in self.scores:
            return "scoring a model again"
        self.scores[cell] = value
        return None

    def add_scores(self, text: str, scores: Iterable[tuple[object, object]]) -> str | None:
        """Add a row of a wide or nested table; returns the reason if it is dropped."""
        values = {self.name(model): as_score(score) for model, score in scores}
        valid = [(name, value) for name, value in values.items() if name and value is not None]
        if len(valid) < 2:
            return "with fewer than two scores"
        self.scores_missing += len(values) - len(valid)
        # A key of its own for each row; those of long tables start with a string.
        table_row = self.table_row_idx.setdefault((None, self.num_read), len(self.table_row_idx))
        self.scores |= {(table_row, self.query(text), self.model(name)): value for name, value in valid}
        return None

    def clean(self, text: str) -> str:
        repaired = valid_unicode(text)
        self.repaired += repaired != text
        return repaired

    def name(self, value: object) -> str:
        missing = value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()
        return "" if missing else self.clean(str(value))

    def query(self, text: str) -> int:
        return self.queries.setdefault(" ".join(text.split()), (len(self.queries), text))[0]

    def model(self, name: str) -> int:
        return self.model_idx.setdefault(name, len(self.model_idx))

    def finish(self, limit: int | None, seed: int) -> tuple[list[str], np.ndarray, np.ndarray, int]:
        """All rows as arrays, with scores paired into battles and models sorted by name.

        limit: keep this many queries with battles, drawn with `seed`; None keeps all.

        Returns model names (M,), battles (N, 4) as query, model a, model b, outcome, scores (S, 4) as table row, query,
        model, score, and the number of queries with battles that `limit` leaves out.
        """
        battles = np.array(self.battles, np.float64).reshape(-1, 4)  # (N, 4)
        scores = np.array([(*cell, score) for cell, score in self.scores.items()], np.float64).reshape(-1, 4)  # (S, 4)
        # A score that is alone in its row makes no battle.
        alone = (np.bincount(scores[:, 0].astype(np.int64)) == 1)[scores[:, 0].astype(np.int64)]  # (S,)
        self.dropped += Counter({"alone with their query": int(alone.sum())})
        scores = scores[~alone]
        # The limit is applied before scores are paired: the pairs of a large table may not fit into memory.
        queries = np.union1d(battles[:, 0], scores[:, 1])  # those with battles
        outside_limit = max(0, len(queries) - limit) if limit else 0
        if outside_limit:
            kept = np.random.default_rng(seed).choice(queries, limit, replace=False)
            battles, scores = battles[np.isin(battles[:, 0], kept)], scores[np.isin(scores[:, 1], kept)]
        battles = np.concatenate([battles, _pair(scores)])  # (N, 4)
        model_names = sorted(self.model_idx)
        rank = np.argsort([self.model_idx[name] for name in model_names])  # (M,) index -> place in sorted names
        battles[:, 1:3] = rank[battles[:, 1:3].astype(np.int64)]
        scores[:, 2] = rank[scores[:, 2].astype(np.int64)]
        return model_names, battles, scores, outside_limit


def _pair(scores: np.ndarray) -> np.ndarray:
    """Battles (N, 4) of all pairs of scores in a table row: the higher score wins, equal scores tie."""
    scores = scores[np.argsort(scores[:, 0], kind="stable")]  # (S, 4): table row, query, model, score
    _, starts, sizes = np.unique(scores[:, 0], return_index=True, return_counts=True)  # (R,) each
    battles = [np.empty((0, 4))]
    for size in np.unique(sizes):  # the r rows of the same size at once
        places = starts[sizes == size, None] + np.arange(size)  # (r, size)
        first, second = np.triu_indices(size, 1)  # (pairs,) each
        a, b = scores[places[:, first].ravel()], scores[places[:, second].ravel()]  # (r * pairs, 4) each
        outcome = (1 + np.sign(a[:, 3] - b[:, 3])) / 2  # (r * pairs,)
        battles.append(np.column_stack([a[:, 1], a[:, 2], b[:, 2], outcome]))  # (r * pairs, 4)
    return np.concatenate(battles)  # (N, 4)


def _outcome(winner: tuple) -> float | None:
    """P(a is better) from the cell of `winner`, or from the three of `ONE_HOT`; None if it is unknown."""
    if len(winner) == 1:
        return OUTCOMES.get(str(winner[0]).strip())
    flags = [as_number(flag) == 1 for flag in winner]
    return list(ONE_HOT.values())[flags.index(True)] if sum(flags) == 1 else None


def as_score(cell: object) -> float | None:
    """The score in a cell; None if it holds no finite number below `LARGEST_SCORE`."""
    score = as_number(cell)
    return score if score is not None and math.isfinite(score) and abs(score) < LARGEST_SCORE else None


def _first_turn(conversation: object) -> str:
    """The first user turn of a conversation: a list of turns, or JSON of one."""
    turns = conversation if isinstance(conversation, list) else _json(conversation) or []
    users = (turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user")
    return _content(next(users, {}).get("content"))


def _content(content: object) -> str:
    """The text of a turn: a string, or the texts in a list of parts."""
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _prompt(prompt: object) -> str:
    """The text of a prompt: a string, a number, or the first element of a list of turns (also as JSON)."""
    turns = prompt if isinstance(prompt, list) else _json(prompt)
    if isinstance(turns, list) and all(turn is None or isinstance(turn, str) for turn in turns):
        return (turns[0] if turns else None) or ""
    is_number = type(prompt) is int or (isinstance(prompt, float) and math.isfinite(prompt))
    return str(prompt) if isinstance(prompt, str) or is_number else ""


def _nested(scores: object) -> list[tuple]:
    """(model, score) pairs of a cell: a mapping, a list of its items (parquet's map type), or JSON of a mapping."""
    scores = _json(scores) if isinstance(scores, str) else scores
    items = scores.items() if isinstance(scores, dict) else scores if isinstance(scores, list) else []
    return [item for item in items if isinstance(item, tuple) and len(item) == 2]


def _json(text: object) -> object:
    """The value of a JSON array or object, or None if the text is neither."""
    try:
        return json.loads(text) if isinstance(text, str) and text.lstrip()[:1] in ("[", "{") else None
    except (ValueError, RecursionError):
        return None


def listed(names: Iterable[str]) -> str:
    """The first twenty names in sorted order, for a message."""
    names = sorted(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
