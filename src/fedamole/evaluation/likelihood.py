"""Losses of answers, and classification by likelihood: the option with the lowest mean token loss after the prompt.

The options of a prompt form a tree, in which options with a common beginning share their first tokens. The prompt is
encoded once; a second pass encodes the whole tree, where each token attends to the prompt's cached keys and values and
to its ancestors. No token of prompt or options is computed twice, and the cache is never copied.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, TokenPair, batches, collate, pad_left, token_losses
from fedamole.model.forward_context import ForwardContext
from fedamole.model.segments import Segments, segment_sum

LOGITS_AT_ONCE = 2**26
"""Number of logits that are normalised to log-probabilities at a time."""


def mean_losses(bank: Bank, clients: Sequence[Sequence[TokenPair]], batch_tokens: int) -> list[float]:
    """Return each client's mean loss per answer token, in nats, under its loaded adapter or the untuned base."""
    bank.select_clients(0, bank.clients)
    total = torch.zeros(len(clients), dtype=torch.float64)
    counts = torch.zeros(len(clients), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches(bank.prefixed(clients), bank.base.pad_id, bank.packs, batch_tokens, bank.base.device):
            with bank.forward(batch) as logits:
                total += segment_sum(token_losses(logits, batch.labels).double(), batch.answers).cpu()
            counts += torch.tensor(batch.answers.lengths)
    means: list[float] = (total / counts).tolist()
    return means


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group indices by similar length, so that each group, padded, has at most `batch_tokens` tokens.

    A sequence that is longer than that forms a group of its own.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and (len(group) + 1) * lengths[index] > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def by_client(prompts: Sequence[Ids], counts: Sequence[int]) -> list[Sequence[Ids]]:
    """Split prompts that are sorted by client into one sequence per client, by the number of each client's prompts."""
    ends = list(accumulate(counts))
    return [prompts[end - count : end] for end, count in zip(ends, counts, strict=True)]


class Tree:
    """The options of one prompt as a prefix tree whose nodes are tokens.

    Node 0 is the end of the prompt. It is followed by the inner nodes, which have children, each after its parent, and
    then by the leaves.
    """

    def __init__(self, options: Sequence[Ids]) -> None:
        """Merge the common beginnings of the options."""
        self.options = options
        prefixes = {tuple(option[:length]) for option in options for length in range(1, len(option) + 1)}
        inner = {prefix[:-1] for prefix in prefixes} - {()}
        nodes = [*sorted(inner, key=lambda prefix: (len(prefix), prefix)), *sorted(prefixes - inner)]
        index = {prefix: node for node, prefix in enumerate(nodes, start=1)} | {(): 0}
        self.num_inner = len(inner)
        self.tokens = [0, *(prefix[-1] for prefix in nodes)]
        self.parents = [0, *(index[prefix[:-1]] for prefix in nodes)]
        self.depths = torch.tensor([0, *map(len, nodes)])
        self.paths = [[index[tuple(option[: length + 1])] for length in range(len(option))] for option in options]
        """Nodes of each option's tokens."""
        self.attends = torch.eye(self.num_inner, dtype=torch.bool)
        """(inner, inner): whether an inner node attends to another: to itself and its ancestors."""
        for node in range(1, self.num_inner + 1):
            if self.parents[node]:
                self.attends[node - 1] |= self.attends[self.parents[node] - 1]


def option_losses(
    bank: Bank, clients: Sequence[Sequence[tuple[Ids, Sequence[Ids]]]], batch_tokens: int
) -> list[list[list[float]]]:
    """Return the mean token loss of every option of every (prompt, options) example of each client.

    Prompt and options are tokenised separately, as in training, and each option ends with the end-of-text token.
    """
    keys = [(client, i) for client, part in enumerate(clients) for i in range(len(part))]
    prompts = [bank.prefix(clients[client][i][0]) for client, i in keys]
    tree_of = {tuple(options): Tree(options) for part in clients for options in {tuple(example[1]) for example in part}}
    trees = [tree_of[tuple(clients[client][i][1])] for client, i in keys]
    results: list[list[list[float]]] = [[[] for _ in part] for part in clients]
    window = getattr(bank.base.model.config.get_text_config(), "sliding_window", None)
    # The second pass continues prompts that are padded on the left from their cache.
    trees_supported = bank.packs and bank.continuation.pads and bank.continuation.caches
    bank.select_clients(0, bank.clients)
    with torch.no_grad():
        sizes = [len(prompt) + tree.num_inner for prompt, tree in zip(prompts, trees, strict=True)]
        for group in by_length(sizes, batch_tokens):
            group.sort()  # groups the examples by client
            counts = [sum(keys[i][0] == client for i in group) for client in range(len(clients))]
            group_prompts, group_trees = [prompts[i] for i in group], [trees[i] for i in group]
            longest = max(map(len, group_prompts)) + max(tree.num_inner for tree in group_trees)
            if trees_supported and (window is None or longest <= window):
                losses = _tree_losses(bank, counts, group_prompts, group_trees)
            else:
                losses = _whole_losses(bank, counts, group_prompts, group_trees, batch_tokens)
            for index, values in zip(group, losses, strict=True):
                client, i = keys[index]
                results[client][i] = values
    return results


def _tree_losses(bank: Bank, counts: list[int], prompts: Sequence[Ids], trees: Sequence[Tree]) -> list[list[float]]:
    """Losses of the options from one pass over the left-padded prompts and one over the trees."""
    base = bank.base
    ids, mask = pad_left(prompts, base.pad_id, base.device)
    context = ForwardContext(
        Segments(tuple(counts), base.device), expert_weights=bank.instance_weights(by_client(prompts, counts))
    )
    with bank.enter(context):
        out = base.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **base.media(prompts),
        )
    starts = [0, *accumulate(len(tree.tokens) for tree in trees)]
    log_probabilities = torch.zeros(starts[-1], dtype=torch.float64)  # of each node's token, given its parent
    # Indices of the parents' logits and of the nodes: first for children of the prompt's end, then of inner nodes.
    sources: list[list[int]] = [[], []]
    nodes: list[list[int]] = [[], []]
    inner_starts = [0, *accumulate(tree.num_inner for tree in trees)]
    for i, tree in enumerate(trees):
        for node, parent in enumerate(tree.parents[1:], start=1):
            sources[parent > 0].append(inner_starts[i] + parent - 1 if parent else i)
            nodes[parent > 0].append(starts[i] + node)
    tokens = torch.tensor([token for tree in trees for token in tree.tokens])
    log_probabilities[nodes[0]] = _log_probabilities(out.logits[:, -1], sources[0], tokens[nodes[0]])
    if nodes[1]:
        logits = _tree_logits(bank, context, mask, trees, out.past_key_values)
        log_probabilities[nodes[1]] = _log_probabilities(logits, sources[1], tokens[nodes[1]])
    return [
        [-float(log_probabilities[start : start + len(tree.tokens)][path].mean()) for path in tree.paths]
        for start, tree in zip(starts, trees, strict=False)
    ]


def _tree_logits(bank: Bank, context: ForwardContext, mask: Tensor, trees: Sequence[Tree], cache: object) -> Tensor:
    """Logits (K, V) of all inner nodes of B trees, which continue the cached prompts with padding mask (B, L)."""
    base, width = bank.base, max(tree.num_inner for tree in trees)
    ids, depths = torch.zeros(2, len(trees), width, dtype=torch.long)
    attends = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    is_node = torch.zeros(len(trees), width, dtype=torch.bool)
    for i, tree in enumerate(trees):
        n = tree.num_inner
        ids[i, :n] = torch.tensor(tree.tokens[1 : n + 1])
        depths[i, :n] = tree.depths[1 : n + 1] - 1
        attends[i, :n, :n] = tree.attends
        is_node[i, :n] = True
    prompt = mask.bool()[:, None].expand(-1, width, -1)
    visible = torch.cat([prompt, attends.to(base.device)], dim=2)[:, None]
    dtype = base.model.dtype
    additive = torch.zeros(visible.shape, dtype=dtype, device=base.device)
    additive.masked_fill_(~visible, torch.finfo(dtype).min)
    logit_indices = is_node.flatten().nonzero().squeeze(1).to(base.device)
    with bank.enter(replace(context, logit_indices=logit_indices)):
        logits: Tensor = base.model(
            input_ids=ids.to(base.device),
            attention_mask=additive,
            position_ids=mask.sum(1, keepdim=True) + depths.to(base.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits.squeeze(0)


def _log_probabilities(logits: Tensor, sources: list[int], tokens: Tensor) -> Tensor:
    """Log-probabilities (E) of `tokens` (E) under the rows `sources` of logits (N, V), as float64 on the CPU."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    norms = [part.to(precise).logsumexp(1) for part in logits.split(max(1, LOGITS_AT_ONCE // logits.shape[1]))]
    index = torch.tensor(sources, device=logits.device)
    token_logits = logits[index, tokens.to(logits.device)].to(precise)
    return (token_logits - torch.cat(norms)[index]).double().cpu()


def _whole_losses(
    bank: Bank, counts: list[int], prompts: Sequence[Ids], trees: Sequence[Tree], batch_tokens: int
) -> list[list[float]]:
    """Losses from forward passes over prompt and option, for bases in which more than full attention mixes tokens."""
    results: list[list[float]] = []
    owners = [client for client, count in enumerate(counts) for _ in range(count)]
    for owner, prompt, tree in zip(owners, prompts, trees, strict=True):
        results.append([])
        at_once = max(1, batch_tokens // (len(prompt) + max(map(len, tree.options))))
        for start in range(0, len(tree.options), at_once):
            options = tree.options[start : start + at_once]
            pairs: list[list[TokenPair]] = [[] for _ in counts]
            pairs[owner] = [(prompt, option) for option in options]
            batch = collate(pairs, bank.base.pad_id, bank.packs, device=bank.base.device)
            with bank.forward(batch) as logits:
                losses = token_losses(logits, batch.labels)
            results[-1] += [float(part.double().mean()) for part in losses.split([len(option) for option in options])]
    return results
