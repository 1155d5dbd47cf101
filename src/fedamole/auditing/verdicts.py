"""What the results of the audits mean, in a sentence for each audit."""

from collections.abc import Iterator, Mapping
from typing import Any

SURE = 2.33
"""Standard errors above guessing from which an attack counts as successful (one-sided, 1 %)."""
MOST_LIKELY = 0.05
"""Largest p-value of an attribute inference that counts as successful."""
ENOUGH_NOISE = 0.9
"""Measured noise, as a share of the claimed noise, below which it is reported."""

Json = Mapping[str, Any]


def verdicts(results: Json) -> list[str]:
    """Return the sentences for the content of audit.json."""
    return [
        *_of_clients("Canary bound", results, "canaries", _canaries),
        *_of_clients("Membership", results, "membership", _membership),
        *_of_clients("Gradient inversion", results, "inversion", _inversion),
        f"Attribute inference: {_attribute(results['attribute'])}",
    ]


def _of_clients(title: str, results: Json, audit: str, sentence: Any) -> Iterator[str]:
    """Yield the sentence of an audit over the clients for which it was done, and why it was not for the others."""
    audits = {name: client[audit] for name, client in results["clients"].items()}
    done = {name: values for name, values in audits.items() if "not_applicable" not in values}
    if done:
        yield f"{title}: {sentence(done)}"
    reasons: dict[str, list[str]] = {}
    for name, values in audits.items():
        if "not_applicable" in values:
            reasons.setdefault(values["not_applicable"], []).append(name)
    for reason, names in reasons.items():
        of_some = f" for {listed(names)}" if done or len(reasons) > 1 else ""
        yield f"{title}: not applicable{of_some}: {reason}."


def listed(names: list[str]) -> str:
    """Return at most three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _canaries(done: Mapping[str, Json]) -> str:
    claimed = {name: values for name, values in done.items() if values["claimed"] is not None}
    if not claimed:
        name = max(done, key=lambda name: done[name]["bound"])
        if done[name]["bound"] == 0:
            canaries = min(values["canaries"] for values in done.values())
            return (
                f"nothing is claimed, and the attack found no lower bound of epsilon above 0 with {canaries} canaries. "
                "That a bound is low proves nothing."
            )
        return (
            f"nothing is claimed, and somebody who knows all other examples learns from the first update whether an "
            f"example was used (epsilon at least {done[name]['bound']:.2f} for {name})."
        )
    above = [name for name, values in claimed.items() if values["bound"] > values["claimed"]]
    repeated = [name for name, values in claimed.items() if values["noise_repeats"]]
    small = [name for name, values in claimed.items() if values["noise"] < ENOUGH_NOISE]
    if above:
        values = claimed[above[0]]
        return (
            f"THE CLAIM IS WRONG for {listed(above)}: epsilon is at least {values['bound']:.2f}, and "
            f"{values['claimed']:.2f} is claimed."
        )
    if repeated:
        return f"THE NOISE REPEATS for {listed(repeated)}: two trainings had the same, so it can be subtracted."
    if small:
        share = min(claimed[name]["noise"] for name in small)
        return f"THE NOISE IS TOO SMALL for {listed(small)}: {share:.0%} of what is claimed."
    name = max(claimed, key=lambda name: claimed[name]["bound"])
    values = claimed[name]
    return (
        f"no claim is refuted: the largest bound is {values['bound']:.2f} ({name}, which claims "
        f"{values['claimed']:.2f}). That a bound is low proves nothing."
    )


def _membership(done: Mapping[str, Json]) -> str:
    own = {name: values["own"] for name, values in done.items()}
    others = {name: values["others"] for name, values in done.items() if "others" in values}
    text = _separates(own, "a client's own model reveals")
    return f"{text}; {_separates(others, 'the models of other clients reveal')}." if others else f"{text}."


def _separates(attacks: Mapping[str, Json], model_reveals: str) -> str:
    mean = sum(values["auroc"] for values in attacks.values()) / len(attacks)
    sure = [name for name, values in attacks.items() if values["auroc"] > 0.5 + SURE * values["error"]]
    if not sure:
        return f"{model_reveals} no training examples (mean AUROC {mean:.2f}, as by guessing)"
    return (
        f"{model_reveals} which examples were trained on for {len(sure)} of {len(attacks)} clients (mean AUROC "
        f"{mean:.2f})"
    )


def _inversion(done: Mapping[str, Json]) -> str:
    mean = sum(values["recall"] for values in done.values()) / len(done)
    chance = sum(values["chance"] for values in done.values()) / len(done)
    above = [name for name, values in done.items() if values["recall"] > values["highest"]]
    numbers = f"mean recall {mean:.0%}, by chance {chance:.0%}"
    if not above:
        return f"the first update reveals no tokens to this cheap attack ({numbers}); stronger attacks exist."
    return f"the first update reveals tokens of the training data for {len(above)} of {len(done)} clients ({numbers})."


def _attribute(values: Json) -> str:
    if "not_applicable" in values:
        return f"not applicable: {values['not_applicable']}."
    numbers = f"accuracy {values['accuracy']:.0%} for {values['clients']} clients, by chance {values['chance']:.0%}"
    if values["p_value"] <= MOST_LIKELY:
        return f"the mean embeddings reveal a client's {values['attribute']} ({numbers})."
    return f"the mean embeddings do not reveal a client's {values['attribute']} to this attack ({numbers})."
