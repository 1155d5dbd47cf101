"""The same as one HTML file: no script, nothing fetched, light or dark as the reader's machine is set."""

import html

from fedamole.personal.explain import PALETTE, Expert, Module, Sight, Story, ranked, visible
from fedamole.terminal import printable

MOST = 40_000
"""Tokens times modules up to which several modules show their tokens; beyond it a browser only gets the numbers."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6470; --line: #d5dae0; --page: #ffffff; --tip: #f3f5f7;
  --least: .18; --most: .62; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --dim: #9aa4b0; --line: #3a424c; --page: #14171b;
  --tip: #242a31; --least: .10; --most: .45; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; overflow-wrap: anywhere; } summary { cursor: pointer; }
p.note, td.dim { color: var(--dim); }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem .25rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line); } td.number { text-align: right;
  font-variant-numeric: tabular-nums; }
.text { font: 15px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer { font-weight: 700; border-left: 3px solid var(--dim); padding-left: .6rem; margin-top: .5rem; }
.token, .swatch { position: relative; border-radius: 3px; background:
  rgb(var(--c) / calc(var(--least) + var(--most) * var(--w))); }
.token { padding: .15em 0; cursor: default; } .token:hover, .token:focus { outline: 2px solid var(--ink); }
.swatch { display: inline-block; width: 1.4em; height: 1.1em; vertical-align: text-bottom; }
.tip { display: none; position: absolute; left: 0; top: 1.9em; z-index: 1; padding: .4rem .7rem; white-space: pre;
  background: var(--tip); border: 1px solid var(--line); border-radius: 6px; font: 13px/1.5 system-ui, sans-serif;
  user-select: none; } .token:hover .tip, .token:focus .tip { display: block; }
"""


def escape(text: str) -> str:
    """Return a text as HTML that shows it, without marks that turn the direction of reading around."""
    return html.escape(printable(text))


def page(story: Story) -> str:
    """The whole page of a story."""
    title = escape(f"{story.client}: which experts its tokens use")
    colours = "\n".join(f".e{at} {{ --c: {r} {g} {b}; }}" for at, (r, g, b) in enumerate(PALETTE))
    several = len(story.modules) > 1
    body = [f"<h1>{title}</h1>", f'<p class="note">{escape(_about(story))}</p>']
    if several:
        body.append(_summary(story))
    whole = not several or len(story.modules) * len(story.tokens) <= MOST
    for module in story.modules:
        inner = (_text(story, module) if story.tokens and whole else "") + _legend(module) + _sights(module)
        name = escape(module.name)
        body.append(f"<details><summary>{name}</summary>{inner}</details>" if several else f"<h2>{name}</h2>{inner}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{colours}\n</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _about(story: Story) -> str:
    tokens = story.modules[0].use.tokens
    told = f"{story.about[0].upper()}{story.about[1:]}, {tokens} tokens. The model routes in {story.of} modules. "
    if story.tokens:
        told += (
            "A token has the colour of the expert with the largest weight, the stronger the larger it is; point at a "
            "token, or go to it by Tab, to see the weights of all its experts. "
        )
    told += "The weights of a token sum to 100%"
    return told + ("; the shared expert, which all tokens use besides, is not shown." if story.shared else ".")


def _text(story: Story, module: Module) -> str:
    """The prompt and the answer, token by token."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    for place, token in enumerate(story.tokens):
        pairs = [(one, weight) for one, weight in ranked(module, place) if weight > 0]
        lines = "\n".join(f"expert {one.id}  {weight:.0%}" for one, weight in pairs)
        shown, (best, weight) = escape(visible(token.text)), pairs[0]
        parts[token.of_answer].append(
            f'<span class="token e{_colour(module, best)}" style="--w:{weight:.2f}" tabindex="0">{shown}'
            f'<span class="tip">{lines}</span></span>'
        )
    answer = "".join(parts[True])
    return f'<div class="text">{"".join(parts[False])}</div>' + (
        f'<div class="text answer">{answer}</div>' if answer else ""
    )


def _colour(module: Module, expert: Expert) -> int:
    return module.experts.index(expert) % len(PALETTE)


def _swatch(module: Module, expert: Expert) -> str:
    return f'<span class="swatch e{_colour(module, expert)}" style="--w:1"></span>'


def _legend(module: Module) -> str:
    rows = [
        f"<tr><td>{_swatch(module, one)}</td><td>{one.id}</td>"
        f'<td class="number">{one.share:.1%}</td><td class="number">{one.first:.1%}</td>'
        f"<td>{escape(one.who)}</td></tr>"
        for one in sorted(module.experts, key=lambda one: -one.share)
    ]
    head = "<th></th><th>expert</th><th>weight</th><th>tokens it is largest for</th><th>who holds it</th>"
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _sights(module: Module) -> str:
    """What each expert is for, in the tokens that weigh it most."""
    parts = []
    for one in module.experts:
        if one.sights:
            rows = "".join(_sight(module, one, sight) for sight in one.sights)
            parts.append(f"<h3>{_swatch(module, one)} expert {one.id}</h3><table>{rows}</table>")
    return "".join(parts)


def _sight(module: Module, expert: Expert, sight: Sight) -> str:
    before, text, after = (
        escape(visible(part).replace("\n", "")) if part else "" for part in (sight.before, sight.text, sight.after)
    )
    token = f'<span class="token e{_colour(module, expert)}" style="--w:1">{text}</span>'
    return f'<tr><td class="number">{sight.weight:.0%}</td><td class="text">{before}{token}{after}</td></tr>'


def _summary(story: Story) -> str:
    """A line for each module."""
    rows = []
    for module in story.modules:
        best = max(module.experts, key=lambda one: one.share)
        rows.append(
            f'<tr><td>{escape(module.name)}</td><td class="number">{len(module.experts)}</td><td>{best.id}</td>'
            f'<td class="number">{best.share:.1%}</td><td class="number">{module.use.telling:.3f}</td></tr>'
        )
    head = "<th>module</th><th>experts</th><th>most used</th><th>its weight</th><th>told apart (nats)</th>"
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
