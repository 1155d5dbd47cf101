"""Trains autoencoders of hidden states, one client at a time, on the resident base."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fedamole.federation.autoencoder_request import AutoencoderRequest, AutoencoderResult
from fedamole.federation.local import NAN_EVERY, DivergedError, LocalTask, OnStep
from fedamole.federation.randomness import torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.federation.synthesis import features
from fedamole.model.bank import Bank
from fedamole.synthesis.latents import autoencoder_loss, decode, encode


def train_autoencoders(
    bank: Bank,
    tasks: Sequence[LocalTask[AutoencoderRequest]],
    settings: TrainingSettings,
    *,
    seed: int,
    round_: int,
    fit_index: int = 0,
    on_step: OnStep | None = None,
) -> list[AutoencoderResult | DivergedError]:
    """Train the autoencoders of several clients one after the other; return one result per task.

    All random draws of a client depend on (seed, client, round, fit_index) alone. A training whose loss or tensors
    become NaN or infinite yields a DivergedError.
    """
    suffix = f"/{fit_index}" if fit_index else ""
    bank.base.training(True)
    try:
        results = []
        for task in tasks:
            generator = torch_generator(seed, f"autoencoder{suffix}", task.client, round_)
            results.append(_train(bank, task, settings, round_, generator, on_step))
        return results
    finally:
        bank.base.training(False)


def _train(
    bank: Bank,
    task: LocalTask[AutoencoderRequest],
    settings: TrainingSettings,
    round_: int,
    generator: torch.Generator,
    on_step: OnStep | None,
) -> AutoencoderResult | DivergedError:
    request, steps, base = task.fit, task.steps(settings), bank.base
    tensors = {
        # Sorted, as the order of the names differs from one deserialisation to the next.
        name: tensor.float().to(base.device, copy=True).requires_grad_()
        for name, tensor in sorted(request.tensors.items())
    }
    parameters, total, tokens = [*tensors.values()], 0.0, 0
    optimiser = torch.optim.Adam(parameters, lr=request.learning_rate)
    bank.load([request.adapter])
    for step in range(steps):
        drawn = torch.randperm(len(request.hidden), generator=generator)[: request.batch_size]
        real = request.hidden[drawn].to(base.device)
        mean, log_variance = encode(tensors, real)
        noise = torch.randn(mean.shape, generator=generator).to(base.device)
        vectors = decode(tensors, mean + (log_variance / 2).exp() * noise, base.width, base.embedding_std)
        prompts = prompts_of(request.prompt, len(real))
        with bank.virtual_vectors(vectors.flatten(0, 1).unsqueeze(0)):
            read = features(bank, prompts)
            loss = autoencoder_loss(read.hidden, real, mean, log_variance, request.kl_weight)
            if request.class_weight:
                logits, classes = read.logits[:, list(request.tokens)], request.classes[drawn].to(base.device)
                loss = loss + request.class_weight * F.cross_entropy(logits, classes)
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
        optimiser.step()
        total += float(loss.detach())
        tokens += sum(map(len, prompts)) + len(prompts)
        if on_step is not None:
            on_step(step + 1, steps)
        last = step + 1 == steps or (step + 1) % NAN_EVERY == 0
        if not math.isfinite(total) or (last and not all(it.isfinite().all() for it in parameters)):
            return DivergedError(
                f"client {task.client}, round {round_}: its autoencoder is no longer finite after {step + 1} steps; "
                "lower its learning rate (method.autoencoder_rate)"
            )
    trained = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return AutoencoderResult(trained, steps, total / steps, tokens)


def prompts_of(prompt: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Return a prompt `count` times, each with virtual tokens of its own."""
    length = sum(token < 0 for token in prompt)
    return [tuple(token - i * length if token < 0 else token for token in prompt) for i in range(count)]
