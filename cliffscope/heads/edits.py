"""What is done to which heads?

An edit is data: a kind, heads, a scope, and a factor or values; several of them make a plan. Every kind is one formula
on a head's output, `hook_z <- factor x hook_z + values`, applied in one of two ways:

1. to the weights (scope `all`): the heads' columns of the output projection are scaled, and what fixed values would
   write becomes an output bias;
2. by hooks (any scope), at the positions that each row of the batch has in the scope.

Both undo themselves, bit for bit, on any exception. Knows nothing of probes and effects.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cliffscope.errors import EditError
from cliffscope.model.load import LensModel
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

HeadValues = tuple[tuple[tuple[float, ...], ...], ...]
"""[head][position][d_head]; one position stands for all of the scope, more are matched one by one."""

Context = AbstractContextManager[None]


class EditKind(StrEnum):
    """What an edit does to `hook_z`."""

    ZERO = "zero"
    SCALE = "scale"
    MEAN = "mean"
    RESAMPLE = "resample"
    PATCH = "patch"


class Scope(StrEnum):
    """Positions that an edit acts on."""

    CLOSING = "closing"
    THINKING = "thinking"
    PROMPT = "prompt"
    ALL = "all"

    @classmethod
    def parse(cls, text: str) -> "Scope":
        """Reads a scope's name; raises EditError on anything else."""
        if text not in set(cls):
            raise EditError(f"scope={text!r}: expected one of {', '.join(cls)}.")
        return cls(text)

    def positions(self, transcript: TokenizedTranscript) -> slice:
        """Its positions in a transcript, up to the final one."""
        return slice(0, transcript.final + 1) if self is Scope.ALL else transcript.span(Span(self.value))


@dataclass(frozen=True, kw_only=True, order=True)
class HeadRef:
    """One query head, printed L12H5."""

    layer: int
    """Layer index from 0."""
    head: int
    """Query head index from 0."""

    @classmethod
    def parse(cls, text: str) -> "HeadRef":
        """Reads `L12H5`; raises EditError on anything else."""
        found = re.fullmatch(r"L(\d+)H(\d+)", text)
        if found is None:
            raise EditError(f"{text!r} names no head. Expected layer and query head, such as 'L12H5'.")
        return cls(layer=int(found[1]), head=int(found[2]))

    def check(self, model: LensModel) -> None:
        """Raises EditError if the model lacks this head."""
        shape = model.shape
        if 0 <= self.layer < shape.n_layers and self.layer not in shape.attention_layers:
            raise EditError(
                f"Layer {self.layer} of {model.name!r} has no heads: it mixes tokens in another way. Layers with "
                f"heads: {', '.join(map(str, shape.attention_layers))}."
            )
        if not (0 <= self.layer < shape.n_layers and 0 <= self.head < shape.n_heads):
            raise EditError(
                f"{model.name!r} has no head {self}: it has layers 0 to {shape.n_layers - 1} with query heads 0 to "
                f"{shape.n_heads - 1}. Is the edit from another model?"
            )

    def __str__(self) -> str:
        """Such as `L12H5`."""
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, kw_only=True)
class HeadEdit:
    """One thing done to some heads: `hook_z <- factor x hook_z + values`."""

    heads: tuple[HeadRef, ...]
    """Distinct query heads."""
    kind: EditKind = EditKind.ZERO
    """What is done."""
    factor: float = 0.0
    """What `hook_z` is multiplied by; 0 for every kind but `scale`."""
    values: HeadValues = ()
    """[head][position][d_head] what `hook_z` is set to by `mean`, `resample` and `patch`; empty for the other kinds."""
    scope: Scope = Scope.ALL
    """Where it acts."""

    def __post_init__(self) -> None:
        """Refuses an edit that names a head twice, or whose numbers do not belong to its kind."""
        _refuse_doubled(self.heads, "one edit")
        if not math.isfinite(self.factor) or (self.factor != 0 and self.kind is not EditKind.SCALE):
            raise EditError(f"factor={self.factor} of kind {str(self.kind)!r}: only 'scale' has one, and it is finite.")
        sets = self.kind in (EditKind.MEAN, EditKind.RESAMPLE, EditKind.PATCH)
        if len(self.values) != (len(self.heads) if sets else 0):
            raise EditError(
                f"An edit of kind {str(self.kind)!r} of {len(self.heads)} heads has values for {len(self.values)}. "
                "Give [head][position][d_head] for 'mean', 'resample' and 'patch', none for 'zero' and 'scale'."
            )
        if sets and not np.isfinite(self.value_array()).all():
            raise EditError(f"Values of kind {str(self.kind)!r} hold NaN or infinity. Load the model in float32.")

    @property
    def edits(self) -> "tuple[HeadEdit, ...]":
        """Itself: what a plan has, an edit has too."""
        return (self,)

    def value_array(self) -> Float[np.ndarray, "head position d_head"]:
        """The values as an array; raises EditError where their lengths differ."""
        lengths = {len(rows) for rows in self.values} | {0}
        if len(lengths) > 2 or len({len(row) for rows in self.values for row in rows}) > 1:
            raise EditError("Values differ in length between heads or positions. Give [head][position][d_head].")
        return np.asarray(self.values, dtype=np.float32)

    def check(self, model: LensModel) -> None:
        """Raises EditError if the model lacks one of the heads, or its heads are of another size."""
        for ref in self.heads:
            ref.check(model)
        if self.values and len(self.values[0][0]) != model.shape.d_head:
            raise EditError(
                f"The edit's values have {len(self.values[0][0])} numbers a head, but heads of {model.name!r} have "
                f"{model.shape.d_head}. Is the edit from another model?"
            )

    def hooks(self, model: LensModel, rows: Sequence[TokenizedTranscript], *, start: int = 0) -> Context:
        """Acts on every pass over these rows inside the context, as `edited_hooks` does."""
        return edited_hooks(model, self, rows, start=start)

    def on(self, heads: Iterable[HeadRef]) -> "HeadEdit":
        """The same done to other heads; raises EditError where values belong to the heads they have."""
        if self.values:
            raise EditError(
                f"An edit of kind {str(self.kind)!r} holds values of its own heads. Make one for the others."
            )
        return replace(self, heads=tuple(heads))

    def to_dict(self) -> dict[str, object]:
        """JSON-ready: heads as text, kind, factor, values, scope."""
        return {
            "heads": [str(h) for h in self.heads],
            "kind": str(self.kind),
            "factor": self.factor,
            "values": [[list(row) for row in rows] for rows in self.values],
            "scope": str(self.scope),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "HeadEdit":
        """Reads what `to_dict` wrote; raises EditError where a field is missing or wrong."""
        heads, factor, kind = data.get("heads"), data.get("factor", 0.0), str(data.get("kind"))
        values = data.get("values", [])
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not isinstance(heads, list) or not isinstance(values, list) or not number or kind not in set(EditKind):
            raise EditError(
                f"No edit can be read from {data!r}. Expected 'heads' (a list), 'kind' (one of {', '.join(EditKind)}), "
                "'factor', 'values' and 'scope'."
            )
        try:
            rows = tuple(tuple(tuple(float(x) for x in row) for row in head) for head in values)
        except (TypeError, ValueError) as error:
            raise EditError(
                f"No values can be read from an edit: {error}. Expected [head][position][d_head]."
            ) from error
        return cls(
            heads=tuple(HeadRef.parse(str(h)) for h in heads),
            kind=EditKind(kind),
            factor=float(str(factor)),
            values=rows,
            scope=Scope.parse(str(data.get("scope", "all"))),
        )

    def __repr__(self) -> str:
        """One line: what, how many heads, where."""
        what = f"scale by {self.factor:g}" if self.kind is EditKind.SCALE else str(self.kind)
        return f"HeadEdit({what}, {len(self.heads)} heads, scope {self.scope})"


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """Several edits applied together; no head is edited by two of them."""

    edits: tuple[HeadEdit, ...]
    """The edits."""

    def __post_init__(self) -> None:
        """Refuses a plan in which two edits name the same head."""
        _refuse_doubled(self.heads, "one plan")

    @property
    def heads(self) -> tuple[HeadRef, ...]:
        """Every edited head."""
        return tuple(chain.from_iterable(edit.heads for edit in self.edits))

    @property
    def scope(self) -> Scope:
        """The scope of all edits; raises EditError where they differ."""
        scopes = {edit.scope for edit in self.edits}
        if len(scopes) > 1:
            raise EditError(f"The edits of the plan have scopes {', '.join(sorted(scopes))}. Apply it by edited_hooks.")
        return scopes.pop() if scopes else Scope.ALL

    def check(self, model: LensModel) -> None:
        """Raises EditError if one of the edits does not fit the model."""
        for edit in self.edits:
            edit.check(model)

    def hooks(self, model: LensModel, rows: Sequence[TokenizedTranscript], *, start: int = 0) -> Context:
        """Acts on every pass over these rows inside the context, as `edited_hooks` does."""
        return edited_hooks(model, self, rows, start=start)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {"edits": [edit.to_dict() for edit in self.edits]}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "EditPlan":
        """Reads what `to_dict` wrote, or a single edit's; raises EditError where it is neither."""
        edits = data.get("edits", [data])
        if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
            raise EditError(f"No plan can be read from {data!r}. Expected 'edits', a list of edits.")
        return cls(edits=tuple(HeadEdit.from_dict(edit) for edit in edits))

    def __repr__(self) -> str:
        """One line: its edits."""
        return f"EditPlan({', '.join(repr(edit) for edit in self.edits)})"


def zero(heads: Iterable[HeadRef], *, scope: Scope | str = Scope.ALL) -> HeadEdit:
    """Zero ablation of heads.

    Args:
        heads: query heads.
        scope: where; generation needs "all".

    Returns:
        The edit.

    Example:
        >>> from cliffscope.heads.edits import HeadRef, zero
        >>> zero([HeadRef(layer=4, head=5)]).to_dict()["heads"]
        ['L4H5']
    """
    return HeadEdit(heads=tuple(heads), scope=Scope.parse(scope))


def scale(heads: Iterable[HeadRef], factor: float, *, scope: Scope | str = Scope.ALL) -> HeadEdit:
    """Multiplies `hook_z` of heads by a factor; see `zero`."""
    return HeadEdit(heads=tuple(heads), kind=EditKind.SCALE, factor=factor, scope=Scope.parse(scope))


def compose(*edits: HeadEdit | EditPlan) -> EditPlan:
    """Several edits as one plan; raises EditError where two of them edit the same head."""
    return EditPlan(edits=tuple(chain.from_iterable(edit.edits for edit in edits)))


@contextmanager
def edited_weights(model: LensModel, edit: HeadEdit | EditPlan) -> Iterator[None]:
    """Applies an edit to the weights for the length of the context.

    Args:
        model: the model. Its bridge shares the weights and is edited too, but for a bias that the plain output
            projection has not had: fixed values need one.
        edit: with scope `all`, and one value a head where it has values.

    Raises:
        EditError: another scope, values that differ by position, a head that the model lacks, or weights that are not
            floating point.
    """
    _check_everywhere(model, edit)
    undo: list[Callable[[], object]] = []
    try:
        with torch.no_grad():
            for one in edit.edits:
                for i, ref in enumerate(one.heads):
                    _edit_weights(model, one, ref, one.values[i][0] if one.values else (), undo)
        yield
    finally:
        with torch.no_grad():
            for step in reversed(undo):
                step()


@contextmanager
def edited_everywhere(model: LensModel, edit: HeadEdit | EditPlan) -> Iterator[None]:
    """Applies an edit at all positions: in the weights, or by hooks where these are quantised or offloaded.

    Args:
        model: the model.
        edit: with scope `all`, and one value a head where it has values.

    Raises:
        EditError: another scope, values that differ by position, or a head that the model lacks.
    """
    _check_everywhere(model, edit)
    if all(model.holds_weights(ref.layer) for ref in edit.heads):
        with edited_weights(model, edit):
            yield
        return
    with ExitStack() as stack:
        for one in edit.edits:
            for layer in sorted({ref.layer for ref in one.heads}):
                stack.enter_context(model.head_hook(layer, _fixed(one, layer)))
        yield


def _fixed(edit: HeadEdit, layer: int) -> Callable[[Float[Tensor, "batch pos head d_head"]], None]:
    """The change of one layer's heads, the same at every position of every row."""
    mine = [i for i, ref in enumerate(edit.heads) if ref.layer == layer]
    heads = [edit.heads[i].head for i in mine]
    values = torch.tensor([edit.values[i][0] for i in mine]) if edit.values else torch.zeros(())

    def change(z: Tensor) -> None:
        z[:, :, heads] = z[:, :, heads] * edit.factor + values.to(z)

    return change


def _check_everywhere(model: LensModel, edit: HeadEdit | EditPlan) -> None:
    edit.check(model)
    for one in edit.edits:
        if one.scope is not Scope.ALL:
            raise EditError(
                f"Scope {one.scope} cannot be held in weights, which act at all positions. Use edited_hooks."
            )
        if one.values and len(one.values[0]) > 1:
            raise EditError("Values that differ by position cannot be held in weights. Use edited_hooks.")


@contextmanager
def edited_hooks(
    model: LensModel, edit: HeadEdit | EditPlan, rows: Sequence[TokenizedTranscript], *, start: int = 0
) -> Iterator[None]:
    """Applies an edit to `hook_z` in every forward pass inside the context.

    Args:
        model: the model.
        edit: any scope.
        rows: the transcript of each row of the batch, right-padded; its scope's positions are edited.
        start: position in the transcripts at which the batch starts, where a cache holds what comes before.

    Raises:
        EditError: a head that the model lacks, or values for another number of positions than the scope has.
    """
    edit.check(model)
    with ExitStack() as stack:
        for one in edit.edits:
            spans = [one.scope.positions(row) for row in rows]
            values = torch.from_numpy(one.value_array()).to(model.device) if one.values else None
            if values is not None:
                for span in spans:
                    _check_positions(values.shape[1], span.stop - span.start)
            for layer in sorted({ref.layer for ref in one.heads}):
                mine = [i for i, ref in enumerate(one.heads) if ref.layer == layer]
                heads = [one.heads[i].head for i in mine]
                own = None if values is None else values[mine].transpose(0, 1)
                changes = [(row, span, heads, own) for row, span in enumerate(spans)]
                stack.enter_context(model.head_hook(layer, _changer(changes, one.factor, start)))
        yield


def change_heads(
    z: Float[Tensor, "position head d_head"], factor: float, values: Float[Tensor, "given head d_head"] | None
) -> Float[Tensor, "position head d_head"]:
    """`factor x z + values`, with one value for all positions or one for each; raises EditError for another number."""
    if values is None:
        return z * factor
    _check_positions(len(values), len(z))
    return z * factor + values.to(z.dtype)


def _check_positions(given: int, there: int) -> None:
    if given not in (1, there):
        raise EditError(
            f"Values for {given} positions were given where the scope has {there}. Take a donor of the same length, or "
            "the mean."
        )


def _changer(
    changes: list[tuple[int, slice, list[int], Tensor | None]], factor: float, start: int
) -> Callable[[Float[Tensor, "batch pos head d_head"]], None]:
    def change(z: Tensor) -> None:
        for row, span, heads, values in changes:
            where, behind = _shifted(span, start), max(0, start - span.start)
            part = z[row, where][:, heads]
            each = values if values is None or len(values) == 1 else values[behind : behind + len(part)]
            z[row, where, heads] = change_heads(part, factor, each)

    return change


def _shifted(where: slice, start: int) -> slice:
    return slice(max(0, where.start - start), max(0, where.stop - start))


def _edit_weights(
    model: LensModel, edit: HeadEdit, ref: HeadRef, value: tuple[float, ...], undo: list[Callable[[], object]]
) -> None:
    """Edits one head in the weights; how to undo it is noted before anything changes."""
    projection, size = model.output_projection(ref.layer), model.shape.d_head
    if not model.holds_weights(ref.layer):
        what = "offloaded" if projection.weight.is_meta else f"quantised, of dtype {projection.weight.dtype}, and"
        raise EditError(
            f"Layer {ref.layer}: weights that are {what} cannot be edited in place. Use edited_everywhere or "
            "edited_hooks, or load the model unquantised and whole."
        )
    columns = projection.weight[:, ref.head * size : (ref.head + 1) * size]
    kept = columns.clone()
    undo.append(lambda: columns.copy_(kept))
    if value:
        written = columns @ torch.tensor(value, dtype=columns.dtype, device=columns.device)
        before = projection.bias
        undo.append(lambda: setattr(projection, "bias", before))
        projection.bias = nn.Parameter(written if before is None else before + written, requires_grad=False)
    columns.mul_(edit.factor)


def _refuse_doubled(heads: Sequence[HeadRef], where: str) -> None:
    doubled = {str(h) for h, n in Counter(heads).items() if n > 1}
    if doubled:
        raise EditError(f"{', '.join(sorted(doubled))} edited twice in {where}. Name each head once.")
