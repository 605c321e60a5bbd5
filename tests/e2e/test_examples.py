"""The examples: the tour finds what its battles say, and LiteLLM's Router sends each conversation to the best model."""

import asyncio
import runpy

import pytest

from data_loader import Battles
from rankrouter import RankRouter
from train import train_router

TEXTS = ("Invert matrix", "Cook soup")


def test_the_tour_finds_what_its_battles_say(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    runpy.run_module("examples.tour")
    rankings = [line.split(" -> ")[1].split(", ") for line in capsys.readouterr().out.splitlines() if " -> " in line]
    firsts = [ranking[0].split()[0] for ranking in rankings]
    lasts = [ranking[-1].split()[0] for ranking in rankings]
    assert firsts == ["mathematician", "cook", "chef"]
    assert lasts == ["cook", "mathematician", "mathematician"]
    assert (tmp_path / "outputs/tour/training.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def checkpoint(demo, tmp_path_factory):
    """Of a router that has learned which of four models are best at matrices, and which at soup."""
    output, pairs = tmp_path_factory.mktemp("outputs"), [("m1", "s1"), ("m1", "s2"), ("m2", "s1"), ("m2", "s2")]
    rows = [
        (f"{text} number {i}", *pair, pair[TEXTS.index(text)]) for i in range(30) for pair in pairs for text in TEXTS
    ]
    tiny = {"embedding_dim": 8, "lr": 0.01, "epochs": 2, "num_clusters": 2, "baselines": "none", "dtype": "float32"}
    train_router(Battles.from_tuples(rows), str(demo / "encoder"), str(output), **tiny)
    return output / "best_model.pt"


@pytest.fixture
def gateway(checkpoint, monkeypatch):
    """A router, and a LiteLLM Router that asks it, with deployments of two of its models and an unknown one."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is downloaded on import
    litellm = pytest.importorskip("litellm")
    from examples.litellm_router import RankRouterStrategy

    router = RankRouter.load(checkpoint)
    groups = [("best", "unknown"), ("best", "m1"), ("best", "s2"), ("other", "stranger")]
    parts = [
        {
            "model_name": group,
            "litellm_params": {"model": f"openai/{name}", "mock_response": name},
            "model_info": {"id": name},
        }
        for group, name in groups
    ]
    gateway = litellm.Router(model_list=parts)
    gateway.register_plugin(RankRouterStrategy(router, gateway))
    return gateway


def answer(reply):
    return reply.choices[0].message.content


def test_each_conversation_goes_to_the_model_that_ranks_first(gateway):
    questions, expected = [f"{text} number {-i}" for i in range(6) for text in TEXTS], ["m1", "s2"] * 6
    chats = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": query}] for query in questions]
    assert [answer(gateway.completion(model="best", messages=chat)) for chat in chats] == expected
    more = [{"role": "assistant", "content": "Hm."}, {"role": "user", "content": "And soup?"}]

    async def together():
        return await asyncio.gather(*(gateway.acompletion(model="best", messages=chat + more) for chat in chats))

    assert list(map(answer, asyncio.run(together()))) == expected  # a session keeps its model


def test_requests_that_cannot_be_ranked_go_to_the_first_deployment(gateway):
    hello = [{"role": "user", "content": "Hello"}]
    assert answer(gateway.completion(model="other", messages=hello)) == "stranger"
    only_system = [{"role": "system", "content": "Be kind."}]
    assert answer(gateway.completion(model="best", messages=only_system)) == "unknown"


def test_a_group_without_deployments_and_one_that_fails(gateway, checkpoint):
    import litellm

    from examples.litellm_router import RankRouterStrategy

    hello = [{"role": "user", "content": "Invert matrix number 7"}]
    with pytest.raises(litellm.BadRequestError, match="no deployment of nope"):
        gateway.completion(model="nope", messages=hello)
    with pytest.raises(litellm.BadRequestError, match="no deployment of nope"):
        asyncio.run(asyncio.wait_for(gateway.acompletion(model="nope", messages=hello), 60))
    model_list = [
        {
            "model_name": "best",
            "litellm_params": {"model": f"openai/{name}", "mock_response": answered},
            "model_info": {"id": name},
        }
        for name, answered in (("m1", "litellm.RateLimitError"), ("s2", "s2"))
    ]
    failing = litellm.Router(model_list=model_list, num_retries=1, allowed_fails=0, cooldown_time=600)
    failing.register_plugin(RankRouterStrategy(RankRouter.load(checkpoint), failing))
    assert [answer(failing.completion(model="best", messages=hello)) for _ in range(2)] == ["s2", "s2"]


def test_the_example_routes_two_requests(checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    pytest.importorskip("litellm")
    from examples.litellm_router import main

    monkeypatch.setattr("sys.argv", ["litellm_router", str(checkpoint)])
    main()
    questions = ["How do I invert a matrix?", "Which spices go with lentil soup?"]
    best = [ranking[0][0] for ranking in RankRouter.load(checkpoint).rank(questions)]
    shown = [f"{query} -> an answer of {name}" for query, name in zip(questions, best, strict=True)]
    assert capsys.readouterr().out.splitlines() == shown
