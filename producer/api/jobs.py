"""The routes of jobs: submit, look, wait, stream, cancel."""

import unicodedata
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from hortator.producer.errors import UnknownJob
from hortator.producer.job import misplaced
from hortator.producer.message import is_job_id
from hortator.producer.schema import Job, Sampling, State, Status

from .body import parse_object
from .failures import BadField, Forbidden, Malformed, NotJson, describe
from .keys import Caller
from .metrics import CLIENT_LEFT
from .patience import unless_disconnected
from .seam import AsyncStore
from .settings import ApiSettings
from .shapes import Accepted, CancelReply, Ids, Statuses, error_docs, json_body
from .stream import EventStream, position, token_events
from .watch import Watcher

M = TypeVar("M", bound=BaseModel)
MAX_KEY_CHARS = 256
DEFAULT_TENANT = str(Job.model_fields["tenant"].default)

JobIdPath = Annotated[str, Path(description="as POST /v1/jobs returned it", max_length=512)]
WaitS = Annotated[float, Query(ge=0, description="answer as soon as the job is terminal, at the latest after this")]
After = Annotated[int, Query(ge=0, lt=10**9, description="tokens that the client has already")]


class JobRoutes:
    """What a request does, between the parsed request and the store."""

    def __init__(self, store: AsyncStore, watcher: Watcher, settings: ApiSettings) -> None:
        self._store, self._watcher, self._settings = store, watcher, settings

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["jobs"])
        job = "/jobs/{job_id}"
        router.add_api_route(
            "/jobs",
            self.submit,
            methods=["POST"],
            status_code=202,
            response_model=Accepted,
            openapi_extra=json_body(Job),
            responses=error_docs(400, 409, 413, 422, 429, 503),
        )
        router.add_api_route(
            "/jobs:status",
            self.many,
            methods=["POST"],
            response_model=Statuses,
            openapi_extra=json_body(Ids),
            responses=error_docs(400, 413, 422, 503),
        )
        router.add_api_route(job, self.one, methods=["GET"], response_model=Status, responses=error_docs(404, 410, 503))
        router.add_api_route(
            job, self.cancel, methods=["DELETE"], response_model=CancelReply, responses=error_docs(404, 410, 503)
        )
        router.add_api_route(
            job + "/tokens",
            self.tokens,
            methods=["GET"],
            status_code=200,
            response_class=EventStream,
            responses=error_docs(404, 410, 503),
        )
        return router

    async def submit(
        self, request: Request, idempotency_key: Annotated[str | None, Header(max_length=MAX_KEY_CHARS)] = None
    ) -> Response:
        """Accept a job: once the id is returned, the job survives anything but the loss of Redis's disk.

        Send an Idempotency-Key so that a repeated request is the same job.  Fields that are not known are listed in
        `ignored`.
        """
        body = await self._object(request)
        if problem := misplaced(body.parsed):
            raise BadField(problem)
        job = owned(validated(Job, body.raw), caller_of(request))
        job = keyed(job, idempotency_key)
        [receipt] = await self._store.enqueue([job])
        state = await self._state_of(receipt.job_id) if receipt.duplicate else State.QUEUED
        accepted = Accepted(
            id=receipt.job_id, state=state, duplicate=receipt.duplicate, ignored=unknown_fields(body.parsed)
        )
        return reply(accepted, status=202, headers={"location": f"/v1/jobs/{receipt.job_id}"})

    async def one(self, request: Request, job_id: JobIdPath, wait_s: WaitS = 0.0) -> Response:
        """A job's status, with the result or the failure once it is terminal.

        wait_s is cut to the server's longest wait; the answer then shows the state of that moment, ask again.
        """
        await thrown_away(request)
        status = await self._known(request, job_id)
        timeout_s = min(wait_s, self._settings.max_wait_s)
        if timeout_s == 0 or status.state.terminal:
            return reply(status)
        newest = await unless_disconnected(request, self._watcher.terminal(status, timeout_s=timeout_s))
        return reply(newest) if newest is not None else Response(status_code=CLIENT_LEFT)

    async def many(self, request: Request) -> Response:
        """The status of many jobs in one round trip, in the order asked; null for an unknown id."""
        ids = validated(Ids, (await self._object(request)).raw).ids
        if len(ids) > self._settings.max_ids:
            raise BadField(f"ids: at most {self._settings.max_ids} at a time (got {len(ids)})")
        jobs = await self._store.statuses(ids, tenant=caller_of(request).tenant)
        return reply(Statuses(jobs=jobs))

    async def tokens(
        self,
        request: Request,
        job_id: JobIdPath,
        after: After = 0,
        last_event_id: Annotated[str | None, Header(max_length=64)] = None,
    ) -> Response:
        """The job's tokens as server-sent events, from token `after` on (or after the `Last-Event-ID`).

        Each event is a Chunk, its id the number of tokens so far.  The last event is `done` with the Status; or
        `interrupted` with the reason, and whoever comes back with the last id gets the rest.
        """
        await thrown_away(request)
        start = position(last_event_id, after)
        status = await self._known(request, job_id)
        if start is None:
            return Response(status_code=204)  # tells a browser not to come back
        watch = self._watcher.watch(status)
        limits = self._settings
        events = token_events(
            self._store,
            self._watcher,
            watch,
            after=start,
            keep_alive_s=limits.keep_alive_s,
            outage_s=limits.outage_s,
        )
        return EventStream(events, watch, send_timeout_s=limits.send_timeout_s)

    async def cancel(self, request: Request, job_id: JobIdPath) -> Response:
        """Ask that the job ends.  A queued job is cancelled at once, a running one within moments; a terminal one stays
        as it is, so the call may be repeated.  The answer is the state after the call."""
        check_id(job_id)
        [state] = await self._store.cancel([job_id], tenant=caller_of(request).tenant)
        if state is None:
            raise await self._unknown(request, job_id)
        return reply(CancelReply(id=job_id, state=state))

    async def _known(self, request: Request, job_id: str) -> Status:
        check_id(job_id)
        [status] = await self._store.statuses([job_id], tenant=caller_of(request).tenant)
        if status is None:
            raise await self._unknown(request, job_id)
        return status

    async def _unknown(self, request: Request, job_id: str) -> UnknownJob:
        """One wording for never issued and for another tenant's; another for the caller's own, when it has expired."""
        gone = await self._store.issued(job_id, tenant=caller_of(request).tenant or DEFAULT_TENANT)
        if gone:
            return UnknownJob(f"job {job_id} is over and its record has expired", job_id=job_id, gone=True)
        return UnknownJob(f"there is no job {job_id}", job_id=job_id)

    async def _state_of(self, job_id: str) -> State:
        [status] = await self._store.statuses([job_id])
        return status.state if status is not None else State.QUEUED

    async def _object(self, request: Request) -> "Body":
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise NotJson("send the body as JSON, with the header Content-Type: application/json")
        raw = await request.body()
        limits = self._settings
        return Body(raw, parse_object(raw, max_depth=limits.max_json_depth, max_containers=limits.max_json_containers))


class Body:
    """A body that passed the strict parser, in both forms."""

    def __init__(self, raw: bytes, parsed: dict[str, Any]) -> None:
        self.raw, self.parsed = raw, parsed


def validated(kind: type[M], raw: bytes) -> M:
    """Strictly: "5" is no number and true is not 1.  Raises BadField naming each wrong field."""
    try:
        return kind.model_validate_json(raw, strict=True)
    except ValidationError as problem:
        raise BadField(describe(problem.errors(include_url=False))) from None


def owned(job: Job, caller: Caller) -> Job:
    """The job as the caller's tenant's.  A body that names another tenant is refused, not rewritten."""
    if caller.tenant is None or job.tenant == caller.tenant:
        return job
    if "tenant" in job.model_fields_set:
        raise Forbidden("tenant: the key belongs to another tenant; leave the field out")
    return job.model_copy(update={"tenant": caller.tenant})


def keyed(job: Job, header: str | None) -> Job:
    """The job with its idempotency key, from the body or from the header."""
    if header is not None and job.idempotency_key not in (None, header):
        raise BadField("idempotency_key: the body has one key, the header Idempotency-Key another")
    key = header if header is not None else job.idempotency_key
    if key is not None and (not key or any(unicodedata.category(char) == "Cc" for char in key)):
        raise BadField("idempotency_key: empty, or holds control characters")
    return job.model_copy(update={"idempotency_key": key})


def unknown_fields(parsed: dict[str, Any]) -> tuple[str, ...]:
    """Fields of the body that the wire schema does not have; a newer client's, or a typing error."""
    sampling = parsed.get("sampling")
    inner = sampling if isinstance(sampling, dict) else {}
    names = [name for name in parsed if name not in Job.model_fields]
    names += [f"sampling.{name}" for name in inner if name not in Sampling.model_fields]
    return tuple(name[:64].encode("ascii", "backslashreplace").decode() for name in names[:16])


def check_id(job_id: str) -> None:
    if not is_job_id(job_id):
        raise Malformed("this is no job id: letters, digits and . _ : - only, at most 128")


async def thrown_away(request: Request) -> None:
    """The body that a GET may have.  Whoever waits beside it must not hear of its being too large or too slow."""
    async for _ in request.stream():
        pass


def caller_of(request: Request) -> Caller:
    caller = request.state.caller
    assert isinstance(caller, Caller)  # the key gate is in front of every route
    return caller


def reply(model: BaseModel, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(model.model_dump_json(exclude_none=True), status, headers, media_type="application/json")
