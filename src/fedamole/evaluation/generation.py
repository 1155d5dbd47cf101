"""Answers by greedy generation."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from fedamole.evaluation.likelihood import by_client, by_length
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, pad_left
from fedamole.model.segments import Segments


def generate_answers(
    bank: Bank, clients: Sequence[Sequence[Ids]], max_new_tokens: int, batch_tokens: int
) -> list[list[str]]:
    """Continue each client's prompts greedily up to the end-of-text token or `max_new_tokens`; texts are stripped.

    Prompts of similar length, of whatever clients, are padded on the left and generated together, at most
    `batch_tokens` tokens at a time; prompts of one length only, if the base reads padding as text. An answer ends early
    where the base has no positions left for it.
    """
    from transformers import GenerationConfig

    rows = [(client, place) for client, part in enumerate(clients) for place in range(len(part))]
    prompts = [bank.prefix(clients[client][place]) for client, place in rows]
    base, answers, way = bank.base, [[""] * len(part) for part in clients], bank.continuation
    bank.window(0, bank.clients)
    stop = base.tokenizer.eos_token_id
    with torch.no_grad():
        for indices in _groups(prompts, max_new_tokens, batch_tokens, base.max_positions, way.pads):
            indices.sort()  # one client's rows after the other's
            amounts = tuple(sum(rows[i][0] == client for i in indices) for client in range(len(clients)))
            ids, mask = pad_left([prompts[i] for i in indices], base.pad_id, base.device)
            length = ids.shape[1]
            room = max(1, min(max_new_tokens, base.max_positions - length))
            greedy = GenerationConfig(
                do_sample=False,
                max_new_tokens=room,
                pad_token_id=base.pad_id,
                eos_token_id=stop,
                use_cache=way.caches,
            )
            gates = bank.gates(by_client([prompts[i] for i in indices], amounts))
            with bank.recording(segments=Segments(amounts, base.device), gates=gates):
                out = base.model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
            texts = base.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            for i, text in zip(indices, texts, strict=True):
                client, place = rows[i]
                answers[client][place] = text.strip()
    return answers


def _groups(prompts: Sequence[Ids], new: int, batch_tokens: int, positions: int, padded: bool) -> Iterator[list[int]]:
    """Group indices by length; a prompt that leaves less than the whole room goes alone, it would cut others short.

    Without `padded` the prompts of a group have one length.
    """
    lengths = [len(prompt) + new for prompt in prompts]
    for group in by_length(lengths, batch_tokens):
        whole = [i for i in group if lengths[i] <= positions]
        if padded:
            yield from ([whole] if whole else [])
        else:
            yield from (list(part) for _, part in groupby(whole, key=lambda i: lengths[i]))
        yield from ([i] for i in group if lengths[i] > positions)
