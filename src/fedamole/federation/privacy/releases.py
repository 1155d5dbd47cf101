"""Kinds of values that leave a client, and which of them can be made private."""

from typing import Literal

Release = Literal["trained", "mean_embedding", "choice", "count", "score", "public", "empty"]
"""trained: values of a private training. mean_embedding: means over the embedding split. choice, count and score: what
a client has chosen, counted or scored by its data. public: computed without the client's examples. empty: nothing."""

PRIVATE = ("trained", "public", "empty")
"""Kinds that can leave a client under `[privacy]`; for the others there is no mechanism yet."""
