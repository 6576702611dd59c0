"""What both clients have: a store, until they are closed, a tenant, and patience with an outage."""

from collections.abc import Callable
from typing import Generic, TypeVar

from pydantic import ValidationError

from . import arguments
from .errors import ClientUnusable, ConfigError, StoreUnavailable
from .job import Patience
from .problems import listed
from .settings import StoreSettings

S = TypeVar("S")

OnOutage = Callable[[StoreUnavailable], None]


class Caller(Generic[S]):
    """The part of a client that does not wait for anything."""

    def __init__(self, store: S, *, tenant: str, patience_s: float, on_outage: OnOutage | None) -> None:
        if on_outage is not None and not callable(on_outage):
            raise arguments.unwanted("on_outage", on_outage, "a function of one error, or None")
        self.tenant = arguments.tenant(tenant)
        self._patience_s = arguments.seconds("patience_s", patience_s)
        self._on_outage = on_outage
        self._store = store
        self._closed = False

    @property
    def store(self) -> S:
        """What answers the calls.  Raises ClientUnusable once the client is closed."""
        self._check()
        return self._store

    def _check(self) -> None:
        if self._closed:
            name = type(self).__name__
            raise ClientUnusable(f"this {name} is closed (its `with` has ended?): make another one, or close it later")

    def _patience(self) -> Patience:
        return Patience(self._patience_s, self._on_outage)


def settings_for(
    url: str | None, namespace: str | None, require_known_model: bool | None, timeout_s: float | None
) -> StoreSettings:
    """The environment's settings with what the caller said on top.  Raises ConfigError."""
    given = {
        "redis_url": url,
        "namespace": namespace,
        "require_known_model": require_known_model,
        "timeout_s": timeout_s,
    }
    try:
        return StoreSettings.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:  # its text holds the values, and one is a URL with a password
        raise ConfigError(listed(error.errors(include_url=False))) from None
