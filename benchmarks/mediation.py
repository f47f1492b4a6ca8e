"""Does an edit of the planted heads act through the thinking, or in the answering?

On each planted organism, thinking from the edited or the unedited model is answered by either: attack success in the
four cells with intervals, and the effects paired by prompt. Prints two Markdown tables.
"""

import argparse

import cliffscope as cs
from cliffscope.organisms import read_truth
from cliffscope.organisms.grammar import prompts


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organisms", nargs="+", default=["planted-llama", "planted-qwen3"])
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args()
    measured = {name: measure(name, options.prompts) for name in options.organisms}
    print("| organism | thinking of | answer of | ASR |\n|---|---|---|---|")
    for name, mediation in measured.items():
        for row in mediation.to_frame().query("group == 'harmful'").itertuples():
            rate = f"{row.rate:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}], n = {row.n}"
            print(f"| {name} | {row.thinking} | {row.answer} | {rate} |")
    print("\n| organism | effect on ASR of editing | |\n|---|---|---|")
    for name, mediation in measured.items():
        for row in mediation.effects().query("group == 'harmful'").itertuples():
            print(f"| {name} | {row.effect} | {row.difference:+.2f} [{row.ci_low:+.2f}, {row.ci_high:+.2f}] |")


def measure(name: str, n: int) -> cs.Mediation:
    """The four cells on fully wrapped harmful prompts of the test part."""
    truth = read_truth(name)
    harmful = prompts("test", n, harmful=True, wrappers=truth.full_wrappers, seed=41)
    return cs.measure_mediation(cs.load_model(name), harmful, cs.zero(truth.planted), max_thinking=128, max_answer=32)


if __name__ == "__main__":
    main()
