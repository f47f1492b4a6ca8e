"""Would this stage give the same results again?

A stage's key is a hash over everything that its results depend on:

1. the settings that it declares, and a version of its code that is raised by hand;
2. the contents of the input files that it declares, whatever they are called or wherever they lie;
3. the model's files (weights, config, tokenizer, chat template), the convention of thinking, and the dtype;
4. the keys of the stages that it needs.

Batch size, device and progress are in no key. Files are read once: a digest is reused while size and modification time
stay the same. Knows no results.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cliffscope.model.checkpoints import find_device, model_files, resolve_dtype
from cliffscope.store import plain
from cliffscope.study.config import StudyConfig
from cliffscope.study.stages.base import Stage
from cliffscope.transcripts.templates import find_template

_CHUNK = 1 << 22
DIGITS = 16
"""Hexadecimal digits of a key or digest."""


@dataclass(eq=False, kw_only=True)
class Digests:
    """Digests of files, reused while a file's size and modification time stay the same."""

    entries: dict[str, dict[str, object]] = field(default_factory=dict)
    """Path to size, mtime_ns and digest, JSON-ready."""

    def of(self, path: Path) -> str:
        """Digest of a file's contents; "absent" where there is no file, which its reader will say."""
        if not path.is_file():
            return "absent"
        place, about = str(path.resolve()), path.stat()
        entry = self.entries.get(place, {})
        if (entry.get("size"), entry.get("mtime_ns")) == (about.st_size, about.st_mtime_ns):
            return str(entry["digest"])
        total = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                total.update(block)
        digest = total.hexdigest()[:DIGITS]
        self.entries[place] = {"size": about.st_size, "mtime_ns": about.st_mtime_ns, "digest": digest}
        return digest

    def of_all(self, paths: Iterable[Path]) -> dict[str, str]:
        """File name to digest."""
        return {path.name: self.of(path) for path in paths}


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What a model's numbers depend on, known without loading it."""

    files: Mapping[str, str]
    """Digest of each file of the checkpoint by name; the hub name alone where nothing has been downloaded."""
    template: Mapping[str, object]
    """The convention of thinking that was asked for; empty where it is detected from the files."""
    dtype: str
    """Of the weights once loaded."""


def identify_model(config: StudyConfig, digests: Digests) -> ModelIdentity:
    """The model of a study, from its files.

    Args:
        config: of the study.
        digests: of files.

    Returns:
        The identity; equal for equal files, wherever they lie.

    Raises:
        DataError: there is no such model.
        TemplateError: there is no such template.
    """
    files = model_files(config.model)
    return ModelIdentity(
        files=digests.of_all(files) if files else {"hub": config.model},
        template={} if config.template is None else asdict(find_template(config.template)),
        dtype=str(resolve_dtype(config.model, find_device(config.device))).removeprefix("torch."),
    )


@dataclass(frozen=True, kw_only=True)
class StageKey:
    """What the results of a stage depend on."""

    parts: Mapping[str, Mapping[str, object]]
    """JSON-ready, by kind: settings, files, code, model, needs."""
    key: str
    """Digest of all of it."""


def stage_keys(config: StudyConfig, stages: Iterable[Stage], digests: Digests) -> dict[str, StageKey]:
    """The key of every stage.

    Args:
        config: of the study.
        stages: in order: what a stage needs comes before it.
        digests: of files.

    Returns:
        Name to key.
    """
    model = asdict(identify_model(config, digests))
    keys: dict[str, StageKey] = {}
    for stage in stages:
        modules = {name: _code_digest(getattr(config, name), digests) for name in stage.settings}
        parts = {
            "settings": {name: getattr(config, name) for name in stage.settings},
            "files": {name: _input_digest(config, name, digests) for name in stage.files},
            "code": {"version": stage.version, **{name: digest for name, digest in modules.items() if digest}},
            "model": model if stage.uses_model else {},
            "needs": {name: keys[name].key for name in stage.needs},
        }
        keys[stage.name] = StageKey(parts=parts, key=digest_of({"stage": stage.name, **parts}))
    return keys


def what_changed(before: Mapping[str, object], now: Mapping[str, Mapping[str, object]]) -> str:
    """In words, what differs between the parts of two keys of a stage.

    Args:
        before: parts as recorded.
        now: parts as they are.
    """
    words = []
    for kind, values in now.items():
        recorded = before.get(kind)
        recorded = recorded if isinstance(recorded, Mapping) else {}
        names = [name for name in {**recorded, **values} if plain(recorded.get(name)) != plain(values.get(name))]
        if not names:
            continue
        if kind == "settings":
            words += [f"{name} was {recorded.get(name)!r}, now {values.get(name)!r}" for name in names]
        elif kind == "needs":
            words.append(f"depends on {', '.join(names)}")
        else:
            words.append(f"{kind} changed ({', '.join(names)})")
    return "; ".join(words)


def digest_of(value: object) -> str:
    """Digest of a JSON-ready value."""
    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _input_digest(config: StudyConfig, name: str, digests: Digests) -> tuple[str, str] | None:
    """Name and digest of an input file: prompts without ids are named after their file."""
    path = getattr(config, name)
    return None if path is None else (Path(path).name, digests.of(Path(path)))


def _code_digest(setting: object, digests: Digests) -> str | None:
    """Digest of the module that a setting of the form `package.module:name` names."""
    if not isinstance(setting, str) or ":" not in setting or "/" in setting:
        return None
    try:
        spec = importlib.util.find_spec(setting.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else digests.of(Path(spec.origin))
