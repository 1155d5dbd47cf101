"""Generation of answers for the prompts of several clients at once, greedy or sampled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sampler:
    """Makes greedy generation draw from the softmax of logits / temperature: the largest value after Gumbel noise.

    The noise comes from a generator of the caller, on the CPU, so that the same seed gives the same text.
    """

    temperature: float
    """Above 0."""
    generator: torch.Generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits (B, V) of the next token with noise."""
        noise = -torch.empty(scores.shape).exponential_(generator=self.generator).log()
        return scores.float() / self.temperature + noise.to(scores.device)


def generate_answers(
    bank: Bank, clients: Sequence[Sequence[Ids]], max_new_tokens: int, batch_tokens: int
) -> list[list[str]]:
    """Generate an answer to each prompt of each client; return the stripped texts, in the order of the prompts.

    An answer ends as with `generate_ids`.
    """
    decode = bank.base.tokenizer.batch_decode
    ids = generate_ids(bank, clients, max_new_tokens, batch_tokens)
    return [[text.strip() for text in decode(part, skip_special_tokens=True)] if part else [] for part in ids]


def generate_ids(
    bank: Bank,
    clients: Sequence[Sequence[Ids]],
    max_new_tokens: int,
    batch_tokens: int,
    sampler: Sampler | None = None,
) -> list[list[Ids]]:
    """Generate an answer to each prompt of each client; return the token ids, in the order of the prompts.

    Generation is greedy without a sampler. An answer ends with the end-of-text token or the chat template's end
    marker, after `max_new_tokens` tokens, or at the base's last position. Prompts of similar length are padded on the
    left and processed together, in batches of at most `batch_tokens` tokens. If the base reads padding as text, only
    prompts of equal length share a batch.
    """
    keys = [(client, i) for client, part in enumerate(clients) for i in range(len(part))]
    prompts = [bank.prefix(clients[client][i]) for client, i in keys]
    base, continuation, ends = bank.base, bank.continuation, set(stop_ids(bank.base.tokenizer))
    answers: list[list[Ids]] = [[()] * len(part) for part in clients]
    bank.select_clients(0, bank.clients)
    for indices in _groups(prompts, max_new_tokens, batch_tokens, base.max_positions, continuation.pads):
        indices.sort()  # groups the prompts by client
        batch = [prompts[i] for i in indices]
        counts = tuple(sum(keys[i][0] == client for i in indices) for client in range(len(clients)))
        new_tokens = max(1, min(max_new_tokens, base.max_positions - max(map(len, batch))))
        tokens = generate_tokens(bank, batch, counts, new_tokens, sampler=sampler)
        for index, ids in zip(indices, tokens.tolist(), strict=True):
            client, i = keys[index]
            length = next((n for n, token in enumerate(ids, start=1) if token in ends), len(ids))
            answers[client][i] = tuple(ids[:length])
    return answers


def generate_tokens(
    bank: Bank,
    prompts: Sequence[Ids],
    counts: Sequence[int],
    max_new_tokens: int,
    streamer: Any = None,
    sampler: Sampler | None = None,
) -> Tensor:
    """Generate after B prompts in one batch; return the new tokens (B, n), with padding after an answer's end.

    Args:
        bank: The base and the adapters of C clients.
        prompts: The ids that the base reads, including virtual tokens; sorted by client.
        counts: Number of prompts of each of the C clients.
        max_new_tokens: Maximum length of an answer.
        streamer: A transformers `BaseStreamer` for a single prompt.
        sampler: Draws the tokens; without it generation is greedy.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    base = bank.base
    ids, mask = pad_left(prompts, base.pad_id, base.device)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=base.pad_id,
        eos_token_id=list(stop_ids(base.tokenizer)),
        use_cache=bank.continuation.caches,
        suppress_tokens=None if base.images is None else [base.images.token_id],
    )
    context = ForwardContext(
        Segments(tuple(counts), base.device), expert_weights=bank.instance_weights(by_client(prompts, counts))
    )
    with torch.no_grad(), bank.enter(context):
        out: Tensor = base.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=greedy,
            streamer=streamer,
            logits_processor=None if sampler is None else LogitsProcessorList([sampler]),
            **base.media(prompts),
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
