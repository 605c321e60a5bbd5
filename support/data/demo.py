"""The built-in demo: synthetic battles with known true skills, and a tiny Qwen2 with its own tokenizer."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np

from support.system.errors import UserError
from support.system.files import atomic_write, content_hash, make_folder, user_cache_folder

NUM_QUERIES, NUM_MODELS = 4000, 12
TIE_WEIGHT = 0.4  # nu of Davidson (1970): P(tie) is proportional to nu * sqrt(strength_a * strength_b)
BASE_SPREAD, TOPIC_SPREAD = 0.7, 2.2  # standard deviations of a model's overall skill, and of its shift per topic

FILES = ("battles.parquet", "truth.json", "encoder/config.json", "encoder/model.safetensors", "encoder/tokenizer.json")

# A prompt is an opener, a request of a topic about two subjects of that topic, and a closer.
OPENERS = ["", "Please ", "Hi! ", "Quick question: ", "I need your help. ", "For a friend: ", "Hello, ", "Be honest: "]
CLOSERS = ["", ", thanks", ", in short", ", step by step", ", for a beginner", ", with one example"]
TOPICS = {
    "code": (["write a Python function for {}", "debug my loop for {}", "what is the complexity of {}",
         "refactor {} in Rust"],
        ["a binary search", "parsing JSON", "a linked list", "merging two arrays", "a regular expression", "a hash map",
         "reading a CSV file", "a recursive tree walk", "an HTTP request", "sorting strings", "a unit test",
         "a thread pool"]),
    "mathematics": (["prove the theorem about {}", "solve an equation with {}", "compute the value of {}",
         "what is the formula for {}"],
        ["a triangle's angles", "prime numbers", "the derivative of a sine", "a quadratic polynomial", "an integral",
         "matrix determinants", "the sum of a series", "two unknowns", "a probability of dice", "complex roots",
         "a circle's area", "modular arithmetic"]),
    "cooking": (["how do I cook {}", "give me a recipe for {}", "what spices go with {}", "how long do I bake {}"],
        ["lentil soup", "roast chicken", "apple pie", "fried rice", "tomato sauce", "sourdough bread", "grilled salmon",
         "mushroom risotto", "vegetable curry", "pancakes", "a chocolate cake", "stuffed peppers"]),
    "medicine": (["what are the symptoms of {}", "which treatment helps against {}", "is {} dangerous for patients",
         "what would a doctor do about {}"],
        ["high blood pressure", "a migraine", "influenza", "an allergy", "diabetes", "back pain", "asthma", "anaemia",
         "a sprained ankle", "insomnia", "an infection", "food poisoning"]),
    "law": (["what does the law say about {}", "draft a legal letter about {}", "can I sue my landlord over {}",
         "which court decides on {}"],
        ["a broken contract", "an unpaid invoice", "copyright", "a rental deposit", "a will", "unfair dismissal",
         "a traffic fine", "defamation", "a trademark", "custody", "tax evasion", "a warranty claim"]),
    "poetry": (["write a poem about {}", "compose a sonnet on {}", "give me a haiku about {}",
         "rhyme four verses about {}"],
        ["autumn leaves", "the moon", "a lost love", "the sea at night", "a sleeping cat", "childhood", "snowfall",
         "an old clock", "a lonely lighthouse", "hope", "a red rose", "silence"]),
    "history": (["who ruled during {}", "what caused {}", "describe daily life in {}", "which century saw {}"],
        ["the Roman Empire", "the French Revolution", "the Black Death", "the Bronze Age", "the Ottoman conquest",
         "the Industrial Revolution", "the fall of Constantinople", "the Cold War", "ancient Egypt", "the Crusades",
         "the Mongol invasions", "the Renaissance"]),
    "travel": (["plan a weekend trip to {}", "find a cheap hotel in {}", "what should a tourist see in {}",
         "which train goes to {}"],
        ["Lisbon", "Kyoto", "Reykjavik", "Marrakesh", "Buenos Aires", "Vancouver", "Prague", "Cape Town", "Hanoi",
         "Edinburgh", "Istanbul", "Oaxaca"]),
}  # fmt: skip


def demo_folder(demo_dir: str | None = None, seed: int = 0) -> Path:
    """The folder of the demo's `battles.parquet`, `truth.json` and `encoder/`, generated from `seed` if missing.

    It is in `demo_dir` (default: the user's cache folder), under a name that changes whenever this file does. Raises
    `UserError` if it cannot be written.
    """
    parent = make_folder(user_cache_folder() if demo_dir is None else demo_dir, "--demo_dir")
    folder = parent / f"demo-{content_hash([__file__])[:12]}-{seed}"
    if all((folder / name).is_file() for name in FILES):
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # a cache cleaner may have deleted some of its files
    temporary = parent / f".{folder.name}.{os.getpid()}"
    try:
        temporary.mkdir()
        prompts = _write_battles(temporary, seed)
        _write_encoder(temporary / "encoder", prompts, seed)
        temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # another process may have written the same content first
            raise UserError(f"cannot write the demo to {parent}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def true_skills(folder: Path, queries: list[str], model_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The true skill of every model on every query (Q, M), and the best skills that ignore the query (M,), in log-odds.

    Differences of the first are the true margins. The second are the Bradley-Terry strengths fitted by maximum
    likelihood to the true win probabilities of all pairs of models, averaged over the topics.
    """
    from sklearn.linear_model import LogisticRegression

    truth = json.loads((folder / "truth.json").read_text())
    skills = np.array(truth["skills"])[:, [truth["models"].index(name) for name in model_names]]  # (topics, M)
    topics = [truth["topic_of_query"][query] for query in queries]
    a, b = np.triu_indices(len(model_names), 1)  # (pairs,)
    p = (1 / (1 + np.exp(skills[:, b] - skills[:, a]))).mean(axis=0)  # (pairs,)
    one_hot = np.eye(len(model_names))
    pairs = np.tile(one_hot[a] - one_hot[b], (2, 1))  # (2 * pairs, M): won with weight p, lost with 1 - p
    won = np.repeat([1, 0], len(a))  # (2 * pairs,)
    fixed = LogisticRegression(fit_intercept=False, C=1e6).fit(pairs, won, np.concatenate([p, 1 - p]))
    return skills[topics], fixed.coef_[0]  # (Q, M), (M,)


def _write_battles(folder: Path, seed: int) -> list[str]:
    """Write `battles.parquet` in the layout of Arena 33K, and `truth.json`; returns the prompts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    model_names = [f"demo-model-{chr(ord('a') + i)}" for i in range(NUM_MODELS)]
    base = rng.normal(0, BASE_SPREAD, NUM_MODELS)  # (M,)
    skills = base + rng.normal(0, TOPIC_SPREAD, (len(TOPICS), NUM_MODELS))  # (topics, M)
    topic_of_query = _prompts(rng)
    answer = {"content": "(not part of the demo)", "role": "assistant"}
    rows = []
    for query, topic in topic_of_query.items():
        conversation = [{"content": query, "role": "user"}, answer]
        for _ in range(rng.integers(1, 5)):
            a, b = rng.choice(NUM_MODELS, 2, replace=False)
            strength_a, strength_b = np.exp(skills[topic, [a, b]])
            weights = np.array([strength_a, strength_b, TIE_WEIGHT * np.sqrt(strength_a * strength_b)])
            row = {
                "question_id": f"demo-{len(rows):05d}",
                "model_a": model_names[a],
                "model_b": model_names[b],
                "winner": str(rng.choice(["model_a", "model_b", "tie"], p=weights / weights.sum())),
                "judge": "synthetic",
                "conversation_a": conversation,
                "conversation_b": conversation,
                "turn": 1,
                "anony": True,
                "language": "English",
                "tstamp": 0.0,
            }
            rows.append(row)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    atomic_write(folder / "battles.parquet", buffer.getvalue())
    truth = {"models": model_names, "skills": skills.tolist(), "topic_of_query": topic_of_query}
    atomic_write(folder / "truth.json", json.dumps(truth).encode())
    return list(topic_of_query)


def _prompts(rng: np.random.Generator) -> dict[str, int]:
    """`NUM_QUERIES` distinct random prompts, each with the index of its topic."""
    topic_of_query = {}
    while len(topic_of_query) < NUM_QUERIES:
        topic = int(rng.integers(len(TOPICS)))
        requests, subjects = list(TOPICS.values())[topic]
        request = str(rng.choice(requests)).format(" or ".join(rng.choice(subjects, 2, replace=False)))
        topic_of_query[f"{rng.choice(OPENERS)}{request}{rng.choice(CLOSERS)}"] = topic
    return topic_of_query


def _write_encoder(folder: Path, prompts: list[str], seed: int) -> None:
    """Write a Qwen2 with random weights, two layers and width 128, and a byte-level BPE tokenizer of the prompts."""
    import torch
    from safetensors import SafetensorError
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model, logging

    logging.disable_progress_bar()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(prompts, vocab_size=2048, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Qwen2Model(config)
    try:
        network.save_pretrained(folder)
    except SafetensorError as error:  # raised on a full disk
        raise OSError(str(error)) from error
