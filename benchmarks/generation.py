"""Does an edit slow generation down, and what do 22 arms cost?

1. Throughput under a weight edit against unedited, in pairs that alternate, so that a machine's slow minutes fall on
   both. The edit multiplies heads by 1, so that both write the same tokens: an edit that changes the answers changes
   their lengths, and with them how full the batches are.
2. Our decoding against `transformers.generate`, greedy, the same prompts and number of tokens.
3. All arms of a comparison: unedited, planted heads, 20 random sets; thinking and answers generated, greedy. On the
   null organism the heads are those that are planted in planted-llama.
4. A small model decoded by two threads over one thread, alone and beside a process that keeps one core busy.

Prints JSON. On a laptop the whole takes some minutes; `--arms-only` leaves out what needs a language model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import cliffscope as cs
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Transcripts
from cliffscope.transcripts.transcript import Span, tokenize


def main() -> None:
    """Measures and prints."""
    options = parse()
    small = {"arms": {name: arms(name, options) for name in ("planted-llama", "null-llama")}, "threads": threads()}
    if options.arms_only:
        print(json.dumps(small, indent=1))
        return
    model = cs.load_model(options.model)
    heads = [cs.HeadRef(layer=layer, head=0) for layer in range(0, model.shape.n_layers, 4)]
    prompts = cs.organisms.prompts("test", options.rows, harmful=True)
    pairs = [edited_pair(model, prompts, cs.scale(heads, 1.0), options) for _ in range(options.repeats)]
    ratios = [plain / edited for plain, edited in pairs]
    generate = [generate_pair(model, prompts, options) for _ in range(options.repeats)]
    faster = statistics.median(theirs / ours for theirs, ours in generate)
    print(
        json.dumps(
            {
                "model": model.name,
                "rows": options.rows,
                "tokens_a_row": options.tokens,
                "edited_over_unedited_throughput": round(statistics.median(ratios), 4),
                "each": [round(ratio, 4) for ratio in ratios],
                "ours_over_generate_throughput": round(faster, 3),
                **small,
            },
            indent=1,
        )
    )


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--arms-only", action="store_true")
    parser.add_argument("--prompts", type=int, default=200, help="of the comparison of arms")
    return parser.parse_args()


def edited_pair(
    model: LensModel, prompts: Transcripts, edit: cs.HeadEdit, options: argparse.Namespace
) -> tuple[float, float]:
    """Seconds a token of one roll-out unedited and one edited, the edit put on and taken off within the time."""

    def plain() -> int:
        return written(model, prompts, options)

    def edited() -> int:
        with cs.edited_weights(model, edit):
            return written(model, prompts, options)

    return per_token(plain), per_token(edited)


def generate_pair(model: LensModel, prompts: Transcripts, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds a token of transformers' `generate` and of ours, without thinking or the end of a turn."""
    rows = [tokenize(t, model.tokenizer, model.template) for t in prompts]
    thinks = model.template.thinks
    ids = [r.token_ids[: r.span(Span.PROMPT).stop if thinks else r.n_pos].tolist() for r in rows]
    batch = model.to_batch(ids, left=True)

    def theirs() -> int:
        with torch.inference_mode():
            model.hf.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                do_sample=False,
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
                pad_token_id=model.tokenizer.pad_token_id or model.tokenizer.eos_token_id,
            )
        return options.tokens * len(ids)

    return per_token(theirs), per_token(lambda: written(model, prompts, options))


def written(model: LensModel, prompts: Transcripts, options: argparse.Namespace) -> int:
    """Tokens that a roll-out wrote."""
    transcripts = cs.roll_out(
        model, prompts, max_thinking=options.tokens, max_answer=options.tokens, batch_size=len(prompts), temperature=0.0
    )
    return sum(len(t.thinking_ids or ()) + len(t.answer_ids or ()) for t in transcripts)


def per_token(work: Callable[[], int]) -> float:
    """Seconds a token."""
    start = time.perf_counter()
    tokens = work()
    return (time.perf_counter() - start) / max(1, tokens)


def arms(name: str, options: argparse.Namespace) -> dict[str, object]:
    """The whole comparison on an organism."""
    model, truth = cs.organisms.load(name), cs.organisms.read_truth("planted-llama")
    half = options.prompts // 2
    prompts = cs.organisms.prompts("test", half, harmful=True, wrappers=truth.full_wrappers, seed=23)
    prompts = prompts + cs.organisms.prompts(
        "test", options.prompts - half, harmful=False, wrappers=(None, *truth.full_wrappers), seed=23
    )
    start = time.perf_counter()
    report = cs.evaluate_safety(
        model, prompts, edit=cs.zero(truth.planted), controls=20, max_thinking=128, max_answer=32
    )
    frame = report.to_frame()
    shown = frame[frame["kind"] != "random"][["arm", "group", "n", "rate", "ci_low", "ci_high"]]
    random = frame[frame["kind"] == "random"].groupby("group")["rate"].agg(["mean", "min", "max"])
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "arms": len(report.arms),
        "rows": json.loads(shown.round(4).to_json(orient="records")),
        "random": json.loads(random.round(4).to_json(orient="index")),
    }


def threads() -> dict[str, float]:
    """Seconds of a roll-out by two threads over seconds by one; above 1, one thread is faster."""
    model = cs.organisms.load("planted-llama")
    prompts = cs.organisms.prompts("test", 64, harmful=True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    ratios = {"alone": thread_ratio(model, prompts)}
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            ratios["beside_a_busy_core"] = thread_ratio(model, prompts)
        finally:
            busy.kill()
    torch.set_num_threads(before)
    return ratios


def thread_ratio(model: LensModel, prompts: Transcripts) -> float:
    """Median of three pairs; `small` is what decides on one thread."""
    ratios = []
    for _ in range(3):
        took = {}
        for small in (True, False):
            model.__dict__["small"] = small
            start = time.perf_counter()
            cs.roll_out(model, prompts, max_thinking=128, max_answer=32, batch_size=64)
            took[small] = time.perf_counter() - start
        ratios.append(took[False] / took[True])
    del model.__dict__["small"]
    return round(statistics.median(ratios), 2)


if __name__ == "__main__":
    main()
