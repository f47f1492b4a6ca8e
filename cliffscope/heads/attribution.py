"""What would every edit do, to first order?

Attribution patching: one forward pass of a transcript, one backward pass from the refusal logit, and the effect of any
change of a head's `hook_z` is estimated as gradient . change, summed over the scope. An estimate, not an intervention:
the cost of one pass for all heads, right where the logit is nearly linear in a head, wrong where it saturates.

Where the scope starts behind the prompt, what comes before is cached without a graph, so that memory grows with the
scope and not with the transcript. Source: Nanda, Attribution Patching (2023); Syed et al., arXiv 2310.10348.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import DynamicCache

from cliffscope.heads.branches import Job
from cliffscope.heads.editing import change_heads
from cliffscope.heads.sweep import Sweep
from cliffscope.model.load import LensModel
from cliffscope.transcripts.transcript import TokenizedTranscript


def attribute_heads(
    job: Job, transcripts: Sequence[TokenizedTranscript], *, progress: Callable[[int], None] | None = None
) -> Sweep:
    """Estimates the refusal logit under every branch of single heads or sets.

    Args:
        job: model, probe, branches, change and scope; a set's estimate is the sum of its heads'.
        transcripts: tokens; answers are ignored.
        progress: called with the number of transcripts done.

    Returns:
        Clean logits, and clean plus estimated effects.
    """
    clean = np.zeros(len(transcripts), np.float32)
    edited = np.zeros((len(transcripts), len(job.branches)), np.float32)
    for i, transcript in enumerate(transcripts):
        clean[i], effects = _estimate(job, transcript, i)
        seen = [[(h.layer, h.head) for h in branch if h.layer <= job.probe.layer] for branch in job.branches]
        edited[i] = clean[i] + np.array([sum(effects[place] for place in places) for places in seen], np.float32)
        if progress is not None:
            progress(i + 1)
    return Sweep(clean=clean, edited=edited, path="gradient")


def _estimate(job: Job, transcript: TokenizedTranscript, index: int) -> tuple[float, Float32[np.ndarray, "layer head"]]:
    model, where = job.model, job.scope.positions(transcript)
    ids = torch.from_numpy(transcript.token_ids[: transcript.final + 1])[None].to(model.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    outputs: dict[int, Tensor] = {}
    leaving: list[Tensor] = []

    def visit(layer: int, hidden: Tensor) -> None:
        if layer == job.probe.layer:
            leaving.append(hidden[0, -1])

    # Layers without heads change their state in place, through which no gradient passes: these models run whole.
    start = where.start if model.shape.attention is None else 0
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(model.only_blocks(0, job.probe.layer))
        cache = _prefix_cache(model, ids[:, :start], positions[:, :start]) if start else None
        stack.enter_context(model.outputs_hook(lambda layer, z: outputs.update({layer: z})))
        stack.enter_context(model.residual_hook(visit))
        stack.enter_context(torch.enable_grad())
        embedded = model.hf.get_input_embeddings()(ids[:, start:]).detach().requires_grad_()
        model.decoder(
            inputs_embeds=embedded,
            position_ids=positions[:, start:],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        logit = leaving[0].float() @ torch.from_numpy(job.probe.weight).to(model.device) + job.probe.bias
        gradients = torch.autograd.grad(logit, list(outputs.values()))
    found = np.zeros((model.shape.n_layers, model.shape.n_heads), np.float32)
    given, own = job.change.of(index), slice(where.start - start, where.stop - start)
    for (layer, z), gradient in zip(outputs.items(), gradients, strict=True):
        before = z[0, own].detach()
        values = None if given is None else given[layer].to(z.device)
        changed = change_heads(before, job.change.factor, values) - before
        found[layer] = (gradient[0, own].float() * changed.float()).sum((0, 2)).cpu().numpy()
    return float(logit.detach()), found


def _prefix_cache(model: LensModel, ids: Tensor, positions: Tensor) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model.decoder(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache


@contextmanager
def _frozen(model: LensModel) -> Iterator[None]:
    """No gradients of weights: they are not asked for, and would keep every activation alive."""
    wanted: list[nn.Parameter] = [p for p in model.hf.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
