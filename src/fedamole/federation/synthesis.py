"""Optimises the vectors of synthetic examples, one client at a time, on the resident base."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedamole.federation.local import NAN_EVERY, DivergedError, LocalTask, OnStep
from fedamole.federation.passes import TOKENS_AT_ONCE
from fedamole.federation.randomness import torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.federation.synthesis_request import SynthesisRequest, SynthesisResult
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, TokenPair, collate
from fedamole.model.forward_context import ForwardContext
from fedamole.model.params import Adapter, Tensors
from fedamole.synthesis.examples import VECTORS, SyntheticExamples
from fedamole.synthesis.matching import Features


def synthesise(
    bank: Bank,
    tasks: Sequence[LocalTask[SynthesisRequest]],
    settings: TrainingSettings,
    *,
    seed: int,
    round_: int,
    fit_index: int = 0,
    on_step: OnStep | None = None,
) -> list[SynthesisResult | DivergedError]:
    """Run the optimisations of several clients one after the other; return one result per task.

    All random draws of a client depend on (seed, client, round, fit_index) alone. An optimisation whose loss or vectors
    become NaN or infinite yields a DivergedError.
    """
    bank.base.training(True)
    try:
        return [_Synthesis(bank, task, settings, seed, round_, fit_index).run(on_step) for task in tasks]
    finally:
        bank.base.training(False)


class _Synthesis:
    """The optimisation of one client."""

    def __init__(
        self,
        bank: Bank,
        task: LocalTask[SynthesisRequest],
        settings: TrainingSettings,
        seed: int,
        round_: int,
        fit_index: int,
    ) -> None:
        self.bank, self.request, self.client, self.round = bank, task.fit, task.client, round_
        self.steps = task.steps(settings)
        suffix = f"/{fit_index}" if fit_index else ""
        self.generator = torch_generator(seed, f"synthesis{suffix}", task.client, round_)
        self.real = real_prompts(task.rows, self.request) if self.request.objective.needs_real else {}
        self.examples = self.tokens = self.synthetic_tokens = 0

    def run(self, on_step: OnStep | None) -> SynthesisResult | DivergedError:
        """Take all steps; without examples there is nothing to do."""
        request, bank = self.request, self.bank
        if not len(request.examples):
            return SynthesisResult(request.examples, 0, 0.0)
        vectors = request.examples.vectors.float().to(bank.base.device, copy=True).requires_grad_()
        classes = torch.tensor(request.examples.classes, device=bank.base.device)
        prompts, total = request.examples.prompts(), 0.0
        others, real = ([] if request.against is None else [request.against]), dict[int, Features]()
        layers, read = request.objective.needs_layers, 1 + len(others)
        optimiser = torch.optim.Adam([vectors], lr=request.learning_rate)
        for step in range(self.steps):
            adapter = self._perturbed()
            if step == 0 or not request.objective.real_once:
                bank.load([adapter])
                real = {label: self._real_features(own) for label, own in sorted(self.real.items())}
            bank.load([adapter, *others])
            with bank.virtual_vectors(vectors.flatten(0, 1).expand(read, -1, -1)):
                loss = request.objective.loss(features(bank, prompts, layers), classes, real)
                (vectors.grad,) = torch.autograd.grad(loss, vectors)
            optimiser.step()
            self.synthetic_tokens += read * (sum(map(len, prompts)) + len(prompts))
            total += float(loss.detach())
            if on_step is not None:
                on_step(step + 1, self.steps)
            if not math.isfinite(total) or ((step + 1) % NAN_EVERY == 0 and not vectors.isfinite().all()):
                return self._diverged(step + 1)
        if not vectors.isfinite().all():
            return self._diverged(self.steps)
        tensors = {**request.examples.tensors, VECTORS: vectors.detach().cpu()}
        made = self._answered(replace(request.examples, tensors=tensors))
        return SynthesisResult(made, self.steps, total / self.steps, self.synthetic_tokens, self.examples, self.tokens)

    def _diverged(self, step: int) -> DivergedError:
        return DivergedError(
            f"client {self.client}, round {self.round}: its synthetic examples are no longer finite after {step} steps;"
            " lower the learning rate of the synthesis (method.synthesis_rate)"
        )

    def _perturbed(self) -> Adapter:
        """Return the adapter of one step."""
        request, generator = self.request, self.generator
        tensors: Tensors = request.adapter.tensors
        if request.toward is not None:
            part = float(torch.rand((), generator=generator))
            tensors = {name: it + part * (request.toward.tensors[name] - it) for name, it in tensors.items()}
        if request.noise > 0:
            tensors = perturbed(tensors, request.noise * float(torch.rand((), generator=generator)), generator)
        return replace(request.adapter, tensors=tensors)

    def _real_features(self, prompts: Sequence[Ids]) -> Features:
        """Compute the features of a random draw of one class's real prompts."""
        order = torch.randperm(len(prompts), generator=self.generator)[: self.request.real_examples].tolist()
        drawn = [prompts[i] for i in order]
        self.examples += len(drawn)
        self.tokens += sum(map(len, drawn)) + len(drawn)
        layers = self.request.objective.needs_layers
        with torch.no_grad():
            parts = [features(self.bank, group, layers) for group in groups(drawn, TOKENS_AT_ONCE)]
        return Features(
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.logits for part in parts]),
            tuple(map(torch.cat, zip(*(part.layers for part in parts), strict=True))),
        )

    def _answered(self, examples: SyntheticExamples) -> SyntheticExamples:
        """Replace the answers by the greedy ones of `answered_by`, if it is set."""
        adapter = self.request.answered_by
        if adapter is None:
            return examples
        self.bank.load([examples.rows().read_by(adapter)])
        answers, read = greedy_answers(self.bank, examples.prompts(), self.request.max_answer_tokens)
        self.examples += len(examples)
        self.tokens += read
        return examples.answered(answers)


def real_prompts(rows: Sequence[TokenPair], request: SynthesisRequest) -> dict[int, list[Ids]]:
    """Return the real prompts of each class of the examples; classes without real examples are left out."""
    by_answer = {tuple(answer): label for label, answer in enumerate(request.class_answers)}
    prompts: dict[int, list[Ids]] = {}
    for prompt, answer in rows:
        label = by_answer.get(tuple(answer)) if by_answer else 0
        if label is not None and label in request.examples.classes:
            prompts.setdefault(label, []).append(prompt)
    return prompts


def perturbed(tensors: Tensors, norm: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors plus noise of this norm, in an even random direction over all of them."""
    # Sorted, as the order of the names differs from one deserialisation to the next.
    noise = {name: torch.randn(it.shape, generator=generator) for name, it in sorted(tensors.items())}
    scale = norm / math.sqrt(sum(float(it.double().square().sum()) for it in noise.values()))
    return {name: it + scale * noise[name].to(it.dtype) for name, it in tensors.items()}


def features(bank: Bank, prompts: Sequence[Ids], layers: bool = False) -> Features:
    """Compute the features at the ends of prompts, in one forward pass under the one loaded adapter.

    Of two loaded adapters, the second yields `Features.other`, and the first all else. `layers` also computes the
    hidden states after each layer.
    """
    hidden, states, read, count = list[Tensor](), list[Tensor](), max(bank.clients, 1), len(prompts)
    rows: list[TokenPair] = [(prompt, (0,)) for prompt in prompts]
    batch = collate([rows] * read, bank.base.pad_id, bank.packs, device=bank.base.device)
    context = ForwardContext(hidden_states=hidden, layer_states=states if layers else None)
    with bank.forward(batch, context) as logits:
        other = logits[count:].float() if read > 1 else None
        by_layer = tuple(each[:count].float() for each in states)
        return Features(hidden[0][:count].float(), logits[:count].float(), by_layer, other)


def groups(prompts: Sequence[Ids], max_tokens: int) -> Iterator[list[Ids]]:
    """Cut prompts into consecutive groups of at most `max_tokens` tokens; a longer prompt is a group of its own."""
    group: list[Ids] = []
    tokens = 0
    for prompt in prompts:
        if group and tokens + len(prompt) > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(prompt)
        tokens += len(prompt)
    if group:
        yield group


def greedy_answers(bank: Bank, prompts: Sequence[Ids], max_tokens: int) -> tuple[list[Ids], int]:
    """Generate an answer to each prompt under the one loaded adapter; return them and the number of tokens read.

    An answer ends with the end-of-sequence token, or is cut after `max_tokens` tokens.
    """
    end, read = int(bank.base.tokenizer.eos_token_id), 0
    answers: list[Ids] = [()] * len(prompts)
    running = list(range(len(prompts)))
    while running and len(answers[running[0]]) < max_tokens:
        rows = [(*prompts[i], *answers[i]) for i in running]
        with torch.no_grad():
            tokens = features(bank, rows).logits.argmax(1).tolist()
        read += sum(map(len, rows)) + len(rows)
        for i, token in zip(running, tokens, strict=True):
            answers[i] = (*answers[i], token)
        running = [i for i in running if answers[i][-1] != end]
    return answers, read
