"""What would every edit do, to first order?

Attribution patching: one forward pass of a transcript, one backward pass from the readout's logit, and the effect of
any change of a head's `hook_z` is estimated as gradient . change, summed over the scope. An estimate, not an
intervention: the cost of one pass for all heads, right where the logit is nearly linear in a head, wrong where it
saturates. The paths of a readout's continuations are rows of the pass.

Where the scope starts behind the prompt, what comes before is cached without a graph, so that memory grows with the
scope and not with the transcript. Source: Nanda, Attribution Patching (2023); Syed et al., arXiv 2310.10348.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from einops import einsum, repeat
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from transformers import DynamicCache

from cliffscope.errors import EditError
from cliffscope.heads.branches import Branch, Change, Job
from cliffscope.heads.editing import change_heads
from cliffscope.heads.methods import Effects, Method, Progress, Task
from cliffscope.heads.sweep import Sweep
from cliffscope.model.load import LensModel
from cliffscope.transcripts.transcript import TokenizedTranscript


class Attribution(Method):
    """Attribution patching of zero ablation."""

    name = "attribution"
    summary = "zero ablation to first order, by one backward pass"
    causal = False

    def measure(self, task: Task, branches: Sequence[Branch], *, progress: Progress | None = None) -> Effects:
        """Gradient times change; see `Method.measure`."""
        job = Job(model=task.model, readout=task.readout, branches=tuple(branches), change=Change(), scope=task.scope)
        return Effects.of_sweep(attribute_heads(job, task.transcripts, progress=progress))


def attribute_heads(
    job: Job, transcripts: Sequence[TokenizedTranscript], *, progress: Callable[[int], None] | None = None
) -> Sweep:
    """Estimates the readout's logit under every branch of single heads or sets.

    Args:
        job: model, readout, branches, change and scope; a set's estimate is the sum of its heads'.
        transcripts: tokens; answers are ignored.
        progress: called with the number of transcripts done.

    Returns:
        Clean logits, and clean plus estimated effects.

    Raises:
        EditError: the change preserves norms, so that a set's effect is not the sum of its heads'.
    """
    if job.change.preserve_norm:
        raise EditError(
            "A change that preserves norms acts on all heads of a layer together, and has no estimate head by head. "
            "Measure it with method='norm-preserving'."
        )
    clean = np.zeros(len(transcripts), np.float32)
    edited = np.zeros((len(transcripts), len(job.branches)), np.float32)
    seen = [[(h.layer, h.head) for h in branch if h.layer <= job.readout.layer] for branch in job.branches]
    for i, transcript in enumerate(transcripts):
        clean[i], effects = _estimate(job, transcript, i)
        edited[i] = clean[i] + np.array([sum(effects[place] for place in places) for places in seen], np.float32)
        if progress is not None:
            progress(i + 1)
    return Sweep(clean=clean, edited=edited, path="gradient")


def _estimate(job: Job, transcript: TokenizedTranscript, index: int) -> tuple[float, Float32[np.ndarray, "layer head"]]:
    model, rows = job.model, job.readout.continuations.rows(transcript)
    # Layers without heads change their state in place, through which no gradient passes: these models run whole.
    start = job.scope.positions(rows[0]).start if model.shape.attention is None else 0
    outputs: dict[int, Float[Tensor, "path pos head d_head"]] = {}
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(model.only_blocks(0, job.readout.layer))
        hidden = _forward(job, rows, start, outputs)
        places = job.readout.continuations.places
        nodes = torch.stack([hidden[path, transcript.final - start + behind] for path, behind in places])
        stack.enter_context(torch.enable_grad())
        logit = job.readout.logits(model, nodes)
        gradients = torch.autograd.grad(logit, list(outputs.values()))
    effects = np.zeros((model.shape.n_layers, model.shape.n_heads), np.float32)
    values = job.change.of(index)
    for (layer, z), gradient in zip(outputs.items(), gradients, strict=True):
        added = None if values is None else values[layer].to(z.device)
        for path, row in enumerate(rows):
            where = job.scope.positions(row)
            part = slice(where.start - start, where.stop - start)
            before = z[path, part].detach()
            moved = change_heads(before, job.change.factor, added) - before
            slope = gradient[path, part].float()
            effects[layer] += einsum(slope, moved.float(), "pos head d_head, pos head d_head -> head").cpu().numpy()
    return float(logit.detach()), effects


def _forward(
    job: Job,
    rows: Sequence[TokenizedTranscript],
    start: int,
    outputs: dict[int, Float[Tensor, "path pos head d_head"]],
) -> Float[Tensor, "path pos d_model"]:
    """The residual at the readout's layer from `start` on, with its graph; `outputs` gets `hook_z` of every layer."""
    model = job.model
    leaving: list[Float[Tensor, "path pos d_model"]] = []

    def visit(layer: int, hidden: Float[Tensor, "path pos d_model"]) -> None:
        if layer == job.readout.layer:
            leaving.append(hidden)

    # Padding stands on the right, where causal attention does not look, so that no mask is needed.
    ids = model.to_batch([row.token_ids.tolist() for row in rows]).ids
    positions = repeat(torch.arange(ids.shape[1], device=ids.device), "pos -> path pos", path=len(rows))
    cache = _prefix_cache(model, ids[:, :start], positions[:, :start]) if start else None
    with (
        model.outputs_hook(lambda layer, z: outputs.update({layer: z})),
        model.residual_hook(visit),
        torch.enable_grad(),
    ):
        embedded = model.hf.get_input_embeddings()(ids[:, start:]).detach().requires_grad_()
        model.decoder(
            inputs_embeds=embedded,
            position_ids=positions[:, start:],
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return leaving[0]


def _prefix_cache(model: LensModel, ids: Int[Tensor, "path pos"], positions: Int[Tensor, "path pos"]) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model.decoder(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache


@contextmanager
def _frozen(model: LensModel) -> Iterator[None]:
    """No gradients of weights: they are not asked for, and would keep every activation alive."""
    trainable: list[nn.Parameter] = [p for p in model.hf.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
