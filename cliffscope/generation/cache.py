"""How is what a model has read held, so that one reading serves many continuations?

1. Plain layers of the architecture's own cache grow in steps: a token is written, the layer not copied for it.
2. `select_rows` keeps some rows of a cache, in place.
3. `branched` makes a cache of any rows of another one, each as often as asked for, and leaves that one as it was.

No number changes on the way. Knows neither tokens nor spans.
"""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cliffscope.model.load import LensModel

_ROOM = 64
"""Positions that a layer grows by at least."""


class _GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers leaves it unannotated.
    """A cache layer with room ahead, so that a token is written and not the whole layer copied for it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_options: object
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values; returns all of them, as views of the rooms."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = [key_states[:, :, :0], value_states[:, :, :0]]
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        for i, states in enumerate((key_states, value_states)):
            if self._rooms[i].shape[-2] < stop:
                self._rooms[i] = _enlarged(self._rooms[i], start, stop + max(_ROOM, stop // 4))
            self._rooms[i][:, :, start:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes some rows, each as often as it is named, with their room."""
        length = self.get_seq_length()
        if length:
            self._rooms = [room.index_select(0, beam_idx.to(room.device)) for room in self._rooms]
            self.keys, self.values = (room[:, :, :length] for room in self._rooms)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same, by the name that other callers know it by."""
        self.reorder_cache(indices)


_REBOUND = (_GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that put new tensors in the place of old ones, and write into none that a copy may hold."""


def growing_cache(model: LensModel) -> DynamicCache:
    """The architecture's own cache, its plain layers replaced by growing ones."""
    cache = DynamicCache(config=model.hf.config)
    grow: Callable[[], DynamicLayer] = _GrowingLayer
    cache.layers = [grow() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keeps some rows, in place.

    Args:
        cache: of a batch.
        rows: [row] indices, in the order to keep.
    """
    # Not `batch_select_indices`, which layers of linear attention do not have.
    cache.reorder_cache(cast(torch.LongTensor, rows))


def branched(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache that goes on from rows of another one.

    Args:
        cache: of a batch; it stays as it is.
        rows: [row] indices, each as often as it is to be continued.

    Returns:
        A cache of as many rows as there are indices.
    """
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) if type(layer) in _REBOUND else copy.deepcopy(layer) for layer in cache.layers]
    select_rows(branch, rows)
    return branch


def _enlarged(room: Tensor, used: int, size: int) -> Tensor:
    larger = room.new_empty((*room.shape[:2], size, room.shape[-1]))
    larger[:, :, :used] = room[:, :, :used]
    return larger
