"""All branches of a closing edit as a few long sequences: the packed counterfactual sweep.

1. One forward pass of the transcript keeps the prefix's cache, and the closing tokens' residual entering each layer.
2. Branches are sorted by their first edited layer and packed: the closing tokens are repeated once a branch, with their
   own positions and a mask in which a branch sees the prefix and itself.
3. A pack enters the model at its first edited layer, with the clean residual, and leaves it at the probe's layer; a
   hook on `hook_z` edits in each branch its own heads.
4. Each pack carries one branch that edits nothing, and whose logit must be the clean one: masks, positions, cache and
   the late entry are proved on every pack of every transcript, not once.

Exact: an edit at the closing changes nothing before it. Memory is the prefix's cache and one pack. A pack that does not
fit into memory is halved, and so are all after it.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import DynamicCache

from cliffscope.errors import ResourceError
from cliffscope.heads.branches import Job, edits_by_layer
from cliffscope.heads.editing import change_heads
from cliffscope.memory import is_out_of_memory
from cliffscope.model.load import LensModel
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

log = logging.getLogger(__name__)
PACK_TOKENS = 320
"""Branches x window tokens in a pack: larger packs lose more to the mask, which grows as the square, than they gain."""
PACK_LAYERS = 6
"""First edited layers that one pack may span: each branch runs from the pack's first layer, clean until its own."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers names them."""


class Disagreement(Exception):
    """A fast path did not give the logit that it must give; the sweep then takes the next path."""


@dataclass(eq=False, kw_only=True)
class PackSize:
    """How large a pack may be; shrinks when memory runs out, and counts how often."""

    tokens: int = field(default_factory=lambda: PACK_TOKENS)
    """Branches x window tokens."""
    halvings: int = 0
    """How often it was halved."""

    def halve(self) -> None:
        """Halves it."""
        self.tokens, self.halvings = max(1, self.tokens // 2), self.halvings + 1
        log.warning("out of memory: going on with packs of at most %d tokens", self.tokens)


def packed_logits(job: Job, transcript: TokenizedTranscript, index: int, size: PackSize) -> tuple[float, np.ndarray]:
    """The clean logit and that of every branch, at the final position of one transcript.

    Args:
        job: the sweep; its scope is `closing`.
        transcript: tokens; the answer is ignored.
        index: the transcript's index in the sweep.
        size: of the packs.

    Returns:
        Clean logit, and [branch] edited ones.

    Raises:
        Disagreement: an unedited branch in a pack does not have the clean logit.
        ResourceError: not even one branch fits into memory.
    """
    start, stop = transcript.span(Span.CLOSING).start, transcript.final + 1
    with torch.inference_mode():
        window, clean = _clean_pass(job, transcript.token_ids[:stop].tolist(), start)
        found = np.full(len(job.branches), clean, dtype=np.float32)
        # A head above the probe's layer cannot change what the probe reads.
        seen = [i for i in range(len(job.branches)) if job.first_layer(i) <= job.probe.layer]
        queue = list(packs(seen, job, window.width, size.tokens))
        while queue:
            pack = queue.pop(0)
            try:
                logits, control = _run_pack(job, window, pack, index)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                queue = _halved(error, [pack, *queue], job, window.width, size)
                continue
            if not job.agrees(control, clean):
                raise Disagreement(f"an unedited branch differs by {abs(control - clean):.1e}")
            found[pack] = logits
    return clean, found


def branched_positions(first: int, width: int, n: int, device: torch.device) -> Tensor:
    """[1, n x width] positions of a window repeated n times."""
    return repeat(torch.arange(first, first + width, device=device), "token -> 1 (branch token)", branch=n)


def packs(branches: Sequence[int], job: Job, width: int, tokens: int) -> Iterator[list[int]]:
    """Groups branches by first edited layer into packs of bounded size, an unedited branch counted in."""
    pack: list[int] = []
    first = 0
    for branch in sorted(branches, key=lambda i: (job.first_layer(i), i)):
        layer = job.first_layer(branch)
        if pack and ((len(pack) + 2) * width > tokens or layer - first >= PACK_LAYERS):
            yield pack
            pack = []
        if not pack:
            first = layer
        pack.append(branch)
    if pack:
        yield pack


def _halved(error: Exception, queue: list[list[int]], job: Job, width: int, size: PackSize) -> list[list[int]]:
    """The packs that are left, cut to half the size; anything but a lack of memory is raised again."""
    if not is_out_of_memory(error):
        raise error
    if len(queue[0]) == 1:
        raise ResourceError(
            f"Memory ran out with one branch of {width} closing tokens. Free some, take a smaller dtype, or drop the "
            "longest transcripts."
        ) from error
    size.halve()
    return list(packs([branch for pack in queue for branch in pack], job, width, size.tokens))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Window:
    """The closing of one transcript, ready to be branched."""

    prefix: int
    """Tokens before it."""
    width: int
    """Tokens of it."""
    entering: list[Tensor]
    """[1, width, d_model] a layer."""
    cache: DynamicCache
    """Of the prefix; never written to."""

    def fresh_cache(self) -> DynamicCache:
        """A cache that starts at the prefix; it shares the tensors, which updates replace and do not change."""
        cache = DynamicCache()
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache


def _clean_pass(job: Job, ids: list[int], start: int) -> tuple[_Window, float]:
    """The window, and the clean logit."""
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    model = job.model
    # Without a config every layer keeps all its keys; which of them are seen is the mask's business.
    cache = DynamicCache()

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entering.append(inputs[0][:, start:].clone())

    def visit(layer: int, hidden: Tensor) -> None:
        if layer == job.probe.layer:
            leaving.append(hidden[:, -1])

    batch = model.to_batch([ids])
    with ExitStack() as stack:
        blocks = stack.enter_context(model.only_blocks(0, job.probe.layer))
        stack.enter_context(model.residual_hook(visit))
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(keep).remove)
        model.decoder(input_ids=batch.ids, position_ids=batch.positions, past_key_values=cache, use_cache=True)
    cache.crop(start - len(ids))
    window = _Window(prefix=start, width=len(ids) - start, entering=entering, cache=cache)
    return window, float(job.logit(leaving[0])[0])


def _run_pack(job: Job, window: _Window, branches: list[int], index: int) -> tuple[np.ndarray, float]:
    """The logits of the branches, and that of one that edits nothing."""
    model, width, n = job.model, window.width, len(branches) + 1
    first = job.first_layer(branches[0])
    residual = repeat(window.entering[first], "1 token d_model -> 1 (branch token) d_model", branch=n)
    positions = branched_positions(window.prefix, width, n, residual.device)
    mask = _masks(model, window.prefix, width, n, residual)
    finals: list[Tensor] = []

    def visit(layer: int, hidden: Tensor) -> None:
        if layer == job.probe.layer - first:
            finals.append(rearrange(hidden, "1 (branch token) d_model -> branch token d_model", token=width)[:, -1])

    with ExitStack() as stack:
        for layer, rows in edits_by_layer(job, branches):
            stack.enter_context(model.head_hook(layer, _branch_edit(job, layer, rows, width, index)))
        stack.enter_context(model.only_blocks(first, job.probe.layer))
        stack.enter_context(model.residual_hook(visit))
        model.decoder(
            inputs_embeds=residual,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=window.fresh_cache(),
            use_cache=True,
        )
    logits = job.logit(finals[0])
    return logits[:-1], float(logits[-1])


def _branch_edit(
    job: Job, layer: int, rows: list[tuple[int, list[int]]], width: int, index: int
) -> Callable[[Tensor], None]:
    """Edits in each branch its own heads, all of a layer in one step."""
    pairs = [(row, head) for row, heads in rows for head in heads]
    branch, head = [row for row, _ in pairs], [head for _, head in pairs]
    values = job.change.of(index)
    own = None if values is None else values[layer][:, head]

    def change(z: Tensor) -> None:
        branched = rearrange(z, "1 (branch token) head d_head -> branch token head d_head", token=width)
        given = None if own is None else own.to(z.device)
        before = rearrange(branched[branch, :, head], "edited token d_head -> token edited d_head")
        after = change_heads(before, job.change.factor, given)
        branched[branch, :, head] = rearrange(after, "token edited d_head -> edited token d_head")

    return change


def _masks(model: LensModel, prefix: int, width: int, n: int, like: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask of a pack; one for each kind of attention where some layers see the nearest positions alone."""
    config = model.hf.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    whole = _branch_mask(prefix, width, n, like)
    if not window or kinds is not None and set(kinds) == {FULL}:
        return whole
    near = _branch_mask(prefix, width, n, like, window=window)
    return near if kinds is None else {FULL: whole, SLIDING: near}


def _branch_mask(prefix: int, width: int, n: int, like: Tensor, *, window: int | None = None) -> Tensor:
    """Additive [1, 1, n x width, prefix + n x width]: a branch sees the prefix and, causally, itself."""
    token = torch.arange(n * width, device=like.device)
    own = (token[:, None] // width == token // width) & (token[:, None] >= token)
    allowed = torch.cat([torch.ones(n * width, prefix, dtype=torch.bool, device=like.device), own], 1)
    if window is not None:
        position = torch.cat([torch.arange(prefix, device=like.device), prefix + token % width])
        allowed &= position > (prefix + token % width)[:, None] - window
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~allowed, torch.finfo(like.dtype).min)[None, None]
