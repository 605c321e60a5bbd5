"""Training and routing on precomputed embeddings: as with the encoder that made them, and what does not fit."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import route
import train
from data_loader import load_battles
from rankrouter import RankRouter
from support.encoding.encoder import QueryEncoder
from support.encoding.precomputed import PrecomputedEmbeddings
from support.system.command_line import run_command
from support.system.errors import UserError

NEW = ["How do I invert a matrix?", "What is in lentil soup?"]


@pytest.fixture(scope="module")
def file(small, demo, tmp_path_factory):
    """The embeddings of the small run's queries and of two new ones."""
    queries = [*load_battles(small[small.index("--data_path") + 1])[0].queries, *NEW]
    encoder = QueryEncoder(str(demo / "encoder"), torch.device("cpu"), dtype="float32", tokens_per_batch=512)
    path = tmp_path_factory.mktemp("embeddings") / "e.parquet"
    pd.DataFrame({"prompt": queries, "embedding": [*encoder.embed(queries)[0].numpy()]}).to_parquet(path)
    return path


def without_encoder(flags):
    """The flags of a run without those of the encoder."""
    left_out = {flags.index(name) + i for name in ("--model_path", "--cache_dir") for i in (0, 1)}
    return [word for i, word in enumerate(flags) if i not in left_out]


@pytest.fixture(scope="module")
def trained(small, file, tmp_path_factory):
    output = tmp_path_factory.mktemp("outputs")
    train.main([*without_encoder(small), "--embeddings", str(file), "--output_dir", str(output)])
    return output


def test_a_run_is_that_of_the_encoder_and_says_where_its_embeddings_are_from(tiny_run, trained, file, capsys):
    history = json.loads((trained / "training_history.json").read_text())
    for key in ("train_losses", "val_metrics"):
        assert np.allclose(pd.DataFrame(history[key]), pd.DataFrame(tiny_run[0][key]), atol=1e-5), key
    assert history["encoder"] | {"fingerprint": ""} == {
        "path": str(file),
        "fingerprint": "",
        "width": 128,
        "dtype": "float32",
        "precomputed": True,
    }
    assert history["args"]["model_path"] is None
    assert history["timing"]["queries_encoded"] == 0
    assert RankRouter.load(trained / "best_model.pt").metadata.encoder == history["encoder"]

    checkpoint = ["--checkpoint", str(trained / "best_model.pt")]
    route.main([*checkpoint, "--embeddings", str(file), "--top_k", "1", *NEW])
    one = RankRouter.load(tiny_run[1] / "best_model.pt").rank(NEW)
    router = RankRouter.load(trained / "best_model.pt")
    router.open_embeddings(file)
    other = router.rank(NEW)
    assert [[name for name, _ in ranking] for ranking in one] == [[name for name, _ in ranking] for ranking in other]
    assert np.allclose(*([score for ranking in each for _, score in ranking] for each in (one, other)), atol=1e-4)


def test_a_run_resumes_with_the_same_file_only(small, trained, file, tmp_path, fails, capsys):
    flags = [*without_encoder(small), "--output_dir", str(trained), "--resume"]
    train.main([*flags, "--embeddings", str(file)])
    assert "finished already" in capsys.readouterr().out
    pd.read_parquet(file)[::-1].to_parquet(tmp_path / "e.parquet")
    assert "the encoder's fingerprint was" in fails(*flags, "--embeddings", str(tmp_path / "e.parquet"))


def test_a_file_that_lacks_a_query_leaves_the_run_of_the_folder_alone(small, trained, file, tmp_path, fails):
    before = (trained / "training_history.json").read_bytes()
    pd.read_parquet(file)[5:].to_parquet(tmp_path / "e.parquet")
    flags = [*without_encoder(small), "--output_dir", str(trained), "--embeddings", str(tmp_path / "e.parquet")]
    assert "lacks" in fails(*flags)
    assert (trained / "training_history.json").read_bytes() == before


def test_what_does_not_fit_is_refused(small, tiny_run, trained, file, fails, capsys):
    def refused(*flags):
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: route.main(list(flags)))
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        return line

    own, other = ["--checkpoint", str(trained / "best_model.pt")], ["--checkpoint", str(tiny_run[1] / "best_model.pt")]
    assert "give those of these queries by --embeddings" in refused(*own, NEW[0])
    assert "lacks 1 of 1 queries, such as 'unknown'; add them" in refused(*own, "--embeddings", str(file), "unknown")
    assert "leave out --embeddings" in refused(*other, "--embeddings", str(file), NEW[0])
    for flags in (
        ["--finetune_encoder"],
        ["--layers", "1"],
        ["--no_cache"],
        ["--model_path", "x"],
        ["--pooling", "cls"],
    ):
        message = f"--embeddings and {flags[0]} exclude each other"
        assert message in fails(*without_encoder(small), "--embeddings", str(file), *flags)
    narrow = PrecomputedEmbeddings(NEW, np.ones((2, 3)))
    with pytest.raises(UserError, match="embeddings of width 3, training had 128"):
        RankRouter.load(trained / "best_model.pt").open_embeddings(narrow)


def test_a_warning_names_embeddings_unlike_those_of_training(trained, file, capsys):
    router = RankRouter.load(trained / "best_model.pt")
    router.open_embeddings(file)
    assert capsys.readouterr().err == ""
    vectors = np.stack(pd.read_parquet(file)["embedding"])
    many = [str(i) for i in range(len(vectors))]
    for unlike in (PrecomputedEmbeddings(NEW, 3 * vectors[-2:, ::-1] + 1), PrecomputedEmbeddings(many, 0.1 * vectors)):
        router.open_embeddings(unlike)
        assert "are they of the same encoder?" in capsys.readouterr().err
