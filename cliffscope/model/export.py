"""How does a model become a checkpoint directory, completely or not at all?

1. The destination is checked: it is free, or a checkpoint that may be replaced, and not the model's own source.
2. transformers itself writes config, generation config, safetensors shards and tokenizer (with its chat template) into
   a temporary folder next to the destination.
3. Everything is flushed to disk, and the folder is renamed in one step; on failure nothing is left behind.

Knows nothing of edits or training: the weights are written as they are at that moment.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from cliffscope.errors import StoreError, UnsupportedModelError
from cliffscope.model.load import LensModel
from cliffscope.store import PARTIAL, flush_directory, flush_file, system_reason, umask

CARD = "README.md"
SHARD_BYTES = 5_000_000_000


def write_checkpoint(
    network: PreTrainedModel, model: LensModel, out: str | Path, *, card: str, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes a trained network with the model's own tokenizer, completely or not at all.

    Args:
        network: the network to write.
        model: the model that it comes from.
        out: directory to create.
        card: text of its README.
        shard_bytes: maximum size of a safetensors file.

    Returns:
        The directory.

    Raises:
        StoreError: the directory exists or cannot be written.
    """
    place = Path(out).absolute()
    check_place(place, model, overwrite=False)

    def write(folder: Path) -> None:
        network.save_pretrained(folder, max_shard_size=shard_bytes)
        model.tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(card, encoding="utf-8")

    write_folder(place, write, overwrite=False)
    return Path(out)


def check_place(place: Path, model: LensModel, *, overwrite: bool) -> None:
    """Raises StoreError unless a checkpoint may be written to a place, UnsupportedModelError if to no place at all."""
    if model.not_exported:
        raise UnsupportedModelError(
            f"{model.name!r} is not written as a checkpoint: {model.not_exported}. Load the checkpoint itself by its "
            "path, and edit that."
        )
    if not os.path.lexists(place):
        return
    if not overwrite:
        raise StoreError(f"{place} exists already. Choose a different directory, or pass overwrite=True (--overwrite).")
    if place.is_symlink() or not (place / "config.json").is_file():
        raise StoreError(
            f"{place} is not a checkpoint directory (it has no config.json), so it is not replaced. Choose a different "
            "directory."
        )
    source = Path(model.name)
    if source.exists() and place.resolve() in (source.resolve(), source.resolve().parent):
        raise StoreError(
            f"{place} is where the model itself was read from, so it is not replaced. Choose a different directory."
        )


def stored_dtype(model: LensModel) -> torch.dtype:
    """The source checkpoint's dtype according to its config.json; the loaded weights' if it cannot be read."""
    try:
        dtype = AutoConfig.from_pretrained(model.name, local_files_only=True, trust_remote_code=False).dtype
    except (OSError, ValueError, KeyError):
        dtype = None
    return dtype if isinstance(dtype, torch.dtype) else model.dtype


@contextmanager
def config_kept(model: LensModel) -> Iterator[None]:
    """Restores the dtype and class in the config of the model in memory, which saving overwrites."""
    config = model.hf.config
    before = config.dtype, config.architectures
    try:
        yield
    finally:
        config.dtype, config.architectures = before


def cast_weights(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point weights in another dtype; weights that share memory still do, so that they stay tied."""
    cast_once: dict[tuple[int, torch.Size], Tensor] = {}
    for weight in state.values():
        if weight.is_floating_point() and weight.dtype != dtype:
            cast_once.setdefault((weight.data_ptr(), weight.shape), weight.to(dtype))
    return {name: cast_once.get((weight.data_ptr(), weight.shape), weight) for name, weight in state.items()}


def note_dtype(path: Path, dtype: torch.dtype) -> None:
    """Records in a `config.json` the dtype in which its weights are stored."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_folder(place: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Lets `write` fill a temporary folder next to the place, then renames it.

    Args:
        place: the directory to create; check it with `check_place` first.
        write: fills a temporary folder, whose path it receives.
        overwrite: whether an existing directory is replaced.

    Raises:
        StoreError: the place cannot be written, such as on a full disk; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=PARTIAL))
        write(temporary)
        # Temporary folders, and files that safetensors writes, are private to the owner; a checkpoint gets the
        # permissions of any new file.
        temporary.chmod(0o777 & ~umask())
        for path in temporary.iterdir():
            path.chmod(0o666 & ~umask())
        for path in temporary.iterdir():
            flush_file(path)
        flush_directory(temporary)
        _move(temporary, place, overwrite=overwrite)
        flush_directory(place.parent)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{place} cannot be written: {system_reason(error)}. Free space or choose a different directory, then "
            "export again; nothing was left behind."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, place: Path, *, overwrite: bool) -> None:
    if not (overwrite and place.exists()):
        # Renaming replaces at most an empty directory that someone has created in the meantime.
        temporary.rename(place)
        return
    old = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=PARTIAL)) / "old"
    place.rename(old)
    try:
        temporary.rename(place)
    except OSError:
        old.rename(place)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
