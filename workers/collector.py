"""Python's garbage collector in a process that holds much for long: hundreds of jobs in flight are no garbage."""

import gc

THRESHOLD = 10_000  # objects, between two looks at the youngest


def spare_what_is_loaded() -> None:
    """Everything that is there by now stays: walking over it again would stop the process for 60 ms and more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(THRESHOLD)
