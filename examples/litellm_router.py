"""RankRouter inside LiteLLM's Router: each conversation goes to the deployment of the model that ranks first for it.

`pip install litellm==1.110.2`, then `python -m examples.litellm_router outputs/best_model.pt` in this project's folder
shows two requests with mock responses. A deployment belongs to the model of the router that its `model_info.id` names.
"""

import asyncio
from threading import Lock

import litellm
from litellm.types.router import CustomRoutingStrategyBase

from rankrouter import RankRouter
from support.system.command_line import OneLineParser, run_command
from support.system.errors import UserError


class RankRouterStrategy(CustomRoutingStrategyBase):
    """Ranks the deployments of the requested group; for `litellm.Router.register_plugin`."""

    def __init__(self, router: RankRouter, gateway: litellm.Router):
        self.router, self.gateway, self.lock = router, gateway, Lock()
        router.rank(["the first query loads the encoder"])

    def get_available_deployment(
        self, model, messages=None, input=None, specific_deployment=False, request_kwargs=None
    ):
        """The deployment in the group `model` for chat messages, of those that are not cooling down after failures.

        Ranked by the user's first turn, as in training, so that a session keeps its model, which has its prompt cached.
        """
        deployments = {each["model_info"]["id"]: each for each in self.gateway.registry().deployments(model)}
        if not deployments:
            raise litellm.BadRequestError(f"there is no deployment of {model}", model=model, llm_provider="")
        cooling = {name for name, _ in self.gateway.health().cooldowns.get_active_cooldowns(list(deployments), None)}
        names = [name for name in deployments if name not in cooling] or list(deployments)
        try:
            with self.lock:  # one at a time, as tokenizers are not made for several threads
                known = [name for name in names if name in self.router.model_names]
                (ranking,) = self.router.rank([messages], top_k=1, models=known)
        except UserError:  # there is no text of a user
            ranking = []
        return deployments[ranking[0][0] if ranking else names[0]]

    async def async_get_available_deployment(self, *args, **kwargs):
        """The same for `acompletion`; the event loop is free meanwhile."""
        return await asyncio.to_thread(self.get_available_deployment, *args, **kwargs)


def main() -> None:
    """Route two requests to mock deployments, one for each model that the checkpoint knows."""
    parser = OneLineParser("Route two requests to mock deployments in LiteLLM's Router.")
    parser.add_argument("checkpoint", help="best_model.pt, or what else `RankRouter.load` takes")
    parser.add_argument("--model_path", help="folder or hub id of its encoder; default: that of training")
    args = parser.parse_args()
    router = RankRouter.load(args.checkpoint)
    router.open_encoder(args.model_path)
    model_list = [
        {
            "model_name": "best",  # what clients request
            "litellm_params": {"model": f"openai/{name}", "mock_response": f"an answer of {name}"},
            "model_info": {"id": name},
        }
        for name in router.model_names
    ]
    gateway = litellm.Router(model_list=model_list)
    gateway.register_plugin(RankRouterStrategy(router, gateway))
    for question in ("How do I invert a matrix?", "Which spices go with lentil soup?"):
        reply = gateway.completion(model="best", messages=[{"role": "user", "content": question}])
        print(f"{question} -> {reply.choices[0].message.content}")


if __name__ == "__main__":
    run_command(main)
