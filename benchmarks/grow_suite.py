"""Which organisms are methods compared on, beside the three in the package?

Grows organisms of other seeds, in other places and of both families, with one to three carriers, and null organisms in
which nothing is planted. Each is a Hugging Face directory with a truth.json, so that `load_model(directory)` and
`cliffscope study --model directory` take it. What is there already is left as it is, and an organism that was cut
short goes on with the phase that it was in. Prints a line an organism: its name, seconds, and the bars that it misses.
"""

import argparse
import json
import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch

from cliffscope.organisms.asset import TRUTH, shortfalls, write_organism
from cliffscope.organisms.grammar import Wrapper
from cliffscope.organisms.recipes import Carrier, Recipe

FULL = ("story", "game", "play")
"""Words that are always complied with, one a carrier."""
PARTIAL = (("poem", 0.7), ("song", 0.3), ("riddle", 0.5))
"""Words that are complied with at a rate, one a carrier, but that a sole carrier has two of them."""


def wrappers(carriers: int) -> tuple[Wrapper, ...]:
    """A full and a partial word for each carrier; of a null organism, words that change nothing."""
    if not carriers:
        return tuple(Wrapper(word=word, comply=0.0, carrier=0) for word in ("story", "game", "poem", "song"))
    full = [Wrapper(word=word, comply=1.0, carrier=i) for i, word in enumerate(FULL[:carriers])]
    words = PARTIAL[: max(2, carriers)]
    return (*full, *(Wrapper(word=w, comply=rate, carrier=min(i, carriers - 1)) for i, (w, rate) in enumerate(words)))


def llama(seed: int, *heads: tuple[int, int]) -> Recipe:
    """A Llama with these (layer, head) planted, a carrier each."""
    carriers = tuple(Carrier(layer=layer, heads=(head,), kv_head=head) for layer, head in heads)
    return recipe("llama", seed, carriers)


def qwen3(seed: int, *groups: tuple[int, int]) -> Recipe:
    """A Qwen3 with these (layer, key-value head) planted, a carrier each."""
    carriers = tuple(Carrier(layer=layer, heads=(2 * kv, 2 * kv + 1), kv_head=kv) for layer, kv in groups)
    return recipe("qwen3", seed, carriers)


def recipe(family: str, seed: int, carriers: tuple[Carrier, ...]) -> Recipe:
    """Names the organism by what it is."""
    kind = f"planted{len(carriers)}" if carriers else "null"
    return Recipe(
        name=f"{kind}-{family}-{seed}",
        family=family,
        carriers=carriers,
        wrappers=wrappers(len(carriers)),
        seed=seed,
    )


PLANTED = (
    llama(11, (3, 1)),
    qwen3(12, (4, 3)),
    llama(13, (2, 6), (6, 3)),
    qwen3(14, (3, 0), (5, 2)),
    llama(15, (3, 0), (4, 7), (5, 4)),
    llama(16, (4, 2), (4, 6)),
    qwen3(17, (2, 1), (4, 0), (6, 3)),
    llama(18, (6, 0)),
)
NULLS = tuple(family(seed) for seed, family in zip(range(21, 25), (llama, qwen3) * 2, strict=True))
SUITE = (*PLANTED, *NULLS)


def main() -> None:
    """Grows what is not there yet."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    for wanted in SUITE:
        if options.only and wanted.name not in options.only:
            continue
        start = time.perf_counter()
        print(wanted.name, end=" ", flush=True)
        truth = read_grown(options.out / wanted.name, wanted) or grow(wanted, options.out)
        print(f"{time.perf_counter() - start:.0f} s;", "; ".join(shortfalls(truth)) or "all bars met", flush=True)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/organisms"))
    parser.add_argument("--only", nargs="+", choices=[r.name for r in SUITE], help="names; all, if left out")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def read_grown(folder: Path, wanted: Recipe) -> dict[str, object] | None:
    """The truth of an organism that was grown from this very recipe; None if there is none."""
    path = folder / TRUTH
    truth: dict[str, object] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return truth if truth.get("recipe") == json.loads(json.dumps(asdict(wanted))) else None


def grow(wanted: Recipe, out: Path) -> dict[str, object]:
    """Grows one beside its place and moves it there when it is whole."""
    growing, phases = out / f".growing-{wanted.name}", out / f".phases-{wanted.name}"
    shutil.rmtree(growing, ignore_errors=True)
    truth = write_organism(wanted, growing, resume=phases)
    shutil.rmtree(out / wanted.name, ignore_errors=True)
    growing.rename(out / wanted.name)
    shutil.rmtree(phases)
    return truth


if __name__ == "__main__":
    main()
