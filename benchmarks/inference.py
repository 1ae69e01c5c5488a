"""Inference: questions a second of ours and of PyTorch, side by side.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/inference.py

Needs the demo's inputs, passages and retrieved questions (--workdir, runs/demo by
default) and the sets of `configs/prepare.py:offline` (--offline, runs/offline). The
same untuned SmolLM2 weights in float32 everywhere; ours starts from text and with the
settings of configs/evaluate.py, the peers are given tokens. Repeats take turns.

Ensemble generation: every test question is read with each of its passages, greedy
decoding, and the answers vote. The peer is `generate` of `transformers`, in batches of
like length with as many tokens as ours, an allocator that keeps its memory, and our
rule of when to stop; its votes are counted outside the clock. Once without and once
with demonstrations (--shots, each with its top passage), for fewer questions: what
prompts begin with alike ours reads once, the peer with each.

Choice among options, closed book: ours reads a question once for all its options.
Peers: one forward pass per option; the same without passes whose input was the last
one's (options of one token, as MMLU's letters); and batches of like length with logits
at the targets only, memory kept.

How many programs are compiled and how long that takes, tracing included, is measured in
two processes of their own, of which the second finds the first one's in the cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from peer_env import ensure
from workers import OURS, Peer, interleaved, median

from radit_jax import sharding
from radit_jax.data import pipeline, prompts
from radit_jax.data.corpus import PassageStore
from radit_jax.data.fewshot import Demonstration, choose, prefix
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.evaluation import metrics
from radit_jax.inference import packing
from radit_jax.inference.ensemble import vote
from radit_jax.inference.generate import generate, stop_tokens
from radit_jax.models.huggingface import load_llama
from radit_jax.models.llama import Llama
from radit_jax.stages import evaluate
from radit_jax.stages.answering import Asked, Reader, task
from radit_jax.stages.retrieve import limited, read_retrieved, read_splits

ROOT = Path(__file__).parents[1]
SYSTEM = "LM + retrieval"
SETS = {"arc_e": "arc_e:dev", "mmlu": "mmlu"}  # dataset -> what is read of it
# Style of the peer -> its name, and the ratio that is aimed at.
LOOPS = {"single": ("PyTorch, one by one", 3), "no_repeats": ("PyTorch, no repeats", 3)}
SCORERS = {**LOOPS, "padded": ("PyTorch, padded", 0)}
GENERATION_AIM = 2
COMPILING = "/jax/core/compile/"
BACKEND = f"{COMPILING}backend_compile_duration"
# By their names in its events; everything else that is compiled is small.
PROGRAMS = {f"jit({name})": name for name in ("prefill", "decode", "log_probabilities")}


class Work(NamedTuple):
    """What everyone answers."""

    generation: ConfigDict
    choice: ConfigDict
    asked: list[Asked]  # with passages
    demonstrations: list[str]
    of_set: dict[str, list[Asked]]  # with options
    folder: Path  # of the model
    tokenizer: Tokenizer
    model: Llama

    def reader(self, config: ConfigDict, shots: Sequence[str] = ()) -> Reader:
        """A reader that remembers nothing."""
        return Reader(
            *(config, self.model, self.tokenizer, self.tokenizer.add_bos),
            lambda example, dataset, read: shots,
        )

    def rendered(
        self, asked: Sequence[Asked], shots: Sequence[str] = ()
    ) -> list[tuple[int, ...]]:
        """One for each passage of each question."""
        reader, section = self.reader(self.generation), self.generation.evaluate
        limit = section.prompt_tokens - section.max_new_tokens
        return [
            tuple(reader.render(one.example, passage.display, limit, shots).tokens)
            for one in asked
            for passage in one.passages
        ]

    def options(self, name: str) -> list[tuple[prompts.Prompt, int]]:
        """Every option of a set's questions, and by what its score is divided."""
        reader, limit = self.reader(self.choice), self.choice.evaluate.prompt_tokens
        found = []
        for _, example, _, _ in self.of_set[name]:
            pieces = [
                prompts.pieces(example._replace(answers=(choice,)))
                for choice in example.choices
            ]
            score = task(self.choice, name, example).score
            assert score in ("nll", "nll_char")
            divisors = [
                len(parts[-1].text.strip()) if score == "nll_char" else 1
                for parts in pieces
            ]
            rendered = reader.render_options(pieces, "", limit)
            found += list(zip(rendered, divisors, strict=True))
        return found

    def batches(self, options: list[prompts.Prompt]) -> list[pipeline.ScoringBatch]:
        """As the reader packs them."""
        section = self.choice.evaluate
        mixture = pipeline.Mixture(
            row_tokens=section.prompt_tokens,
            row_targets=section.row_targets,
            rows=section.rows,
            packing_bins=section.packing_bins,
        )
        return list(pipeline.scoring_batches(options, mixture))


def read_work(options: argparse.Namespace) -> Work:
    """Questions, passages and the model, on the current mesh."""
    sys.path.insert(0, str(ROOT))
    from configs import evaluate as recipe

    generation, choice = recipe.get_config("demo"), recipe.get_config("offline")
    generation.workdir, choice.workdir = str(options.workdir), str(options.offline)
    generation.dtype = choice.dtype = "float32"
    section = generation.evaluate
    section.passages, section.limit = options.passages, options.questions
    section.prompt_tokens = 2048  # has room for the demonstrations
    section.systems = (SYSTEM,)
    section.batch_tokens = options.batch_tokens or section.batch_tokens
    choice.data.test = ", ".join(SETS.values())
    choice.data.limit.test = 0
    store = PassageStore(options.workdir / "passages")
    asked = [
        evaluate.ask(
            evaluate.SYSTEMS[SYSTEM],
            question,
            generation,
            section.score_temperature,
            store,
        )
        for question in evaluate.questions(generation, store)[: options.questions]
    ]
    examples, found = next(iter(read_retrieved(options.workdir, "train").values()))
    best = {e.id: int(ids[0]) for e, ids in zip(examples, found.ids, strict=True)}
    drawn = choose(examples, options.shots, 0, [one.example for one in asked])
    demonstrations = [
        prefix([Demonstration(one, store[best[one.id]].display)]) for one in drawn
    ]
    every = read_splits(choice)["test"]
    of_set = {
        name: [
            Asked(name, example, (), ())
            for example in limited(every[name], options.of_set[name], 0)
        ]
        for name in SETS
    }
    folder = (options.workdir / "inputs" / "lm").resolve()
    return Work(
        *(generation, choice, asked, demonstrations, of_set),
        *(folder, load_tokenizer(folder), load_llama(folder)),
    )


class Ours:
    """The stage's answers to all questions, once a repeat."""

    def __init__(self, reader: Callable[[], Reader], asked: Sequence[Asked]):
        self.reader = reader
        self.asked = asked

    def __call__(self) -> dict[str, Any]:
        """One pass."""
        start = time.perf_counter()
        answered = self.reader().answer(OURS, self.asked)
        return {"seconds": time.perf_counter() - start, "answered": answered}


@contextmanager
def shared(content: Any) -> Iterator[str]:
    """A JSON file for the peers to read."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(content, file)
        file.flush()
        yield file.name


def compare_generation(
    work: Work,
    asked: Sequence[Asked],
    shots: Sequence[str],
    python: Path,
    repeats: int,
) -> None:
    """Run and print the ensemble."""
    given = work.rendered(asked, shots)
    section = work.generation.evaluate
    of = task(work.generation, asked[0].dataset, asked[0].example)
    size = work.model.config.vocab_size
    tables = stop_tokens(work.tokenizer, of.stop, size)
    stops = {
        name: np.flatnonzero(table_V).tolist()
        for name, table_V in zip(("first", "later", "blank"), tables, strict=True)
    }
    content = {"prompts": given, "eos": work.tokenizer.eos_id, "stops": stops}
    name = "PyTorch, generate"
    with shared(content) as file:
        peer = Peer(
            python,
            "generate",
            model=str(work.folder),
            prompts=file,
            max_new_tokens=of.max_new_tokens,
            batch_tokens=section.batch_tokens,
        )
        # One that remembers answers would have nothing to do the second time.
        ours = Ours(lambda: work.reader(work.generation, shots), asked)
        results = interleaved(ours, {name: peer}, repeats)
    aims = {name: GENERATION_AIM}
    what = f"ensemble generation, {len(shots)} demonstrations"
    print_speeds(what, len(asked), seconds_of(results), aims)
    generated = generate(
        work.model,
        work.tokenizer,
        given,
        max_new_tokens=of.max_new_tokens,
        stop=of.stop,
        batch_tokens=section.batch_tokens,
    )
    theirs = results[name][-1]
    pairs = list(zip(generated, theirs["tokens"], strict=True))
    same = np.array([one.tokens == tokens for one, tokens in pairs])
    ours_log = np.array([one.log_probability for one in generated])
    apart = np.abs(ours_log - np.array(theirs["sums"]))[same]
    texts = [spoken(work.tokenizer, tokens, of.stop) for tokens in theirs["tokens"]]
    votes = []
    start = 0
    for one in asked:
        part = slice(start, start + len(one.passages))
        log = theirs["sums"][part]
        found = vote(texts[part], log, one.weights, metrics.normalise)
        votes.append(found[0].text)
        start = part.stop
    answered = results[OURS][-1]["answered"]
    agreed = np.mean([a.prediction == v for a, v in zip(answered, votes, strict=True)])
    alike = np.mean([o.text == t for o, t in zip(generated, texts, strict=True)])
    new = [len(one.tokens) for one in generated]
    rows = packing.pack(given, [], of.max_new_tokens, section.batch_tokens)
    read = sum(int((batch.segment_ids_BL > 0).sum()) for batch in rows)
    total, slots = sum(map(len, given)), sum(b.tokens_BL.size for b in rows)
    print(
        f"{len(given)} prompts of {total / len(given):.0f} tokens, {np.mean(new):.1f} "
        f"new ones; ours shares {100 * (1 - read / total):.0f} % of the tokens, "
        f"padding {100 * (1 - read / slots):.0f} %"
    )
    print(
        f"same tokens {100 * same.mean():.1f} %, same text "
        f"{100 * alike:.1f} %, same vote {100 * agreed:.1f} %; "
        f"log-probabilities of the same tokens differ by at most "
        f"{max(apart, default=np.nan):.1e} nats"
    )
    leads = []
    for (one, tokens), margins in zip(pairs, theirs["margins"], strict=True):
        steps = zip(one.tokens, tokens, margins, strict=False)
        leads += [margin for a, b, margin in steps if a != b][:1]
    if leads:
        print(
            f"{len(leads)} prompts get other tokens: where they part, PyTorch's "
            f"likeliest token leads its second by at most {max(leads):.1e} nats"
        )


def spoken(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """The text of a peer's tokens, up to its first stop string."""
    said = [token for token in tokens if token != tokenizer.eos_id]
    text = tokenizer.decode(said).lstrip()
    for string in stop:
        text = text.partition(string)[0]
    return text.strip()


def compare_choice(work: Work, python: Path, repeats: int) -> None:
    """Run and print the choice among options, by dataset and in all."""
    total: dict[str, float] = {}
    aims = dict(SCORERS.values())
    reader = work.reader(work.choice)
    for name, asked in work.of_set.items():
        options = work.options(name)
        sequences = [{"tokens": p.tokens, "start": p.answer_start} for p, _ in options]
        with shared(sequences) as file:
            peers = {
                shown: Peer(
                    python,
                    "score",
                    model=str(work.folder),
                    sequences=file,
                    style=style,
                )
                for style, (shown, _) in SCORERS.items()
            }
            # Options are not remembered, but programs are.
            results = interleaved(Ours(lambda: reader, asked), peers, repeats)
        seconds = seconds_of(results)
        total = {shown: total.get(shown, 0.0) + s for shown, s in seconds.items()}
        print_speeds(name, len(asked), seconds, aims)
        divisors = np.array([divisor for _, divisor in options])
        answered = results[OURS][-1]["answered"]
        ours = np.concatenate([found.choice_scores for found in answered])
        ends = np.cumsum([len(found.choice_scores) for found in answered])[:-1]
        for shown, _ in SCORERS.values():
            sums = np.array(results[shown][-1]["sums"])
            best = [scores.argmax() for scores in np.split(sums / divisors, ends)]
            agreed = np.mean(
                [
                    a.prediction == q.example.choices[i]
                    for a, q, i in zip(answered, asked, best, strict=True)
                ]
            )
            print(
                f"{shown:20s} largest difference "
                f"{np.abs(ours * divisors - sums).max():.1e} nats, same prediction "
                f"{100 * agreed:.1f} %"
            )
        tokens = sum(len(p.tokens) for p, _ in options)
        targets = sum(len(p.tokens) - p.answer_start for p, _ in options)
        batches = work.batches([p for p, _ in options])
        read = sum(int((b.batch.segment_ids_BL > 0).sum()) for b in batches)
        slots = sum(b.batch.tokens_BL.size for b in batches)
        print(
            f"{len(options)} options of {targets / len(options):.1f} tokens, "
            f"{tokens / len(options):.0f} with their prompts; of ours "
            f"{100 * (1 - read / tokens):.0f} % had been read for another option; "
            f"{len(batches)} batches, padding {100 * (1 - read / slots):.0f} %"
        )
    count = sum(len(asked) for asked in work.of_set.values())
    print_speeds("choice, both sets", count, total, aims)


def seconds_of(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Median of every contender."""
    return {name: median(found, "seconds") for name, found in results.items()}


def print_speeds(
    what: str, questions: int, seconds: dict[str, float], aims: dict[str, int]
) -> None:
    """Questions a second, and ours in terms of the others'."""
    print(f"{what}, {questions} questions")
    for name, spent in seconds.items():
        aim = f" (aim {aims[name]}x)" if aims.get(name) else ""
        print(
            f"{name:20s} {questions / spent:7.2f} questions/s   ours is "
            f"{spent / seconds[OURS]:.2f}x{aim}"
        )


def compile_all(options: argparse.Namespace) -> dict[str, Any]:
    """Run every program once; how many were compiled, and for how long."""
    spans: list[tuple[float, float]] = []
    names: list[str] = []

    def note(event: str, start_time: float, end_time: float, **facts: Any) -> None:
        if event.startswith(COMPILING):
            spans.append((start_time, end_time))
        if event == BACKEND:
            names.append(str(facts["fun_name"]))

    work = read_work(options)
    given = work.rendered(work.asked)
    section = work.generation.evaluate
    of = task(work.generation, work.asked[0].dataset, work.asked[0].example)
    # Loading the model is not counted.
    jax.monitoring.register_event_time_span_listener(note)
    generate(
        work.model,
        work.tokenizer,
        given,
        max_new_tokens=of.max_new_tokens,
        stop=of.stop,
        batch_tokens=section.batch_tokens,
    )
    work.reader(work.choice).answer(OURS, [asked[0] for asked in work.of_set.values()])
    # Programs are traced within others: no moment counts twice.
    seconds, until = 0.0, 0.0
    for start, end in sorted(spans):
        seconds += max(end - max(start, until), 0.0)
        until = max(until, end)
    programs = Counter(PROGRAMS.get(name, "small") for name in names)
    return {"seconds": seconds, "programs": programs}


def print_compilation(arguments: Sequence[str], cache: str) -> None:
    """Compile in one process, and again in another that finds the cache."""
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, __file__, *arguments, "--compile", "--cache", cache],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = found
    counts = ", ".join(f"{count} {name}" for name, count in cold["programs"].items())
    print(
        f"compile: {cold['seconds']:.1f} s cold, {warm['seconds']:.1f} s in a second "
        f"process from the cache; programs: {counts}"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--offline", type=Path, default=Path("runs/offline"))
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--shots", type=int, default=5, help="demonstrations")
    parser.add_argument(
        "--shot-questions", type=int, default=4, help="that are asked with them"
    )
    parser.add_argument("--arc", type=int, default=64, help="questions of ARC-Easy")
    parser.add_argument("--mmlu", type=int, default=32, help="questions of MMLU")
    parser.add_argument(
        "--batch-tokens", type=int, help="of generation; the recipe's by default"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", help="of compiled programs; a new one by default")
    parser.add_argument(
        "--compile", action="store_true", help="compile, print how long it took, end"
    )
    options = parser.parse_args()
    options.of_set = {"arc_e": options.arc, "mmlu": options.mmlu}
    with (
        tempfile.TemporaryDirectory() as new,
        jax.set_mesh(sharding.make_mesh(1, 1, 1)),
    ):
        cache = options.cache or new
        jax.config.update("jax_compilation_cache_dir", cache)
        # That of radit_jax/main.py.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        if options.compile:
            print(json.dumps(compile_all(options)))
            return
        print_compilation(sys.argv[1:], cache)
        python = ensure()
        work = read_work(options)
        compare_generation(work, work.asked, (), python, options.repeats)
        few = work.asked[: options.shot_questions]
        compare_generation(work, few, work.demonstrations, python, options.repeats)
        compare_choice(work, python, options.repeats)


if __name__ == "__main__":
    main()
