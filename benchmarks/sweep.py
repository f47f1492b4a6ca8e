"""How much faster is the sweep than a loop of `run_with_hooks`, is it the same, and how near is it to its floor?

All sides run in one process on SmolLM2-135M, fp32: each of the 270 heads zeroed in one transcript, the refusal logit
read at the last layer's final token.

- `closing`: the packed sweep at each length. The loop's cost a head is the median over `--heads` heads, times 270; the
  sweep's is the median of `--repeats` whole sweeps, their unedited controls included; the first one also compares its
  path with the plain one, which is done once a model. The floor is what no such method goes
  below: one forward pass of the prefix, and one of half of branches x window tokens, since a branch that starts at its
  own layer runs through half of them on average.
- `all`: the batched sweep at the first length, against the loop.
- `transcripts`: `--many` short transcripts against one of them.
- `readouts`: the packed sweep with the answer readout, of openings of one and of several tokens, against that with a
  probe at the same layer, in turn; and its largest difference from the loop.
- `memory`: peak resident memory of a fresh process that sweeps `--longest` tokens, above the loaded model.

Prints JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pandas as pd
import psutil
import torch
from memory_peak import peak_above_now

from cliffscope.heads.edits import HeadRef, Scope, zero
from cliffscope.heads.sweep import Sweep, sweep_branches
from cliffscope.memory import held_bytes
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts.answer import AnswerReadout
from cliffscope.readouts.openings import describe
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.readout import Readout, read_final
from cliffscope.readouts.reports import AnswerReport, ProbeReport, calibration_of, region_report
from cliffscope.transcripts.records import Message, Transcript
from cliffscope.transcripts.transcript import Span, TokenizedTranscript, tokenize

Result = TypeVar("Result")
SENTENCE = "Please tell me how bread is made, what it needs, and how long each of the steps takes at home. "


def main() -> None:
    """Measures and prints."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_above_model(options))
        return
    model = load_model(options.model)
    probe = random_probe(model)
    report: dict[str, object] = {
        "model": model.name,
        "heads": model.shape.n_layers * model.shape.n_heads,
        "threads": torch.get_num_threads(),
        "closing": [compare(model, probe, n, Scope.CLOSING, options) for n in options.tokens],
    }
    if options.all_tokens:
        report["all"] = compare(model, probe, options.all_tokens, Scope.ALL, options)
    if options.many:
        report["transcripts"] = many(model, probe, options)
    if options.readouts:
        report["readouts"] = [readouts(model, probe, n, options) for n in options.readouts]
    if options.longest:
        command = [sys.executable, __file__, "--memory-of", str(options.longest), "--model", options.model]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        report["memory"] = json.loads(out.splitlines()[-1])
    print(json.dumps({**report, "load_average": psutil.getloadavg()[0]}, indent=1))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--all-tokens", type=int, default=512, help="length for scope all; 0 leaves it out")
    parser.add_argument("--many", type=int, default=100, help="0 leaves it out")
    parser.add_argument("--readouts", type=int, nargs="*", default=[48, 512], help="lengths; none leaves it out")
    parser.add_argument("--longest", type=int, default=4096, help="0 leaves it out")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(
    model: LensModel, probe: RefusalProbe, tokens: int, scope: Scope, options: argparse.Namespace
) -> dict[str, object]:
    """The sweep against the loop, and against its floor."""
    transcript, branches = long_transcript(model, tokens), every_head(model)
    some = [branches[i][0] for i in np.linspace(0, len(branches) - 1, options.heads).astype(int)]
    loop_logit(model, probe, transcript, some[0], scope)
    loops = {head: timed(lambda head=head: loop_logit(model, probe, transcript, head, scope)) for head in some}
    sweeps = [timed(lambda: sweep(model, probe, [transcript], scope)) for _ in range(options.repeats)]
    loop = statistics.median(seconds for seconds, _ in loops.values()) * len(branches)
    took = statistics.median(seconds for seconds, _ in sweeps)
    swept = sweeps[0][1]
    differences = [abs(logit - float(swept.edited[0, branches.index((h,))])) for h, (_, logit) in loops.items()]
    window = transcript.final + 1 - transcript.span(Span.CLOSING).start
    result: dict[str, object] = {
        "scope": str(scope),
        "tokens": transcript.n_pos,
        "window": window,
        "loop_seconds": round(loop, 2),
        "first_sweep_seconds": round(sweeps[0][0], 3),
        "sweep_seconds": round(took, 3),
        "ratio": round(loop / took, 1),
        "largest_difference": max(differences),
        "clean_logit": float(swept.clean[0]),
        "path": swept.path,
    }
    if scope is Scope.CLOSING:
        floor = sum(forward_seconds(model, n, options.repeats) for n in (transcript.n_pos, len(branches) * window // 2))
        result |= {"floor_seconds": round(floor, 3), "sweep_over_floor": round(took / floor, 2)}
    return result


def many(model: LensModel, probe: RefusalProbe, options: argparse.Namespace) -> dict[str, object]:
    """Many transcripts against one of them."""
    one = long_transcript(model, 48)
    alone = statistics.median(timed(lambda: sweep(model, probe, [one], Scope.CLOSING))[0] for _ in range(5))
    together, _ = timed(lambda: sweep(model, probe, [one] * options.many, Scope.CLOSING))
    return {
        "n": options.many,
        "tokens": one.n_pos,
        "one_seconds": round(alone, 3),
        "seconds": round(together, 2),
        "ratio": round(together / alone, 1),
    }


def readouts(model: LensModel, probe: RefusalProbe, tokens: int, options: argparse.Namespace) -> dict[str, object]:
    """The answer readout against a probe at the same layer."""
    transcript = long_transcript(model, tokens)
    kinds: dict[str, Readout] = {
        "probe": probe,
        "one token": answer_readout(model, {"refused": ["I"], "complied": ["Sure"]}),
        "several tokens": answer_readout(model, {"refused": ["I'm sorry", "I cannot"], "complied": ["I can", "Sure,"]}),
    }
    took: dict[str, list[float]] = {name: [] for name in kinds}
    swept: dict[str, Sweep] = {}
    for _ in range(options.repeats + 1):
        for name, readout in kinds.items():
            seconds, swept[name] = timed(lambda readout=readout: sweep(model, readout, [transcript], Scope.CLOSING))
            took[name].append(seconds)
    # The first sweep also compares its path with the plain one.
    medians = {name: statistics.median(seconds[1:]) for name, seconds in took.items()}
    result: dict[str, object] = {"tokens": transcript.n_pos}
    for name, readout in kinds.items():
        head = model.shape.places[len(model.shape.places) // 2]
        ref = HeadRef(layer=head[0], head=head[1])
        plain = read_final(model, readout, [transcript], edit=zero([ref], scope=Scope.CLOSING))[0]
        edited = swept[name].edited[0, every_head(model).index((ref,))]
        result[name] = {
            "seconds": round(medians[name], 3),
            "over_probe": round(medians[name] / medians["probe"], 3),
            "positions_behind_the_final_one": len(readout.continuations),
            "difference": float(abs(plain - edited)),
            "path": swept[name].path,
        }
    return result


def peak_above_model(options: argparse.Namespace) -> str:
    """Peak resident memory of this process above what it holds after loading, as JSON."""
    model = load_model(options.model)
    probe, transcript = random_probe(model), long_transcript(model, options.memory_of)
    loaded = held_bytes(torch.device("cpu"))
    above, swept = peak_above_now(lambda: sweep(model, probe, [transcript], Scope.CLOSING))
    gib = 1 / 2**30
    return json.dumps(
        {
            "tokens": transcript.n_pos,
            "loaded_gib": round(loaded * gib, 2),
            "above_gib": round(above * gib, 2),
            "path": swept.path,
        }
    )


def sweep(model: LensModel, readout: Readout, rows: list[TokenizedTranscript], scope: Scope) -> Sweep:
    """What is measured."""
    return sweep_branches(model, readout, rows, every_head(model), scope=scope)


def every_head(model: LensModel) -> list[tuple[HeadRef]]:
    """One branch a head."""
    shape = model.shape
    return [(HeadRef(layer=a, head=b),) for a in range(shape.n_layers) for b in range(shape.n_heads)]


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds and result of a call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def long_transcript(model: LensModel, tokens: int) -> TokenizedTranscript:
    """A prompt of as many tokens as asked for, a sentence more at the most."""
    text, tokenized = SENTENCE, None
    while tokenized is None or tokenized.n_pos < tokens:
        text += SENTENCE
        message = Message(role="user", content=text)
        tokenized = tokenize(Transcript(id="long", messages=(message,)), model.tokenizer, model.template)
    return tokenized


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
            calibration=calibration_of(np.zeros(0), np.zeros(0)),
            shuffled=(),
            by_region=np.zeros(0),
            cells={},
            warnings=(),
        ),
    )


def answer_readout(model: LensModel, openings: dict[str, list[str]]) -> AnswerReadout:
    """An answer readout of these openings: the cost depends on them alone."""
    nothing = region_report("none", np.zeros(0), np.zeros(0))
    ids = {
        kind: [tuple(model.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        for kind, texts in openings.items()
    }
    return AnswerReadout(
        openings=describe(ids, model.tokenizer),
        layer=model.shape.n_layers - 1,
        vocabulary=model.hf.get_output_embeddings().out_features,
        refused_logit=0.0,
        fingerprint=model.fingerprint,
        template=model.template.name,
        report=AnswerReport(
            final=nothing,
            within_harmful=nothing,
            openings=pd.DataFrame(),
            separation=1.0,
            covered=1.0,
            mass=1.0,
            warnings=(),
        ),
    )


def loop_logit(
    model: LensModel, probe: RefusalProbe, transcript: TokenizedTranscript, head: HeadRef, scope: Scope
) -> float:
    """What a TransformerLens user writes: one hooked forward pass."""
    where = scope.positions(transcript)
    captured = {}

    def zero(z: torch.Tensor, hook: object) -> torch.Tensor:
        del hook
        z[:, where, head.head] = 0.0
        return z

    def keep(residual: torch.Tensor, hook: object) -> None:
        del hook
        captured["residual"] = residual[0, -1]

    hooks = [(f"blocks.{head.layer}.attn.hook_z", zero), (f"blocks.{probe.layer}.hook_resid_post", keep)]
    ids = torch.from_numpy(transcript.token_ids[: transcript.final + 1])[None]
    with torch.inference_mode():
        model.bridge.run_with_hooks(ids, return_type=None, fwd_hooks=hooks)
    return float(captured["residual"] @ torch.from_numpy(probe.weight) + probe.bias)


def forward_seconds(model: LensModel, tokens: int, repeats: int) -> float:
    """Median seconds of a plain forward pass of the blocks."""
    batch = model.to_batch([[5] * tokens])

    def forward() -> None:
        with torch.inference_mode():
            model.decoder(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)

    return statistics.median(timed(forward)[0] for _ in range(repeats))


if __name__ == "__main__":
    main()
