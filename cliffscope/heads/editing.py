"""How does an edit act on a model?

1. In the weights (scope `all`): the heads' columns of the output projection are scaled, and what fixed values would
   write becomes an output bias.
2. By hooks (any scope), at the positions that each row of the batch has in the scope.

Both compute `hook_z <- factor x hook_z + values` and undo themselves, bit for bit, on any exception. An edit that
preserves norms then scales all heads of the layer by a number that depends on what stands at the position, so that only
hooks can do it. Knows nothing of the kinds of edits, nor of readouts and effects.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from cliffscope.errors import EditError
from cliffscope.heads.edits import EditPlan, HeadEdit, HeadRef, Scope
from cliffscope.model.load import LensModel
from cliffscope.transcripts.transcript import TokenizedTranscript


@contextmanager
def edited_weights(model: LensModel, edit: HeadEdit | EditPlan) -> Iterator[None]:
    """Applies an edit to the weights for the length of the context.

    Args:
        model: the model. Its bridge shares the weights and is edited too, but for a bias that the plain output
            projection has not had: fixed values need one.
        edit: with scope `all`, and one value a head where it has values.

    Raises:
        EditError: another scope, values that differ by position, norms that are preserved, a head that the model lacks,
            or weights that are not floating point.
    """
    _check_everywhere(model, edit)
    check_constant(edit)
    undo: list[Callable[[], object]] = []
    try:
        with torch.no_grad():
            for one in edit.edits:
                for i, ref in enumerate(one.heads):
                    value = None if one.values is None else torch.tensor(one.values[i, 0])
                    _edit_weights(model, ref, one.factor, value, undo)
        yield
    finally:
        with torch.no_grad():
            for step in reversed(undo):
                step()


@contextmanager
def edited_everywhere(model: LensModel, edit: HeadEdit | EditPlan) -> Iterator[None]:
    """Applies an edit at all positions: in the weights, or by hooks where these cannot hold it.

    Weights that are quantised or offloaded are left as they are, and no weights preserve norms.

    Args:
        model: the model.
        edit: with scope `all`, and one value a head where it has values.

    Raises:
        EditError: another scope, values that differ by position, or a head that the model lacks.
    """
    _check_everywhere(model, edit)
    constant = not any(one.preserve_norm for one in edit.edits)
    if constant and all(model.holds_weights(ref.layer) for ref in edit.heads):
        with edited_weights(model, edit):
            yield
        return
    with ExitStack() as stack:
        for one in edit.edits:
            for layer in sorted({ref.layer for ref in one.heads}):
                stack.enter_context(model.head_hook(layer, _fixed(one, layer), preserve_norm=one.preserve_norm))
        yield


def check_constant(edit: HeadEdit | EditPlan) -> None:
    """Raises EditError where an edit preserves norms, which no fixed weights do."""
    for one in edit.edits:
        if one.preserve_norm:
            raise EditError(
                f"{one!r} cannot be held in weights: it scales the attention output by a number of its own at every "
                "position, which depends on what stands there. Use edited_hooks, or generate under the edit with "
                "roll_out(edit=...); for weights, take the edit without preserve_norm."
            )


def _fixed(edit: HeadEdit, layer: int) -> Callable[[Float[Tensor, "batch pos head d_head"]], None]:
    """The change of one layer's heads, the same at every position of every row."""
    indices = [i for i, ref in enumerate(edit.heads) if ref.layer == layer]
    heads = [edit.heads[i].head for i in indices]
    values = torch.zeros(()) if edit.values is None else torch.tensor(edit.values[indices, 0])

    def change(z: Float[Tensor, "batch pos head d_head"]) -> None:
        z[:, :, heads] = z[:, :, heads] * edit.factor + values.to(z)

    return change


def _check_everywhere(model: LensModel, edit: HeadEdit | EditPlan) -> None:
    edit.check(model)
    for one in edit.edits:
        if one.scope is not Scope.ALL:
            raise EditError(
                f"Scope {one.scope} cannot be held in weights, which act at all positions. Use edited_hooks."
            )
        if one.values is not None and one.values.shape[1] > 1:
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
            # Layers that `only_blocks` has cut off above do not run, so that there is nothing to edit in them.
            for layer in sorted({ref.layer for ref in one.heads if ref.layer < len(model.blocks)}):
                change = layer_change(model, [one] * len(rows), rows, layer, start)
                stack.enter_context(model.head_hook(layer, change, preserve_norm=one.preserve_norm))
        yield


def layer_change(
    model: LensModel, edits: Sequence[HeadEdit], rows: Sequence[TokenizedTranscript], layer: int, start: int
) -> Callable[[Float[Tensor, "batch pos head d_head"]], None]:
    """What edits do to a layer's `hook_z`, to be written into it; norms are the caller's to preserve.

    Args:
        model: the model.
        edits: one a row, with the same factor.
        rows: the transcript of each row of the batch.
        layer: the layer.
        start: position in the transcripts at which the batch starts.

    Raises:
        EditError: values for another number of positions than the scope has.
    """
    added = {id(edit): _added(model, edit, layer) for edit in edits}
    changes = []
    for row, (edit, transcript) in enumerate(zip(edits, rows, strict=True)):
        span, values = edit.scope.positions(transcript), added[id(edit)]
        if values is not None:
            _check_positions(len(values), span.stop - span.start)
        heads = [ref.head for ref in edit.heads if ref.layer == layer]
        changes.append((row, span, heads, values))
    return _changer(changes, edits[0].factor if edits else 0.0, start)


def _added(model: LensModel, edit: HeadEdit, layer: int) -> Float[Tensor, "value_pos head d_head"] | None:
    if edit.values is None:
        return None
    indices = [i for i, ref in enumerate(edit.heads) if ref.layer == layer]
    return rearrange(torch.tensor(edit.values[indices], device=model.device), "head pos d_head -> pos head d_head")


def change_heads(
    z: Float[Tensor, "pos head d_head"], factor: float, values: Float[Tensor, "value_pos head d_head"] | None
) -> Float[Tensor, "pos head d_head"]:
    """`factor x z + values`, with one value for all positions or one for each; raises EditError for another number."""
    if values is None:
        return z * factor
    _check_positions(len(values), len(z))
    return z * factor + values.to(z.dtype)


def _check_positions(n_values: int, n_positions: int) -> None:
    if n_values not in (1, n_positions):
        raise EditError(
            f"Values for {n_values} positions were given where the scope has {n_positions}. Take a donor of the same "
            "length, or the mean."
        )


def _changer(
    changes: list[tuple[int, slice, list[int], Float[Tensor, "value_pos head d_head"] | None]],
    factor: float,
    start: int,
) -> Callable[[Float[Tensor, "batch pos head d_head"]], None]:
    def change(z: Float[Tensor, "batch pos head d_head"]) -> None:
        for row, span, heads, values in changes:
            where, behind = _shifted(span, start), max(0, start - span.start)
            part = z[row, where][:, heads]
            each = values if values is None or len(values) == 1 else values[behind : behind + len(part)]
            z[row, where, heads] = change_heads(part, factor, each)

    return change


def _shifted(where: slice, start: int) -> slice:
    return slice(max(0, where.start - start), max(0, where.stop - start))


def _edit_weights(
    model: LensModel,
    ref: HeadRef,
    factor: float,
    value: Float[Tensor, " d_head"] | None,
    undo: list[Callable[[], object]],
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
    before = columns.clone()
    undo.append(lambda: columns.copy_(before))
    if value is not None:
        written, bias = columns @ value.to(columns), projection.bias
        undo.append(lambda: setattr(projection, "bias", bias))
        projection.bias = nn.Parameter(written if bias is None else bias + written, requires_grad=False)
    columns.mul_(factor)
