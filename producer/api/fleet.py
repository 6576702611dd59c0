"""The routes of the fleet: queues, dead letters, health, metrics."""

from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from hortator.producer.errors import HortatorError, StoreUnavailable
from hortator.producer.hindrance import queue_facts
from hortator.producer.store import DeadLetter, QueueInfo

from .failures import Forbidden, refusal
from .jobs import caller_of, reply
from .metrics import CONTENT_TYPE, Metrics
from .seam import AsyncStore
from .settings import ApiSettings
from .shapes import Letter, Letters, Queue, Queues, error_docs
from .watch import Watcher


class FleetRoutes:
    """What concerns no single job."""

    def __init__(self, store: AsyncStore, watcher: Watcher, metrics: Metrics, settings: ApiSettings) -> None:
        self._store, self._watcher, self._metrics, self._settings = store, watcher, metrics, settings

    def router(self) -> APIRouter:
        router = APIRouter(tags=["fleet"])
        router.add_api_route(
            "/v1/queues", self.queues, methods=["GET"], response_model=Queues, responses=error_docs(503)
        )
        router.add_api_route(
            "/v1/dead-letters",
            self.dead_letters,
            methods=["GET"],
            response_model=Letters,
            responses=error_docs(403, 404, 503),
        )
        router.add_api_route("/healthz", self.healthz, methods=["GET"])
        router.add_api_route("/readyz", self.readyz, methods=["GET"], responses=error_docs(503))
        router.add_api_route("/metrics", self.metrics, methods=["GET"])
        return router

    async def queues(self) -> Response:
        """Every model's queue: what waits, what runs, which groups are alive."""
        queues = await self._store.queues()
        return reply(Queues(queues=tuple(Queue.model_validate(queue_facts(queue)) for queue in queues)))

    async def dead_letters(
        self,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[str | None, Query(pattern=r"^[0-9]{1,16}-[0-9]{1,16}$", description="a letter_id")] = None,
    ) -> Response:
        """Messages that can never run and jobs that took groups down, newest first.  For operators' keys."""
        if not caller_of(request).operator:
            raise Forbidden("dead letters hold every tenant's messages: this needs an operator's key")
        letters = await self._store.dead_letters(limit=limit, before=before)
        return reply(Letters(dead_letters=tuple(letter_shape(letter) for letter in letters)))

    async def healthz(self) -> Response:
        """The process runs."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Jobs can be accepted now; otherwise 503 with the reason."""
        if self._watcher.draining:
            return refusal(StoreUnavailable("this process is stopping"))
        try:
            await self._store.check(for_submits=True)
        except HortatorError as reason:
            return refusal(reason)
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """Prometheus's text format."""
        if "/metrics" not in self._settings.open_paths and not caller_of(request).operator:
            raise Forbidden("metrics cover every tenant: this needs an operator's key")
        queues: list[QueueInfo] | None = None
        num_letters: int | None = None
        with suppress(StoreUnavailable):  # said by hortator_store_up
            queues = await self._store.queues()
            num_letters = await self._store.count_dead_letters()
        self._metrics.waiters.set(self._watcher.waiters)
        return Response(self._metrics.page(queues, num_letters), media_type=CONTENT_TYPE)


def letter_shape(letter: DeadLetter) -> Letter:
    return Letter(
        letter_id=letter.letter_id,
        model=letter.model,
        job_id=letter.job_id,
        reason=letter.reason,
        buried_ms=letter.buried_ms,
        message=repr(letter.message)[2:-1],  # as a Python literal: printable ASCII only
        message_bytes=letter.message_bytes,
    )
