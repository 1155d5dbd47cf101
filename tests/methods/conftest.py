"""Fixtures: LoRAs trained apart on the bundled task."""

import pytest
from tests.methods.zoo import Zoo


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    """Three clients of three tasks, and a second one of the first task."""
    return Zoo.train(("hospital_north", "hospital_south", "shop_house", "weather_coast"), 60)
