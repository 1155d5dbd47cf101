"""A writer of new rows in place of a model: the rows that it is shown, with another number in each."""

import re
from collections.abc import Sequence
from zlib import crc32

import torch
from typing_extensions import override

from fedamole.evaluation.generation import Sampler
from fedamole.federation.written_rows import TextWriter
from fedamole.model.params import Adapter
from fedamole.synthesis.written import EXAMPLE


class NumberedTexts(TextWriter):
    """Writes the first example of each request again, on another day. A "token" is twenty characters."""

    @override
    def write(
        self, adapter: Adapter | None, texts: Sequence[str], max_new_tokens: int, sampler: Sampler | None
    ) -> tuple[list[str], int]:
        written = []
        for text in texts:
            draw = 0
            if sampler is not None:
                draw = int(900 * sampler.temperature * float(torch.rand((), generator=sampler.generator)))
            day = crc32(text.encode()) % 100 + draw + (1000 if adapter is None else 2000)
            first = text.split(EXAMPLE)[1]
            written.append(re.sub(r"day \d+", f"day {day}", first)[: 20 * max_new_tokens])
        return written, 0
