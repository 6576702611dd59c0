"""How a leader's consumer ends."""

import errno
from typing import NoReturn

import pytest
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.worker.consumer import Consumer

from hortator.workers.consumer import LeaderConsumer


def test_a_worker_without_file_descriptors_ends_with_a_failures_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(self: Consumer) -> NoReturn:
        raise WorkerTerminate(1) from OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Consumer, "start", give_up)
    with pytest.raises(WorkerShutdown) as end:
        LeaderConsumer.start(LeaderConsumer.__new__(LeaderConsumer))
    assert end.value.code == 1
