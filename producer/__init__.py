"""What an application needs to enqueue prompts and to get every answer, once.  No torch, no Celery."""

if __name__ != "hortator.producer":
    raise ImportError(f"import this folder as hortator.producer, not as {__name__}")
