"""What is a loaded model, and how are its residuals and heads reached?

`LensModel` holds the plain Hugging Face modules, which do the work (they keep fused attention and caches), and
TransformerLens' view of the same weights. Hooks are context managers that leave nothing behind. Which module is which
is known to architectures.py.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cliffscope.errors import UnsupportedModelError
from cliffscope.model.architectures import (
    ModelShape,
    cut_to_blocks,
    find_blocks,
    find_decoder,
    find_embedding,
    find_mlp,
    find_projection,
    has_heads,
)
from cliffscope.model.checkpoints import hash_weights
from cliffscope.transcripts.records import Omission, Transcript
from cliffscope.transcripts.templates import Template
from cliffscope.transcripts.tokenization import Tokenization
from cliffscope.transcripts.transcript import TokenizedTranscript

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SMALL = 20_000_000
"""Parameters up to which a model counts as small."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LensModel:
    """A checked model: plain Hugging Face modules, tokenizer, template, TransformerLens' view of the same weights."""

    name: str
    """The path or name that it was loaded by."""
    hf: PreTrainedModel
    """The plain model, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    template: Template
    """How it opens and closes thinking."""
    shape: ModelShape
    """Its sizes."""
    bridge: "TransformerBridge"
    """TransformerLens' view; slower, with every hook. A bridge shares the weights, a HookedTransformer has its own."""
    not_exported: str = ""
    """Why these weights must not be written as a checkpoint; "" if they may be."""

    @property
    def device(self) -> torch.device:
        """The embedding's device, which is where token ids go."""
        return find_embedding(self.hf).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.hf.dtype

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the sizes and of every weight, the same on any device and in a wider dtype."""
        return hash_weights(repr(self.shape), self.hf)

    @cached_property
    def small(self) -> bool:
        """Whether it is on the CPU and its matrices are too small to be shared between threads."""
        return self.device.type == "cpu" and sum(weight.numel() for weight in self.hf.parameters()) <= SMALL

    def copy_network(self) -> PreTrainedModel:
        """A copy of the plain model whose weights can be trained."""
        network = copy.deepcopy(self.hf)
        return network.requires_grad_(True)

    @cached_property
    def tokenization(self) -> Tokenization:
        """Tokens of this model's transcripts, each of which is tokenized once, up to the context's length."""
        return Tokenization(tokenizer=self.tokenizer, template=self.template, max_length=self.shape.context)

    def tokenize_all(
        self, transcripts: Iterable[Transcript], *, with_answer: bool = False
    ) -> tuple[list[TokenizedTranscript], tuple[Omission, ...]]:
        """Tokens of transcripts, in order, and what is left out, such as what is longer than the context."""
        return self.tokenization.all_tokens(transcripts, with_answer=with_answer)

    @property
    def blocks(self) -> nn.ModuleList:
        """The plain model's blocks, first to last."""
        return find_blocks(self.hf)

    @property
    def decoder(self) -> nn.Module:
        """The plain model without its language-model head."""
        return find_decoder(self.hf)

    def only_blocks(self, first: int, last: int) -> AbstractContextManager[list[nn.Module]]:
        """Cuts the model to the blocks from `first` to `last`, both included; see `architectures.cut_to_blocks`."""
        return cut_to_blocks(self.hf, first, last)

    def output_projection(self, layer: int) -> nn.Linear:
        """The linear map whose input is `hook_z` of a layer, heads concatenated; a layer without heads has none."""
        return find_projection(self.blocks[layer])

    def holds_weights(self, layer: int) -> bool:
        """Whether a layer's output projection is in memory as plain numbers: neither quantised nor offloaded."""
        weight = self.output_projection(layer).weight
        return weight.is_floating_point() and not weight.is_meta

    def mlp(self, layer: int) -> nn.Module:
        """The block's other writer next to attention; raises UnsupportedModelError if it has no known name."""
        block = self.blocks[layer]
        module = find_mlp(block)
        if module is None:
            names = sorted(name for name, _ in block.named_children())
            raise UnsupportedModelError(
                f"Layer {layer} of {type(self.hf).__name__} has no MLP under a known name, only {names}, so its share "
                "of the logit cannot be computed."
            )
        return module

    def output_columns(self, layer: int) -> Float[Tensor, "d_model head d_head"]:
        """What each head writes, by weights: its columns of the output projection, fp32.

        Raises:
            UnsupportedModelError: the weights are quantised or offloaded, so they cannot be read.
        """
        if not self.holds_weights(layer):
            raise UnsupportedModelError(
                f"Layer {layer} of {self.name!r}: weights that are quantised or offloaded cannot be read, so the "
                "shares of heads cannot be computed. Use a method that measures effects, such as zero."
            )
        weight = self.output_projection(layer).weight.detach()
        return rearrange(weight.float(), "d_model (head d_head) -> d_model head d_head", head=self.shape.n_heads)

    @contextmanager
    def outputs_hook(self, visit: Callable[[int, Float[Tensor, "batch pos head d_head"]], None]) -> Iterator[None]:
        """Calls `visit(layer, hook_z)` in every block of every forward pass inside the context; nothing is changed.

        The model continues with the visited tensor, so that gradients reach it.
        """

        def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
            def call(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                z = rearrange(inputs[0], "batch pos (head d_head) -> batch pos head d_head", head=self.shape.n_heads)
                visit(layer, z)
                return (rearrange(z, "batch pos head d_head -> batch pos (head d_head)"), *inputs[1:])

            return call

        with ExitStack() as stack:
            for layer, block in enumerate(self.blocks):
                if has_heads(block):
                    stack.callback(find_projection(block).register_forward_pre_hook(hook(layer)).remove)
            yield

    def to_batch(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> "Batch":
        """Pads token ids to a rectangle, with a mask and position ids that make padding invisible."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place] = torch.as_tensor(row, dtype=torch.long)
            mask[i, place] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return Batch(ids=self._moved(ids), mask=self._moved(mask), positions=self._moved(positions))

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the model's device; from pinned memory, a GPU copies it while it computes."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    @contextmanager
    def residual_hook(self, visit: Callable[[int, Float[Tensor, "batch pos d_model"]], None]) -> Iterator[None]:
        """Calls `visit(layer, hook_resid_post)` in every block of every forward pass inside the context.

        Autocast is off inside: the forward pass runs in the weights' own dtype, whatever the caller has set.
        """

        def hook(layer: int) -> Callable[[nn.Module, object, object], None]:
            def call(_module: nn.Module, _inputs: object, output: object) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if not isinstance(hidden, Tensor):
                    raise UnsupportedModelError(f"Block {layer} returns {type(output).__name__}, not a tensor.")
                visit(layer, hidden)

            return call

        with ExitStack() as stack:
            for i, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(hook(i)).remove)
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            yield

    @contextmanager
    def head_hook(
        self,
        layer: int,
        change: Callable[[Float[Tensor, "batch pos head d_head"]], None],
        *,
        preserve_norm: bool = False,
    ) -> Iterator[None]:
        """Lets `change` write into a copy of a layer's `hook_z` in every forward pass inside the context.

        Args:
            layer: whose `hook_z`.
            change: writes into it.
            preserve_norm: scale all heads, position by position, back to the norm before the change.
        """

        def call(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # `change` writes into the heads, which are a view of a contiguous copy.
            z = inputs[0].clone(memory_format=torch.contiguous_format)
            change(rearrange(z, "batch pos (head d_head) -> batch pos head d_head", head=self.shape.n_heads))
            if preserve_norm:
                z = (z * norm_ratio(inputs[0], z)).to(z.dtype)
            return (z, *inputs[1:])

        handle = self.output_projection(layer).register_forward_pre_hook(call)
        try:
            yield
        finally:
            handle.remove()

    def __repr__(self) -> str:
        """One line: name, size and template."""
        s = self.shape
        return f"LensModel({self.name!r}, {s.n_layers} layers x {s.n_heads} heads, template {self.template.name!r})"


def norm_ratio(
    before: Float[Tensor, "*place feature"], after: Float[Tensor, "*place feature"]
) -> Float[Tensor, "*place 1"]:
    """What `after` is multiplied by to have the norm of `before`, place by place.

    Exactly 1 where nothing changed, and where `after` is zero and has no direction to be scaled along.
    """
    norms = (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) for x in (before, after))
    was, became = norms
    return torch.where(became > 0, was / became.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Token ids padded to a rectangle."""

    ids: Int[Tensor, "batch pos"]
    """Token ids."""
    mask: Int[Tensor, "batch pos"]
    """1 where there is a token."""
    positions: Int[Tensor, "batch pos"]
    """Position of each token in its own transcript."""
