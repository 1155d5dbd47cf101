"""An explanation as one HTML file, without scripts or external resources, in the reader's light or dark colours."""

import html

from fedamole.personal.explain import ExampleInContext, Expert, Explanation, Module, by_weight
from fedamole.personal.explain_terminal import PALETTE, on_one_line, visible
from fedamole.terminal import printable

MAX_TOKENS_TIMES_MODULES = 40_000
"""Above this size, a page with several modules shows their statistics but not the tokens, to stay usable."""

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
    """Escape a text for HTML, and remove characters that change the reading direction."""
    return html.escape(printable(text))


def page(explanation: Explanation) -> str:
    """Return an explanation as an HTML page."""
    title = escape(f"{explanation.client}: which experts its tokens use")
    colours = "\n".join(f".e{index} {{ --c: {r} {g} {b}; }}" for index, (r, g, b) in enumerate(PALETTE))
    several = len(explanation.modules) > 1
    body = [f"<h1>{title}</h1>", f'<p class="note">{escape(_introduction(explanation))}</p>']
    if several:
        body.append(_summary(explanation))
    size = len(explanation.modules) * len(explanation.tokens)
    with_tokens = bool(explanation.tokens) and (not several or size <= MAX_TOKENS_TIMES_MODULES)
    for module in explanation.modules:
        inner = (_text(explanation, module) if with_tokens else "") + _legend(module) + _examples(module)
        name = escape(module.name)
        body.append(f"<details><summary>{name}</summary>{inner}</details>" if several else f"<h2>{name}</h2>{inner}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{colours}\n</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _introduction(explanation: Explanation) -> str:
    tokens, about = explanation.modules[0].stats.tokens, explanation.about
    text = f"{about[0].upper()}{about[1:]}, {tokens} tokens. "
    text += f"{explanation.num_modules} modules of the model have experts. "
    if explanation.tokens:
        text += (
            "Each token has the colour of the expert with the largest weight; the larger the weight, the stronger the "
            "colour. Point at a token, or move to it with Tab, to see the weights of all its experts. "
        )
    text += "The weights of a token sum to 100%"
    return text + (". The shared expert, which every token uses as well, is not shown." if explanation.shared else ".")


def _text(explanation: Explanation, module: Module) -> str:
    """The prompt and the answer, token by token."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    for index, token in enumerate(explanation.tokens):
        pairs = [(expert, weight) for expert, weight in by_weight(module, index) if weight > 0]
        lines = "\n".join(f"expert {expert.id}  {weight:.0%}" for expert, weight in pairs)
        text, (best, weight) = escape(visible(token.text)), pairs[0]
        parts[token.of_answer].append(
            f'<span class="token e{_colour(module, best)}" style="--w:{weight:.2f}" tabindex="0">{text}'
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
        f"<tr><td>{_swatch(module, expert)}</td><td>{expert.id}</td>"
        f'<td class="number">{expert.mean_weight:.1%}</td><td class="number">{expert.top_fraction:.1%}</td>'
        f"<td>{escape(expert.description)}</td></tr>"
        for expert in sorted(module.experts, key=lambda expert: -expert.mean_weight)
    ]
    head = "<th></th><th>expert</th><th>mean weight</th><th>largest weight for</th><th>held by</th>"
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _examples(module: Module) -> str:
    """For each expert, the tokens with the largest weights in context."""
    parts = []
    for expert in module.experts:
        if expert.examples:
            rows = "".join(_example(module, expert, example) for example in expert.examples)
            parts.append(f"<h3>{_swatch(module, expert)} expert {expert.id}</h3><table>{rows}</table>")
    return "".join(parts)


def _example(module: Module, expert: Expert, example: ExampleInContext) -> str:
    before, text, after = (escape(on_one_line(part)) for part in (example.before, example.text, example.after))
    token = f'<span class="token e{_colour(module, expert)}" style="--w:1">{text}</span>'
    return f'<tr><td class="number">{example.weight:.0%}</td><td class="text">{before}{token}{after}</td></tr>'


def _summary(explanation: Explanation) -> str:
    """One line per module."""
    rows = []
    for module in explanation.modules:
        best = max(module.experts, key=lambda expert: expert.mean_weight)
        rows.append(
            f'<tr><td>{escape(module.name)}</td><td class="number">{len(module.experts)}</td><td>{best.id}</td>'
            f'<td class="number">{best.mean_weight:.1%}</td>'
            f'<td class="number">{module.stats.mutual_information:.3f}</td></tr>'
        )
    head = "<th>module</th><th>experts</th><th>most used</th><th>its weight</th><th>mutual information (nats)</th>"
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
