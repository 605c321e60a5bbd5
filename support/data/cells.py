"""One cell of a table: its text, its number, the outcome or the scores in it, whatever form the file gives it."""

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Iterable

from support.data.formats import as_number

MODELS = ("model_name", "model", "llm", "llm_selected", "llm_name", "generator", "model_id")
SCORES = (
    *("score", "performance", "effect", "label", "correct", "is_correct", "acc", "accuracy", "evaluation_result"),
    *("overall_score", "reward", "rating", "quality"),
)
COSTS = ("cost", "total_cost", "inference_cost", "price", "usd")
LARGEST_SCORE = 1e30  # a sum of larger ones could overflow
LONGEST_LITERAL = 2**20  # characters of a Python literal: parsing takes a hundred times its size
# Labels of `winner`, folded by `fold`. All ties are alike, whether both answers were good or bad.
WINS_OF_A = ("modela", "a", "model1", "left", "leftvote", "assistanta", "answera", "responsea")
WINS_OF_B = ("modelb", "b", "model2", "right", "rightvote", "assistantb", "answerb", "responseb")
TIES = (
    *("tie", "tievote", "draw", "equal", "both", "neither", "same", "tiebothbad", "bothbad", "bothbadvote"),
    *("tiebothgood", "bothgood", "tieinconsistent"),  # the last where two judgments of FastChat differ
)
WINNERS = dict.fromkeys(WINS_OF_A, 1.0) | dict.fromkeys(WINS_OF_B, 0.0) | dict.fromkeys(TIES, 0.5)
USERS = ("user", "human", "prompter")


def fold(label: object) -> str:
    """A label in lower case, without spaces and punctuation."""
    return re.sub(r"[\W_]", "", str(label).lower())


def as_name(cell: object) -> str:
    """A model's name, or "" where the cell is empty."""
    is_missing = cell is None or (isinstance(cell, float) and math.isnan(cell))
    return "" if is_missing else str(cell).strip()


def as_list(cell: object) -> object:
    """The list or mapping in a cell, also written as JSON or as a Python literal; other cells as they are."""
    if not isinstance(cell, str) or cell.lstrip()[:1] not in ("[", "{"):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return _python_literal(cell)


def _python_literal(text: str) -> object:
    """The value of a Python list or dict, also as numpy prints an array of them; the text where it is none."""
    if len(text) > LONGEST_LITERAL:
        return text
    try:
        # numpy writes no comma between the elements of an array, and Python joins strings without one.
        joined = re.search(r"""['"]\s*\n?\s+['"]""", text) and _first_strings_touch(text)
        return text if joined else ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "}, {", text.strip()))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _first_strings_touch(text: str) -> bool:
    """Whether two string literals follow each other without a comma."""
    previous = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == previous == tokenize.STRING:
            return True
        previous = previous if token.type in (tokenize.NL, tokenize.NEWLINE) else token.type
    return False


def as_text(cell: object, is_conversation: bool = False) -> str:
    """The text of a query: a text, a number, or the first user's turn of a conversation; "" where there is none.

    A conversation is a list of turns, texts or mappings with a role and a content, also written as JSON or as a Python
    literal. is_conversation: whether only that counts, so that a conversation that cannot be parsed is no text.
    """
    value = as_list(cell)
    if isinstance(value, dict):
        value = value.get("messages") or value.get("conversation") or [value]
    if isinstance(value, list) and (value or is_conversation):
        turns = [turn for turn in value if turn is not None]
        if all(isinstance(turn, str) for turn in turns):
            return value[0] or "" if value else ""
        if all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
            users = (turn for turn in turns if turn.get("role", turn.get("from")) in USERS)
            return _content(next(users, {}))
        if all(isinstance(turn, dict) and "text" in turn for turn in turns):
            return _content({"content": turns})
    if value == [] or is_conversation:
        return ""
    is_number = type(cell) is int or (isinstance(cell, float) and math.isfinite(cell))
    return str(cell) if isinstance(cell, str) or is_number else ""


def _content(turn: dict) -> str:
    """The text of a turn: a string, or the texts in a list of parts."""
    content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def as_score(cell: object) -> float | None:
    """The finite number below `LARGEST_SCORE` in a cell, or under one of `SCORES` in a mapping; None without one."""
    cell = as_list(cell)
    if isinstance(cell, dict):
        return next((as_score(cell[key]) for key in SCORES if key in cell), None)
    score = as_number(cell)
    return score if score is not None and math.isfinite(score) and abs(score) < LARGEST_SCORE else None


def as_cost(cell: object) -> float | None:
    """The number of at least 0 in a cell; None without one."""
    cost = as_score(cell)
    return cost if cost is not None and cost >= 0 else None


def cost_in(cell: object) -> object:
    """What a mapping has under one of `COSTS`; None in other cells."""
    return next((cell[key] for key in COSTS if key in cell), None) if isinstance(cell, dict) else None


def as_scores(cell: object) -> list[tuple[str, object]]:
    """Models and their scores, or what holds them, in one cell: a mapping by model, or a list of pairs or mappings."""
    cell = as_list(cell)
    items: Iterable = cell.items() if isinstance(cell, dict) else cell if isinstance(cell, list) else []
    pairs = []
    for item in items:
        if isinstance(item, dict):
            name = next((item[key] for key in (*MODELS, "name") if key in item), None)
            pairs.append((as_name(name), item))
        elif isinstance(item, tuple) and len(item) == 2:  # parquet's map type is a list of these
            pairs.append((as_name(item[0]), item[1]))
    return pairs


def outcome_of_label(label: object, a: str, b: str) -> float | None:
    """P(a is better) from the label of a winner: a known one, or the name of one of the two models.

    None where it is unknown, or would be both: with models called "b" and "a", the winner "a".
    """
    by_label = WINNERS.get(fold(label))
    names = {a: 1.0, b: 0.0}
    by_name = names.get(as_name(label), {fold(a): 1.0, fold(b): 0.0}.get(fold(label)) if fold(a) != fold(b) else None)
    return by_label if by_name is None or by_name == by_label else by_name if by_label is None else None


def outcome_of_flags(win_a: object, win_b: object, tie: object) -> float | None:
    """P(a is better) where one of three columns is 1."""
    flags = [as_number(flag) == 1 for flag in (win_a, win_b, tie)]
    return (1.0, 0.0, 0.5)[flags.index(True)] if sum(flags) == 1 else None


def outcome_of_preference(preference: object) -> float | None:
    """P(the first is better) from AlpacaEval's preference: 1 the first, 2 the second, the nearer one between."""
    number = as_number(preference)
    if number is None or not 1 <= number <= 2:
        return None
    return 0.5 if number == 1.5 else float(number < 1.5)
