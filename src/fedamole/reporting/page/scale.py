"""Colour scale of the assignment's heat map: neutral where an expert and a client have no preference for each other."""

import math
from collections.abc import Mapping
from typing import Any

from fedamole.reporting.method_descriptions import method_descriptions

MOST_TIMES = 4
"""A value this many times as high as without preference, or as low, has the full colour."""


def scale_of(config: Mapping[str, Any], clients: int) -> dict[str, Any]:
    """Return what the values in assignment.jsonl mean for the method of a run, and the scale of their colours.

    The scale does not depend on the values, so colours can be compared between modules, rounds and runs, and negligible
    differences stay pale. Probabilities and shares have a logarithmic scale to both sides of the value without
    preference; cosine similarities have a linear scale from 0 to 1.

    Args:
        config: The run's config as tables.
        clients: Number of clients.

    Returns:
        `name` of the values; `even`, the value of the neutral colour, with its `meaning`; `times`, the ratio to `even`
        that has the full colour (0: linear up to `high`); `low` and `high`, the values with the full colours; and
        `random`, whether the values of round 0 are random.
    """
    description = method_descriptions().get(config["method"]["name"], {})
    kind = description.get("logged_relevance", "probability")
    if kind == "similarity":
        scale = {
            "name": "cosine similarity",
            "even": 0.0,
            "meaning": "unrelated",
            "times": 0.0,
            "low": 0.0,
            "high": 1.0,
        }
        return {**scale, "random": False}
    name, meaning, number = "relevance P", "no preference", clients
    if kind == "token share":
        name, meaning, number = (
            "share of the client's tokens",
            "all experts equal",
            config["method"].get("experts") or 1,
        )
    number = max(2, number)
    times = float(min(MOST_TIMES, number))
    ends = {"low": 1 / number / times, "high": times / number}
    random = kind == "probability"
    return {"name": name, "even": 1 / number, "meaning": meaning, "times": times, **ends, "random": random}


def tone(value: float, scale: Mapping[str, Any]) -> float:
    """Return the colour of a value: 0 for the neutral colour, -1 and 1 for the full colours below and above it."""
    even, high, times = float(scale["even"]), float(scale["high"]), float(scale["times"])
    if not times:
        return max(-1.0, min(1.0, (value - even) / (high - even)))
    return max(-1.0, min(1.0, math.log(value / even) / math.log(times))) if value > 0 else -1.0
