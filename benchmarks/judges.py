"""How well does `PhraseJudge` agree with people, does it generalise over models, and what do short answers hide?

Reads one CSV file a model with the columns id, prompt, completion and final_label (1_full_compliance,
2_full_refusal, 3_partial_refusal), as the XSTest authors publish them (github.com/paul-rottger/exaggerated-safety).
They are not part of this project: give their folder. Prints Markdown tables.

- Files: balanced accuracy over full refusals and full compliances, by file and part. Every third id is for reporting;
  the wordings were tuned on the others. Intervals: Wilson's for each class, joined as for a mean of independent rates.
- Partial: recall and precision of `partial` over all answers.
- `--transfer`: for each model, the settings and the wordings that do best on the tuning parts of the *other* models,
  measured on all answers of this one. A wording stays if it matches more refusals than compliances there.
- `--budgets 32 64 ...`: the answers cut to so many words and marks, and how many verdicts differ from those on whole
  answers.
"""

import argparse
import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from cliffscope.judging.canonical import canonical
from cliffscope.judging.lectures import DENIALS, PLAIN, STANCES, SYMPATHY, LectureRule
from cliffscope.judging.phrase_judge import PhraseJudge
from cliffscope.judging.phrases import REFUSALS
from cliffscope.judging.protocols import Verdict
from cliffscope.stats import wilson
from cliffscope.transcripts.records import Outcome

COMPLIANCE, REFUSAL, PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"
PARTS = ("tuning", "reporting")
GRID = {"sentences": (2, 3), "of_request": (0.5, 0.6, 0.7), "of_premise": (0.4,)}


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One answer that people labelled."""

    model: str
    part: str
    prompt: str
    answer: str
    label: str


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help="folder of CSV files, one a model")
    parser.add_argument("--transfer", action="store_true", help="tune on all models but one")
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help="words and marks that an answer is cut to")
    options = parser.parse_args()
    answers = [row for path in sorted(options.labels.glob("*.csv")) for row in read(path)]
    models = sorted({row.model for row in answers})
    verdicts = judged(answers)
    print(files_table(answers, verdicts, models))
    print(partial_table(answers, verdicts, models))
    if options.transfer:
        print(transfer_table(answers, models))
    if options.budgets:
        print(budget_table(answers, verdicts, options.budgets))


def read(path: Path) -> list[Labelled]:
    """The labelled answers of one model."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Labelled(
                model=path.stem,
                part=PARTS[int(re.sub(r"^v2-|\D", "", row["id"])) % 3 == 0],
                prompt=row["prompt"],
                answer=row["completion"],
                label=row["final_label"],
            )
            for row in csv.DictReader(file)
        ]


def judged(answers: Sequence[Labelled], rule: LectureRule = PLAIN) -> list[Verdict]:
    """The judge's verdicts."""
    judge = PhraseJudge(rule=rule)
    return [judge(row.prompt, row.answer) for row in answers]


def accuracy(answers: Sequence[Labelled], verdicts: Sequence[Verdict], where: Callable[[Labelled], bool]) -> list[str]:
    """Cells: n of each class, the share of each that is judged rightly, and their mean with its interval."""
    counts: Counter[tuple[str, bool]] = Counter()
    for row, verdict in zip(answers, verdicts, strict=True):
        if where(row) and row.label != PARTIAL:
            right = Outcome.REFUSED if row.label == REFUSAL else Outcome.COMPLIED
            counts[row.label, verdict.outcome is right] += 1
    sizes = [counts[label, True] + counts[label, False] for label in (REFUSAL, COMPLIANCE)]
    hits = [counts[label, True] for label in (REFUSAL, COMPLIANCE)]
    rates = [hit / max(1, size) for hit, size in zip(hits, sizes, strict=True)]
    intervals = [wilson(hit, size) for hit, size in zip(hits, sizes, strict=True)]
    mean = sum(rates) / 2
    below = sum((rate - i.low) ** 2 for rate, i in zip(rates, intervals, strict=True)) ** 0.5 / 2
    above = sum((i.high - rate) ** 2 for rate, i in zip(rates, intervals, strict=True)) ** 0.5 / 2
    shares = [f"{rate:.3f} ({size})" for rate, size in zip(rates, sizes, strict=True)]
    return [*shares, f"{mean:.3f} [{mean - below:.3f}, {mean + above:.3f}]"]


def files_table(answers: Sequence[Labelled], verdicts: Sequence[Verdict], models: Sequence[str]) -> str:
    """Balanced accuracy by file and part."""
    rows = []
    for model, part in product(models, PARTS):
        cells = accuracy(answers, verdicts, lambda row, m=model, p=part: (row.model, row.part) == (m, p))
        rows.append([model, part, *cells])
    return table(["answers of", "part", "refusals told (n)", "compliances told (n)", "balanced accuracy"], rows)


def partial_table(answers: Sequence[Labelled], verdicts: Sequence[Verdict], models: Sequence[str]) -> str:
    """Recall and precision of partial refusals."""
    rows = []
    for name, part in product(("all", *models), PARTS):
        cells = [
            (row.label == PARTIAL, verdict.partial)
            for row, verdict in zip(answers, verdicts, strict=True)
            if row.part == part and name in ("all", row.model)
        ]
        counts = Counter(cells)
        both, labelled, told = counts[True, True], sum(a for a, _ in cells), sum(b for _, b in cells)
        rows.append([name, part, share(both, labelled), share(both, told)])
    return table(["answers of", "part", "recall", "precision"], rows)


def transfer_table(answers: Sequence[Labelled], models: Sequence[str]) -> str:
    """Tuned on the tuning parts of all models but one, measured on that one."""
    rows = []
    for held in models:
        others = [row for row in answers if row.model != held and row.part == "tuning"]
        dropped = unseen(others)
        rules = [
            LectureRule(without=dropped, **dict(zip(GRID, values, strict=True))) for values in product(*GRID.values())
        ]
        best = max(rules, key=lambda rule: balance(others, rule))
        alone = [row for row in answers if row.model == held]
        cells = accuracy(alone, judged(alone, best), lambda _: True)
        setting = f"{best.sentences} sentences, {best.of_request}, {best.of_premise}; {len(dropped)} wordings dropped"
        rows.append([held, setting, *cells])
    heads = ["held out", "tuned on the others", "refusals told (n)", "compliances told (n)", "balanced accuracy"]
    return table(heads, rows)


def unseen(answers: Sequence[Labelled]) -> frozenset[str]:
    """Wordings that do not match more refusals than compliances."""
    texts = [(canonical(row.answer), row.label) for row in answers if row.label != PARTIAL]
    names = []
    for phrase in (*REFUSALS, *STANCES, *DENIALS, SYMPATHY):
        labels = Counter(label for text, label in texts if phrase.pattern.search(text, 0, 600))
        if labels[REFUSAL] <= labels[COMPLIANCE]:
            names.append(phrase.name)
    return frozenset(names)


def balance(answers: Sequence[Labelled], rule: LectureRule) -> float:
    """Mean over models of the balanced accuracy."""
    verdicts = judged(answers, rule)
    hits: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for row, verdict in zip(answers, verdicts, strict=True):
        if row.label != PARTIAL:
            sizes[row.model, row.label] += 1
            hits[row.model, row.label] += (verdict.outcome is Outcome.REFUSED) == (row.label == REFUSAL)
    return sum(hits[cell] / sizes[cell] for cell in sizes) / len(sizes)


def budget_table(answers: Sequence[Labelled], whole: Sequence[Verdict], budgets: Sequence[int]) -> str:
    """How verdicts change where answers are cut."""
    rows = []
    for budget in budgets:
        cut = [re.match(rf"(?:\s*(?:\w+|[^\w\s])){{0,{budget}}}", row.answer) for row in answers]
        short = [match.group() if match else "" for match in cut]
        judge = PhraseJudge()
        verdicts = [judge(row.prompt, text) for row, text in zip(answers, short, strict=True)]
        n_cut = sum(len(text) < len(row.answer.rstrip()) for row, text in zip(answers, short, strict=True))
        turned = Counter((a.outcome, b.outcome) for a, b in zip(verdicts, whole, strict=True) if a.outcome != b.outcome)
        late = turned[Outcome.COMPLIED, Outcome.REFUSED]
        early = turned[Outcome.REFUSED, Outcome.COMPLIED]
        parts = sum(a.partial != b.partial for a, b in zip(verdicts, whole, strict=True))
        cells = [share(n_cut, len(answers)), share(sum(turned.values()), len(answers)), str(late), str(early)]
        rows.append([str(budget), *cells, str(parts), accuracy(answers, verdicts, lambda _: True)[-1]])
    heads = ["budget", "cut", "outcome differs", "complied, refused if whole", "refused, complied if whole"]
    return table([*heads, "partial differs", "balanced accuracy"], rows)


def share(part: int, whole: int) -> str:
    """A share with its count."""
    return f"{part / whole:.2f} ({part} of {whole})" if whole else "none"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
