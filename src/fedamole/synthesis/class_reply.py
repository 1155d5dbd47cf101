"""What clients of FedAF send by class: mean logits of their answer options, and soft labels of synthetic examples."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedamole.model.batch import Ids
from fedamole.synthesis.examples import PROBABILITIES, SyntheticExamples, SyntheticExamplesError

USUAL_LOGIT = 10.0
"""Size of a logit without the mean, from which the default bound on the norm of a reply is computed."""


@dataclass(frozen=True)
class ClassReply(SyntheticExamples):
    """Mean logits and no examples, or synthetic examples with soft labels and no mean logits."""

    logits: Mapping[str, Tensor] = field(default_factory=dict)
    """Mean option logits (options) by class, without their mean over the options."""
    options: str = ""
    """`options_hash` of the client's answer options; empty without logits."""


def first_tokens(answers: Sequence[Ids]) -> tuple[int, ...]:
    """Return the first token of each answer, each token once."""
    return tuple(dict.fromkeys(answer[0] for answer in answers))


def options_hash(answers: Sequence[Ids]) -> str:
    """Return a hash that is equal for clients with the same answer options in the same order."""
    return hashlib.sha256(repr([list(answer) for answer in answers]).encode()).hexdigest()


def expected_logits(reply: ClassReply, most_options: int) -> ClassReply:
    """Return the record with which a reply of mean logits is compared, for `Method.expected_reply`.

    Which classes it has and how many options comes from the reply, after they are checked. Raises
    SyntheticExamplesError.
    """
    widths = {tuple(tensor.shape) for tensor in reply.logits.values()}
    classes = all(re.fullmatch("0|[1-9][0-9]{0,5}", label) and int(label) < most_options for label in reply.logits)
    shapes = not widths or (len(widths) == 1 and len(min(widths)) == 1 and 0 < min(widths)[0] <= most_options)
    if not (classes and shapes and re.fullmatch("[0-9a-f]{64}" if widths else "", reply.options)):
        raise SyntheticExamplesError("mean logits by class: classes or options of an unexpected form")
    logits = {label: torch.full(tensor.shape, USUAL_LOGIT) for label, tensor in reply.logits.items()}
    return ClassReply({}, (), (), (), (), logits, reply.options)


def logits_for(reply: ClassReply, measured: Mapping[str, ClassReply]) -> dict[str, Tensor]:
    """Stack the mean logits (clients, options) of each class over all clients with the answer options of one client."""
    shapes = {tensor.shape for tensor in reply.logits.values()}
    rows: dict[str, list[Tensor]] = {}
    for name in sorted(measured):
        other = measured[name]
        for label in sorted(other.logits) if other.options == reply.options else ():
            if other.logits[label].shape in shapes:
                rows.setdefault(label, []).append(other.logits[label])
    return {label: torch.stack(tensors) for label, tensors in rows.items()}


def with_mean_labels(examples: Mapping[str, SyntheticExamples]) -> dict[str, SyntheticExamples]:
    """Give every example the mean soft label of its class over the clients that have one.

    A class is known by its answer and the token ids of its soft labels. A soft label whose probabilities are all 0 is
    none, and stays so if no client has another.
    """
    by_class: dict[tuple[Ids, Ids], dict[str, Tensor]] = {}
    for name in sorted(examples):
        probabilities = examples[name].tensors[PROBABILITIES].float()
        for key, own in zip(_classes(examples[name]), probabilities, strict=True):
            if float(own.sum()) > 0:
                by_class.setdefault(key, {})[name] = own
    means = {key: torch.stack([*labels.values()]).mean(0) for key, labels in by_class.items()}
    averaged: dict[str, SyntheticExamples] = {}
    for name, each in examples.items():
        own_labels = each.tensors[PROBABILITIES].float()
        rows = [means.get(key, own) for key, own in zip(_classes(each), own_labels, strict=True)]
        tensors = {**each.tensors, PROBABILITIES: torch.stack(rows) if rows else own_labels}
        averaged[name] = replace(each, tensors=tensors)
    return averaged


def _classes(examples: SyntheticExamples) -> list[tuple[Ids, Ids]]:
    """Return answer and token ids of the soft label of each example."""
    width = len(examples.soft_ids) // max(len(examples), 1)
    return [(examples.answer(i), examples.soft_ids[i * width : (i + 1) * width]) for i in range(len(examples))]


def without_labels(examples: Mapping[str, SyntheticExamples]) -> dict[str, SyntheticExamples]:
    """Leave out the soft labels."""
    kept = {
        name: {key: tensor for key, tensor in each.tensors.items() if key != PROBABILITIES}
        for name, each in examples.items()
    }
    return {name: replace(each, tensors=kept[name], soft_ids=()) for name, each in examples.items()}
