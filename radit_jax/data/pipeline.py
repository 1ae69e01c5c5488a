"""From examples and their passages to packed batches for LM-FT, with Grain.

numpy only: a data worker must never start a jax backend. The position in the data
is Grain's own iterator state, saved with every checkpoint.
"""

import difflib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np

from radit_jax.batch import Example, Packed, Passage
from radit_jax.data import prompts

CONTEXT_ROLES = ("none", "only", "add")


@runtime_checkable
class Passages(Protocol):
    """Random access to the corpus by passage id."""

    def __len__(self) -> int: ...
    def __getitem__(self, id: int) -> Passage: ...


class Dataset(NamedTuple):
    """One dataset of the mixture with what was retrieved for it."""

    name: str
    examples: Sequence[Example]
    passage_ids: np.ndarray  # int64 [examples, k], best first; -1: none
    context: str = "none"  # what a given context is for; see instances()


class Mixture(NamedTuple):
    """How instances are made, mixed and packed."""

    passages_per_example: int = 3  # k~ (RA-DIT App. B)
    dataset_cap: int = 7500  # eta: a dataset weighs as if it had at most this many
    plain_text_share: float = 0.1  # of instances; loss on all their tokens
    row_tokens: int = 2048  # L
    row_targets: int = 1024  # T, room for loss-carrying tokens in a row
    rows: int = 64  # per optimizer step, all processes together
    micro_batches: int = 1  # gradient accumulation
    packing_bins: int = 64  # rows packed at once; more means less padding
    bos: bool = True
    seed: int = 0


def context_roles(setting: str, datasets: Sequence[str]) -> dict[str, str]:
    """What the given context of each dataset is for.

    Args:
        setting: ``ROLE`` for all, or ``NAME=ROLE`` for one of them, separated by
            commas: ``none, squad=add, cnn_dailymail=only``.
        datasets: names of the datasets.

    Raises:
        ValueError: an unknown role or dataset, or two roles for all.
    """
    default: str | None = None
    named: dict[str, str] = {}
    for part in setting.split(","):
        name, equals, role = (piece.strip() for piece in part.rpartition("="))
        if role not in CONTEXT_ROLES:
            raise ValueError(
                f"lm_ft.context = {setting!r}: {role!r} is not one of "
                f"{', '.join(CONTEXT_ROLES)}"
            )
        if equals and name not in datasets:
            near = difflib.get_close_matches(name, datasets, 1, 0.0)
            raise ValueError(
                f"lm_ft.context = {setting!r}: there is no dataset {name!r}; did you "
                f"mean {near[0] if near else 'none'}? There are {', '.join(datasets)}"
            )
        if not equals:
            if default is not None:
                raise ValueError(f"lm_ft.context = {setting!r}: two roles for all")
            default = role
        else:
            named[name] = role
    return {name: named.get(name, default or "none") for name in datasets}


def check_answers(
    datasets: Sequence[Dataset], tokenizer: prompts.Tokenizer, mixture: Mixture
) -> None:
    """Find answers that are too long to train on before hours of training do.

    Raises:
        ValueError: naming the dataset, the example and the settings that would do.
    """
    for dataset in datasets:
        for example in dataset.examples:
            answer = example.answers[0]
            # A token has at least one byte, so most answers need not be tokenised.
            room = min(mixture.row_targets, mixture.row_tokens - 1)
            if len(answer.encode()) + 2 <= room:
                continue
            prompt = prompts.render(tokenizer, "", 10**9, answer=answer)
            size = len(prompt.tokens) - prompt.answer_start
            if size > room:
                raise ValueError(
                    f"dataset {dataset.name}, example {example.id}: the answer has "
                    f"{size} tokens, <eos> included, and answers are never cut; set "
                    f"lm_ft.row_targets to at least {size} (now {mixture.row_targets})"
                    f" and lm_ft.row_tokens to more than that (now "
                    f"{mixture.row_tokens}), or shorten it: {answer[:60]!r}"
                )


def instances(dataset: Dataset, passages_per_example: int) -> np.ndarray:
    """(example, passage id) of every training instance, int64 [instances, 2].

    Passage id -1 stands for the example's own context. RA-DIT footnote 4: ``none``
    pairs every example with each of its top passages; ``only`` (summaries, questions
    about a given text) uses the given context alone; ``add`` (self-contained reading
    comprehension) uses both, k~ + 1 instances.

    Raises:
        ValueError: no instance comes out, or an example lacks the context it needs.
    """
    pairs = []
    for i, example in enumerate(dataset.examples):
        if dataset.context != "none":
            if not example.context:
                raise ValueError(
                    f"dataset {dataset.name}: example {example.id} has no `context`, "
                    f"which lm_ft.context = {dataset.context!r} needs"
                )
            pairs.append((i, -1))
        if dataset.context != "only":
            ids = dataset.passage_ids[i, :passages_per_example]
            pairs += [(i, int(id)) for id in ids if id >= 0]
    if not pairs:
        raise ValueError(f"dataset {dataset.name} yields no training instance")
    return np.asarray(pairs, np.int64)


class _Renderer:
    """Turns an instance into tokens, with markers drawn per instance."""

    def __init__(
        self,
        dataset: Dataset,
        passages: Passages,
        tokenizer: prompts.Tokenizer,
        mixture: Mixture,
    ):
        self.dataset = dataset
        self.passages = passages
        self.tokenizer = tokenizer
        self.mixture = mixture

    def __call__(self, pair: np.ndarray, rng: np.random.Generator) -> dict:
        example = self.dataset.examples[int(pair[0])]
        passage_id = int(pair[1])
        passage = (
            self.passages[passage_id].display if passage_id >= 0 else example.context
        )
        questions, answers = prompts.QUESTION_MARKERS, prompts.ANSWER_MARKERS
        prompt = prompts.render(
            self.tokenizer,
            example.question,
            self.mixture.row_tokens,
            passage=passage,
            answer=example.answers[0],
            question_marker=questions[int(rng.integers(len(questions)))],
            answer_marker=answers[int(rng.integers(len(answers)))],
            bos=self.mixture.bos,
        )
        return features(
            prompt.tokens, prompt.answer_start, self.mixture.row_targets, example.id
        )


class _PlainText:
    """A passage as plain text: every token is a target."""

    def __init__(
        self, passages: Passages, tokenizer: prompts.Tokenizer, mixture: Mixture
    ):
        self.passages = passages
        self.tokenizer = tokenizer
        self.mixture = mixture

    def __call__(self, id: int) -> dict:
        tokenizer, mixture = self.tokenizer, self.mixture
        start = (
            [tokenizer.bos_id] if mixture.bos and tokenizer.bos_id is not None else []
        )
        tokens = start + tokenizer.encode(self.passages[int(id)].display)
        room = min(mixture.row_tokens, mixture.row_targets)
        tokens = [*tokens[: room - 1], tokenizer.eos_id]
        return features(tokens, 1, mixture.row_targets, f"passage {id}")


def features(tokens: list[int], start: int, row_targets: int, what: str) -> dict:
    """What is packed of an instance: its tokens, and the sites whose successors, from
    ``start`` on, carry loss."""
    if len(tokens) - start > row_targets:
        raise ValueError(
            f"{what}: an answer of {len(tokens) - start} tokens, <eos> included, is "
            f"longer than lm_ft.row_targets = {row_targets}"
        )
    # A segment's first token has no predecessor that could predict it.
    start = max(start, 1)
    return {
        "tokens": np.asarray(tokens, np.int32),
        "sites": np.arange(start - 1, len(tokens) - 1, dtype=np.int32),
        "targets": np.asarray(tokens[start:], np.int32),
    }


def _pack(dataset: grain.IterDataset, mixture: Mixture, bins: int) -> grain.IterDataset:
    return _first_fit(
        dataset,
        {
            "tokens": mixture.row_tokens,
            "sites": mixture.row_targets,
            "targets": mixture.row_targets,
        },
        bins,
        mixture.seed,
    ).map(_absolute_sites)


def _first_fit(
    dataset: grain.IterDataset, lengths: dict[str, int], bins: int, seed: int
) -> grain.IterDataset:
    return grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct=lengths,
        num_packing_bins=bins,
        seed=seed,
        shuffle_bins=True,
    )


def _absolute_sites(row: dict) -> Packed:
    """Sites count from the start of their segment; make them count from the row's."""
    segment_ids, positions = row["tokens_segment_ids"], row["tokens_positions"]
    starts = np.zeros(segment_ids.max() + 1, np.int32)
    first = np.flatnonzero((positions == 0) & (segment_ids > 0))
    starts[segment_ids[first]] = first
    segment_of_site = row["sites_segment_ids"]
    used = segment_of_site > 0
    return Packed(
        tokens_BL=row["tokens"].astype(np.int32),
        segment_ids_BL=segment_ids.astype(np.int32),
        positions_BL=positions.astype(np.int32),
        sites_BT=np.where(used, row["sites"] + starts[segment_of_site], 0).astype(
            np.int32
        ),
        targets_BT=np.where(used, row["targets"], 0).astype(np.int32),
        weights_BT=used.astype(np.float32),
    )


def mixture_weights(datasets: Sequence[Dataset], mixture: Mixture) -> list[float]:
    """Share of instances of each dataset, then of plain text if it has any.

    Examples-proportional with a cap (RA-DIT section 3.2): a dataset weighs
    min(its examples, ``dataset_cap``).
    """
    sizes = [min(len(d.examples), mixture.dataset_cap) for d in datasets]
    shares = [(1 - mixture.plain_text_share) * size / sum(sizes) for size in sizes]
    return [*shares, mixture.plain_text_share] if mixture.plain_text_share else shares


def training_batches(
    datasets: Sequence[Dataset],
    passages: Passages,
    tokenizer: prompts.Tokenizer,
    mixture: Mixture,
    process: int = 0,
    processes: int = 1,
) -> grain.DatasetIterator[Packed]:
    """Packed batches without end, their arrays shaped [micro-batches, rows, ...].

    Every dataset is reshuffled each time it is exhausted. Each process sees its own
    part of the mixture: every ``processes``-th instance, before packing.

    Raises:
        ValueError: rows do not divide, or a dataset is empty (as ``instances``).
    """
    if not 0 <= mixture.plain_text_share < 1:
        raise ValueError(
            f"lm_ft.plain_text_share = {mixture.plain_text_share} must be at least 0 "
            "and less than 1"
        )
    parts = processes * mixture.micro_batches
    if mixture.rows % parts:
        raise ValueError(
            f"lm_ft.rows = {mixture.rows} does not divide over {processes} processes x "
            f"{mixture.micro_batches} micro-batches; the nearest multiple is "
            f"{max(round(mixture.rows / parts), 1) * parts}"
        )
    sources = []
    for i, dataset in enumerate(datasets):
        pairs = instances(dataset, mixture.passages_per_example)
        renderer = _Renderer(dataset, passages, tokenizer, mixture)
        sources.append(
            grain.MapDataset.source(pairs)
            .shuffle(seed=mixture.seed + i)
            .repeat(reseed_each_epoch=True)
            .random_map(renderer, seed=mixture.seed + i)
        )
    if mixture.plain_text_share:
        sources.append(
            grain.MapDataset.range(len(passages))
            .shuffle(seed=mixture.seed + len(datasets))
            .repeat(reseed_each_epoch=True)
            .map(_PlainText(passages, tokenizer, mixture))
        )
    mixed = grain.MapDataset.mix(sources, mixture_weights(datasets, mixture))
    rows = mixture.rows // parts
    # Few reading threads: rendering is Python, and the device may be this very CPU.
    ds = mixed[process::processes].to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
    )
    ds = _pack(ds, mixture, max(mixture.packing_bins, rows))
    ds = ds.batch(rows).batch(mixture.micro_batches)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(ds, prefetch_buffer_size=2)
    )


def validation_batches(
    datasets: Sequence[Dataset],
    passages: Passages,
    tokenizer: prompts.Tokenizer,
    mixture: Mixture,
    rows: int,
) -> Iterator[Packed]:
    """Every example once, with its top passage or, where training reads it, its own
    context; packed, the last batch padded.

    Markers are the evaluation's, so the batches are the same each time.
    """
    source = []
    for dataset in datasets:
        for i, example in enumerate(dataset.examples):
            passage, id = example.context, int(dataset.passage_ids[i, 0])
            if dataset.context == "none":
                passage = passages[id].display if id >= 0 else ""
            prompt = prompts.render(
                tokenizer,
                example.question,
                mixture.row_tokens,
                passage=passage,
                answer=example.answers[0],
                bos=mixture.bos,
            )
            source.append(
                features(
                    prompt.tokens, prompt.answer_start, mixture.row_targets, example.id
                )
            )
    return pack_all(source, mixture, rows)


def pack_all(source: Sequence[dict], mixture: Mixture, rows: int) -> Iterator[Packed]:
    """Pack instances that are all there, in batches of ``rows``; the last is padded."""
    order = grain.MapDataset.source(source).to_iter_dataset()
    packed = list(_pack(order, mixture, max(mixture.packing_bins, rows)))
    for start in range(0, len(packed), rows):
        chosen = packed[start : start + rows]
        fields = zip(*chosen, strict=True)
        yield Packed(*(_stack(arrays, rows) for arrays in fields))


def _stack(arrays: Sequence[np.ndarray], rows: int, fill: int = 0) -> np.ndarray:
    """Rows of a batch, filled up to ``rows`` of them."""
    missing = [(0, rows - len(arrays)), (0, 0)]
    return np.pad(np.stack(arrays), missing, constant_values=fill)


class ScoringBatch(NamedTuple):
    """Sequences packed to be scored; numpy."""

    batch: Packed
    # int32, the segment that holds the beginning of a token's sequence; 0: its own.
    prefix_ids_BL: np.ndarray
    owners_BT: np.ndarray  # int32, place of the sequence a site is of; -1: unused


def scoring_batches(
    sequences: Sequence[prompts.Prompt], mixture: Mixture
) -> Iterator[ScoringBatch]:
    """Sequences packed to be scored, in batches of ``mixture.rows``; empty rows fill up
    the last.

    Sequences with the same beginning (<bos> and background) share it: a passage is read
    once for all the questions asked about it.

    Raises:
        ValueError: a sequence is longer than a row or its target than ``row_targets``;
            it is named by its place.
    """
    bundles = [
        _bundle(beginning, part)
        for beginning, places in _by_beginning(sequences).items()
        for part in _parts(len(beginning), places, sequences, mixture)
    ]
    lengths = dict.fromkeys(("tokens", "parts", "places"), mixture.row_tokens)
    lengths |= dict.fromkeys(("sites", "targets", "owners"), mixture.row_targets)
    order = grain.MapDataset.source(bundles).to_iter_dataset()
    bins = max(mixture.packing_bins, mixture.rows)
    rows = map(_scoring_row, _first_fit(order, lengths, bins, mixture.seed))
    while chosen := list(itertools.islice(rows, mixture.rows)):
        fields = zip(*(row.batch for row in chosen), strict=True)
        yield ScoringBatch(
            Packed(*(_stack(arrays, mixture.rows) for arrays in fields)),
            _stack([row.prefix_ids_BL for row in chosen], mixture.rows),
            _stack([row.owners_BT for row in chosen], mixture.rows, fill=-1),
        )


def empty_batch(mixture: Mixture) -> ScoringBatch:
    """A batch of empty rows, for a process that has run out of sequences."""
    zeros_BL = np.zeros((mixture.rows, mixture.row_tokens), np.int32)
    zeros_BT = np.zeros((mixture.rows, mixture.row_targets), np.int32)
    return ScoringBatch(
        Packed(
            tokens_BL=zeros_BL,
            segment_ids_BL=zeros_BL,
            positions_BL=zeros_BL,
            sites_BT=zeros_BT,
            targets_BT=zeros_BT,
            weights_BT=zeros_BT.astype(np.float32),
        ),
        prefix_ids_BL=zeros_BL,
        owners_BT=zeros_BT - 1,
    )


def _by_beginning(
    sequences: Sequence[prompts.Prompt],
) -> dict[tuple[int, ...], list[int]]:
    """Places of the sequences that begin alike."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(sequences):
        beginning = tuple(prompt.tokens[: prompt.question_start])
        groups.setdefault(beginning, []).append(place)
    return groups


def _parts(
    beginning: int,
    places: Sequence[int],
    sequences: Sequence[prompts.Prompt],
    mixture: Mixture,
) -> Iterator[list[tuple[int, prompts.Prompt]]]:
    """The sequences of one beginning, as many at a time as a row has room for."""
    part: list[tuple[int, prompts.Prompt]] = []
    tokens, targets = beginning, 0
    for place in places:
        prompt = sequences[place]
        more = len(prompt.tokens) - beginning
        answer = len(prompt.tokens) - prompt.answer_start
        if beginning + more > mixture.row_tokens or answer > mixture.row_targets:
            raise ValueError(
                f"sequence {place}: {beginning + more} tokens, {answer} of them the "
                f"target, do not fit into row_tokens = {mixture.row_tokens} with "
                f"row_targets = {mixture.row_targets}"
            )
        full = tokens + more > mixture.row_tokens
        if part and (full or targets + answer > mixture.row_targets):
            yield part
            part, tokens, targets = [], beginning, 0
        part.append((place, prompt))
        tokens, targets = tokens + more, targets + answer
    yield part


def _bundle(
    beginning: tuple[int, ...], part: Sequence[tuple[int, prompts.Prompt]]
) -> dict:
    """What is packed of sequences with one beginning, which is part 0 of it."""
    size = len(beginning)
    tokens, parts, places = [*beginning], [0] * size, [*range(size)]
    sites: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, (place, prompt) in enumerate(part, 1):
        shift = len(tokens) - size
        for at in range(max(prompt.answer_start, 1), len(prompt.tokens)):
            # The token before the first one of a part is the last of the beginning.
            sites.append(at - 1 + (shift if at > size else 0))
            targets.append(prompt.tokens[at])
            owners.append(place)
        tokens += prompt.tokens[size:]
        places += range(size, len(prompt.tokens))
        parts += [number] * (len(prompt.tokens) - size)
    named = {
        "tokens": tokens,
        "parts": parts,
        "places": places,
        "sites": sites,
        "targets": targets,
        "owners": owners,
    }
    return {name: np.asarray(values, np.int32) for name, values in named.items()}


def _scoring_row(row: dict) -> ScoringBatch:
    """Every part of every bundle becomes a segment of its own."""
    packed = _absolute_sites(row)
    bundles = packed.segment_ids_BL
    used = bundles > 0
    # Numbers of (bundle, part) in order of appearance, from 1.
    pairs = bundles.astype(np.int64) * (row["tokens"].size + 1) + row["parts"]
    starts = used & np.diff(pairs, prepend=-1).astype(bool)
    segments = np.where(used, np.cumsum(starts), 0).astype(np.int32)
    begins = np.zeros(bundles.max() + 1, np.int32)
    is_beginning = used & (row["parts"] == 0)
    begins[bundles[is_beginning]] = segments[is_beginning]
    return ScoringBatch(
        packed._replace(
            segment_ids_BL=segments, positions_BL=row["places"].astype(np.int32)
        ),
        np.where(used, begins[bundles], 0).astype(np.int32),
        np.where(packed.weights_BT > 0, row["owners"], -1).astype(np.int32),
    )


def padding_share(batch: Any) -> float:
    """Share of a packed batch's tokens that is padding."""
    return float(np.mean(batch.segment_ids_BL == 0))
