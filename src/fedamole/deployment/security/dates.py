"""Validity periods of certificates and client keys; all dates are in UTC."""

from datetime import UTC, date, datetime, timedelta

from fedamole.errors import ConfigError

SERVER_DAYS = 825
"""Default validity of a server certificate in days."""
CLIENT_DAYS = 365
"""Default validity of a client key in days."""
SOON = timedelta(days=30)
"""Certificates and keys that expire within this time are reported."""
MAX_DAYS = 1_000_000
"""Maximum validity in days, so that every date has a year of four digits."""


def now() -> datetime:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def checked_days(days: int, option: str) -> timedelta:
    """Return a validity given in days; ConfigError if it is not between 1 and MAX_DAYS."""
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"{option} {days}: give a number of days between 1 and {MAX_DAYS}")
    return timedelta(days=days)


def last_day(days: int, option: str = "--client-days") -> date:
    """Return the last valid day of a key that is valid for `days` days from today; ConfigError as `checked_days`."""
    return (now() + checked_days(days, option)).date()
