"""RankRouter inside LiteLLM's Router: each conversation goes to the deployment of the model that ranks first for it.

`pip install litellm`, then `python -m examples.litellm_router outputs/best_model.pt` in this project's folder shows two
requests with mock responses. A deployment belongs to the model of the router that its `model_info.id` names.
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import litellm
from litellm.types.router import CustomRoutingStrategyBase

from rankrouter import RankRouter
from support.system.errors import UserError


class RankRouterStrategy(CustomRoutingStrategyBase):
    """Ranks the deployments of the requested group; for `litellm.Router.register_plugin`."""

    def __init__(self, router: RankRouter, gateway: litellm.Router):
        self.router, self.gateway = router, gateway
        self.one_at_a_time = ThreadPoolExecutor(1)  # so that the event loop is free meanwhile
        router.rank(["load the encoder before the first request"])

    def get_available_deployment(
        self, model, messages=None, input=None, specific_deployment=False, request_kwargs=None
    ):
        """The deployment in the group `model` for chat messages: by the user's first turn, as in training.

        So all turns of a session go to one model, and its provider can reuse the cached prompt.
        """
        deployments = {each["model_info"]["id"]: each for each in self.gateway.registry().deployments(model)}
        names = [name for name in deployments if name in self.router.model_names]
        try:
            (ranking,) = self.router.rank([messages], top_k=1, models=names)
        except UserError:  # there is no text of a user
            ranking = []
        return deployments[ranking[0][0] if ranking else next(iter(deployments))]

    async def async_get_available_deployment(self, *args, **kwargs):
        """The same, for `acompletion`."""
        decide = asyncio.get_running_loop().run_in_executor
        return await decide(self.one_at_a_time, lambda: self.get_available_deployment(*args, **kwargs))


def main(checkpoint: str, model_path: str | None = None) -> None:
    """Route two requests to mock deployments, one for each model that the checkpoint knows."""
    router = RankRouter.load(checkpoint)
    router.open_encoder(model_path)
    parts = [
        {
            "model_name": "best",  # what clients request
            "litellm_params": {"model": f"openai/{name}", "mock_response": f"an answer of {name}"},
            "model_info": {"id": name},
        }
        for name in router.model_names
    ]
    gateway = litellm.Router(model_list=parts)
    gateway.register_plugin(RankRouterStrategy(router, gateway))
    for question in ("How do I invert a matrix?", "Which spices go with lentil soup?"):
        reply = gateway.completion(model="best", messages=[{"role": "user", "content": question}])
        print(f"{question} -> {reply.choices[0].message.content}")


if __name__ == "__main__":
    main(*sys.argv[1:])
