"""How many rows fit into memory, and what if they did not after all?

The size of a batch is found from the free memory, and halved each time memory runs out. Knows rows by their length.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from cliffscope.errors import GenerationError
from cliffscope.memory import free_bytes, is_out_of_memory
from cliffscope.model.load import LensModel

log = logging.getLogger(__name__)
MOST_ROWS = 64
"""Rows of a batch that is found by itself at most: more gain little speed, and a killed run loses more."""
HALVED = "batch_halved_to"
"""Key in `extra` of transcripts that were generated after memory ran out: the rows of a batch from then on."""
_OF_FREE = 0.5
"""Share of the free memory that a batch may take."""
Result = TypeVar("Result")


@dataclass(eq=False, kw_only=True)
class BatchSize:
    """Rows of a batch, halved where memory runs out."""

    rows: int
    """Rows of the next batch at most."""
    halved: bool = False
    """Whether memory has run out."""

    @property
    def note(self) -> dict[str, object]:
        """What is noted in `extra` of a transcript that is made now."""
        return {HALVED: self.rows} if self.halved else {}

    def attempt(self, work: Callable[[], Result], n_rows: int, *, alone: str) -> Result | None:
        """Does some work, or halves the size where it does not fit into memory.

        Args:
            work: to be done.
            n_rows: rows that it takes.
            alone: what is said if not even one row fits.

        Returns:
            What the work gives; None where memory ran out.

        Raises:
            GenerationError: memory does not suffice for one row.
        """
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if n_rows == 1:
                raise GenerationError(alone) from error
            self.rows, self.halved = max(1, n_rows // 2), True
            log.warning("Memory ran out with %d rows; going on with %d rows a batch.", n_rows, self.rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def check_batch_size(batch_size: int | None) -> None:
    """Raises GenerationError for a batch of no rows; None is found by itself."""
    if batch_size is not None and batch_size < 1:
        raise GenerationError(f"batch_size={batch_size}: expected at least 1 row.")


def find_batch_size(model: LensModel, length: int, *, most: int = MOST_ROWS) -> int:
    """Rows whose caches take at most half of the free memory; a power of two.

    Args:
        model: the model, loaded.
        length: tokens of the longest row.
        most: rows at most.

    Returns:
        At least 1.
    """
    rows = max(1, min(most, int(_OF_FREE * free_bytes(model.device) / max(1, row_bytes(model, length)))))
    return 1 << (rows.bit_length() - 1)


def row_bytes(model: LensModel, length: int) -> int:
    """Memory that a row of so many tokens takes while it is generated: its cache and its logits."""
    shape, each = model.shape, torch.empty(0, dtype=model.dtype).element_size()
    # Twice: a cache that grows is copied, and a batch that shrinks too. The logits are three arrays in fp32 or more.
    cache = 2 * 2 * length * shape.n_layers * shape.n_kv_heads * shape.d_head * each
    return cache + 3 * 4 * len(model.tokenizer)
