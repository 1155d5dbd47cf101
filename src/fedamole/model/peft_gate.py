"""Experts weighted by instance, behind PEFT's face: the weights of a prompt are found before the model reads it.

A prompt is what a model is called with while its cache is empty. The weights stay in force for the calls that go on
from that cache, so that `generate` weighs a whole answer by its prompt, as the bank does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InstanceGate:
    """Finds the weights of two experts for each row of a batch, and hands them to the layers."""

    def __init__(self, references: Sequence[Sequence[float]], most: float) -> None:
        """Compare with `references` (S, d); `most` is the largest weight of the first expert."""
        self.references, self.most = torch.tensor(references), most
        self.weights: Tensor | None = None
        """(rows, 2), of the prompts read last."""
        self._looking = False

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the weights, if this call begins an answer."""
        past = kwargs.get("past_key_values")
        if self._looking or (past is not None and past.get_seq_length() > 0):
            return
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        self._looking, self.weights = True, torch.tensor([[1.0, 0.0]], device=ids.device)
        try:
            with torch.no_grad():
                hidden = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-1]
        finally:
            self._looking = False
        places = torch.arange(ids.shape[1], device=ids.device)
        ends = (places * (1 if mask is None else mask)).expand(ids.shape).argmax(1)
        last = hidden[torch.arange(len(ids), device=ids.device), ends].float()
        near = F.cosine_similarity(last[:, None], self.references.to(ids.device), dim=2).mean(1)
        first = (near * self.most).clamp(0, 1)
        self.weights = torch.stack([first, 1 - first], dim=1)

    def of(self, tokens: int) -> Tensor:
        """Weights (tokens, 2) for all tokens of the rows."""
        assert self.weights is not None
        return self.weights.repeat_interleave(tokens // len(self.weights), dim=0)
