"""Replicas of the service on one or many machines, as many as its load requires, with Ray Serve.

    pip install -e '.[ray]'
    serve run tarq_jax.serving.ray:application artefact=artefacts/1 max_replicas=4

A replica takes requests when its artefact is warm, and refuses those that exceed its capacity as
`tarq_jax.serving.server` does. To serve another artefact, run the same command with its name: Ray starts new
replicas before it ends old ones. `/swap` is disabled, and `/metrics` shows those of the replica that answers.
"""

from pathlib import Path

import pydantic
from ray import serve
from starlette.applications import Starlette

from tarq_jax import cli
from tarq_jax.serving.http.app import make_app
from tarq_jax.serving.http.options import Options

UPSCALE, DOWNSCALE = 5.0, 120.0  # seconds that a load has to last before replicas are added or removed


class Arguments(pydantic.BaseModel):
    """What is served, and by how many replicas; paths are on the replicas' machines."""

    model_config = pydantic.ConfigDict(extra="forbid")

    artefact: str
    min_replicas: int = pydantic.Field(1, ge=1)
    max_replicas: int = pydantic.Field(1, ge=1)
    # Concurrent requests per replica; more start another one. A replica refuses what it cannot answer in
    # time, so one that computes requests one by one holds fewer than two even under twice its load.
    ongoing: float = pydantic.Field(1.0, gt=0)
    num_cpus: float = pydantic.Field(1.0, ge=0)  # per replica
    num_gpus: float = pydantic.Field(0.0, ge=0)
    token_file: str | None = None
    budget_ms: float | None = pydantic.Field(None, gt=0)  # as --budget_ms of the server

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "Arguments":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, expected at most max_replicas, "
                             f"{self.max_replicas}")
        return self


class Replica:
    """What Ray knows of a replica besides its application; `serve.ingress` sets `app`."""

    app: Starlette

    async def check_health(self) -> None:
        """Raises an error, after some of which Ray replaces the replica, when /readyz would answer 503."""
        await self.app.state.service.check()


def application(arguments: Arguments) -> serve.Application:
    """A Ray Serve application; `serve run` and configuration files of Ray call it.

    A replica whose artefact is damaged or missing does not start; Ray's log and status give the reason.
    """
    def build() -> Starlette:  # runs in each replica
        token = cli.token_in(Path(arguments.token_file)) if arguments.token_file else None
        budget = arguments.budget_ms / 1e3 if arguments.budget_ms else None
        return make_app(Path(arguments.artefact), Options(token=token, budget=budget, swaps=False))

    deployed = serve.deployment(
        name="tarq", max_ongoing_requests=Options.queue,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        autoscaling_config={
            "min_replicas": arguments.min_replicas, "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.ongoing, "upscale_delay_s": UPSCALE,
            "downscale_delay_s": DOWNSCALE})
    return deployed(serve.ingress(build)(Replica)).bind()
