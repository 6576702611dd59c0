"""One colour for each model of a plan, and shades of it for its groups.  Pure."""

import colorsys
from typing import NamedTuple

from .plan import Plan

_FIRST_HUE = 0.58
_GOLDEN_RATIO = 0.618034  # steps of it around the circle stay as far from each other as can be
_SHADES = 4


class Colour(NamedTuple):
    """As `#rrggbb`."""

    fill: str
    line: str


def colours(plan: Plan) -> dict[str, Colour]:
    """By group name."""
    models = list(dict.fromkeys(group.model for group in plan.groups))
    hues = {model: (_FIRST_HUE + number * _GOLDEN_RATIO) % 1.0 for number, model in enumerate(models)}
    return {group.name: _colour(hues[group.model], group.replica % _SHADES) for group in plan.groups}


def _colour(hue: float, shade: int) -> Colour:
    lightness = 0.86 - 0.05 * shade
    return Colour(_hex(hue, lightness, 0.62), _hex(hue, 0.36, 0.55))


def _hex(hue: float, lightness: float, saturation: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, saturation))
