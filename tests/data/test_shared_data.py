"""Real public text from ../shared/data, which exists beside the repository only during development."""

from pathlib import Path

import pytest

from fedamole.data.manifest import load_federation
from fedamole.data.settings import DataSettings, PartitionSettings, SourceSettings
from fedamole.data.tokens import tokenise

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"
pytestmark = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"{SHARED / 'data'} is not here")


def source(name: str, test: bool = True, **keys: object) -> SourceSettings:
    train = f"../shared/data/{name}.train.jsonl.gz" if test else f"../shared/data/{name}.jsonl.gz"
    official = f"../shared/data/{name}.test.jsonl.gz" if test else None
    return SourceSettings(name, path=train, test=official, **keys)  # type: ignore[arg-type]


def test_a_mixed_federation_is_drawn_and_reproduced() -> None:
    settings = DataSettings(
        (
            source("snli", partition=PartitionSettings("dirichlet", by="label", alpha=0.1, clients=10), limit=3000),
            source("banking77", template="banking77"),
            source("pubmedqa", template="pubmedqa", partition=PartitionSettings("iid", clients=2)),
            source("medquad", test=False, limit=1500, partition=PartitionSettings("value", by="source")),
        )
    )
    drawn = load_federation(settings, REPOSITORY)
    by_name = {shard.client: shard for shard in drawn.shards}
    assert [name for name in by_name if name.startswith("snli")] == [f"snli-{index:02d}" for index in range(10)]
    assert min(len(shard.train) for shard in drawn.shards) >= 10
    assert len(by_name["banking77"].train[0].options) == 77
    assert len(by_name["banking77"].test) == 200
    assert "source 'banking77': 7 training rows that equal an official test row were dropped" in drawn.notes
    assert load_federation(settings, REPOSITORY, drawn.manifest).shards == drawn.shards


@pytest.mark.skipif(not (SHARED / "models" / "stories260K").is_dir(), reason="the small Llama is not here")
def test_a_real_llama_tokenizer() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(SHARED / "models" / "stories260K")
    (shard,) = load_federation(DataSettings((source("pubmedqa", template="pubmedqa"),)), REPOSITORY).shards
    tokenised = tokenise(shard.test, tokenizer, 256)
    assert tokenised.dropped == 0
    assert tokenised.cut > 100
    for row in tokenised.rows:
        assert row.prompt[0] == tokenizer.bos_token_id
        assert row.answer[-1] == tokenizer.eos_token_id
        assert row.answer in row.options
        assert len(row.prompt) + max(map(len, row.options)) <= 256
        assert tokenizer.decode(list(row.prompt)).endswith("Answer with yes, no or maybe.\nAnswer:\n")
