"""What do 22 arms cost when they answer the same thinking?

1. The arms of an evaluation at the closing (unedited, planted heads, 20 random sets), answered together: each
   transcript is read once.
2. The same arms, one call each: each transcript is read once per arm.
3. The same arms with an edit at all positions: each arm thinks for itself.

Medians over `--repeats` rounds of all three in one process, wall clock and CPU time of the process, since other work
may share the machine. The answers of 1 and 2 are compared token for token. Prints JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import cliffscope as cs
from cliffscope.evaluation.arms import plan_arms
from cliffscope.generation.answering import answer_arms
from cliffscope.generation.speaking import Budget
from cliffscope.heads.editing import edited_everywhere
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Transcripts

Answers = dict[str, Transcripts]


def main() -> None:
    """Measures and prints."""
    options = parse()
    model, truth = cs.load_model(options.model, device=options.device), cs.organisms.read_truth("planted-llama")
    half = options.transcripts // 2
    prompts = cs.organisms.prompts("test", half, harmful=True, wrappers=truth.full_wrappers, seed=23)
    prompts = prompts + cs.organisms.prompts("test", options.transcripts - half, harmful=False, seed=23)
    written = cs.roll_out(model, prompts, max_thinking=128, max_answer=options.max_answer)
    edits = {
        scope: {
            arm.name: arm.edit
            for arm in plan_arms(model, cs.zero(truth.planted, scope=scope), controls=options.controls)
        }
        for scope in ("closing", "all")
    }
    ways: dict[str, Callable[[], Answers]] = {
        "together": lambda: together(model, written, edits["closing"], options),
        "one_call_each": lambda: one_call_each(model, written, edits["closing"], options),
        "thinking_anew": lambda: thinking_anew(model, prompts, edits["all"], options),
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    answers: dict[str, Answers] = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            start = time.perf_counter(), time.process_time()
            answers[name] = way()
            took[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    medians = {name: [statistics.median(values) for values in zip(*each, strict=True)] for name, each in took.items()}
    print(
        json.dumps(
            {
                "model": model.name,
                "device": str(model.device),
                "transcripts": len(written),
                "arms": len(edits["closing"]),
                "tokens_read": mean_of([len(t.thinking_ids or ()) for t in written]),
                "tokens_answered": mean_of([len(t.answer_ids or ()) for t in written]),
                "seconds": {name: round(wall, 2) for name, (wall, _) in medians.items()},
                "cpu_seconds": {name: round(cpu, 2) for name, (_, cpu) in medians.items()},
                "each": {name: [[round(v, 2) for v in pair] for pair in each] for name, each in took.items()},
                "same_answers": answers["together"] == answers["one_call_each"],
            },
            indent=1,
        )
    )


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="planted-llama", help="an organism with the heads of planted-llama")
    parser.add_argument("--device", default=None)
    parser.add_argument("--transcripts", type=int, default=100)
    parser.add_argument("--controls", type=int, default=20)
    parser.add_argument("--max-answer", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def together(
    model: LensModel, written: Transcripts, arms: dict[str, cs.HeadEdit | None], options: argparse.Namespace
) -> Answers:
    """All arms in one call."""
    return answer_arms(model, written, arms, Budget(max_answer=options.max_answer))


def one_call_each(
    model: LensModel, written: Transcripts, arms: dict[str, cs.HeadEdit | None], options: argparse.Namespace
) -> Answers:
    """One call an arm."""
    return {
        name: cs.answer_transcripts(model, written, edit=edit, max_answer=options.max_answer)
        for name, edit in arms.items()
    }


def thinking_anew(
    model: LensModel, prompts: Transcripts, arms: dict[str, cs.HeadEdit | None], options: argparse.Namespace
) -> Answers:
    """One roll-out an arm, its edit in the weights."""
    answers = {}
    for name, edit in arms.items():
        with edited_everywhere(model, edit if edit is not None else cs.zero(())):
            answers[name] = cs.roll_out(model, prompts, max_thinking=128, max_answer=options.max_answer)
    return answers


def mean_of(counts: list[int]) -> float:
    """Mean, rounded."""
    return round(statistics.mean(counts), 1)


if __name__ == "__main__":
    main()
