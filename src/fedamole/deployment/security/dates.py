"""Dates of certificates and of client keys, all in UTC."""

from datetime import UTC, date, datetime, timedelta

from fedamole.errors import ConfigError

SOON = timedelta(days=30)
"""A certificate or key that ends within this time is reported."""
LONGEST = 1_000_000
"""Days; no validity may be longer, so that every date can be written with a year of four digits."""


def now() -> datetime:
    """Return the present moment in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def checked_days(days: int, option: str) -> timedelta:
    """Return a validity that was given in days; ConfigError where it is no sensible number."""
    if not 1 <= days <= LONGEST:
        raise ConfigError(f"{option} {days}: give a number of days between 1 and {LONGEST}")
    return timedelta(days=days)


def last_day(days: int, option: str = "--client-days") -> date:
    """Return the last valid day of a key that is valid for `days` days from today; ConfigError as `checked_days`."""
    return (now() + checked_days(days, option)).date()
