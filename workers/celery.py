"""The Celery app: `celery -A hortator.workers worker -Q MODEL`.

Importable without a model, so that `inspect`, `control` and `events` need only HORTATOR_REDIS_URL.
"""

import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery, signals
from kombu import Queue
from kombu.transport import TRANSPORT_ALIASES
from pydantic import ValidationError

from hortator.interrupts import leave_at_once
from hortator.producer.errors import ConfigError
from hortator.producer.problems import listed
from hortator.producer.redis_url import kombu_url
from hortator.producer.schema import TASK_NAME
from hortator.producer.settings import NamespaceSettings

from . import commands  # noqa: F401  # what leaders can be told over remote control
from .modelcheck import check_model
from .settings import WorkerSettings

if TYPE_CHECKING:
    from hortator.producer.redis_store import RedisStore

    from .front import Front, Watcher
    from .group import Group


TRANSPORT_ALIASES["hortator"] = "hortator.workers.transport:Transport"
EX_CONFIG = 78  # sysexits.h: the settings cannot work
STORE_TIMEOUT_S = 2.0  # how long a stalled Redis may keep the front from its group


class BrokerSettings(NamespaceSettings):
    """What even a process without a model must know, from the sources that WorkerSettings has."""

    @classmethod
    def settings_customise_sources(cls, *args: Any, **kwargs: Any) -> Any:
        return WorkerSettings.settings_customise_sources(*args, **kwargs)


class App(Celery):  # type: ignore[misc]
    """A Celery app with one model group behind it."""

    front: "Front | None" = None  # in a leader's process: what the result backend writes through

    def __init__(self, settings: WorkerSettings | None = None) -> None:
        super().__init__("hortator", set_as_current=True, task_cls=None)
        self._given = settings
        self.config_from_object(_config(settings or _broker_settings()))

    @cached_property
    def settings(self) -> WorkerSettings:
        """The model group's settings; ConfigError in a readable line."""
        if self._given is not None:
            return self._given
        try:
            return WorkerSettings()
        except ValidationError as error:
            raise ConfigError(listed(error.errors())) from None

    def make_group(self) -> "Group":
        from .group import Group

        return Group(self.settings)

    def make_store(self) -> "RedisStore":
        """The leader's store, under the rules of the namespace."""
        from hortator.producer.redis_store import RedisStore

        settings = self.settings
        return RedisStore(
            settings.redis_url, namespace=settings.namespace, rules=settings.rules(),
            timeout_s=STORE_TIMEOUT_S, connect_timeout_s=STORE_TIMEOUT_S / 2,
        )  # fmt: skip

    def make_front(self, group: "Group", *, watcher: "Watcher") -> "Front":
        from .front import Front

        settings = self.settings
        self.front = Front(self.make_store(), group, _text(settings), settings, watcher=watcher)
        return self.front

    def serve(self, queues: list[str] | None) -> None:
        """Become a leader: called before the worker is built."""
        settings = self.settings
        check_model(settings)
        if queues and queues != [settings.queue]:
            raise ConfigError(
                f"-Q {','.join(queues)}: this worker's model is served on the queue {settings.queue!r};"
                f" say -Q {settings.queue}, leave -Q out, or set HORTATOR_MODEL"
            )
        self.conf.task_queues = [Queue(settings.queue, routing_key=settings.queue)]
        self.conf.task_default_queue = settings.queue
        self.conf.worker_concurrency = settings.max_num_seqs


def _broker_settings() -> BrokerSettings:
    try:
        return BrokerSettings()
    except ValidationError as error:
        raise ConfigError(listed(error.errors())) from None


def _config(settings: NamespaceSettings) -> dict[str, Any]:
    options = {"global_keyprefix": settings.namespace, "socket_timeout": 2.0, "socket_connect_timeout": 2.0}
    url = kombu_url(settings.redis_url, transport="hortator")
    no_waiting = {"max_retries": 0, "interval_start": 0, "interval_step": 0}  # kombu would sleep in the front's thread
    return {
        "broker_url": url,
        "broker_transport": "hortator",
        "broker_transport_options": options | no_waiting | {"socket_keepalive": True},
        "broker_connection_retry_on_startup": True,
        "result_backend": f"hortator.workers.backend:StoreBackend+{url.removeprefix('hortator+')}",
        "result_backend_transport_options": {"global_keyprefix": settings.namespace},
        "result_expires": settings.result_ttl_s,
        "redis_socket_timeout": 5.0,
        "redis_socket_connect_timeout": 2.0,
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "task_acks_late": True,
        "task_track_started": True,
        "task_create_missing_queues": False,
        "task_queues": [],
        "task_routes": (_route,),
        "worker_pool": "hortator.workers.pool:EnginePool",
        "worker_consumer": "hortator.workers.consumer:LeaderConsumer",
        "worker_prefetch_multiplier": 1,
        "worker_disable_rate_limits": True,
        "worker_hijack_root_logger": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_enable_prefetch_count_reduction": False,
    }


def _route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
    """A prompt sent through this app goes to its model's queue; nothing goes to a queue that nobody serves."""
    if name == TASK_NAME and kwargs and kwargs.get("model"):
        queue = str(kwargs["model"])
        return {"queue": Queue(queue, routing_key=queue)}
    return None


def _text(settings: WorkerSettings) -> Any:
    from .text import ByteText, HFText, torch_hidden

    if settings.engine == "echo" or settings.model_path is None:
        return ByteText()
    with torch_hidden():
        return HFText.load(settings.model_path)


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _become_leader(instance: Any = None, options: Any = None, **_: Any) -> None:
    leader = instance.app
    if not isinstance(leader, App):
        return
    leave_at_once()  # until Celery handles Ctrl-C itself, soon
    queues = (options or {}).get("queues")
    try:
        leader.serve(queues.split(",") if isinstance(queues, str) else list(queues or []))
    except ConfigError as error:
        sys.stderr.write(f"hortator: {error.message}\n")
        raise SystemExit(EX_CONFIG) from None


def _app() -> App:
    try:
        return App()
    except ConfigError as error:
        if "celery" not in Path(sys.argv[0]).parts[-2:]:  # celery would show its user our traceback
            raise
        sys.stderr.write(f"hortator: {error.message}\n")
        raise SystemExit(EX_CONFIG) from None


app = _app()


@app.task(  # type: ignore[untyped-decorator]
    name=TASK_NAME,
    Strategy="hortator.workers.request:strategy",
    Request="hortator.workers.request:PromptRequest",
    acks_late=True,
    typing=False,
)
def generate(*args: Any, **kwargs: Any) -> None:
    """Run by the model group, never by this function."""
    raise NotImplementedError(f"{TASK_NAME} runs in a model group: send it with send_task or apply_async")
