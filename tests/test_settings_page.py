"""The page of all settings says what the code does."""

import pytest

from tests.settings_page import PAGE, links, page, rows


def test_the_page_of_settings_equals_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python -m tests.settings_page"


@pytest.mark.parametrize("pointer", ["likewise", "see there", "the same lines", "ditto"])
def test_no_row_points_at_another_for_they_are_sorted_by_name(pointer: str) -> None:
    assert [row for row in rows() if pointer in row] == []


def test_the_page_of_settings_is_found_from_where_settings_are_spoken_of() -> None:
    assert links() >= {"00", "02", "06", "11"}
