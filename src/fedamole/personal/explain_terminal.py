"""An explanation as coloured text and tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.color import Color
from rich.console import Console, Group
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from fedamole.personal.explain import Explanation, Module, Token, by_weight

PALETTE = (
    (124, 197, 240),
    (240, 178, 62),
    (76, 195, 160),
    (221, 159, 193),
    (242, 233, 107),
    (143, 165, 232),
    (238, 138, 90),
    (189, 189, 189),
    (181, 215, 122),
    (201, 160, 236),
)
"""Background colours (red, green, blue) of a module's experts in the order of their ids; dark text is readable on
each."""


def visible(text: str) -> str:
    """Return a token's text with visible line ends, and without characters that control a terminal."""
    printable = "".join(char if char.isprintable() or char == "\n" else "\u00b7" for char in text)
    return printable.replace("\n", "\u21b5\n") if printable else "\u00b7"


def on_one_line(text: str) -> str:
    """Return a part of a text as `visible` does, without line breaks; an empty text stays empty."""
    return visible(text).replace("\n", "") if text else ""


def explanation_view(explanation: Explanation, console: Console) -> Group:
    """Return an explanation to print. Without colours, the number of its expert follows each token."""
    colours = console.color_system is not None
    if len(explanation.modules) > 1:
        return Group(_summary(explanation))
    module = explanation.modules[0]
    title = f"{explanation.client}, {module.name}: {explanation.about}, {module.stats.tokens} tokens"
    parts: list[Any] = [Text(title, style="bold")]
    if explanation.tokens:
        parts += [Text(), _coloured(explanation.tokens, module, colours), Text()]
    return Group(*parts, _legend(module), *_examples(module, colours))


def clients_table(mean_weights: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Return a summary of routing.json: one line per client."""
    table = Table("client", "modules", "experts held", "per module", "most used", "its weight")
    for client, modules in mean_weights.items():
        counts = [len(weights) for weights in modules.values()]
        module = max(modules, key=lambda name: max(modules[name].values()))
        best = max(modules[module], key=lambda expert: modules[module][expert])
        per_module = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        weight = f"{modules[module][best]:.0%}"
        table.add_row(client, str(len(modules)), str(sum(counts)), per_module, f"{best} in {module}", weight)
    return table


def _style(index: int) -> Style:
    return Style(color="black", bgcolor=Color.from_rgb(*PALETTE[index % len(PALETTE)]))


def _coloured(tokens: Sequence[Token], module: Module, colours: bool) -> Text:
    """The text, with each token on the colour of the expert with its largest weight, and the answer in bold."""
    text = Text()
    for index, token in enumerate(tokens):
        if token.of_answer and (index == 0 or not tokens[index - 1].of_answer):
            text.append("" if text.plain.endswith("\n") else "\n").append("answer: ", style="dim")
        best = by_weight(module, index)[0][0]
        style = _style(module.experts.index(best)) + Style(bold=token.of_answer)
        token_text = visible(token.text)
        end = "\n" if token_text.endswith("\n") else ""
        text.append(token_text if colours else f"{token_text.removesuffix(end)}[{best.id}]{end}", style=style)
    return text


def _legend(module: Module) -> Table:
    roles_only = not any(expert.clients for expert in module.experts) and any(expert.role for expert in module.experts)
    table = Table("", "expert", "weight", "largest for", "role" if roles_only else "held by")
    for index in sorted(range(len(module.experts)), key=lambda index: -module.experts[index].mean_weight):
        expert = module.experts[index]
        largest_for = f"{expert.top_fraction:.0%} of tokens"
        swatch = Text("  ", style=_style(index))
        table.add_row(swatch, str(expert.id), f"{expert.mean_weight:.0%}", largest_for, expert.description)
    return table


def _examples(module: Module, colours: bool) -> list[Text]:
    """Example tokens of each expert in context; in brackets if there are no colours."""
    lines: list[Text] = []
    for index, expert in enumerate(module.experts):
        if expert.examples:
            lines.append(Text.assemble("\n", ("  ", _style(index)), (f" expert {expert.id}", "bold")))
        for example in expert.examples:
            before, text, after = map(on_one_line, (example.before, example.text, example.after))
            token = (text if colours else f"[{text}]", _style(index))
            lines.append(Text.assemble(f"  {example.weight:4.0%}  ", (before, "dim"), token, (after, "dim")))
    return lines


def _summary(explanation: Explanation) -> Table:
    """One line per module."""
    table = Table(
        Column("module", overflow="fold"),
        "experts",
        "most used",
        "its weight",
        "mutual information",
        title=f"{explanation.client}: {explanation.about}, {explanation.modules[0].stats.tokens} tokens",
        title_style="bold",
        title_justify="left",
        caption="mutual information between token and expert, in nats; 0 if all tokens are routed alike",
        caption_justify="left",
    )
    for module in explanation.modules:
        best = max(module.experts, key=lambda expert: expert.mean_weight)
        table.add_row(
            module.name,
            str(len(module.experts)),
            str(best.id),
            f"{best.mean_weight:.0%}",
            f"{module.stats.mutual_information:.3f}",
        )
    return table
