"""Which rank sits where, how ranks are started, watched and joined."""

if __name__ != "hortator.topology":
    raise ImportError(f"import this folder as hortator.topology, not as {__name__}")
