"""Answers chosen by likelihood: the option with the lowest mean token loss after the prompt.

The options of a prompt form a tree: options that begin alike share their first tokens. A prompt is encoded once, and
the tree of its options in one more pass, in which a token sees the prompt's keys and values and its own ancestors. So
no token of prompt or options is computed twice, and the cache is never copied.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, TokenPair, batches, collate, pad_left, token_losses
from fedamole.model.segments import Segments, segment_sum

LOGITS_AT_ONCE = 2**26
"""Numbers of logits turned into log-probabilities at a time."""


def mean_losses(bank: Bank, clients: Sequence[Sequence[TokenPair]], batch_tokens: int) -> list[float]:
    """Mean loss per answer token, in nats, of each client's rows under its loaded adapter (or the bare base)."""
    bank.window(0, bank.clients)
    total = torch.zeros(len(clients), dtype=torch.float64)
    counts = torch.zeros(len(clients), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches(bank.prefixed(clients), bank.base.pad_id, bank.packs, batch_tokens):
            batch = batch.to(bank.base.device)
            with bank.reading(batch) as logits:
                total += segment_sum(token_losses(logits, batch.labels).double(), batch.answers).cpu()
            counts += torch.tensor(batch.answers.lengths)
    means: list[float] = (total / counts).tolist()
    return means


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group indices of similar length so that no padded group holds more than `batch_tokens` tokens (but >= 1 row)."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and (len(group) + 1) * lengths[index] > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def by_client(rows: Sequence[Ids], amounts: Sequence[int]) -> list[Sequence[Ids]]:
    """Cut rows that stand one client's after the other's."""
    ends = list(accumulate(amounts))
    return [rows[end - amount : end] for end, amount in zip(ends, amounts, strict=True)]


class Tree:
    """The options of one prompt as a tree whose nodes are tokens; node 0 is the prompt's end.

    After it come the inner nodes, those that something follows, each after its parent; then the leaves.
    """

    def __init__(self, options: Sequence[Ids]) -> None:
        """Merge what options have in common at their beginnings."""
        self.options = options
        beginnings = {tuple(option[:length]) for option in options for length in range(1, len(option) + 1)}
        followed = {beginning[:-1] for beginning in beginnings} - {()}
        nodes = [*sorted(followed, key=lambda b: (len(b), b)), *sorted(beginnings - followed)]
        place = {beginning: node for node, beginning in enumerate(nodes, start=1)} | {(): 0}
        self.inner = len(followed)
        self.tokens = [0, *(beginning[-1] for beginning in nodes)]
        self.parents = [0, *(place[beginning[:-1]] for beginning in nodes)]
        self.depths = torch.tensor([0, *map(len, nodes)])
        self.paths = [[place[tuple(option[: length + 1])] for length in range(len(option))] for option in options]
        self.sees = torch.eye(self.inner, dtype=torch.bool)
        """(inner, inner): whether an inner node sees another: itself and its ancestors."""
        for node in range(1, self.inner + 1):
            if self.parents[node]:
                self.sees[node - 1] |= self.sees[self.parents[node] - 1]


def option_losses(
    bank: Bank, clients: Sequence[Sequence[tuple[Ids, Sequence[Ids]]]], batch_tokens: int
) -> list[list[list[float]]]:
    """Mean token loss of every option of every (prompt, options) row of each client.

    Prompt and options are tokenised apart, as in training, and each option ends with the end-of-text token.
    """
    rows = [(client, place) for client, part in enumerate(clients) for place in range(len(part))]
    prompts = [bank.prefix(clients[client][place][0]) for client, place in rows]
    grown = {tuple(options): Tree(options) for part in clients for options in {tuple(row[1]) for row in part}}
    trees = [grown[tuple(clients[client][place][1])] for client, place in rows]
    results: list[list[list[float]]] = [[[] for _ in part] for part in clients]
    window = getattr(bank.base.model.config.get_text_config(), "sliding_window", None)
    # A tree continues prompts that are padded on the left from their cache.
    trees_fit = bank.packs and bank.continuation.pads and bank.continuation.caches
    bank.window(0, bank.clients)
    with torch.no_grad():
        sizes = [len(prompt) + tree.inner for prompt, tree in zip(prompts, trees, strict=True)]
        for group in by_length(sizes, batch_tokens):
            group.sort()  # one client's rows after the other's
            amounts = [sum(rows[i][0] == client for i in group) for client in range(len(clients))]
            chosen = [trees[i] for i in group]
            longest = max(len(prompts[i]) for i in group) + max(tree.inner for tree in chosen)
            with_tree = trees_fit and (window is None or longest <= window)
            some = [prompts[i] for i in group]
            if with_tree:
                found = _tree_losses(bank, amounts, some, chosen)
            else:
                found = _plain_losses(bank, amounts, some, chosen, batch_tokens)
            for i, losses in zip(group, found, strict=True):
                client, place = rows[i]
                results[client][place] = losses
    return results


def _tree_losses(bank: Bank, amounts: list[int], prompts: Sequence[Ids], trees: Sequence[Tree]) -> list[list[float]]:
    """One pass over the prompts, padded on the left so that all end at the same place, and one over their trees."""
    base, segments = bank.base, Segments(tuple(amounts), bank.base.device)
    ids, mask = pad_left(prompts, base.pad_id, base.device)
    gates = bank.gates(by_client(prompts, amounts))
    with bank.recording(segments=segments, gates=gates):
        out = base.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
    starts = [0, *accumulate(len(tree.tokens) for tree in trees)]
    gained = torch.zeros(starts[-1], dtype=torch.float64)  # log-probability of each node's token after its parent
    sources: list[list[int]] = [[], []]  # where the parent's logits are: of the prompts' ends, of inner nodes
    nodes: list[list[int]] = [[], []]
    before = [0, *accumulate(tree.inner for tree in trees)]
    for row, tree in enumerate(trees):
        for node, parent in enumerate(tree.parents[1:], start=1):
            sources[parent > 0].append(before[row] + parent - 1 if parent else row)
            nodes[parent > 0].append(starts[row] + node)
    tokens = torch.tensor([token for tree in trees for token in tree.tokens])
    gained[nodes[0]] = _log_probabilities(out.logits[:, -1], sources[0], tokens[nodes[0]])
    if nodes[1]:
        logits = _tree_logits(bank, segments, gates, mask, trees, out.past_key_values)
        gained[nodes[1]] = _log_probabilities(logits, sources[1], tokens[nodes[1]])
    return [
        [-float(gained[start : start + len(tree.tokens)][path].mean()) for path in tree.paths]
        for start, tree in zip(starts, trees, strict=False)
    ]


def _tree_logits(
    bank: Bank, segments: Segments, gates: Tensor | None, mask: Tensor, trees: Sequence[Tree], cache: object
) -> Tensor:
    """Logits (K, V) of all inner nodes of all trees, which go on from the cached prompts; mask (B, L) of prompts."""
    base, width = bank.base, max(tree.inner for tree in trees)
    ids, depths = torch.zeros(2, len(trees), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    inside = torch.zeros(len(trees), width, dtype=torch.bool)
    for row, tree in enumerate(trees):
        ids[row, : tree.inner] = torch.tensor(tree.tokens[1 : tree.inner + 1])
        depths[row, : tree.inner] = tree.depths[1 : tree.inner + 1] - 1
        sees[row, : tree.inner, : tree.inner] = tree.sees
        inside[row, : tree.inner] = True
    prompt = mask.bool()[:, None].expand(-1, width, -1)
    visible = torch.cat([prompt, sees.to(base.device)], dim=2)[:, None]
    dtype = base.model.dtype
    additive = torch.zeros(visible.shape, dtype=dtype, device=base.device)
    additive.masked_fill_(~visible, torch.finfo(dtype).min)
    wanted = inside.flatten().nonzero().squeeze(1).to(base.device)
    with bank.recording(segments=segments, gates=gates, logit_indices=wanted):
        logits: Tensor = base.model(
            input_ids=ids.to(base.device),
            attention_mask=additive,
            position_ids=mask.sum(1, keepdim=True) + depths.to(base.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits.squeeze(0)


def _log_probabilities(logits: Tensor, sources: list[int], tokens: Tensor) -> Tensor:
    """Log-probabilities (E) of `tokens` (E) after the rows `sources` of logits (N, V), in float64 on the CPU."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    norms = [part.to(precise).logsumexp(1) for part in logits.split(max(1, LOGITS_AT_ONCE // logits.shape[1]))]
    places = torch.tensor(sources, device=logits.device)
    chosen = logits[places, tokens.to(logits.device)].to(precise)
    return (chosen - torch.cat(norms)[places]).double().cpu()


def _plain_losses(
    bank: Bank, amounts: list[int], prompts: Sequence[Ids], trees: Sequence[Tree], batch_tokens: int
) -> list[list[float]]:
    """Whole forward passes over prompt and option, for bases where more than full attention mixes tokens."""
    found: list[list[float]] = []
    owners = [client for client, amount in enumerate(amounts) for _ in range(amount)]
    for owner, prompt, tree in zip(owners, prompts, trees, strict=True):
        found.append([])
        at_once = max(1, batch_tokens // (len(prompt) + max(map(len, tree.options))))
        for start in range(0, len(tree.options), at_once):
            options = tree.options[start : start + at_once]
            rows: list[list[TokenPair]] = [[] for _ in amounts]
            rows[owner] = [(prompt, option) for option in options]
            batch = collate(rows, bank.base.pad_id, bank.packs).to(bank.base.device)
            with bank.reading(batch) as logits:
                losses = token_losses(logits, batch.labels)
            found[-1] += [float(part.double().mean()) for part in losses.split([len(option) for option in options])]
    return found
