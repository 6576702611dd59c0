"""The API container is healthy while jobs can be accepted: exit 0 if /readyz says so, else 1 with the reason."""

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 3.0


def reason_not_ready(port: str) -> str | None:
    """None when the API is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as refusal:
        return refusal.read(500).decode(errors="replace")
    except OSError as problem:
        return str(problem)


if __name__ == "__main__":
    sys.exit(reason_not_ready(os.environ.get("HORTATOR_API_PORT", "8080")))
