"""YAML without its surprises: the values of JSON and nothing else.  Pure.

YAML 1.1 reads `no` as false, 22:30 as a number and 2026-01-01 as a date, and takes the last of two equal keys without a
word.  Here only true, false, null and plain decimal numbers are other than text (the core schema of YAML 1.2), and
equal keys, anchors, aliases and tags are refused.
"""

import re
from typing import Any

from yaml import (  # type: ignore[import-untyped]
    AliasEvent,
    MappingNode,
    Node,
    SafeLoader,
    ScalarNode,
    SequenceNode,
    YAMLError,
)

_BOOLEANS = {"true": True, "false": False}
_NULLS = ("", "null", "~")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")


class BadYaml(ValueError):
    """What is wrong, with its line."""


def read_yaml(text: str) -> Any:
    """The one document.  Raises BadYaml."""
    loader = _Composer(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(node)
    except YAMLError as error:
        raise BadYaml(" ".join(str(error).split())) from None
    finally:
        loader.dispose()


class _Composer(SafeLoader):  # type: ignore[misc]
    """Makes nodes, never objects."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, AliasEvent) or event.anchor is not None:
            raise BadYaml(f"{where}: anchors (&) and aliases (*) are not read: write it out, or quote it")
        if getattr(event, "tag", None) is not None:
            raise BadYaml(f"{where}: tags (!) are not read: leave it out, or quote it")
        return super().compose_node(parent, index)


def _value(node: Node) -> Any:
    if isinstance(node, MappingNode):
        return _table(node)
    if isinstance(node, SequenceNode):
        return [_value(item) for item in node.value]
    return _scalar(node)


def _table(node: MappingNode) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in node.value:
        where = f"line {key.start_mark.line + 1}"
        if not isinstance(key, ScalarNode):
            raise BadYaml(f"{where}: a key must be a word")
        if key.value in table:
            raise BadYaml(f"{where}: key {key.value!r} stands twice: remove one")
        table[key.value] = _value(value)
    return table


def _scalar(node: ScalarNode) -> str | int | float | bool | None:
    text: str = node.value
    if node.style is not None:
        return text
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
