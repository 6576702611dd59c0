"""When a device has no memory left: how such an error is known, and what is said of it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hortator.producer.errors import GroupFailed, HortatorError

# torch, its CPU and CUDA allocators, cuBLAS, Triton, NCCL, numpy and the system each have words of their own.
_SIGNS = ("out of memory", "allocate memory", "cublas_status_alloc_failed", "bad_alloc")
_AMOUNT = re.compile(r"(?:tried|unable) to allocate ([\d.]+ ?[a-z]+)", re.IGNORECASE)
_FREE = re.compile(r"of which ([\d.]+ \w+) is free")


class OutOfMemory(GroupFailed):
    """This rank has no memory for what all its group needs."""


def lacking(error: BaseException) -> str | None:
    """What could not be had, if memory is what the error, or the one that it followed upon, is about."""
    if isinstance(error, HortatorError):
        return None
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in text.lower() for sign in _SIGNS):
        amount, free = _AMOUNT.search(text), _FREE.search(text)
        found = f"{amount[1]} could not be allocated" if amount else text.strip().partition("\n")[0][:200]
        return (found or "no more could be allocated") + (f", {free[1]} were free" if free else "")
    before = error.__cause__ or error.__context__
    return lacking(before) if before is not None else None


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Whatever lacks memory in here is an OutOfMemory that says so."""
    try:
        yield
    except Exception as error:
        if lack := lacking(error):
            raise OutOfMemory(f"out of memory for {what} ({lack}): {remedy}") from error
        raise
