"""Colours of all figures of the report, on the page and in files; distinguishable with colour blindness."""

LIGHT = ("#0072b2", "#c4500b", "#0a8f6b", "#9c4fa0", "#8a6d00", "#2a8fc0", "#b3003c", "#4d4d4d")
"""Colours of the models on a white background, for the last model first; repeated after eight, with other marks."""
DARK = ("#5ab0f0", "#ff9a57", "#3fd0a4", "#dda0e0", "#e3c44d", "#9adcff", "#ff8fab", "#cfcfcf")
"""The same colours for a dark background."""
PLAIN_LIGHT, PLAIN_DARK = "#6b7280", "#9aa3af"
"""Colour of the untuned base and of the constant answer."""
HEAT_LIGHT, HEAT_DARK = ("#dcebf7", "#08467f"), ("#1d3850", "#a5d8ff")
"""Ends of the colour scale of a heat map, from weak to strong."""

EVEN_LIGHT, EVEN_DARK, BELOW_LIGHT, BELOW_DARK = "#c6ced8", "#465160", "#b34a08", "#ff9a57"
"""Colours of a heat map around a neutral value: the neutral colour, and the end below it; the end above is strong."""


def as_css() -> str:
    """Return the colours as CSS custom properties for both colour schemes; print uses the light one."""

    def properties(models: tuple[str, ...], plain: str, heat: tuple[str, str], around: tuple[str, str]) -> str:
        named = {**{f"m{index}": colour for index, colour in enumerate(models)}, "plain": plain}
        named |= {"weak": heat[0], "strong": heat[1], "even": around[0], "below": around[1]}
        return ":root{" + ";".join(f"--{name}:{colour}" for name, colour in named.items()) + "}"

    light = properties(LIGHT, PLAIN_LIGHT, HEAT_LIGHT, (EVEN_LIGHT, BELOW_LIGHT))
    dark = properties(DARK, PLAIN_DARK, HEAT_DARK, (EVEN_DARK, BELOW_DARK))
    return f"{light}\n@media screen and (prefers-color-scheme:dark){{{dark}}}\n"
