"""hortator: serve large language models from a queue, across several machines."""

__version__ = "0.1.0"
