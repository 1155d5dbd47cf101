from typing import Any

import pytest

from fedamole.data.settings import DataSettings, PartitionSettings, SourceSettings
from fedamole.data.templates import TemplateSettings
from fedamole.errors import ConfigError

SOURCE = SourceSettings("s", path="a.jsonl")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "diriclet"}, r"kind = 'diriclet': must be one of whole, iid, dirichlet, classes, value"),
        ({"kind": "dirichlet", "by": "label", "clients": 2}, "alpha is missing: kind = 'dirichlet' requires it"),
        ({"kind": "iid", "clients": 2, "alpha": 0.1}, "alpha = 0.1: kind = 'iid' does not use it; remove this key"),
        ({"kind": "dirichlet", "by": "l", "clients": 2, "alpha": 0.0}, "alpha = 0.0: must be a number above 0"),
        ({"kind": "iid", "clients": 0}, "clients = 0: must be at least 1"),
        ({"by": "label"}, "by = 'label': kind = 'whole' does not use it"),
    ],
)
def test_partition_settings_refuse(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PartitionSettings(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a/b", "path": "x"}, r"data.source.name = 'a/b'"),
        ({"name": "医院", "path": "x"}, "use ASCII letters, digits"),
        ({"name": "s" * 121, "path": "x"}, "at most 120 characters$"),
        (
            {"name": "s" * 81, "path": "x", "partition": PartitionSettings("value", by="l")},
            "at most 80 characters, because",
        ),
        ({"name": "s"}, "either path"),
        ({"name": "s", "path": "x", "hub": "y"}, "not both"),
        ({"name": "s", "hub": "y"}, r"data.source\[s\].split is missing"),
        ({"name": "s", "hub": "y", "split": "train", "test": "t"}, "test = 't': not used with hub"),
        ({"name": "s", "path": "x", "config": "c"}, "config = 'c': not used with path"),
        ({"name": "s", "path": "x", "limit": 0}, "limit = 0"),
    ],
)
def test_source_settings_refuse(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceSettings(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": (SOURCE, SOURCE)}, "'s' appears 2 times"),
        ({"source": (SOURCE,), "test_share": 1.0}, "test_share = 1.0: must be between 0 and 1"),
        ({"source": (SOURCE,), "test_share": 0.5, "validation_share": 0.5}, "must be below 1, to leave training rows"),
        ({"source": (SOURCE,), "min_examples": 0}, "min_examples = 0"),
        ({"source": (SOURCE,), "validation_cap_classification": 0}, "validation_cap_classification = 0: must be at"),
        ({"source": (SOURCE,), "validation_cap_generation": 0}, "validation_cap_generation = 0: must be at"),
        ({"source": (SOURCE,), "test_cap_generation": 0}, "test_cap_generation = 0: must be at"),
        ({"source": (SOURCE,), "partition_seed": -1}, "partition_seed = -1"),
        (
            {"source": (SOURCE,), "templates": {"snli": TemplateSettings("{a}", "{b}")}},
            "a built-in template has this name",
        ),
        ({"source": (SourceSettings("s", path="x", template="snlii"),)}, "did you mean 'snli'"),
    ],
)
def test_data_settings_refuse(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataSettings(**given)


def test_an_own_template_is_known() -> None:
    own = TemplateSettings("{a}\n", "{b}")
    DataSettings((SourceSettings("s", path="x", template="mine"),), templates={"mine": own})
