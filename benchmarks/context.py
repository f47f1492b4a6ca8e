"""What does the trace of a long transcript cost?

On a random model of 4 layers, d_model 256, 8 heads (fp32), the trace of one transcript of `--length` tokens, in chunks:
peak resident memory above the loaded model, and seconds; and at `--paired` tokens the time of the chunked trace over
that of one pass, the median of paired runs in turn, with the largest difference between the two. Prints JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
from memory_peak import peak_above_now
from transformers import LlamaConfig, LlamaForCausalLM

import cliffscope as cs
from cliffscope.model.load import LensModel
from cliffscope.organisms import grammar
from cliffscope.organisms.tokenizer import build_tokenizer
from cliffscope.readouts import activations
from cliffscope.transcripts.transcript import TokenizedTranscript


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--paired", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-of", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(peak(options.peak_of))
        return
    model = build()
    report: dict[str, object] = {"load_average": psutil.getloadavg()[0], "threads": torch.get_num_threads()}
    row, probe = transcript(model, options.paired), directions(model)
    trace(model, row, probe)
    ratios = []
    for _ in range(options.repeats):
        chunked, ours = timed(lambda: trace(model, row, probe))
        whole, theirs = timed(lambda: one_pass(model, row, probe))
        ratios.append(chunked / whole)
    report["chunked_over_one_pass"] = {
        **{"tokens": options.paired, "median": round(statistics.median(ratios), 3)},
        **{"lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)},
        "largest_difference": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    }
    report["long"] = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--peak-of", str(options.length)], capture_output=True, text=True, check=True
        ).stdout
    )
    print(json.dumps(report, indent=1))


def peak(length: int) -> str:
    """Seconds, and peak resident memory above the loaded model, as JSON."""
    model = build()
    probe, long = directions(model), transcript(model, length)
    trace(model, transcript(model, 64), probe)
    above, (seconds, logits) = peak_above_now(lambda: timed(lambda: trace(model, long, probe)))
    return json.dumps(
        {
            **{"tokens": logits.shape[1], "seconds": round(seconds, 1)},
            "above_model_mb": round(above / 1e6),
        }
    )


def build() -> LensModel:
    """The random model."""
    tokenizer = build_tokenizer(grammar.vocabulary(["story"]))
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=65_536,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return cs.load_model(folder, device="cpu")


def transcript(model: LensModel, length: int) -> TokenizedTranscript:
    """Random tokens."""
    ids = np.random.default_rng(0).integers(8, len(model.tokenizer), length)
    return TokenizedTranscript(id="long", token_ids=ids, bounds=(10, length - 3, length, length))


def directions(model: LensModel) -> tuple[np.ndarray, np.ndarray]:
    """A random direction a layer."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(4, model.shape.d_model)).astype(np.float32), np.zeros(4, np.float32)


def trace(model: LensModel, row: TokenizedTranscript, probe: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Logits of every layer and token, in chunks where the transcript is long."""
    return activations.project_residuals(model, [row], *probe)[0]


def one_pass(model: LensModel, row: TokenizedTranscript, probe: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The same without chunks."""
    long, activations.LONG = activations.LONG, 1 << 40
    try:
        return trace(model, row, probe)
    finally:
        activations.LONG = long


def timed(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds and result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
