"""Which tensors may be averaged in a round, and limits on the influence of one client's embeddings.

An average over few clients reveals each of them: of two, either can subtract its own part and has the other's.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from fedamole.methods.shared.architectures import Held
from fedamole.model.params import Shapes, Tensors, expert_keys, expert_name, is_expert_key

MAX_NORM_RATIO = 4.0
"""Largest norm of a client's embeddings of a module, as a multiple of the median client's."""
FIRST_LINEARS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")
"""Linears whose input in the first layer is the normalised word embeddings."""


def fewest_replies(
    held: Mapping[str, Mapping[str, Sequence[int]]], asked: Collection[str], min_holders: int | None
) -> Callable[[str], int]:
    """Return the number of replies that a key needs to be averaged, as a function of the key.

    This is `min_holders`. If it is None (a simulation), it is 2, or 1 for an expert of which only one holder was sent a
    message in this round. `held` has the experts by module and client; keys are <module>/expert-07/A, or without the
    last part.
    """
    if min_holders is not None:
        return lambda key: min_holders
    holders = Counter(
        f"{module}/{expert_name(expert)}"
        for module, clients in held.items()
        for name in asked
        for expert in clients.get(name, ())
    )

    def needed(key: str) -> int:
        owner = key if key in holders else key.rpartition("/")[0]
        return min(2, holders.get(owner, len(asked)))

    return needed


def mixture_of(pool: Tensors, held: Held, client: str) -> dict[str, Tensor]:
    """Return the tensors of a client's mixture: those of the pool without the experts that it does not hold."""
    own = {key for module, holders in held.items() for expert in holders[client] for key in expert_keys(module, expert)}
    return {key: tensor for key, tensor in pool.items() if key in own or not is_expert_key(key)}


def with_enough_replies(
    replies: Mapping[str, Tensors], needed: Callable[[str], int], prefix: str = ""
) -> dict[str, dict[str, Tensor]]:
    """Leave out the tensors that fewer than `needed(prefix + key)` clients returned; replies by client, then key."""
    counts = Counter(key for tensors in replies.values() for key in tensors)
    return {
        client: {key: tensor for key, tensor in tensors.items() if counts[key] >= needed(prefix + key)}
        for client, tensors in replies.items()
    }


def limit_norms(embeddings: Mapping[str, Tensors]) -> dict[str, dict[str, Tensor]]:
    """Scale down embeddings of one module so that no client attracts experts by large values.

    Embeddings by client and key. A client's size is the largest norm of its embeddings. The limit is `MAX_NORM_RATIO`
    times the median size; larger embeddings are scaled to it, all others are returned unchanged. With fewer than three
    clients nothing is scaled, because the median of two says nothing about which is wrong.
    """
    result = {client: dict(rows) for client, rows in embeddings.items()}
    if len(result) < 3:
        return result
    norms = {client: {key: float(row.double().norm()) for key, row in rows.items()} for client, rows in result.items()}
    sizes = sorted(max(client_norms.values(), default=0.0) for client_norms in norms.values())
    limit = MAX_NORM_RATIO * sizes[(len(sizes) - 1) // 2]
    for client, client_norms in norms.items():
        for key, norm in client_norms.items():
            if norm > limit:
                row = result[client][key]
                result[client][key] = (row.double() * (limit / norm)).to(row.dtype)
    return result


def group_exposure(
    clients: int | None, shapes: Shapes | None, *, experts: float, choices: int, min_holders: int | None, rank: int
) -> list[str]:
    """Return sentences about what other holders and the coordinator can compute of experts and mean embeddings.

    A client holds `experts` per module on average, and each expert is held by `choices` clients. `clients` and `shapes`
    are None if not known yet, `min_holders` if no number is set.
    """
    by = f"In each module every expert is held by {choices} clients, who get the mean of their updates back"
    few = {
        1: "In each module every expert is held by one client alone: the next holder gets that client's update.",
        2: f"{by}. Either of the two can subtract its own and has the other's update.",
    }
    sentences = [
        few.get(choices, f"{by}. {choices - 1} of them together can subtract theirs and have that of the last one.")
    ]
    if clients is not None and clients > 1:
        others = "one client alone" if clients == 2 else f"{clients - 1} clients together"
        sentences.append(
            f"Shared expert and router are means over all {clients} clients: {others} can compute the last one's part."
        )
    if min_holders is not None:
        sentences.append(
            f"Tensors that fewer than {min_holders} clients return in a round are not averaged and keep their values "
            f"(method.min_holders = {min_holders})."
        )
    each = round(rank * (1 + experts))
    disclosed = (
        "The coordinator gets the mean embeddings of each client's embedding split: in each round about "
        f"{each} linear equations per adapted linear for the mean of that linear's inputs over the split"
    )
    first = sorted(shapes, key=_layer)[0] if shapes else None
    if shapes is None or first is None:
        return [*sentences, f"{disclosed}."]
    same_input = [name for name in shapes if _layer(name) == _layer(first) and name.endswith(FIRST_LINEARS)] or [first]
    width = shapes[first][0]
    rounds = max(1, -(-width // (each * len(same_input))))
    return [
        *sentences,
        f"{disclosed}. In the first layer ({len(same_input)} of them have the same input of width {width}) these "
        f"determine it after {rounds} round{'s' if rounds > 1 else ''} at the earliest; it is the mean of the "
        "embeddings of the split's words, a bag of words.",
    ]


def _layer(name: str) -> int:
    """Return the number of the layer that a module is in."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
