"""A mixture looked into: which experts the tokens of a text used, and what each expert is for; for a terminal and JSON.

Nothing but the model and the client's own data is read, and nothing leaves the machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.color import Color
from rich.console import Console, Group
from rich.progress import Progress
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, TokenPair
from fedamole.model.params import Adapter
from fedamole.personal.routing import (
    ALL,
    Peak,
    Split,
    Use,
    Weights,
    as_table,
    check_room,
    experts_of,
    has_experts,
    holders,
    module_named,
    most_telling,
    own_rows,
    peaks,
    pieces,
    roles,
    token_weights,
    uses,
)
from fedamole.personal.saved_models import Place

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
"""Red, green, blue of a module's experts, in the order of their ids; dark text can be read on each."""

AROUND = 7
"""Tokens shown on either side of one that an expert is described by."""


@dataclass(frozen=True)
class Token:
    """A token of a text."""

    text: str
    of_answer: bool


@dataclass(frozen=True)
class Sight:
    """A token that gives an expert a large weight, with a few words around it."""

    before: str
    text: str
    after: str
    weight: float


@dataclass(frozen=True)
class Expert:
    """One expert of a module, as it is told."""

    id: int
    share: float
    """Mean weight over the tokens."""
    first: float
    """Share of the tokens that give it their largest weight."""
    role: str
    """What it stands for where experts are not all of one pool, else empty."""
    clients: tuple[str, ...]
    """Who holds it, or whose own it is; empty where that is not known here."""
    sights: tuple[Sight, ...] = ()

    @property
    def who(self) -> str:
        """Role and clients in words."""
        return ": ".join(part for part in (self.role, ", ".join(self.clients)) if part) or "not known here"


@dataclass(frozen=True)
class Module:
    """One module and how tokens went through it."""

    name: str
    use: Use
    experts: tuple[Expert, ...]
    weights: tuple[tuple[float, ...], ...] = ()
    """Of each token of a text, for the experts in their order."""


@dataclass(frozen=True)
class Story:
    """What is told of one client's model."""

    client: str
    about: str
    """What was read: a text, or a split of the client's data."""
    modules: tuple[Module, ...]
    """Those that were asked for."""
    of: int
    """How many modules the model routes in."""
    shared: bool
    """Whether there is a shared expert besides, which every token uses with weight 1."""
    tokens: tuple[Token, ...] = ()


class Teller:
    """Tells of one client's mixture, loaded in a bank."""

    def __init__(self, bank: Bank, adapter: Adapter, place: Place) -> None:
        """Load the adapter; ConfigError for one without experts."""
        self.bank, self.client, self.held = bank, place.client, experts_of(adapter, place.client)
        self._roles, self._holders = roles(adapter), holders(place)
        self._shared = any("/shared/" in name for name in adapter.tensors)
        bank.load([adapter])

    def text(self, prompt: Ids, answer: Ids, layer: str | None) -> Story:
        """How the tokens of a prompt and its answer were routed; ConfigError where they are too long for the base."""
        check_room(self.bank, len(prompt) + len(answer))
        ((_, weights),) = token_weights(self.bank, [(prompt, answer)])
        found = uses([weights])
        modules = tuple(self._module(name, found[name], weights) for name in self.chosen(layer, found))
        texts = pieces(self.bank, (*prompt, *answer))
        tokens = tuple(Token(text, place >= len(prompt)) for place, text in enumerate(texts))
        return Story(self.client, "prompt and answer", modules, len(found), self._shared, tokens)

    def use(self, rows: Sequence[TokenPair], batch_tokens: int, progress: Progress) -> dict[str, Use]:
        """How the tokens of all rows were routed, by module."""
        read = token_weights(self.bank, rows, batch_tokens)
        return uses(weights for _, weights in progress.track(read, len(rows), description=f"reading {self.client}"))

    def experts(
        self, rows: Sequence[TokenPair], about: str, layer: str | None, top: int, batch_tokens: int, progress: Progress
    ) -> Story:
        """What the experts are for: the `top` tokens of the rows that weigh each of them most."""
        found = self.use(rows, batch_tokens, progress)
        names = self.chosen(layer, found)
        kept: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        read = token_weights(self.bank, rows, batch_tokens)
        for place, weights in progress.track(read, len(rows), description="finding tokens"):
            for name in names:
                kept[name][place] = weights[name]
        texts: dict[int, list[str]] = {}

        def sight(peak: Peak) -> Sight:
            if peak.row not in texts:
                texts[peak.row] = pieces(self.bank, (*rows[peak.row][0], *rows[peak.row][1]))
            text, at = texts[peak.row], peak.place
            before, after = text[max(0, at - AROUND) : at], text[at + 1 : at + 1 + AROUND]
            return Sight("".join(before), text[at], "".join(after), peak.weight)

        modules = []
        for name in names:
            sights = [tuple(map(sight, best)) for best in peaks(kept.pop(name), rows, top)]
            modules.append(self._module(name, found[name], {}, sights))
        return Story(self.client, about, tuple(modules), len(found), self._shared)

    def table(self, rows: Sequence[TokenPair], batch_tokens: int, progress: Progress) -> dict[str, dict[str, float]]:
        """Mean weight by module and expert id, as routing.json holds it."""
        return as_table(self.held, self.use(rows, batch_tokens, progress))

    def chosen(self, layer: str | None, found: Mapping[str, Use]) -> list[str]:
        """Names of the modules to tell of: the one that was named, all, or the one that tells tokens apart best."""
        if layer == ALL:
            return sorted(found)
        return [most_telling(found) if layer is None else module_named(layer, found)]

    def _module(
        self, name: str, use: Use, weights: Weights, sights: Sequence[tuple[Sight, ...]] | None = None
    ) -> Module:
        who = self._holders.get(name, {})
        experts = tuple(
            Expert(
                expert,
                use.share[place],
                use.first[place],
                self._roles.get(expert, ""),
                tuple(who.get(expert, ())),
                sights[place] if sights else (),
            )
            for place, expert in enumerate(self.held[name])
        )
        return Module(name, use, experts, tuple(map(tuple, weights[name].tolist())) if name in weights else ())


def tables(
    found: Sequence[Place], bank: Bank, adapters: Sequence[Adapter], split: Split, batch_tokens: int, progress: Progress
) -> dict[str, dict[str, dict[str, float]]]:
    """How the tokens of each client's own split are shared out, by client, module and expert id.

    Clients whose models have no experts are left out; where none has any, it is a ConfigError.
    """
    pairs = [*zip(found, adapters, strict=True)]
    mixtures = [(place, adapter) for place, adapter in pairs if has_experts(adapter)]
    return {
        place.client: Teller(bank, adapter, place).table(own_rows(place, bank, split), batch_tokens, progress)
        for place, adapter in mixtures or pairs
    }


def as_json(story: Story) -> dict[str, Any]:
    """A story for machines; weights of tokens by module and expert id, those above 0."""
    modules = {
        module.name: {
            "tokens": module.use.tokens,
            "telling": module.use.telling,
            "experts": [
                {
                    "expert": one.id,
                    "share": one.share,
                    "largest": one.first,
                    "role": one.role,
                    "clients": list(one.clients),
                    "examples": [vars(sight) for sight in one.sights],
                }
                for one in module.experts
            ],
        }
        for module in story.modules
    }
    tokens = [
        {
            "text": token.text,
            "answer": token.of_answer,
            "weights": {
                module.name: {str(one.id): weight for one, weight in ranked(module, place) if weight > 0}
                for module in story.modules
            },
        }
        for place, token in enumerate(story.tokens)
    ]
    return {"client": story.client, "about": story.about, "modules": modules, "tokens": tokens}


def ranked(module: Module, token: int) -> list[tuple[Expert, float]]:
    """The experts of a module with a token's weights for them, the largest first."""
    pairs = zip(module.experts, module.weights[token], strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


def visible(text: str) -> str:
    """A token's text with line ends that can be seen, and nothing that a terminal would obey."""
    shown = "".join(char if char.isprintable() or char == "\n" else "\u00b7" for char in text)
    return shown.replace("\n", "\u21b5\n") if shown else "\u00b7"


def shown(story: Story, console: Console) -> Group:
    """A story for a terminal; where there are no colours, each token has its expert's number behind it."""
    parts: list[Any] = []
    if len(story.modules) > 1:
        parts.append(_summary(story))
    else:
        module = story.modules[0]
        about = f"{story.client}, {module.name}: {story.about}, {module.use.tokens} tokens"
        parts.append(Text(about, style="bold"))
        if story.tokens:
            parts += [Text(), _coloured(story.tokens, module, console.color_system is not None), Text()]
        parts += [_legend(module), *_sights(module, console.color_system is not None)]
    return Group(*parts)


def tables_shown(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """What was written into routing.json, summed up: a line for each client."""
    table = Table("client", "modules", "experts held", "in each", "most used", "its weight")
    for client, modules in tables.items():
        counts = [len(shares) for shares in modules.values()]
        module = max(modules, key=lambda name: max(modules[name].values()))
        best = max(modules[module], key=lambda expert: modules[module][expert])
        each = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        table.add_row(
            client, str(len(modules)), str(sum(counts)), each, f"{best} in {module}", f"{modules[module][best]:.0%}"
        )
    return table


def _style(place: int) -> Style:
    return Style(color="black", bgcolor=Color.from_rgb(*PALETTE[place % len(PALETTE)]))


def _coloured(tokens: Sequence[Token], module: Module, colours: bool) -> Text:
    """The text, each token on the colour of the expert with its largest weight; the answer in bold."""
    text = Text()
    for place, token in enumerate(tokens):
        if token.of_answer and (place == 0 or not tokens[place - 1].of_answer):
            text.append("" if text.plain.endswith("\n") else "\n").append("answer: ", style="dim")
        best = ranked(module, place)[0][0]
        style = _style(module.experts.index(best)) + Style(bold=token.of_answer)
        shown = visible(token.text)
        end = "\n" if shown.endswith("\n") else ""
        text.append(shown if colours else f"{shown.removesuffix(end)}[{best.id}]{end}", style=style)
    return text


def _legend(module: Module) -> Table:
    roles_alone = not any(one.clients for one in module.experts) and any(one.role for one in module.experts)
    table = Table("", "expert", "weight", "largest for", "what it is" if roles_alone else "held by")
    for place in sorted(range(len(module.experts)), key=lambda place: -module.experts[place].share):
        one = module.experts[place]
        swatch = Text("  ", style=_style(place))
        table.add_row(swatch, str(one.id), f"{one.share:.0%}", f"{one.first:.0%} of tokens", one.who)
    return table


def _sights(module: Module, colours: bool) -> list[Text]:
    """What each expert is for, in the tokens that weigh it most; in brackets where there are no colours."""
    lines: list[Text] = []
    for place, one in enumerate(module.experts):
        if one.sights:
            lines.append(Text.assemble("\n", ("  ", _style(place)), (f" expert {one.id}", "bold")))
        for sight in one.sights:
            before, text, after = (
                visible(part).replace("\n", "") if part else "" for part in (sight.before, sight.text, sight.after)
            )
            token = (text if colours else f"[{text}]", _style(place))
            lines.append(Text.assemble(f"  {sight.weight:4.0%}  ", (before, "dim"), token, (after, "dim")))
    return lines


def _summary(story: Story) -> Table:
    """A line for each module."""
    table = Table(
        Column("module", overflow="fold"),
        "experts",
        "most used",
        "its weight",
        "told apart",
        title=f"{story.client}: {story.about}, {story.modules[0].use.tokens} tokens",
        title_style="bold",
        title_justify="left",
        caption="told apart: nats that a token tells of its expert, 0 where all are routed alike",
        caption_justify="left",
    )
    for module in story.modules:
        best = max(module.experts, key=lambda one: one.share)
        table.add_row(
            module.name,
            str(len(module.experts)),
            str(best.id),
            f"{best.share:.0%}",
            f"{module.use.telling:.3f}",
        )
    return table
