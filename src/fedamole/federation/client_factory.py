"""Builds the `Client` that the client's half of a method works with."""

from collections.abc import Sequence

from torch import Tensor

from fedamole.evaluation.likelihood import mean_losses
from fedamole.federation.client_data import ClientData
from fedamole.federation.lock_step import indices_by_kind
from fedamole.federation.looks import Looks, drawn
from fedamole.federation.method import Client
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter


class ClientFactory:
    """Builds `Client` objects whose `losses` and `last_hidden` run on a resident base."""

    def __init__(self, bank: Bank, batch_tokens: int, seed: int) -> None:
        """Run forward passes on `bank`, at most `batch_tokens` tokens at once; `seed` is the run's."""
        self.bank, self.batch_tokens, self.seed = bank, batch_tokens, seed

    def client(self, data: ClientData, round_: int, looks: Looks) -> Client:
        """Return the `Client` of a round; forward passes without training are counted in `looks`."""
        bank, name = self.bank, data.info.name

        def losses(adapters: Sequence[Adapter], most: int) -> list[float]:
            rows = drawn(data.embedding.pairs(), most, self.seed, "losses", name)
            means = [0.0] * len(adapters)
            for indices in indices_by_kind({i: adapter.kind() for i, adapter in enumerate(adapters)}):
                bank.load([adapters[i] for i in indices])
                looks.add(bank.prefixed([rows])[0], len(indices))
                values = mean_losses(bank, [rows] * len(indices), self.batch_tokens)
                for i, value in zip(indices, values, strict=True):
                    means[i] = value
            return means

        def last_hidden(adapter: Adapter, most: int) -> Tensor:
            prompts = [row[0] for row in drawn(data.embedding.pairs(), most, self.seed, "hidden", name)]
            looks.add([(prompt, (0,)) for prompt in prompts])
            bank.load([adapter])
            return bank.last_hidden([prompts]).cpu()

        base = bank.base
        return Client(data.info, base.shapes, self.seed, round_, losses, last_hidden, base.width, base.embedding_std)
