"""Texts are cut before the tokenizer, to the same tokens as after it."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.encoding import batching
from support.encoding.batching import tokenize

WORDS = [
    "prove",
    "the",
    "theorem",
    "about",
    "prime",
    "numbers",
    "in",
    "Rust,",
    "\u4f60\u597d",
    "caf\u00e9",
    "don't",
    "3.1",
]
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]


def some_texts():
    """Texts of up to forty times as many characters as are read at first, made of what tokenizers find hard."""
    rng = random.Random(0)
    parts = [
        lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 2000))),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 6000))),  # one word
        lambda: "".join(rng.choice("ax1. \n\u4f60\u00e9\U0001f999-") * rng.randint(1, 400) for _ in range(9)),
        lambda: " " * rng.randint(1, 6000),
        lambda: "e\u0301\u200d" * rng.randint(1, 500),  # letters of several characters
    ]
    return ["".join(rng.choice(parts)() for _ in range(rng.randint(1, 5))) for _ in range(30)]


@pytest.fixture(scope="module")
def tokenizers():
    """Byte-level BPE, WordPiece, Unigram with and without words, and one token per character."""
    corpus = [" ".join(random.Random(i).sample(WORDS, len(WORDS))) for i in range(50)] + ["ab" * 8, "x" * 16, "a" * 9]
    bpe, piece = Tokenizer(models.BPE()), Tokenizer(models.WordPiece(unk_token="[UNK]"))
    unigram, unsplit = Tokenizer(models.Unigram()), Tokenizer(models.Unigram())
    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "a": 4}, unk_token="[UNK]"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    piece.normalizer, piece.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    unigram.normalizer, unigram.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    unsplit.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "\u2581")])
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    piece.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    for each in (unigram, unsplit):
        each.train_from_iterator(
            corpus, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="[UNK]")
        )
    named = {"bpe": bpe, "piece": piece, "unigram": unigram, "unsplit": unsplit, "letters": letters}
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    for name in ("piece", "unsplit"):
        named[name].post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    options = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    sides = {
        f"{name} {side}": PreTrainedTokenizerFast(tokenizer_object=each, truncation_side=side, **options)
        for name, each in named.items()
        for side in ("right", "left")[: 1 + (name == "bpe")]
    }
    return sides


def test_the_tokens_are_those_of_the_whole_text(tokenizers, monkeypatch):
    monkeypatch.setattr(batching, "CHARACTERS_AT_FIRST", 1000)
    monkeypatch.setattr(batching, "CHARACTERS_AT_ONCE", 50_000)
    texts = some_texts()
    assert max(map(len, texts)) > 10_000
    for name, tokenizer in tokenizers.items():
        for max_length in (3, 60):
            whole = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
            found = [ids.tolist() for ids in tokenize(texts, tokenizer, max_length)]
            different = [i for i in range(len(texts)) if found[i] != (whole[i] or [tokenizer.pad_token_id])]
            assert not different, (name, max_length, different)


def test_a_text_without_an_end_is_read_in_part(tokenizers):
    read = []

    class Watched:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def __call__(self, texts, **options):
            read.append(sum(map(len, texts)))
            return self.tokenizer(texts, **options)

    for text, most in ((" ".join(WORDS) * 50_000, 2**18), ("a" * 3 * 10**6, 2**21), (" " * 3 * 10**6, 2**21)):
        for name in ("bpe right", "piece right"):
            tokenize([text], Watched(tokenizers[name]), 512)
            assert 2**16 <= max(read) <= most, (name, text[:9])
            read.clear()
    tokenize([" ".join(WORDS) * 500] * 300, Watched(tokenizers["bpe right"]), 512)
    assert max(read) <= 2**21 + 2**16
