"""The page of all settings says what the code does."""

from tests.settings_page import PAGE, links, page


def test_the_page_of_settings_equals_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python -m tests.settings_page"


def test_the_page_of_settings_is_found_from_where_settings_are_spoken_of() -> None:
    assert links() >= {"00", "02", "06", "11"}
