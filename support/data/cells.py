"""One cell of a table: its text, its number, the outcome or the scores in it, whatever form the file gives it."""

import ast
import io
import json
import math
import re
import tokenize
from functools import lru_cache

CONVERSATIONS = ("conversation_a", "messages_a", "conversation", "messages")  # the first user's turn is the query
READ = ("first", "last", "all")  # what of a conversation is the query: see `as_text`
QUERIES = ("conversation_a", "messages_a", "prompt", "question", "query", "instruction", "messages", "conversation")
MODELS = ("model_name", "model", "llm", "llm_selected", "llm_name", "generator", "model_id")
SCORES = (
    *("score", "performance", "effect", "correct", "is_correct", "acc", "accuracy", "evaluation_result"),
    *("overall_score", "reward", "rating", "quality", "label"),
)
GROUPS = ("task", "task_name", "eval_name", "category", "dataset", "dataset_name", "benchmark")  # a row's task
COSTS = ("cost", "total_cost", "inference_cost", "price", "usd")
NO_NUMBER = ("", "NA", "N/A", "None", "null")  # what tables write where a number is missing
NO_NAME = (*NO_NUMBER, "nan", "NaN", "#N/A")
LARGEST_SCORE = 1e30  # a sum of larger ones could overflow
LONGEST_LITERAL = 2**20  # characters of a Python literal: parsing takes a hundred times its size
# Labels of `winner`, folded by `fold`. All ties are alike, whether both answers were good or bad.
WINS_OF_A = ("modela", "a", "left", "leftvote", "assistanta", "answera", "responsea")
WINS_OF_B = ("modelb", "b", "right", "rightvote", "assistantb", "answerb", "responseb")
TIES = (
    *("tie", "tievote", "draw", "equal", "both", "neither", "same", "tiebothbad", "bothbad", "bothbadvote"),
    *("tiebothgood", "bothgood", "tieinconsistent"),  # the last where two judgments of FastChat differ
)
WINNERS = dict.fromkeys(WINS_OF_A, 1.0) | dict.fromkeys(WINS_OF_B, 0.0) | dict.fromkeys(TIES, 0.5)
USERS = ("user", "human", "prompter")
CONVERSATION = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|type|text)['"].*\]\s*""", re.DOTALL)  # in a text
PART = {"type", "text", "image", "image_url", "id"}  # keys of the parts of a content


@lru_cache(4096)
def fold(label: str) -> str:
    """A label in lower case, without spaces and the usual punctuation."""
    return re.sub(r"[\s_().,;:'\"/-]", "", label.lower())


def as_number(value: object) -> float | None:
    """The number in a cell, perhaps infinite or NaN; true is 1, false is 0; None if it holds something else."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    if value is None or (isinstance(value, str) and "_" in value):  # float() takes "1_5" for 15
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def as_name(cell: object) -> str:
    """A model's name, or "" where the cell is empty or holds no name."""
    if isinstance(cell, float) and cell.is_integer():  # ids of a column with gaps
        cell = int(cell)
    name = "" if isinstance(cell, (bytes, list, dict, float)) or cell is None else str(cell).strip()
    return "" if name in NO_NAME else name


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
        if re.search(r"""['"]\s*\n?\s+['"]""", text) and _strings_touch(text):
            return text
        return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "}, {", text.strip()))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _strings_touch(text: str) -> bool:
    """Whether two string literals follow each other without a comma."""
    previous = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == previous == tokenize.STRING:
            return True
        previous = previous if token.type in (tokenize.NL, tokenize.NEWLINE) else token.type
    return False


def as_text(cell: object, is_conversation: bool = False, read: str = "first") -> str:
    """The text of a query: a text, a number, or the user's turn of a conversation; "" where there is none.

    Of several turns of the user `read` takes the first, the last, or all, with an empty line between them.

    A conversation is a list of turns, texts or mappings with a role and a content, also written as JSON or as a Python
    literal. is_conversation: whether only that counts, so that a conversation that cannot be parsed is no text.
    """
    value = as_list(cell)
    if isinstance(value, dict):
        value = value.get("messages") or value.get("conversation") or [value]
    if isinstance(value, list) and value:
        if read == "first" and isinstance(value[0], dict) and value[0].get("role") == "user":  # nearly always
            return _content(value[0])
        roles = [turn.get("role", turn.get("from")) if isinstance(turn, dict) else None for turn in value]
        users = [turn for turn, role in zip(value, roles, strict=True) if role in USERS or str(role).lower() in USERS]
        if users or any(roles):
            return _chosen([_content(turn) for turn in users], read)
        if all(turn is None or isinstance(turn, str) for turn in value):
            return _chosen([turn or "" for turn in value], read)
        if all(isinstance(turn, dict) and turn.keys() <= PART for turn in value):
            return _content({"content": value})
    if value == [] or is_conversation:
        return ""
    if isinstance(value, str) and CONVERSATION.fullmatch(value):  # one that could not be parsed
        return ""
    is_number = type(cell) is int or (isinstance(cell, float) and math.isfinite(cell))
    return str(cell) if isinstance(cell, str) or is_number else ""


def _chosen(turns: list[str], read: str) -> str:
    if read == "all":
        return "\n\n".join(filter(None, turns))
    return turns[0 if read == "first" else -1] if turns else ""


def _content(turn: dict) -> str:
    """The text of a turn: a string, or the texts in a list of parts."""
    content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def as_score(cell: object) -> float | None:
    """The finite number below `LARGEST_SCORE` in a cell, or under one of `SCORES` in a mapping; None without one."""
    if type(cell) in (float, int, bool):  # nearly always
        return float(cell) if abs(cell) < LARGEST_SCORE else None
    cell = as_list(cell)
    if isinstance(cell, dict):
        scores = (as_score(cell[key]) for key in SCORES if key in cell)
        return next((score for score in scores if score is not None), None)
    score = as_number(cell)
    return score if score is not None and math.isfinite(score) and abs(score) < LARGEST_SCORE else None


def as_cost(cell: object) -> float | None:
    """The number of at least 0 in a cell, with or without a dollar sign; None without one."""
    cost = as_score(cell.strip().removeprefix("$") if isinstance(cell, str) else cell)
    return cost if cost is not None and cost >= 0 else None


def cost_in(cell: object) -> object:
    """What a mapping has under one of `COSTS`; None in other cells."""
    return next((cell[key] for key in COSTS if key in cell), None) if isinstance(cell, dict) else None


def as_scores(cell: object) -> list[tuple[str, object]]:
    """Models and their scores, or what holds them, in one cell: a mapping by model, or a list of pairs or mappings."""
    cell = as_list(cell)
    pairs = []
    for item in cell.items() if isinstance(cell, dict) else cell if isinstance(cell, list) else []:
        if isinstance(item, dict):
            name = next((item[key] for key in (*MODELS, "name") if key in item), None)
            pairs.append((as_name(name), item))
        elif isinstance(item, (tuple, list)) and len(item) == 2:  # parquet's map type is a list of these
            pairs.append((as_name(item[0]), item[1]))
        else:
            pairs.append(("", item))  # counted as missing
    return pairs


def outcome_of_label(label: object, a: str, b: str) -> float | None:
    """P(a is better) from the label of a winner: a known one, or the name of one of the two models.

    None where it is unknown, a number, which may be a code or a model's id, or would be both winners: with models
    called "b" and "a", the winner "a".
    """
    name = as_name(label)
    if name.isdigit():
        return None
    by_label = WINNERS.get(fold(name))
    if name in (a, b):
        by_name = float(name == a)
        return by_name if by_label in (None, by_name) else None
    if by_label is None and fold(a) != fold(b):
        return {fold(a): 1.0, fold(b): 0.0}.get(fold(name))
    return by_label


def outcome_of_flags(win_a: object, win_b: object, tie: object, *_: str) -> float | None:
    """P(a is better) where one of three columns is 1 and the others are 0; None where they are not, as with votes."""
    flags = [as_number(flag) for flag in (win_a, win_b, tie)]
    return (1.0, 0.0, 0.5)[flags.index(1)] if sorted(flags, key=str) == [0, 0, 1] else None


def outcome_of_preference(preference: object, *_: str) -> float | None:
    """P(the first is better) from AlpacaEval's preference: 1 the first, 2 the second, the nearer one between."""
    number = as_number(preference)
    if number is None or not 1 <= number <= 2:
        return None
    return 0.5 if number == 1.5 else float(number < 1.5)
