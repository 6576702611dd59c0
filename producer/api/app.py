"""The application: its layers, routes and the two tasks that run beside them."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hortator import __version__
from hortator.producer.errors import HortatorError, StoreUnavailable

from .body import BodyLimit
from .failures import BadField, describe, error_response, refusal
from .fleet import FleetRoutes
from .framing import Framing
from .jobs import JobRoutes
from .keys import KeyGate
from .metrics import CLIENT_LEFT, Meter, Metrics
from .patience import PatientStore
from .seam import AsyncStore
from .settings import ApiSettings
from .watch import Watcher

log = logging.getLogger(__name__)

CANCEL_AGAIN_S = 0.2
HTTP_CODES = {404: "no_such_route", 405: "method_not_allowed"}


def create_app(store: AsyncStore, *, api_settings: ApiSettings) -> FastAPI:
    """The API on a store, which stays the caller's to close.

    `app.state.watcher.drain()` ends all waiting; call it when the process is told to stop (`serve` does).
    """
    patient = PatientStore(store, timeout_s=api_settings.store_timeout_s)
    metrics = Metrics()
    watcher = Watcher(store, poll_s=api_settings.poll_s, max_waiters=api_settings.max_waiters)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(watcher.run(), name="watcher"),
            asyncio.create_task(sweep(store, metrics, every_s=api_settings.sweep_s), name="sweeper"),
        ]
        try:
            yield
        finally:
            watcher.drain()
            await end(tasks)

    # The framework's pages would load scripts from elsewhere into the origin of the API: /openapi.json says as much.
    app = FastAPI(
        title="hortator", version=__version__, lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    app.state.watcher = watcher
    app.include_router(JobRoutes(patient, watcher, api_settings).router())
    app.include_router(FleetRoutes(patient, watcher, metrics, api_settings).router())
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=api_settings.max_body_bytes, timeout_s=api_settings.body_timeout_s)
    app.add_middleware(KeyGate, ring=api_settings.key_ring(), open_paths=api_settings.open_paths)
    app.add_middleware(Framing)
    app.add_middleware(Meter, metrics=metrics)
    return app


async def end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel until they obey: redis-py can turn a cancellation into the error of a connection."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)


async def sweep(store: AsyncStore, metrics: Metrics, *, every_s: float) -> None:
    """Jobs past their deadline end here even when no worker is alive.  Any number of processes may do it.

    Lost leases are left to the leaders: an API that was cut off from Redis cannot tell a dead leader from one that was
    cut off as well.
    """
    while True:
        try:
            report = await store.sweep(expired_before_ms=0)
            metrics.expired.inc(len(report.expired))
        except StoreUnavailable:
            pass  # readyz says so; the next round may find it back
        except Exception:
            log.exception("a sweep failed; the next one comes in %g s", every_s)
        await asyncio.sleep(every_s)


async def on_hortator_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HortatorError)
    return refusal(error)


async def on_bad_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return refusal(BadField(describe(error.errors())))


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTP_CODES.get(error.status_code, "http_error")
    return error_response(error.status_code, code, str(error.detail), headers=error.headers)


async def on_leave(request: Request, error: Exception) -> Response:
    """The client left before its body was complete: nobody reads this, but it is counted."""
    return Response(status_code=CLIENT_LEFT)


async def on_bug(request: Request, error: Exception) -> Response:
    """The log has the traceback; the client learns nothing of our insides."""
    return error_response(500, "internal", "this is a bug of the server; its log says more")


HANDLERS = {
    HortatorError: on_hortator_error,
    RequestValidationError: on_bad_parameter,
    HTTPException: on_http_error,
    ClientDisconnect: on_leave,
    Exception: on_bug,
}
