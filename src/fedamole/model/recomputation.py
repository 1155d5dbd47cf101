"""Gradient checkpointing that leaves the base in eval mode.

transformers checkpoints activations only in train mode, which also enables the base's dropout, layer dropout and router
noise. Models implement these in too many forms (modules, numbers, settings) to disable them all. This module wraps the
decoder layers instead and never changes the mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedamole.errors import ConfigError


class Recomputation:
    """Recomputes the activations of each decoder layer in the backward pass while `active` is True."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap the layers of a language model in place; raise ConfigError if none of them supports it."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.active = False
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(
                f"base.gradient_checkpointing = true: {type(model).__name__} has no layers that can be recomputed; "
                "set it to false"
            )
        for layer in layers:
            layer.forward = partial(self._run, layer.forward)

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (self.active and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        # Reentrant checkpointing would silently lose the gradient of the balance loss.
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)
