"""What clients and server of CoDream exchange: dreams that clients have moved, soft labels of dreams, and averages."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedamole.synthesis.class_reply import first_tokens, options_hash
from fedamole.synthesis.dreams import mean_labels, top_labels
from fedamole.synthesis.examples import (
    PROBABILITIES,
    VECTORS,
    SyntheticExamples,
    check_prompt,
    require,
    whole_numbers,
)
from fedamole.synthesis.outline import ExampleSizes, Outline
from fedamole.synthesis.rows import ExtraRows, SoftLabels, joined

PROMPT, IDS = "prompt", "ids"
TRAIN, DREAM, LABEL = "train", "dream", "label"
"""Names of tensors; phases of a round."""


def task_hash(prompt: Sequence[int], options: str) -> str:
    """Return a hash of a prompt and of the hash of answer options."""
    return hashlib.sha256(repr((list(prompt), options)).encode()).hexdigest()


@dataclass(frozen=True)
class DreamState:
    """Server state."""

    tensors: Mapping[str, Tensor]
    """The student w."""
    dreams: Mapping[str, Mapping[str, Tensor]]
    """By task: `vectors` (N, L, d), `prompt` with the token ids of its template, and if the dreams are labelled
    `probabilities` and `ids` (N, 1, k) of the soft labels."""
    tasks: Mapping[str, str]
    """Task of each client that has dreamt."""

    def known(self, client: str) -> dict[str, Tensor]:
        """Return vectors and soft labels of the labelled dreams of a client's task; empty if there are none."""
        dreams = self.dreams.get(self.tasks.get(client, ""), {})
        return {key: dreams[key] for key in (VECTORS, PROBABILITIES, IDS)} if PROBABILITIES in dreams else {}

    def rows(self) -> ExtraRows:
        """Return the labelled dreams of all tasks as rows to train on."""
        return joined(
            [
                labelled_rows(dreams, tuple(dreams[PROMPT].tolist()))
                for _, dreams in sorted(self.dreams.items())
                if PROBABILITIES in dreams
            ]
        )


@dataclass(frozen=True)
class DreamMessage:
    """Message: the student w, and dreams of the client's task."""

    tensors: Mapping[str, Tensor]
    dreams: Mapping[str, Tensor]
    """`vectors`, in the first exchange with `probabilities` and `ids`; empty if there are none yet."""
    phase: str
    """What the client is to do: "train" its LoRA and dream, "dream", or "label"."""


@dataclass(frozen=True)
class DreamReply:
    """Dreams or soft labels of a client; no tensors from a client that takes no part in the dreams."""

    tensors: Mapping[str, Tensor]
    """`vectors` (N, L, d) of the dreams, or `probabilities` (N, 1, k) of `soft_ids`."""
    prompt: tuple[int, ...]
    """Token ids of the client's prompt: the template's own text, and -1 to -L in place of the columns."""
    options: str
    """`options_hash` of the client's answer options; empty for free text."""
    soft_ids: tuple[int, ...] = ()
    """Token ids of the soft labels, (N, 1, k) in order."""

    @property
    def task(self) -> str:
        """What clients must have in common to dream together: prompt and answer options."""
        return task_hash(self.prompt, self.options)

    def labels(self) -> SoftLabels:
        """Return the soft labels."""
        probabilities = self.tensors[PROBABILITIES]
        return SoftLabels(torch.tensor(self.soft_ids).view(probabilities.shape), probabilities)


def expected_dreams(template: DreamReply, reply: DreamReply) -> DreamReply:
    """Return the record with which a reply is compared, for `Method.expected_reply`.

    `template` is the reply of a dry run, with the longest prompt and the last id of the vocabulary. Prompt, ids and
    the hash come from the reply, after they are checked. Raises SyntheticExamplesError.
    """
    if not template.tensors:
        return template
    check_prompt(reply.prompt, template.prompt)
    hexadecimal = set(reply.options) <= set("0123456789abcdef") and len(reply.options) in (0, 64)
    require(hexadecimal, "a hash of answer options of an unexpected form")
    expected = replace(template, prompt=reply.prompt, options=reply.options)
    if VECTORS in template.tensors:
        return expected
    largest, probabilities = template.tensors[PROBABILITIES], reply.tensors.get(PROBABILITIES)
    form = probabilities is not None and probabilities.shape == largest.shape
    require(form, "soft labels of an unexpected form")
    assert probabilities is not None
    valid = bool((probabilities >= 0).all() and (probabilities.float().sum(2) < 1.01).all())
    require(valid, "soft labels that are no probabilities")
    known = len(reply.soft_ids) == largest.numel() and whole_numbers(reply.soft_ids, 0, max(template.prompt))
    require(known, "soft labels with ids outside the vocabulary")
    certain = torch.zeros_like(largest)
    certain[..., 0] = 1.0  # the largest norm that distributions can have
    return replace(expected, tensors={PROBABILITIES: certain}, soft_ids=reply.soft_ids)


def averaged(state: DreamState, replies: Mapping[str, DreamReply]) -> tuple[DreamState, bool]:
    """Average moved dreams, or soft labels, over the clients of each task; the student stays as it is.

    Also returns whether there were soft labels. Those of dreams that are not known are left out.
    """
    by_task: dict[str, dict[str, DreamReply]] = {}
    for name in sorted(replies):
        if replies[name].tensors:
            by_task.setdefault(replies[name].task, {})[name] = replies[name]
    dreams, tasks, labelled = dict(state.dreams), dict(state.tasks), False
    for task, group in by_task.items():
        first = next(iter(group.values()))
        if VECTORS in first.tensors:
            mean = torch.stack([reply.tensors[VECTORS] for reply in group.values()]).mean(0)
            dreams[task] = {VECTORS: mean, PROMPT: torch.tensor(first.prompt)}
            tasks |= dict.fromkeys(group, task)
        elif task in dreams:
            labels, labelled = mean_labels([reply.labels() for reply in group.values()]), True
            dreams[task] = {**dreams[task], PROBABILITIES: labels.probabilities, IDS: labels.ids}
    return DreamState(state.tensors, dreams, tasks), labelled


def labelled_rows(dreams: Mapping[str, Tensor], prompt: tuple[int, ...]) -> ExtraRows:
    """Return labelled dreams as rows to train on, in one prompt."""
    return dream_examples(dreams[VECTORS], prompt, SoftLabels(dreams[IDS], dreams[PROBABILITIES])).rows()


def dream_examples(vectors: Tensor, prompt: tuple[int, ...], labels: SoftLabels | None = None) -> SyntheticExamples:
    """Return dreams (N, L, d) as synthetic examples of one class, in the prompt of one client.

    With soft labels, whose first id of a row is the most likely one, this id is the answer; without, it means nothing.
    """
    if labels is None:
        count = len(vectors)
        return SyntheticExamples({VECTORS: vectors}, prompt, (0,) * count, (0,) * count)
    tensors = {VECTORS: vectors, PROBABILITIES: labels.probabilities}
    answers, ids = tuple(labels.ids[:, 0, 0].tolist()), tuple(labels.ids.flatten().tolist())
    return SyntheticExamples(tensors, prompt, answers, (0,) * len(vectors), ids)


@dataclass(frozen=True)
class DreamTask:
    """Prompt and answer options of a client's dreams."""

    prompt: tuple[int, ...]
    """The template's own text, and virtual tokens in place of the columns."""
    tokens: tuple[int, ...]
    """First tokens of the answer options; empty for free text and too many options."""
    options: str
    """`options_hash` of the answer options; empty for free text."""

    @property
    def key(self) -> str:
        """What clients with the same prompt and answer options have in common: 64 hexadecimal digits."""
        return task_hash(self.prompt, self.options)

    @staticmethod
    def of(outline: Outline, virtual_tokens: int, max_prompt_tokens: int, max_options: int) -> "DreamTask":
        """Return the task of a client with this outline."""
        sizes = ExampleSizes(1, virtual_tokens, 1, max_prompt_tokens, 1, 1)
        prompt = outline.new_examples(sizes, torch.Generator()).prompt  # its vectors are not used
        answers = outline.class_answers()
        tokens = first_tokens(answers)
        return DreamTask(prompt, tokens if len(tokens) <= max_options else (), options_hash(answers) if answers else "")

    def labelled(self, tokens: Sequence[int], logits: Tensor, most: int) -> DreamReply:
        """Return soft labels of N dreams with at most `most` ids, from the logits (N, k) of some token ids."""
        labels = top_labels(logits, tokens, most)
        ids = tuple(labels.ids.flatten().tolist())
        return DreamReply({PROBABILITIES: labels.probabilities}, self.prompt, self.options, ids)
