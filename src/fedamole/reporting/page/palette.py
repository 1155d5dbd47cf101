"""The colours of all figures, on the page and in the files for a paper; told apart by the colour-blind, too."""

LIGHT = ("#0072b2", "#c4500b", "#0a8f6b", "#9c4fa0", "#8a6d00", "#2a8fc0", "#b3003c", "#4d4d4d")
"""Models on white, the last one first; after eight they repeat, with another mark."""
DARK = ("#5ab0f0", "#ff9a57", "#3fd0a4", "#dda0e0", "#e3c44d", "#9adcff", "#ff8fab", "#cfcfcf")
"""The same on a dark page."""
PLAIN_LIGHT, PLAIN_DARK = "#6b7280", "#9aa3af"
"""The untuned base and the constant answer."""
HEAT_LIGHT, HEAT_DARK = ("#dcebf7", "#08467f"), ("#1d3850", "#a5d8ff")
"""Ends of the scale of a heat map: from weak to strong."""


def as_css() -> str:
    """The colours as custom properties, for both schemes; on paper it is always the light one."""

    def properties(models: tuple[str, ...], plain: str, heat: tuple[str, str]) -> str:
        named = {**{f"m{place}": colour for place, colour in enumerate(models)}, "plain": plain}
        named |= {"weak": heat[0], "strong": heat[1]}
        return ":root{" + ";".join(f"--{name}:{colour}" for name, colour in named.items()) + "}"

    light, dark = properties(LIGHT, PLAIN_LIGHT, HEAT_LIGHT), properties(DARK, PLAIN_DARK, HEAT_DARK)
    return f"{light}\n@media screen and (prefers-color-scheme:dark){{{dark}}}\n"
