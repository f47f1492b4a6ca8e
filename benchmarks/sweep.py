"""How much faster is the packed sweep than a loop of `run_with_hooks`, and is it the same?

Both sides run in one process on SmolLM2-135M, fp32: every one of the 270 heads zeroed at the five closing tokens of one
transcript, the refusal logit read at the last layer's final token. The loop's cost a head is the median over `--heads`
heads, times 270; the sweep's is the median of `--repeats` whole sweeps, its own check against the plain path included.
Prints JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from cliffscope.heads.edits import HeadRef
from cliffscope.heads.sweep import sweep_branches
from cliffscope.models import LensModel, load_model
from cliffscope.probing.probe import RefusalProbe
from cliffscope.probing.reports import ProbeReport, region_report
from cliffscope.transcripts.records import Message, Transcript
from cliffscope.transcripts.transcript import Span, TokenizedTranscript, tokenize

Result = TypeVar("Result")
SENTENCE = "Please tell me how bread is made, what it needs, and how long each of the steps takes at home. "


def main() -> None:
    """Measures and prints."""
    options = parse()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    transcript, probe = long_transcript(model, options.tokens), random_probe(model)
    heads = [HeadRef(layer=a, head=b) for a in range(model.shape.n_layers) for b in range(model.shape.n_heads)]
    some = [heads[i] for i in np.linspace(0, len(heads) - 1, options.heads).astype(int)]
    loop_logit(model, probe, transcript, some[0])
    branches = [(head,) for head in heads]
    found = {head: timed(lambda head=head: loop_logit(model, probe, transcript, head)) for head in some}
    sweeps = [timed(lambda: sweep_branches(model, probe, [transcript], branches)) for _ in range(options.repeats)]
    prefix = [timed(lambda: forward(model, transcript)) for _ in range(options.repeats)]
    loop = statistics.median(seconds for seconds, _ in found.values()) * len(heads)
    packed = statistics.median(seconds for seconds, _ in sweeps)
    sweep = sweeps[0][1]
    differences = [abs(logit - float(sweep.edited[0, heads.index(head)])) for head, (_, logit) in found.items()]
    print(
        json.dumps(
            {
                "model": model.name,
                "heads": len(heads),
                "tokens": transcript.n_pos,
                "window": transcript.final + 1 - transcript.span(Span.CLOSING).start,
                "threads": torch.get_num_threads(),
                "loop_seconds": round(loop, 2),
                "sweep_seconds": round(packed, 3),
                "ratio": round(loop / packed, 1),
                "one_forward_seconds": round(statistics.median(seconds for seconds, _ in prefix), 3),
                "largest_difference": max(differences),
                "clean_logit": float(sweep.clean[0]),
                "path": sweep.path,
                "load_average": os.getloadavg()[0],
            },
            indent=1,
        )
    )


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds and result of a call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def long_transcript(model: LensModel, tokens: int) -> TokenizedTranscript:
    """A prompt of as many tokens as asked for, a sentence more at the most."""
    text, found = SENTENCE, None
    while found is None or found.n_pos < tokens:
        text += SENTENCE
        message = Message(role="user", content=text)
        found = tokenize(Transcript(id="long", messages=(message,)), model.tokenizer, model.template)
    return found


def random_probe(model: LensModel) -> RefusalProbe:
    """A probe at the last layer with a random direction: the cost and the exactness do not depend on it."""
    shape = model.shape
    weights = np.random.default_rng(0).standard_normal((shape.n_layers, shape.d_model)).astype(np.float32)
    empty = region_report("none", np.zeros(0), np.zeros(0))
    return RefusalProbe(
        layer=shape.n_layers - 1,
        weight=weights[-1],
        bias=0.0,
        layer_weights=weights,
        layer_biases=np.zeros(shape.n_layers, dtype=np.float32),
        positions="final",
        strength=1.0,
        refused_logit=0.0,
        fingerprint=model.fingerprint,
        report=ProbeReport(
            final=empty,
            late_thinking=empty,
            within_harmful=empty,
            shuffled=(),
            by_region=np.zeros(0),
            cells={},
            warnings=(),
        ),
    )


def loop_logit(model: LensModel, probe: RefusalProbe, transcript: TokenizedTranscript, head: HeadRef) -> float:
    """What a TransformerLens user writes: one hooked forward pass."""
    window = transcript.span(Span.CLOSING)
    kept = {}

    def zero(z: torch.Tensor, hook: object) -> torch.Tensor:
        del hook
        z[:, window, head.head] = 0.0
        return z

    def keep(residual: torch.Tensor, hook: object) -> None:
        del hook
        kept["residual"] = residual[0, -1]

    hooks = [(f"blocks.{head.layer}.attn.hook_z", zero), (f"blocks.{probe.layer}.hook_resid_post", keep)]
    ids = torch.from_numpy(transcript.token_ids[: transcript.final + 1])[None]
    with torch.inference_mode():
        model.bridge.run_with_hooks(ids, return_type=None, fwd_hooks=hooks)
    return float(kept["residual"] @ torch.from_numpy(probe.weight) + probe.bias)


def forward(model: LensModel, transcript: TokenizedTranscript) -> None:
    """One plain forward pass of the blocks: the floor."""
    batch = model.to_batch([transcript.token_ids.tolist()])
    with torch.inference_mode():
        model.decoder(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)


if __name__ == "__main__":
    main()
