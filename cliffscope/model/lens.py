"""What is a loaded model, and how are its residuals and heads reached?

`LensModel` holds the plain Hugging Face modules, which do the work (they keep fused attention and caches), and
TransformerLens' view of the same weights. Hooks are context managers that leave nothing behind.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cliffscope.errors import UnsupportedModelError
from cliffscope.model.checkpoints import hash_weights
from cliffscope.transcripts.templates import Template

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SMALL = 20_000_000
"""Parameters up to which a model counts as small."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that everything else is indexed by."""

    n_layers: int
    """Blocks."""
    n_heads: int
    """Query heads a layer."""
    n_kv_heads: int
    """Key-value heads a layer."""
    d_model: int
    """Width of the residual stream."""
    d_head: int
    """Width of one head's `hook_z`."""
    context: int
    """Longest sequence in tokens."""
    attention: tuple[int, ...] | None = None
    """Layers that attend with heads, where others mix tokens in another way (linear attention); None is all."""

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that have heads, ascending."""
        return tuple(range(self.n_layers)) if self.attention is None else self.attention

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(layer, query head) of every head there is, layer by layer."""
        return tuple((layer, head) for layer in self.attention_layers for head in range(self.n_heads))

    def kv_group(self, head: int) -> int:
        """The key-value head that a query head reads."""
        return head // (self.n_heads // self.n_kv_heads)


@dataclass(frozen=True, eq=False, kw_only=True)
class LensModel:
    """A checked model: plain Hugging Face modules, tokenizer, template, TransformerLens' view of the same weights."""

    name: str
    """What was asked for."""
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
    """Why no checkpoint may be made of these weights; "" where one may."""

    @property
    def device(self) -> torch.device:
        """Where the embedding lives, so where token ids go."""
        return _embedding(self.hf).weight.device

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
        """Whether it is on the CPU with matrices too small to be shared between threads."""
        return self.device.type == "cpu" and sum(weight.numel() for weight in self.hf.parameters()) <= SMALL

    def copy_network(self) -> PreTrainedModel:
        """The plain model with weights of its own, to be trained."""
        network = copy.deepcopy(self.hf)
        return network.requires_grad_(True)

    @property
    def blocks(self) -> nn.ModuleList:
        """The plain model's blocks, first to last."""
        return cast(nn.ModuleList, self.decoder.layers)

    @property
    def decoder(self) -> nn.Module:
        """The plain model without its language-model head."""
        return _decoder(self.hf)

    @contextmanager
    def only_blocks(self, first: int, last: int) -> Iterator[list[nn.Module]]:
        """Cuts the model to the blocks from `first` to `last`, both included; each keeps its own index into the cache.

        A model that looks up each block's kind of attention by its place in the list finds the kinds of these blocks.
        """
        decoder, config = self.decoder, self.hf.config.get_text_config()
        whole, kinds = decoder.layers, getattr(config, "layer_types", None)
        blocks = list(self.blocks)[first : last + 1]
        decoder.layers = nn.ModuleList(blocks)
        if kinds is not None:
            config.layer_types = kinds[first : last + 1]
        try:
            yield blocks
        finally:
            decoder.layers = whole
            if kinds is not None:
                config.layer_types = kinds

    def output_projection(self, layer: int) -> nn.Linear:
        """The linear map whose input is `hook_z` of a layer, heads concatenated; a layer without heads has none."""
        return cast(nn.Linear, self.blocks[layer].get_submodule("self_attn.o_proj"))

    def holds_weights(self, layer: int) -> bool:
        """Whether a layer's output projection is numbers in memory: neither quantised nor offloaded."""
        weight = self.output_projection(layer).weight
        return weight.is_floating_point() and not weight.is_meta

    def mlp(self, layer: int) -> nn.Module:
        """The block's other writer beside attention; raises UnsupportedModelError where none has a known name."""
        named = dict(self.blocks[layer].named_children())
        for name in ("mlp", "feed_forward", "block_sparse_moe", "moe"):
            if name in named:
                return named[name]
        raise UnsupportedModelError(
            f"Layer {layer} of {type(self.hf).__name__} has no module for its MLP among {sorted(named)}, so that its "
            "share of the logit cannot be told."
        )

    def output_columns(self, layer: int) -> Float[Tensor, "d_model head d_head"]:
        """What each head writes, by weights: its columns of the output projection, fp32.

        Raises:
            UnsupportedModelError: the weights are quantised or offloaded, so that they are not there to be read.
        """
        if not self.holds_weights(layer):
            raise UnsupportedModelError(
                f"Layer {layer} of {self.name!r}: weights that are quantised or offloaded cannot be read, so that "
                "shares of heads cannot be told. Take a method that measures effects, such as zero."
            )
        weight = self.output_projection(layer).weight.detach()
        return rearrange(weight.float(), "d_model (head d_head) -> d_model head d_head", head=self.shape.n_heads)

    @contextmanager
    def outputs_hook(self, visit: Callable[[int, Float[Tensor, "batch pos head d_head"]], None]) -> Iterator[None]:
        """Calls `visit(layer, hook_z)` in every block of every forward pass inside the context; nothing is changed.

        What is visited is what the model goes on with, so that gradients reach it.
        """

        def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
            def call(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                z = rearrange(inputs[0], "batch pos (head d_head) -> batch pos head d_head", head=self.shape.n_heads)
                visit(layer, z)
                return (rearrange(z, "batch pos head d_head -> batch pos (head d_head)"), *inputs[1:])

            return call

        with ExitStack() as stack:
            for layer, block in enumerate(self.blocks):
                if _has_heads(block):
                    stack.callback(self.output_projection(layer).register_forward_pre_hook(hook(layer)).remove)
            yield

    def to_batch(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> "Batch":
        """Pads token ids to one rectangle, with mask and position ids that make padding invisible."""
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
        """On the model's device; from pinned memory a GPU takes it while it still computes."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    @contextmanager
    def residual_hook(self, visit: Callable[[int, Float[Tensor, "batch pos d_model"]], None]) -> Iterator[None]:
        """Calls `visit(layer, hook_resid_post)` in every block of every forward pass inside the context.

        Autocast is off inside: what is measured is computed in the weights' own dtype, whatever the caller has set.
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
    def head_hook(self, layer: int, change: Callable[[Float[Tensor, "batch pos head d_head"]], None]) -> Iterator[None]:
        """Lets `change` write into a copy of a layer's `hook_z` in every forward pass inside the context."""

        def call(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # `change` writes into the heads, which are a view of a contiguous copy.
            z = inputs[0].clone(memory_format=torch.contiguous_format)
            change(rearrange(z, "batch pos (head d_head) -> batch pos head d_head", head=self.shape.n_heads))
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Token ids padded to one rectangle."""

    ids: Int[Tensor, "batch pos"]
    """Token ids."""
    mask: Int[Tensor, "batch pos"]
    """1 where there is a token."""
    positions: Int[Tensor, "batch pos"]
    """Position of each token in its own transcript."""


def read_shape(hf: PreTrainedModel) -> ModelShape:
    """The sizes that a model's config and modules say; raises UnsupportedModelError where it has no heads."""
    config = hf.config.get_text_config()
    heads = int(config.num_attention_heads)
    # Latent attention (DeepSeek) gives values a size of their own, and values are what a head writes.
    size = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    blocks = cast(nn.ModuleList, _decoder(hf).layers)
    with_heads = tuple(i for i, block in enumerate(blocks) if _has_heads(block))
    if not with_heads:
        raise UnsupportedModelError(
            f"No layer of {type(hf).__name__} has `self_attn.o_proj`, the output projection whose input are the heads; "
            "it is not supported."
        )
    return ModelShape(
        n_layers=int(config.num_hidden_layers),
        n_heads=heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        d_model=int(config.hidden_size),
        d_head=int(size),
        context=int(getattr(config, "max_position_embeddings", 0) or 1_000_000_000),
        attention=None if len(with_heads) == len(blocks) else with_heads,
    )


def _has_heads(block: nn.Module) -> bool:
    attention = dict(block.named_children()).get("self_attn")
    return attention is not None and "o_proj" in dict(attention.named_children())


def _embedding(hf: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, hf.get_input_embeddings())


def _decoder(hf: PreTrainedModel) -> nn.Module:
    get_decoder: Callable[[], nn.Module] = hf.get_decoder
    decoder = get_decoder()
    if not hasattr(decoder, "layers"):
        raise UnsupportedModelError(
            f"{type(hf).__name__} keeps its blocks elsewhere than in `.layers`; it is not supported."
        )
    return decoder
