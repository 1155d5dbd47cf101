"""Builds the `Client` that the client's half of a method works with."""

from collections.abc import Callable
from functools import partial

from fedamole.federation.client_data import ClientData
from fedamole.federation.method import BaseInfo, Client
from fedamole.federation.probe import ClientProbe, ProbeCounts
from fedamole.federation.randomness import seeded_key
from fedamole.federation.written_rows import ClientDataEngine, ModelWriter, TextWriter
from fedamole.model.bank import Bank
from fedamole.synthesis.outline import ClientOutline


class ClientFactory:
    """Builds `Client` objects whose probe runs on a resident base."""

    def __init__(self, bank: Bank, batch_tokens: int, seed: int) -> None:
        """Run forward passes on `bank`, at most `batch_tokens` tokens at once; `seed` is the run's."""
        self.bank, self.batch_tokens, self.seed, self.base = bank, batch_tokens, seed, BaseInfo.of(bank.base)
        self.writer: TextWriter = ModelWriter(bank, batch_tokens)
        """Writes the texts of new rows (`Client.data_engine`)."""
        self.new_key: Callable[[str], bytes] = partial(seeded_key, seed)
        """Returns the key for the noise of a client, by name (`Client.new_key`)."""
        self.once: Callable[[Callable[[], bytes]], bytes] = lambda compute: compute()
        """Computes what may be released once in a run (`Client.once`)."""

    def client(self, data: ClientData, round_: int, counts: ProbeCounts) -> Client:
        """Return the `Client` of a round; its probe adds what it reads to `counts`."""
        rows, name = data.embedding.rows, data.info.name
        probe = ClientProbe(self.bank, rows, name, self.seed, self.batch_tokens, counts)
        return Client(
            data.info,
            self.base,
            self.seed,
            round_,
            probe,
            partial(self.outline, data),
            partial(self.data_engine, data, counts),
            partial(self.new_key, name),
            self.once,
        )

    def outline(self, data: ClientData) -> ClientOutline:
        """Return the prompt and the classes of a client's synthetic examples."""
        train, base = data.train, self.base
        return ClientOutline(train.rows, train.examples, self.bank.base.tokenizer, base.width, base.embedding_std)

    def data_engine(self, data: ClientData, counts: ProbeCounts) -> ClientDataEngine:
        """Return what lets a client's data grow."""
        return ClientDataEngine(self.bank, data, self.seed, self.writer, counts)
