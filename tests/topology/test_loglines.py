"""Which process a log line is from."""

from hortator.topology.loglines import labelled

HOSTS = ("nodeA", "nodeA", "nodeB")


def test_a_ranks_line_names_group_rank_and_host() -> None:
    line = "[2026-11-24 06:20:08,123: INFO/MainProcess] [rank 2] Traceback (most recent call last)"
    assert labelled(line, "llama-0", HOSTS) == (
        "llama-0 rank 2 nodeB | [2026-11-24 06:20:08,123: INFO/MainProcess] Traceback (most recent call last)"
    )


def test_all_other_lines_are_the_leaders() -> None:
    assert labelled("celery@x ready.", "llama-0", HOSTS) == "llama-0 leader nodeA | celery@x ready."


def test_a_rank_that_the_plan_does_not_have_is_shown_all_the_same() -> None:
    assert labelled("[rank 7] x", "g", HOSTS) == "g rank 7 ? | x"
