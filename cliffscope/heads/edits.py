"""What is done to which heads?

An edit is data: heads, a scope, and the numbers of one formula on a head's output,
`hook_z <- factor x hook_z + values`; several edits make a plan. An edit may also preserve the norm of the layer's
attention output, as the paper's code does (arXiv 2510.06036). The kind is a label that says where the numbers come
from: nothing acts on it, so that a new kind needs no code. How an edit acts on a model is in editing.py; this file
knows a model by its sizes alone.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain

import numpy as np
from jaxtyping import Float32

from cliffscope.errors import EditError
from cliffscope.model.load import LensModel
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

HeadValues = Float32[np.ndarray, "head position d_head"]
"""What is added to `hook_z`; one position stands for all of the scope, more are matched one by one."""

Context = AbstractContextManager[None]


class EditKind(StrEnum):
    """Kinds of the package's own methods; other methods label their edits with names of their own."""

    ZERO = "zero"
    SCALE = "scale"
    MEAN = "mean"
    RESAMPLE = "resample"
    PATCH = "patch"
    NORM_PRESERVING = "norm-preserving"


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
        """Its positions in a transcript; `all` includes the answer where the transcript holds one."""
        return slice(0, transcript.n_pos) if self is Scope.ALL else transcript.span(Span(self.value))


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
        numbers = re.fullmatch(r"L(\d+)H(\d+)", text)
        if numbers is None:
            raise EditError(f"{text!r} names no head. Expected layer and query head, such as 'L12H5'.")
        return cls(layer=int(numbers[1]), head=int(numbers[2]))

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


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadEdit:
    """One thing done to some heads: `hook_z <- factor x hook_z + values`."""

    heads: tuple[HeadRef, ...]
    """Distinct query heads."""
    kind: str = EditKind.ZERO
    """Name of what is done: an `EditKind`, or the label of another method."""
    factor: float = 0.0
    """What `hook_z` is multiplied by; 0 for every `EditKind` but `scale` and `norm-preserving`."""
    values: HeadValues | None = None
    """[head, position, d_head] fp32, read-only: what is added; None adds nothing."""
    preserve_norm: bool = False
    """Whether all heads of an edited layer are then scaled, position by position, back to their norm before."""
    scope: Scope = Scope.ALL
    """Where it acts."""

    def __post_init__(self) -> None:
        """Refuses an edit that names a head twice, or whose numbers do not belong to its kind."""
        _refuse_doubled(self.heads, "one edit")
        if not math.isfinite(self.factor):
            raise EditError(f"factor={self.factor} of kind {str(self.kind)!r}: expected a finite number.")
        if self.values is not None:
            values = _checked_values(self.values, len(self.heads), str(self.kind)) if self.heads else None
            object.__setattr__(self, "values", values)
        if self.kind not in set(EditKind):
            return
        sets = self.kind in (EditKind.MEAN, EditKind.RESAMPLE, EditKind.PATCH)
        if self.factor != 0 and self.kind not in (EditKind.SCALE, EditKind.NORM_PRESERVING):
            raise EditError(
                f"factor={self.factor} of kind {str(self.kind)!r}: of the package's kinds only 'scale' and "
                "'norm-preserving' have one."
            )
        if self.preserve_norm is not (self.kind == EditKind.NORM_PRESERVING):
            raise EditError(
                f"preserve_norm={self.preserve_norm} of kind {str(self.kind)!r}: of the package's kinds "
                "'norm-preserving' alone preserves norms. Make it by zero or scale with preserve_norm=True."
            )
        if self.heads and sets is (self.values is None):
            raise EditError(
                f"An edit of kind {str(self.kind)!r} {'needs' if sets else 'takes no'} values. Give [head, position, "
                "d_head] for 'mean', 'resample' and 'patch', none for 'zero', 'scale' and 'norm-preserving'."
            )

    @property
    def edits(self) -> "tuple[HeadEdit, ...]":
        """Itself: what a plan has, an edit has too."""
        return (self,)

    def check(self, model: LensModel) -> None:
        """Raises EditError if the model lacks one of the heads, or its heads are of another size."""
        for ref in self.heads:
            ref.check(model)
        if self.values is not None and self.values.shape[2] != model.shape.d_head:
            raise EditError(
                f"The edit's values have {self.values.shape[2]} numbers a head, but heads of {model.name!r} have "
                f"{model.shape.d_head}. Is the edit from another model?"
            )

    def hooks(self, model: LensModel, rows: Sequence[TokenizedTranscript], *, start: int = 0) -> Context:
        """Acts on every pass over these rows inside the context, as `edited_hooks` does."""
        from cliffscope.heads.editing import edited_hooks

        return edited_hooks(model, self, rows, start=start)

    def on(self, heads: Iterable[HeadRef]) -> "HeadEdit":
        """The same done to other heads; raises EditError where values belong to the heads they have."""
        if self.values is not None:
            raise EditError(
                f"An edit of kind {str(self.kind)!r} holds values of its own heads. Make one for the others."
            )
        return replace(self, heads=tuple(heads))

    def to_dict(self) -> dict[str, object]:
        """JSON-ready: heads as text, kind, factor, values, preserve_norm, scope."""
        return {
            "heads": [str(h) for h in self.heads],
            "kind": str(self.kind),
            "factor": self.factor,
            "values": [] if self.values is None else self.values.tolist(),
            "preserve_norm": self.preserve_norm,
            "scope": str(self.scope),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "HeadEdit":
        """Reads what `to_dict` wrote; raises EditError where a field is missing or wrong."""
        heads, kind, values = data.get("heads"), data.get("kind"), data.get("values", [])
        # A label says nothing about numbers, so that those of an unknown kind must be there.
        factor = data.get("factor", 0.0 if kind in set(EditKind) else None)
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        preserve = data.get("preserve_norm", kind == EditKind.NORM_PRESERVING)
        flags = number and isinstance(preserve, bool)
        if not isinstance(heads, list) or not isinstance(values, list) or not isinstance(kind, str) or not flags:
            raise EditError(
                f"No edit can be read from {data!r}. Expected 'heads' (a list), 'kind' ({', '.join(EditKind)}, or "
                "another name with its 'factor'), 'values', 'preserve_norm' (true or false) and 'scope'."
            )
        return cls(
            heads=tuple(HeadRef.parse(str(h)) for h in heads),
            kind=EditKind(kind) if kind in set(EditKind) else kind,
            factor=float(str(factor)),
            values=_checked_values(values, len(heads), kind) if values else None,
            preserve_norm=bool(preserve),
            scope=Scope.parse(str(data.get("scope", "all"))),
        )

    def __eq__(self, other: object) -> bool:
        """Whether both do the same to the same heads, values compared number by number."""
        return isinstance(other, HeadEdit) and self._key() == other._key()

    def __hash__(self) -> int:
        """Of everything that equality compares."""
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        values = None if self.values is None else (self.values.shape, self.values.tobytes())
        return self.heads, str(self.kind), self.factor, values, self.preserve_norm, self.scope

    def __repr__(self) -> str:
        """One line: what, how many heads, where."""
        zeroing = self.kind in (EditKind.ZERO, EditKind.NORM_PRESERVING) and self.factor == 0
        factor = "" if zeroing or self.values is not None else f" by {self.factor:g}"
        return f"HeadEdit({self.kind}{factor}, {len(self.heads)} heads, scope {self.scope})"


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """Several edits applied together; no head is edited by two of them."""

    edits: tuple[HeadEdit, ...]
    """The edits."""

    def __post_init__(self) -> None:
        """Refuses a plan in which two edits name the same head, or change the layer of one that preserves norms."""
        _refuse_doubled(self.heads, "one plan")
        layers = [{ref.layer for ref in edit.heads} for edit in self.edits]
        for i, edit in enumerate(self.edits):
            shared = layers[i] & set[int]().union(*layers[:i], *layers[i + 1 :])
            if edit.preserve_norm and shared:
                raise EditError(
                    f"{edit!r} preserves the norm of layer {min(shared)}, in which another edit of the plan changes "
                    "heads, so that there are two norms to preserve. Edit all heads of a layer in one edit."
                )

    @property
    def heads(self) -> tuple[HeadRef, ...]:
        """Heads of all edits, in their order."""
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
        from cliffscope.heads.editing import edited_hooks

        return edited_hooks(model, self, rows, start=start)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready: the edits, each as `HeadEdit.to_dict` has it."""
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


def zero(heads: Iterable[HeadRef], *, scope: Scope | str = Scope.ALL, preserve_norm: bool = False) -> HeadEdit:
    """Zero ablation of heads.

    Args:
        heads: query heads.
        scope: where.
        preserve_norm: scale what the other heads of the layer write, position by position, until `hook_z` of the layer
            has its norm before the edit: the ablation of the paper's code, which takes the norm over the whole batch.
            Off by default: it changes heads that were not named, and weights cannot hold it.

    Returns:
        The edit.

    Source:
        Norms are preserved in the code of arXiv 2510.06036.

    Example:
        >>> from cliffscope.heads.edits import HeadRef, zero
        >>> zero([HeadRef(layer=4, head=5)]).to_dict()["heads"]
        ['L4H5']
    """
    kind = EditKind.NORM_PRESERVING if preserve_norm else EditKind.ZERO
    return HeadEdit(heads=tuple(heads), kind=kind, preserve_norm=preserve_norm, scope=Scope.parse(scope))


def scale(
    heads: Iterable[HeadRef], factor: float, *, scope: Scope | str = Scope.ALL, preserve_norm: bool = False
) -> HeadEdit:
    """Multiplies `hook_z` of heads by a factor; see `zero`."""
    kind = EditKind.NORM_PRESERVING if preserve_norm else EditKind.SCALE
    where = Scope.parse(scope)
    return HeadEdit(heads=tuple(heads), kind=kind, factor=factor, preserve_norm=preserve_norm, scope=where)


def compose(*edits: HeadEdit | EditPlan) -> EditPlan:
    """Several edits as one plan; raises EditError where two of them edit the same head."""
    return EditPlan(edits=tuple(chain.from_iterable(edit.edits for edit in edits)))


def _checked_values(values: object, n_heads: int, kind: str) -> HeadValues:
    """A read-only fp32 copy; raises EditError unless it is finite and [head, position, d_head]."""
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise EditError(
            f"Values of kind {kind!r} are no array of numbers: {error}. Give [head, position, d_head], as many "
            "positions and numbers for each head."
        ) from error
    if array.ndim != 3 or len(array) != n_heads or not array.size:
        raise EditError(
            f"Values of kind {kind!r} have shape {array.shape}; {n_heads} heads need [head, position, d_head] with "
            "one position, or one for each of the scope."
        )
    if not np.isfinite(array).all():
        raise EditError(f"Values of kind {kind!r} hold NaN or infinity. Load the model in float32.")
    array.setflags(write=False)
    return array


def _refuse_doubled(heads: Sequence[HeadRef], where: str) -> None:
    doubled = {str(h) for h, n in Counter(heads).items() if n > 1}
    if doubled:
        raise EditError(f"{', '.join(sorted(doubled))} edited twice in {where}. Name each head once.")
