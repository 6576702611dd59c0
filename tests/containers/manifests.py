"""Checks Kubernetes manifests against kubernetes_fields.json: unknown fields, wrong types, what is missing."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

FIELDS = Path(__file__).with_name("kubernetes_fields.json")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
SCALARS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "boolean": (bool,),
    "int-or-string": (int, str),
    "quantity": (int, str),
}


@cache
def _known() -> dict[str, Any]:
    known: dict[str, Any] = json.loads(FIELDS.read_text(encoding="utf-8"))
    return known


def problems(document: dict[str, Any]) -> list[str]:
    """Each names the place in the document and what is wrong there."""
    kind = f"{document.get('apiVersion')} {document.get('kind')}"
    name = _known()["kinds"].get(kind)
    if name is None:
        return [f"{kind} is no known kind"]
    return list(_of_type(document, name, str(document.get("kind"))))


def _of_type(value: Any, notation: str, place: str) -> Iterator[str]:
    if notation == "any":
        return
    if notation.startswith("["):
        yield from _items(value, notation[1:-1], place)
    elif notation.startswith("{"):
        yield from _entries(value, notation[1:-1], place)
    elif notation in _known()["types"]:
        yield from _fields(value, _known()["types"][notation], place)
    elif notation in SCALARS:
        wrong = not isinstance(value, SCALARS[notation]) or (isinstance(value, bool) and notation != "boolean")
        if wrong or (notation == "quantity" and not QUANTITY.fullmatch(str(value))):
            yield f"{place}: {value!r} is no {notation}"
    elif value not in notation.split("|"):
        yield f"{place}: {value!r} is not one of {notation}"


def _items(value: Any, notation: str, place: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{place}: no list"
        return
    for i, item in enumerate(value):
        yield from _of_type(item, notation, f"{place}[{i}]")


def _entries(value: Any, notation: str, place: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{place}: no map"
        return
    for key, item in value.items():
        yield from _of_type(item, notation, f"{place}.{key}")


def _fields(value: Any, fields: dict[str, str], place: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{place}: no map"
        return
    yield from (f"{place}: there is no field {name!r}" for name in value.keys() - fields.keys())
    for name, notation in fields.items():
        if name in value:
            yield from _of_type(value[name], notation.removesuffix("!"), f"{place}.{name}")
        elif notation.endswith("!"):
            yield f"{place}: {name} is missing"
