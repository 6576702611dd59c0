"""Figures for Prometheus, in a registry of their own."""

from collections.abc import Iterable, Sequence
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hortator.producer.store import QueueInfo

CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
CLIENT_LEFT = 499  # before there was an answer: a status that is counted, and that nobody reads
METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "PUT", "PATCH", "OPTIONS"})


class Metrics:
    """Counts requests as they pass; queues are asked for when somebody looks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hortator_http_requests",
            "Requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.duration_s = Histogram(
            "hortator_http_request_duration_seconds",
            "Time until the answer was complete, waiting included.",
            ("route",),
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self.in_flight = Gauge("hortator_http_requests_in_flight", "Requests under way.", registry=self.registry)
        self.waiters = Gauge("hortator_waiters", "Long polls and streams that wait.", registry=self.registry)
        self.expired = Counter(
            "hortator_expired_jobs", "Jobs that this process ended at their deadline.", registry=self.registry
        )

    def page(self, queues: Sequence[QueueInfo] | None, num_letters: int | None = None) -> bytes:
        """The text format.  None: the store is away; its figures are then absent, not zero."""
        scrape = CollectorRegistry()
        scrape.register(Queues(queues, num_letters))
        return generate_latest(self.registry) + generate_latest(scrape)


class Queues(Collector):
    """One scrape's view of the queues and of what fell out of them."""

    def __init__(self, queues: Sequence[QueueInfo] | None, num_letters: int | None) -> None:
        self._queues, self._num_letters = queues, num_letters

    def collect(self) -> Iterable[Metric]:
        up = self._queues is not None
        yield GaugeMetricFamily("hortator_store_up", "1 if the store answered this scrape.", value=float(up))
        if self._num_letters is not None:
            yield GaugeMetricFamily("hortator_dead_letters", "Dead letters, of all models.", value=self._num_letters)
        queues = self._queues or ()
        yield gauge("hortator_queue_depth", "Jobs that wait.", {q.model: q.depth for q in queues})
        yield gauge(
            "hortator_queue_oldest_age_seconds",
            "Age of the job that waits longest; 0 if none waits.",
            {q.model: q.oldest_age_s or 0.0 for q in queues},
        )
        yield gauge("hortator_jobs_running", "Jobs with a lease.", {q.model: q.running for q in queues})
        yield gauge("hortator_jobs_suspect", "Jobs that must run alone.", {q.model: q.suspects for q in queues})
        yield gauge("hortator_groups_alive", "Model groups with a heartbeat.", {q.model: len(q.groups) for q in queues})
        yield gauge(
            "hortator_groups_capacity",
            "Jobs that the groups alive can run at a time.",
            {q.model: sum(group.capacity for group in q.groups) for q in queues},
        )


def gauge(name: str, text: str, by_model: dict[str, float] | dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["model"])
    for model, value in by_model.items():
        family.add_metric([model], float(value))
    return family


class Meter:
    """ASGI: counts every answer by its route's pattern, so that ids make no new time series."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = perf_counter()
        try:
            with self._metrics.in_flight.track_inprogress():
                await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.duration_s.labels(route).observe(perf_counter() - began)
