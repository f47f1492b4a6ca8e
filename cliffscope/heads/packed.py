"""All branches of a closing edit as a few long sequences: the packed counterfactual sweep.

1. One forward pass of the transcript keeps the prefix's cache, and the residual of the window's tokens entering each
   layer. The window is the closing, followed by the readout's continuations as a tree, if it has any.
2. Branches are sorted by their first edited layer and packed: the window is repeated once a branch, with its own
   positions and a mask in which a branch sees the prefix and itself.
3. A pack enters the model at its first edited layer, with the clean residual, and leaves it at the readout's layer; a
   hook on `hook_z` edits in each branch its own heads, at the closing alone.
4. Each pack carries one branch that edits nothing, and whose logit must be the clean one: masks, positions, cache and
   the late entry are proved on every pack of every transcript, not once.

Exact: an edit at the closing changes nothing before it. Memory is the prefix's cache and one pack. A pack that does not
fit into memory is halved, and so are all after it.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from transformers import DynamicCache

from cliffscope.errors import ResourceError
from cliffscope.heads.branches import BranchValues, Job, edits_by_layer
from cliffscope.heads.editing import change_heads
from cliffscope.memory import is_out_of_memory
from cliffscope.model.load import LensModel
from cliffscope.readouts.activations import Intervention
from cliffscope.readouts.continuations import Continuations
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

log = logging.getLogger(__name__)
PACK_TOKENS = 320
"""Branches x tokens of the window in a pack: larger packs lose more to the mask, which grows as the square, than they
gain."""
PACK_LAYERS = 6
"""First edited layers that one pack may span: each branch runs from the pack's first layer, clean until its own."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers names them."""

Mask = Float[Tensor, "1 1 query key"]


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
        """Makes packs half as large from now on."""
        self.tokens, self.halvings = max(1, self.tokens // 2), self.halvings + 1
        log.warning("out of memory: going on with packs of at most %d tokens", self.tokens)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """Tokens that follow a cached prefix or a part of it: where each stands, and which of the others it sees."""

    prefix: int
    """Cached tokens."""
    offsets: Int[Tensor, " token"]
    """How far each stands behind what it sees of the prefix."""
    sees: Bool[Tensor, "token token"]
    """Whether a token sees another."""

    @classmethod
    def of_window(cls, prefix: int, closing: int, tree: Continuations, device: torch.device) -> "Layout":
        """The closing, then the continuations; with no closing, continuations that follow the prefix at once."""
        offsets = [*range(closing), *(closing + depth - 1 for depth in tree.depths.tolist())]
        sees = torch.ones(len(offsets), len(offsets), dtype=torch.bool).tril()
        sees[closing:, closing:] = torch.tensor(tree.ancestors)
        return cls(prefix=prefix, offsets=torch.tensor(offsets, device=device), sees=sees.to(device))

    @property
    def width(self) -> int:
        """Number of tokens."""
        return len(self.offsets)

    def whole(self, n: int) -> Int[Tensor, " branch"]:
        """The starts of n copies that see the whole prefix."""
        return torch.full((n,), self.prefix, device=self.offsets.device)

    def positions(self, starts: Int[Tensor, " branch"]) -> Int[Tensor, "1 pack"]:
        """Position ids of copies, each of which stands behind as many tokens of the prefix as `starts` says."""
        return rearrange(rearrange(starts, "branch -> branch 1") + self.offsets, "branch token -> 1 (branch token)")


@dataclass(frozen=True, eq=False, kw_only=True)
class Window:
    """The window of one transcript, ready to be branched."""

    layout: Layout
    """Its tokens, behind the prefix."""
    closing: int
    """How many of them are the closing; the readout reads from the last of these on."""
    entering: list[Float[Tensor, "1 token d_model"]]
    """The residual entering each layer."""
    cache: DynamicCache
    """Of the prefix; never written to."""

    def fresh_cache(self, length: int | None = None) -> DynamicCache:
        """A cache that starts at the prefix; it shares the tensors, which updates replace and do not change.

        Args:
            length: tokens of the prefix to hold, from the first on; None for all.
        """
        cache = DynamicCache()
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        if length is not None and length < self.layout.prefix:
            cache.crop(length - self.layout.prefix)
        return cache


def packed_logits(
    job: Job, transcript: TokenizedTranscript, index: int, size: PackSize
) -> tuple[float, Float32[np.ndarray, " branch"]]:
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
    with torch.inference_mode():
        window, clean = clean_pass(job, transcript)
        edited = np.full(len(job.branches), clean, dtype=np.float32)
        width = window.layout.width
        queue = list(packs(job.seen(), job, width, size.tokens))
        while queue:
            pack = queue.pop(0)
            try:
                logits, control = _run_pack(job, window, pack, index)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                queue = _halved(error, [pack, *queue], job, width, size)
                continue
            if not job.agrees(control, clean):
                raise Disagreement(f"an unedited branch differs by {abs(control - clean):.1e}")
            edited[pack] = logits
    return clean, edited


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
            f"Memory ran out with one branch of {width} tokens. Free some, take a smaller dtype, or drop the "
            "longest transcripts."
        ) from error
    size.halve()
    return list(packs([branch for pack in queue for branch in pack], job, width, size.tokens))


def clean_pass(job: Job, transcript: TokenizedTranscript, *, edit: Intervention | None = None) -> tuple[Window, float]:
    """The window of a transcript, and its logit.

    Args:
        job: the sweep.
        transcript: tokens; the answer is ignored.
        edit: done meanwhile, at the closing alone, so that the prefix stays as it is.
    """
    ids, start = transcript.token_ids[: transcript.final + 1].tolist(), transcript.span(Span.CLOSING).start
    entering: list[list[Float[Tensor, "1 token d_model"]]] = []
    leaving: list[Float[Tensor, "token d_model"]] = []
    model, tree, last = job.model, job.readout.continuations, job.readout.layer
    # Without a config every layer keeps all its keys; which of them are seen is the mask's business.
    cache = DynamicCache()
    kept_from = start

    def keep(_module: nn.Module, inputs: tuple[Float[Tensor, "1 pos d_model"], ...]) -> None:
        entering[-1].append(inputs[0][:, kept_from:].clone())

    def visit(layer: int, hidden: Float[Tensor, "1 pos d_model"]) -> None:
        if layer == last:
            leaving.append(hidden[0, kept_from:])

    batch = model.to_batch([ids])
    with ExitStack() as stack:
        blocks = stack.enter_context(model.only_blocks(0, last))
        stack.enter_context(model.residual_hook(visit))
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(keep).remove)
        entering.append([])
        with nullcontext() if edit is None else edit.hooks(model, [transcript]):
            model.decoder(input_ids=batch.ids, position_ids=batch.positions, past_key_values=cache, use_cache=True)
        if len(tree):
            kept_from = 0
            entering.append([])
            layout = Layout.of_window(len(ids), 0, tree, batch.ids.device)
            model.decoder(
                input_ids=torch.tensor([tree.tokens], device=batch.ids.device),
                attention_mask=branch_masks(model, layout, layout.whole(1), entering[0][0]),
                position_ids=layout.positions(layout.whole(1)),
                past_key_values=cache,
                use_cache=True,
            )
    cache.crop(start - len(ids) - len(tree))
    window = Window(
        layout=Layout.of_window(start, len(ids) - start, tree, batch.ids.device),
        closing=len(ids) - start,
        entering=[torch.cat(parts, 1) for parts in zip(*entering, strict=True)],
        cache=cache,
    )
    return window, float(job.logits(torch.cat(leaving)[window.closing - 1 :]))


def _run_pack(
    job: Job, window: Window, branches: list[int], index: int
) -> tuple[Float32[np.ndarray, " branch"], float]:
    """The logits of the branches, and that of one that edits nothing."""
    model, layout, n = job.model, window.layout, len(branches) + 1
    first = job.first_layer(branches[0])
    residual = repeat(window.entering[first], "1 token d_model -> 1 (branch token) d_model", branch=n)
    leaving: list[Float[Tensor, "branch node d_model"]] = []

    def visit(layer: int, hidden: Float[Tensor, "1 pack d_model"]) -> None:
        if layer == job.readout.layer - first:
            branched = rearrange(hidden, "1 (branch token) d_model -> branch token d_model", branch=n)
            leaving.append(branched[:, window.closing - 1 :])

    with ExitStack() as stack:
        for layer, rows in edits_by_layer(job, branches):
            change = _branch_edit(job, layer, rows, window, index)
            stack.enter_context(model.head_hook(layer, change, preserve_norm=job.change.preserve_norm))
        stack.enter_context(model.only_blocks(first, job.readout.layer))
        stack.enter_context(model.residual_hook(visit))
        model.decoder(
            inputs_embeds=residual,
            attention_mask=branch_masks(model, layout, layout.whole(n), residual),
            position_ids=layout.positions(layout.whole(n)),
            past_key_values=window.fresh_cache(),
            use_cache=True,
        )
    logits = job.logits(leaving[0])
    return logits[:-1], float(logits[-1])


def _branch_edit(
    job: Job, layer: int, rows: list[tuple[int, list[int]]], window: Window, index: int
) -> Callable[[Float[Tensor, "1 pack head d_head"]], None]:
    """Edits in each branch its own heads, all of a layer in one step."""
    pairs = [(row, head) for row, heads in rows for head in heads]
    branch, head = [row for row, _ in pairs], [head for _, head in pairs]
    values: BranchValues | None = job.change.of(index)
    added = None if values is None else values[layer][:, head]
    closing = slice(0, window.closing)

    def change(z: Float[Tensor, "1 pack head d_head"]) -> None:
        branched = rearrange(z, "1 (branch token) head d_head -> branch token head d_head", token=window.layout.width)
        before = rearrange(branched[branch, closing, head], "edited token d_head -> token edited d_head")
        after = change_heads(before, job.change.factor, None if added is None else added.to(z.device))
        branched[branch, closing, head] = rearrange(after, "token edited d_head -> edited token d_head")

    return change


def branch_masks(
    model: LensModel, layout: Layout, starts: Int[Tensor, " branch"], like: Float[Tensor, "..."]
) -> Mask | dict[str, Mask]:
    """The mask of copies; one for each kind of attention where some layers see the nearest positions alone.

    Args:
        model: the model.
        layout: the tokens of each copy.
        starts: tokens of the prefix that each copy sees, from the first on.
        like: has the mask's dtype and device.

    Returns:
        What transformers takes as `attention_mask`.
    """
    config = model.hf.config.get_text_config()
    nearest, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    whole = _branch_mask(layout, starts, like, None)
    if not nearest or kinds is not None and set(kinds) == {FULL}:
        return whole
    near = _branch_mask(layout, starts, like, nearest)
    return near if kinds is None else {FULL: whole, SLIDING: near}


def _branch_mask(
    layout: Layout, starts: Int[Tensor, " branch"], like: Float[Tensor, "..."], nearest: int | None
) -> Mask:
    """Additive: a copy sees its part of the prefix and itself; of these the `nearest` positions where that is set."""
    device, width, n = like.device, layout.width, len(starts)
    same = repeat(torch.eye(n, dtype=torch.bool, device=device), "q k -> (q query) (k key)", query=width, key=width)
    sees = repeat(layout.sees, "query key -> (q query) (k key)", q=n, k=n)
    cached = torch.arange(layout.prefix, device=device)
    seen = repeat(cached < rearrange(starts, "branch -> branch 1"), "q key -> (q query) key", query=width)
    allowed = torch.cat([seen, same & sees], 1)
    if nearest is not None:
        query = layout.positions(starts)[0]
        allowed &= torch.cat([cached, query]) > rearrange(query, "query -> query 1") - nearest
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=device)
    return rearrange(mask.masked_fill_(~allowed, torch.finfo(like.dtype).min), "query key -> 1 1 query key")
