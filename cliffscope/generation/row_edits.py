"""How do edits of heads act on rows that are generated together, each under its own?

1. An edit is known by a small protocol: heads, a factor, values, whether the layer's norm is preserved, and a scope. A
   scope is a set of spans; `all` is every span, the answer included, as an edit of the weights would be.
2. For each layer there is one table [edit, span, head] of factors, and one of what is added. A row under no edit has
   factor 1 and adds nothing, so that edited and unedited rows share a batch.
3. In each pass every token that is fed looks up its row's edit and its own span: `hook_z <- factor x hook_z + values`.
   Values that differ by position are looked up by the token's place in its span. Where the norm is preserved, all heads
   of the layer are then scaled back to it.
4. Hooks stand for the length of a pass in which something acts, and are removed on any exception.

Padding belongs to no span and is never changed. Where heads and their numbers come from is not known here.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cliffscope.errors import EditError
from cliffscope.model.lens import norm_ratio
from cliffscope.model.load import LensModel
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

SPANS = tuple(Span)
"""Order in which spans are numbered."""
PADDING = len(SPANS)
"""Number of a token that belongs to no span."""
SCOPES: Mapping[str, frozenset[Span]] = {**{str(span): frozenset({span}) for span in SPANS}, "all": frozenset(SPANS)}
"""Spans of each scope."""


class HeadPlace(Protocol):
    """Where a query head is."""

    @property
    def layer(self) -> int:
        """Layer index from 0."""

    @property
    def head(self) -> int:
        """Query head index from 0."""


class EditPart(Protocol):
    """One thing done to some heads over one scope."""

    @property
    def heads(self) -> Sequence[HeadPlace]:
        """Distinct query heads."""

    @property
    def factor(self) -> float:
        """What `hook_z` is multiplied by."""

    @property
    def values(self) -> np.ndarray | None:
        """[head, position, d_head] what is added: one position for all of the scope, or one for each; None is 0."""

    @property
    def preserve_norm(self) -> bool:
        """Whether all heads of a layer are scaled, position by position, back to their norm before the edit."""

    @property
    def scope(self) -> str:
        """A key of `SCOPES`."""


class SpanEdit(Protocol):
    """What generation knows of an edit; no head is in two of its parts."""

    @property
    def edits(self) -> Sequence[EditPart]:
        """Its parts."""

    def check(self, model: LensModel) -> None:
        """Raises EditError if the model lacks one of the heads."""


def spans_of(edit: SpanEdit | None) -> frozenset[Span]:
    """The spans that an edit acts on; none for no edit."""
    return frozenset[Span]().union(*(SCOPES[part.scope] for part in edit.edits)) if edit is not None else frozenset()


def acts_before_closing(edit: SpanEdit | None) -> bool:
    """Whether an edit changes what the model reads before the closing."""
    return bool(spans_of(edit) & {Span.PROMPT, Span.THINKING})


@dataclass(frozen=True, eq=False, kw_only=True)
class FedTokens:
    """What the tokens of one pass are."""

    rows: Int[np.ndarray, " row"]
    """[row] index into the edits."""
    spans: Int[np.ndarray, "row pos"]
    """[row, pos] number of the span, or `PADDING`."""
    places: Int[np.ndarray, "row pos"]
    """[row, pos] place of the token in its span, from 0."""


class RowEdits:
    """Edits of the rows of a batch.

    Args:
        model: the model.
        edits: one a row, or None for a row that is not edited. Rows under the same object share its numbers.
        rows: what each row begins with; values that differ by position need the scope's positions to be among them.
        spans: those that the rows go through; what an edit does elsewhere is left out.

    Raises:
        EditError: a head that the model lacks, values for another number of positions than the scope has, or values by
            position over text that is still to be generated.
    """

    def __init__(
        self,
        model: LensModel,
        edits: Sequence[SpanEdit | None],
        rows: Sequence[TokenizedTranscript],
        *,
        spans: frozenset[Span] = SCOPES["all"],
    ) -> None:
        """Collects the numbers of each layer."""
        unique = {id(edit): edit for edit in edits if edit is not None}
        for edit in unique.values():
            edit.check(model)
        parts = {key: [part for part in edit.edits if SCOPES[part.scope] & spans] for key, edit in unique.items()}
        for row_edit, row in zip(edits, rows, strict=True):
            for part in parts.get(id(row_edit), ()):
                _check_positions(part, row)
        numbers = {key: i for i, key in enumerate(unique, start=1)}
        self._model = model
        self._edit_of = np.array([numbers.get(id(edit), 0) for edit in edits])
        self._acts = np.zeros((len(unique) + 1, PADDING + 1), dtype=bool)
        places = {(place.layer, place.head) for each in parts.values() for part in each for place in part.heads}
        self._layers = {
            layer: _LayerTable(model, len(unique), sorted(head for at, head in places if at == layer))
            for layer in sorted({layer for layer, _ in places})
        }
        for key, part in ((key, part) for key, each in parts.items() for part in each):
            self._acts[numbers[key], [SPANS.index(span) for span in SCOPES[part.scope] & spans]] = True
            for layer in {place.layer for place in part.heads}:
                self._layers[layer].add(numbers[key], part, layer)

    def acting(self, fed: FedTokens) -> ExitStack:
        """A context in which a pass over these tokens is edited; its hooks are removed when it is left."""
        numbers = self._edit_of[fed.rows][:, None]
        # Hooks that were set are removed where a later one cannot be set.
        with ExitStack() as stack:
            if self._acts[numbers, fed.spans].any():
                looked_up = torch.from_numpy(numbers * (PADDING + 1) + fed.spans).to(self._model.device)
                for layer, table in self._layers.items():
                    stack.enter_context(self._model.head_hook(layer, table.change(looked_up, numbers, fed)))
            return stack.pop_all()


@dataclass(frozen=True, eq=False, kw_only=True)
class _Placed:
    """Values by position of one edit over one span of one layer."""

    number: int
    span: int
    columns: list[int]
    values: Float[Tensor, "pos head d_head"]


class _LayerTable:
    """Factors and values of one layer: those of all edits, over its heads that any of them names."""

    def __init__(self, model: LensModel, n_edits: int, heads: list[int]) -> None:
        """A table that changes nothing."""
        self._heads = heads
        self._d_head, self._device = model.shape.d_head, model.device
        self._factors = torch.ones(n_edits + 1, PADDING + 1, len(heads), device=model.device)
        self._added: Tensor | None = None
        self._placed: list[_Placed] = []
        self._preserving = torch.zeros(n_edits + 1, PADDING + 1, dtype=torch.bool, device=model.device)

    def add(self, number: int, part: EditPart, layer: int) -> None:
        """Enters what a part does to its heads of this layer."""
        indices = [i for i, place in enumerate(part.heads) if place.layer == layer]
        columns = [self._heads.index(part.heads[i].head) for i in indices]
        values = None if part.values is None else torch.tensor(part.values[indices], device=self._device)
        for span in (SPANS.index(span) for span in SCOPES[part.scope]):
            self._factors[number, span, columns] = part.factor
            self._preserving[number, span] |= part.preserve_norm
            if values is not None and values.shape[1] == 1:
                if self._added is None:
                    self._added = self._factors.new_zeros(*self._factors.shape, self._d_head)
                self._added[number, span, columns] = values[:, 0]
            elif values is not None:
                by_position = values.transpose(0, 1)
                self._placed.append(_Placed(number=number, span=span, columns=columns, values=by_position))

    def change(
        self, looked_up: Int[Tensor, "row pos"], numbers: Int[np.ndarray, "row 1"], fed: FedTokens
    ) -> Callable[[Float[Tensor, "row pos head d_head"]], None]:
        """What a hook does to `hook_z` of a pass.

        Args:
            looked_up: [row, pos] index into the tables' first two axes taken as one.
            numbers: [row, 1] number of the edit of each row.
            fed: the tokens of the pass.
        """
        placed = []
        for one in self._placed:
            row, pos = np.nonzero((numbers == one.number) & (fed.spans == one.span))
            if len(row):
                placed.append((row, pos, one.columns, one.values[fed.places[row, pos]]))

        preserving = bool(self._preserving.any())

        def change(z: Float[Tensor, "row pos head d_head"]) -> None:
            """Multiplies by factors and adds values, in place."""
            index = looked_up.to(z.device)
            # In fp32 at least, so that a factor is not rounded to half precision before it multiplies.
            part = z[:, :, self._heads].to(torch.promote_types(z.dtype, torch.float32))
            part *= self._factors.to(z.device).flatten(0, 1)[index][..., None]
            if self._added is not None:
                part += self._added.to(z.device).flatten(0, 1)[index]
            for row, pos, columns, values in placed:
                part[row[:, None], pos[:, None], columns] += values.to(z.device)
            before = z.flatten(2).clone() if preserving else None
            z[:, :, self._heads] = part.to(z.dtype)
            if before is not None:
                scaled = self._preserving.to(z.device).flatten()[index][..., None]
                ratio = torch.where(scaled, norm_ratio(before, z.flatten(2)), 1.0)
                z.copy_(z * ratio[..., None])

        return change


def _check_positions(part: EditPart, row: TokenizedTranscript) -> None:
    n_values = 1 if part.values is None else part.values.shape[1]
    if n_values == 1:
        return
    spans, closing = SCOPES[part.scope], row.span(Span.CLOSING)
    if len(spans) > 1 or (Span.THINKING in spans and closing.start == closing.stop):
        raise EditError(
            f"Values for {n_values} positions were given for scope {str(part.scope)!r} of {row.id!r}, of which text is "
            "still to be generated, so that nobody knows how many it has. Take one value for all positions, such as "
            "the mean, or an edit of the closing."
        )
    width = sum(row.span(span).stop - row.span(span).start for span in spans)
    if width != n_values:
        raise EditError(
            f"Values for {n_values} positions were given where scope {str(part.scope)!r} of {row.id!r} has {width}. "
            "Take a donor of the same length, or the mean."
        )
