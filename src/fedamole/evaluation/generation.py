"""Greedy generation of answers for the prompts of several clients at once."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fedamole.data.chat import stop_ids
from fedamole.evaluation.likelihood import by_client, by_length
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, pad_left
from fedamole.model.forward_context import ForwardContext
from fedamole.model.segments import Segments


def generate_answers(
    bank: Bank, clients: Sequence[Sequence[Ids]], max_new_tokens: int, batch_tokens: int
) -> list[list[str]]:
    """Generate an answer to each prompt of each client; return the stripped texts, in the order of the prompts.

    An answer ends at the end-of-text token or the chat template's end marker, after `max_new_tokens` tokens, or at the
    base's last position. Prompts of similar length are padded on the left and processed together, in batches of at most
    `batch_tokens` tokens. If the base reads padding as text, only prompts of equal length share a batch.
    """
    keys = [(client, i) for client, part in enumerate(clients) for i in range(len(part))]
    prompts = [bank.prefix(clients[client][i]) for client, i in keys]
    base, answers, continuation = bank.base, [[""] * len(part) for part in clients], bank.continuation
    bank.select_clients(0, bank.clients)
    for indices in _groups(prompts, max_new_tokens, batch_tokens, base.max_positions, continuation.pads):
        indices.sort()  # groups the prompts by client
        batch = [prompts[i] for i in indices]
        counts = tuple(sum(keys[i][0] == client for i in indices) for client in range(len(clients)))
        new_tokens = max(1, min(max_new_tokens, base.max_positions - max(map(len, batch))))
        generated = generate_tokens(bank, batch, counts, new_tokens)
        texts = base.tokenizer.batch_decode(generated, skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            client, i = keys[index]
            answers[client][i] = text.strip()
    return answers


def generate_tokens(
    bank: Bank, prompts: Sequence[Ids], counts: Sequence[int], max_new_tokens: int, streamer: Any = None
) -> Tensor:
    """Generate greedily after B prompts in one batch; return the new tokens (B, n), with padding after an answer's end.

    Args:
        bank: The base and the adapters of C clients.
        prompts: The ids that the base reads, including virtual tokens; sorted by client.
        counts: Number of prompts of each of the C clients.
        max_new_tokens: Maximum length of an answer.
        streamer: A transformers `BaseStreamer` for a single prompt.
    """
    from transformers import GenerationConfig

    base = bank.base
    ids, mask = pad_left(prompts, base.pad_id, base.device)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=base.pad_id,
        eos_token_id=list(stop_ids(base.tokenizer)),
        use_cache=bank.continuation.caches,
    )
    context = ForwardContext(
        Segments(tuple(counts), base.device), expert_weights=bank.instance_weights(by_client(prompts, counts))
    )
    with torch.no_grad(), bank.enter(context):
        out: Tensor = base.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=greedy, streamer=streamer
        )
    return out[:, ids.shape[1] :]


def _groups(
    prompts: Sequence[Ids], new_tokens: int, batch_tokens: int, max_positions: int, pads: bool
) -> Iterator[list[int]]:
    """Group prompt indices into batches by length.

    A prompt with fewer than `new_tokens` positions left forms a batch of its own, as it would shorten the answers of
    the others. Without `pads` all prompts of a batch have the same length.
    """
    lengths = [len(prompt) + new_tokens for prompt in prompts]
    for group in by_length(lengths, batch_tokens):
        fitting = [i for i in group if lengths[i] <= max_positions]
        if pads:
            yield from ([fitting] if fitting else [])
        else:
            yield from (list(part) for _, part in groupby(fitting, key=lambda i: lengths[i]))
        yield from ([i] for i in group if lengths[i] > max_positions)
