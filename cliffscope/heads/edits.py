"""What is done to which heads?

An edit is data: a kind, heads, a scope, a factor. It is applied to the weights (scope `all`: the heads' columns of the
output projection are scaled, which is the same as scaling their `hook_z`) or by hooks (any scope). Both undo
themselves, bit for bit, on any exception. Knows nothing of probes and effects.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum

import torch
from torch import Tensor

from cliffscope.errors import EditError
from cliffscope.models import LensModel
from cliffscope.transcripts.transcript import Span, TokenizedTranscript


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

    def __str__(self) -> str:
        """Such as `L12H5`."""
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, kw_only=True)
class HeadEdit:
    """Scales `hook_z` of some heads; factor 0 is zero ablation."""

    heads: tuple[HeadRef, ...]
    """Distinct query heads."""
    factor: float = 0.0
    """What `hook_z` is multiplied by."""
    scope: Scope = Scope.ALL
    """Where it acts."""

    def __post_init__(self) -> None:
        """Refuses an edit that names a head twice."""
        doubled = {str(h) for h in self.heads if self.heads.count(h) > 1}
        if doubled:
            raise EditError(f"{', '.join(sorted(doubled))} edited twice in one edit. Name each head once.")

    def check(self, model: LensModel) -> None:
        """Raises EditError if the model lacks one of the heads."""
        shape = model.shape
        for ref in self.heads:
            if not (0 <= ref.layer < shape.n_layers and 0 <= ref.head < shape.n_heads):
                raise EditError(
                    f"{model.name!r} has no head {ref}: it has layers 0 to {shape.n_layers - 1} with query heads 0 to "
                    f"{shape.n_heads - 1}. Is the edit from another model?"
                )

    def to_dict(self) -> dict[str, object]:
        """JSON-ready: heads as text, factor, scope."""
        return {**asdict(self), "heads": [str(h) for h in self.heads], "scope": str(self.scope)}

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> "HeadEdit":
        """Reads what `to_dict` wrote; raises EditError where a field is missing or wrong."""
        heads, factor, scope = data.get("heads"), data.get("factor", 0.0), data.get("scope", "all")
        number = isinstance(factor, int | float) and math.isfinite(factor)
        if not isinstance(heads, list) or not number or str(scope) not in set(Scope):
            raise EditError(f"No edit can be read from {data!r}. Expected 'heads' (a list), 'factor' and 'scope'.")
        return cls(
            heads=tuple(HeadRef.parse(str(h)) for h in heads), factor=float(str(factor)), scope=Scope(str(scope))
        )

    def __repr__(self) -> str:
        """One line: what, how many heads, where."""
        what = "zero" if self.factor == 0 else f"scale by {self.factor:g}"
        return f"HeadEdit({what}, {len(self.heads)} heads, scope {self.scope})"


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
    return HeadEdit(heads=tuple(heads), factor=factor, scope=Scope.parse(scope))


@contextmanager
def edited_weights(model: LensModel, edit: HeadEdit) -> Iterator[None]:
    """Applies an edit to the weights for the length of the context.

    Args:
        model: the model; its bridge shares the weights and is edited too.
        edit: with scope `all`.

    Raises:
        EditError: another scope, a head that the model lacks, or weights that are not floating point.
    """
    edit.check(model)
    if edit.scope is not Scope.ALL:
        raise EditError(f"Scope {edit.scope} cannot be held in weights, which act at all positions. Use edited_hooks.")
    size, kept = model.shape.d_head, []
    try:
        with torch.no_grad():
            for ref in edit.heads:
                weight = model.output_projection(ref.layer).weight
                if not weight.is_floating_point():
                    raise EditError(
                        f"Layer {ref.layer}: weights of dtype {weight.dtype} cannot be edited. Use edited_hooks."
                    )
                columns = weight[:, ref.head * size : (ref.head + 1) * size]
                kept.append((columns, columns.clone()))
                columns.mul_(edit.factor)
        yield
    finally:
        with torch.no_grad():
            for columns, values in reversed(kept):
                columns.copy_(values)


@contextmanager
def edited_hooks(model: LensModel, edit: HeadEdit, positions: Sequence[slice]) -> Iterator[None]:
    """Applies an edit to `hook_z` in every forward pass inside the context.

    Args:
        model: the model.
        edit: any scope.
        positions: for each row of the batch, the positions that the edit acts on.

    Raises:
        EditError: a head that the model lacks.
    """
    edit.check(model)

    def changer(heads: list[int]) -> Callable[[Tensor], None]:
        def change(z: Tensor) -> None:
            for row, where in enumerate(positions):
                z[row, where, heads] *= edit.factor

        return change

    with ExitStack() as stack:
        for layer in sorted({ref.layer for ref in edit.heads}):
            heads = [ref.head for ref in edit.heads if ref.layer == layer]
            stack.enter_context(model.head_hook(layer, changer(heads)))
        yield
