"""The polling API: submit, wait, stream and cancel jobs over HTTP.  No torch, no Celery.

One request goes through these files: metrics -> keys -> body -> routes, and from there to the store; what waits, waits
in `watch` and is sent by `stream`; whatever goes wrong is worded in `failures`.
"""

from .app import create_app
from .seam import AsyncStore
from .settings import ApiSettings

__all__ = ["ApiSettings", "AsyncStore", "create_app"]
