"""The worker's side: the Celery front, the ranks and the engine.  `celery -A hortator.workers worker`."""

if __name__ != "hortator.workers":
    raise ImportError(f"import this folder as hortator.workers, not as {__name__}")
