"""Instance weights in the PEFT tuner: the weights of a prompt are computed before the model reads it.

A forward call with an empty cache starts a prompt. Its weights stay in force for the calls that continue from that
cache, so `generate` uses the prompt's weights for the whole answer, as a bank does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedamole.model.mixer import InstanceWeights


class InstanceGate:
    """Computes the weights of two experts for each row of a batch, for all layers of an adapter."""

    def __init__(self, references: Sequence[Sequence[float]], router: InstanceWeights) -> None:
        """Compare prompts with `references` (S, d)."""
        self.references, self.router = torch.tensor(references), router
        self.weights: Tensor | None = None
        """(rows, 2): weights of the latest prompts."""
        self._in_own_pass = False

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute the weights if this call starts a prompt; a forward pre-hook of the model."""
        past = kwargs.get("past_key_values")
        if self._in_own_pass or (past is not None and past.get_seq_length() > 0):
            return
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        self._in_own_pass, self.weights = True, torch.tensor([[1.0, 0.0]], device=ids.device)
        try:
            with torch.no_grad():
                hidden = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-1]
        finally:
            self._in_own_pass = False
        positions = torch.arange(ids.shape[1], device=ids.device)
        ends = (positions * (1 if mask is None else mask)).expand(ids.shape).argmax(1)
        last = hidden[torch.arange(len(ids), device=ids.device), ends].float()
        similarity = F.cosine_similarity(last[:, None], self.references.to(ids.device), dim=2).mean(1)
        self.weights = self.router.weights(similarity)
