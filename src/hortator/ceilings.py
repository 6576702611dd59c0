"""The most that any setting may be: what everything beneath (Redis, sockets, milliseconds in 32 bits) still takes.

A setting beyond what Redis takes would be found only in the middle of a script, with half of its work done.
"""

from typing import Annotated

from pydantic import Field

DAY_S = 86_400
MAX_LIFETIME_S = 10 * 365 * DAY_S  # records and keys; Redis takes far more, and nobody means it
MAX_PATIENCE_S = 7 * DAY_S  # poll() counts milliseconds in 32 bits: 24 days
MAX_TIMEOUT_S = 3_600  # one answer of somebody who is there
MAX_COUNT = 10**9
MAX_TOKENS = 2**27  # of one context or step
MAX_STRING_BYTES = 2**29  # Redis's own limit of one string
MAX_BYTES = 2**50

Lifetime = Annotated[float, Field(le=MAX_LIFETIME_S)]
"""Seconds for which something is kept."""
Patience = Annotated[float, Field(le=MAX_PATIENCE_S)]
"""Seconds until something slow is given up."""
Timeout = Annotated[float, Field(le=MAX_TIMEOUT_S)]
"""Seconds until something quick is given up, or between two looks at it."""
Count = Annotated[int, Field(le=MAX_COUNT)]
Tokens = Annotated[int, Field(le=MAX_TOKENS)]
Bytes = Annotated[int, Field(le=MAX_BYTES)]
