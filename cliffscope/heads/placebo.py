"""Would any displacement of the same size do what an edit of heads does?

1. An edit moves a layer's attention output, at each position of its scope, by what it changes in `hook_z`, written
   through the output projection.
2. The placebo leaves the heads alone and moves that output as far at the same positions, along one random direction
   for each edited layer, the same for all transcripts and positions.
3. Distances are those of the placebo's own pass: in a later layer, they follow from what was moved in an earlier one,
   as they do under the edit.

An effect that random directions have too comes from the size of the displacement, and not from these heads. Source: the
norm-matched placebo of TransformerLens (`tools.analysis.interchange`), a random subspace in which an activation is
moved as far as a reference moves it. There the sign follows the reference, which ties the placebo to the edit in small
models; here it is left to chance, since what is claimed of heads has a sign. Knows no ranks and no random sets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float32
from torch import Tensor, nn

from cliffscope.heads.branches import Branch, Change
from cliffscope.heads.editing import layer_change
from cliffscope.heads.edits import HeadEdit
from cliffscope.heads.methods import Task
from cliffscope.model.lens import norm_ratio
from cliffscope.model.load import LensModel
from cliffscope.readouts.readout import read_final
from cliffscope.transcripts.transcript import TokenizedTranscript

Directions = Mapping[int, Float32[np.ndarray, " d_model"]]
"""A unit vector for each edited layer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class NormMatched:
    """A displacement as large as an edit's, in random directions."""

    edits: Mapping[str, HeadEdit]
    """By transcript, the edit whose displacement is matched; all have the same heads."""
    directions: Directions
    """For each layer of these heads."""

    @contextmanager
    def hooks(self, model: LensModel, rows: Sequence[TokenizedTranscript], *, start: int = 0) -> Iterator[None]:
        """Acts on every pass over these rows, which begins at position `start` of them."""
        with ExitStack() as stack:
            # Layers that `only_blocks` has cut off above do not run.
            for layer in (layer for layer in self.directions if layer < len(model.blocks)):
                move = self._move(model, rows, layer, start)
                stack.callback(model.output_projection(layer).register_forward_hook(move).remove)
            yield

    def _move(
        self, model: LensModel, rows: Sequence[TokenizedTranscript], layer: int, start: int
    ) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], Tensor]:
        edits = [self.edits[row.id] for row in rows]
        change = layer_change(model, edits, rows, layer, start)
        direction = torch.from_numpy(self.directions[layer])

        def move(projection: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            """Adds a step along the direction, as long as the edit's own."""
            before = inputs[0]
            after = before.clone(memory_format=torch.contiguous_format)
            change(rearrange(after, "batch pos (head d_head) -> batch pos head d_head", head=model.shape.n_heads))
            if edits[0].preserve_norm:
                after = (after * norm_ratio(before, after)).to(after.dtype)
            # `forward`, not a call, which would come back here.
            written = projection.forward(after - before)
            written = written if projection.bias is None else written - projection.bias
            distance = torch.linalg.vector_norm(written, dim=-1, keepdim=True, dtype=torch.float32)
            step: Tensor = (distance * direction.to(output.device)).to(output.dtype)
            return output + step

        return move


def draw_directions(
    layers: Sequence[int], d_model: int, draws: int, rng: np.random.Generator
) -> list[dict[int, Float32[np.ndarray, " d_model"]]]:
    """Random unit vectors, evenly over the sphere: for each draw one a layer."""
    drawn = rng.standard_normal((draws, len(layers), d_model))
    units = (drawn / np.linalg.norm(drawn, axis=2, keepdims=True)).astype(np.float32)
    return [dict(zip(layers, vectors, strict=True)) for vectors in units]


def placebo_effects(
    task: Task, change: Change, heads: Branch, directions: Sequence[Directions]
) -> Float32[np.ndarray, "draw n"]:
    """The readout's logit under each placebo minus the unedited one.

    Args:
        task: model, readout, transcripts and scope.
        change: what is done to the heads, and only measured here.
        heads: those whose displacement is matched.
        directions: one set of them a draw.

    Returns:
        [draw, n] effects. The time is that of one pass over all transcripts a draw.
    """
    edits = {t.id: change.edit(heads, task.scope, i) for i, t in enumerate(task.transcripts)}
    unedited = read_final(task.model, task.readout, task.transcripts)
    effects = [
        read_final(task.model, task.readout, task.transcripts, edit=NormMatched(edits=edits, directions=each))
        - unedited
        for each in directions
    ]
    return np.array(effects, dtype=np.float32).reshape(len(directions), len(task.transcripts))
