"""From examples and their passages to packed batches for LM-FT, with Grain.

numpy only: a data worker must never start a jax backend. The position in the data
is Grain's own iterator state, saved with every checkpoint.
"""

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np

from radit_jax.batch import Example, Packed, Passage
from radit_jax.data import prompts
from radit_jax.data.counting import Counted, CountingBatches
from radit_jax.data.spec import CONTEXT_ROLES

PLAIN_TEXT = "plain text"  # its name in reports
# What is counted of the instances a run reads, in this order.
SEEN = ("examples", "tokens", "loss_tokens", "truncated")


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
    # Fixed shares of instances, by dataset; the rest goes by size.
    shares: Mapping[str, float] = MappingProxyType({})
    plain_text_share: float = 0.1  # of instances; loss on all their tokens
    row_tokens: int = 2048  # L
    row_targets: int = 1024  # T, room for loss-carrying tokens in a row
    rows: int = 64  # per optimizer step, all processes together
    micro_batches: int = 1  # gradient accumulation
    # Rows packed at once, of all streams; more means less padding.
    packing_bins: int = 64
    bos: bool = True
    every_turn: bool = False  # of a dialogue: whether all its answers carry loss
    seed: int = 0


def context_roles(
    setting: str, datasets: Sequence[str], usual: Mapping[str, str]
) -> dict[str, str]:
    """What the given context of each dataset is for.

    Args:
        setting: ``ROLE`` for all, or ``NAME=ROLE`` for one of them, separated by
            commas: ``none, squad=add, cnn_dailymail=only``; "" for what is usual.
        datasets: names of the datasets.
        usual: roles of published datasets; that of others is ``none``.

    Raises:
        ValueError: an unknown role or dataset, or two roles for all.
    """
    default: str | None = None
    named: dict[str, str] = {}
    for name, role in _by_dataset("lm_ft.context", setting, datasets):
        if role not in CONTEXT_ROLES:
            raise ValueError(
                f"lm_ft.context = {setting!r}: {role!r} is not one of "
                f"{', '.join(CONTEXT_ROLES)}"
            )
        if not name:
            if default is not None:
                raise ValueError(f"lm_ft.context = {setting!r}: two roles for all")
            default = role
        else:
            named[name] = role
    return {
        name: named.get(name) or default or usual.get(name, "none") for name in datasets
    }


def fixed_shares(setting: str, datasets: Sequence[str]) -> dict[str, float]:
    """Datasets whose share of the instances does not go by their size.

    Args:
        setting: ``NAME=SHARE``, separated by commas: ``oasst1=0.05``.
        datasets: names of the datasets.

    Raises:
        ValueError: an unknown dataset, or a share that is none.
    """
    found = {}
    for name, value in _by_dataset("lm_ft.shares", setting, datasets):
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not (name and 0 < share < 1):
            raise ValueError(
                f"lm_ft.shares = {setting!r}: expected NAME=SHARE with a share between "
                f"0 and 1, such as {name or datasets[0]}=0.05"
            )
        found[name] = share
    return found


def _by_dataset(
    field: str, setting: str, datasets: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """``NAME=VALUE, VALUE`` as (name, value) pairs; "" where there is no name."""
    for part in filter(None, (part.strip() for part in setting.split(","))):
        name, equals, value = (piece.strip() for piece in part.rpartition("="))
        if equals and name not in datasets:
            near = difflib.get_close_matches(name, datasets, 1, 0.0)
            raise ValueError(
                f"{field} = {setting!r}: there is no dataset {name!r}; did you mean "
                f"{near[0] if near else 'none'}? There are {', '.join(datasets)} "
                f"(--config.{field}= for no such setting)"
            )
        yield name, value


def check_answers(
    datasets: Sequence[Dataset], tokenizer: prompts.Tokenizer, mixture: Mixture
) -> None:
    """Find answers that are too long to train on before hours of training do.

    Raises:
        ValueError: naming the dataset, the example and the settings that would do.
    """
    for dataset in datasets:
        for example in dataset.examples:
            pieces = prompts.pieces(example)
            answer = pieces[-1].text
            # A token has at least one byte, so most answers need not be tokenised.
            room = min(mixture.row_targets, mixture.row_tokens - 1)
            if len(answer.encode()) + 1 <= room:
                continue
            prompt = prompts.render(tokenizer, pieces[-1:], 10**9)
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
        number: int,
        dataset: Dataset,
        passages: Passages,
        tokenizer: prompts.Tokenizer,
        mixture: Mixture,
    ):
        self.number = number
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
        markers = prompts.Markers(
            questions[int(rng.integers(len(questions)))],
            answers[int(rng.integers(len(answers)))],
        )
        prompt = prompts.render(
            self.tokenizer,
            prompts.pieces(example, markers, self.mixture.every_turn),
            self.mixture.row_tokens,
            passage=passage,
            bos=self.mixture.bos,
        )
        return features(prompt, self.mixture.row_targets, example.id, self.number)


class _PlainText:
    """A passage as plain text: every token is a target."""

    def __init__(
        self,
        number: int,
        passages: Passages,
        tokenizer: prompts.Tokenizer,
        mixture: Mixture,
    ):
        self.number = number
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
        cut = max(len(tokens) + 1 - room, 0)
        tokens = [*tokens[: room - 1], tokenizer.eos_id]
        prompt = prompts.Prompt(tokens, 0, 0, ((0, len(tokens)),), cut, 0)
        return features(prompt, mixture.row_targets, f"passage {id}", self.number)


def features(
    prompt: prompts.Prompt, row_targets: int, what: str, dataset: int = 0
) -> dict:
    """What is packed of an instance: its tokens, and the sites whose successors carry
    loss. Where all of it does not fit, the earlier turns of a dialogue carry none.

    Args:
        prompt: with its answer.
        row_targets: room for tokens that carry loss.
        what: its name in errors.
        dataset: its number, for the count of what was seen.

    Raises:
        ValueError: the answer does not fit.
    """
    # A segment's first token has no predecessor that could predict it.
    places = [np.arange(max(start, 1), end) for start, end in prompt.spans]
    if places[-1].size > row_targets:
        raise ValueError(
            f"{what}: an answer of {places[-1].size} tokens, <eos> included, is "
            f"longer than lm_ft.row_targets = {row_targets}"
        )
    carries = np.concatenate(places)
    if carries.size > row_targets:
        carries = places[-1]
    tokens = np.asarray(prompt.tokens, np.int32)
    cut = prompt.passage_cut + prompt.question_cut > 0
    return {
        "tokens": tokens,
        "sites": (carries - 1).astype(np.int32),
        "targets": tokens[carries],
        "instance": np.array([dataset], np.int32),
        "cut": np.array([cut], np.int32),
    }


def _pack(dataset: grain.IterDataset, mixture: Mixture, bins: int) -> grain.IterDataset:
    # Every instance carries loss, so there are no more of them than sites.
    targets = ("sites", "targets", "instance", "cut")
    lengths = {"tokens": mixture.row_tokens}
    lengths |= dict.fromkeys(targets, mixture.row_targets)
    return _first_fit(dataset, lengths, bins, mixture.seed)


class _Count:
    """Packed features to a row and its count by dataset."""

    def __init__(self, datasets: int):
        self.datasets = datasets

    def __call__(self, row: dict) -> Counted:
        packed = _absolute_sites(row)
        instances = row["instance_segment_ids"] > 0
        of = row["instance"][instances]
        # Of segment s: instance s - 1.
        tokens, targets = (
            np.bincount(row[name][row[name] > 0] - 1, minlength=of.size)
            for name in ("tokens_segment_ids", "sites_segment_ids")
        )
        seen_NS = np.zeros((self.datasets, len(SEEN)), np.int64)
        counts = (np.ones_like(of), tokens, targets, row["cut"][instances])
        np.add.at(seen_NS, of, np.stack(counts, axis=-1))
        return Counted(packed, seen_NS)


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

    Fixed shares as ``shares`` says; the rest is examples-proportional with a cap
    (RA-DIT section 3.2): a dataset weighs min(its examples, ``dataset_cap``).

    Raises:
        ValueError: the fixed shares leave nothing for the other datasets.
    """
    rest = 1.0 - mixture.plain_text_share - sum(mixture.shares.values())
    sizes = {
        dataset.name: min(len(dataset.examples), mixture.dataset_cap)
        for dataset in datasets
        if dataset.name not in mixture.shares
    }
    if rest < -1e-9 or bool(sizes) != (rest > 1e-9):
        raise ValueError(
            f"lm_ft.shares = {dict(mixture.shares)} and lm_ft.plain_text_share = "
            f"{mixture.plain_text_share} leave {rest:.3g} of the mixture for "
            f"{', '.join(sizes) or 'no other dataset'}"
        )
    found = [
        mixture.shares.get(name) or rest * sizes[name] / sum(sizes.values())
        for name in (dataset.name for dataset in datasets)
    ]
    return [*found, mixture.plain_text_share] if mixture.plain_text_share else found


def training_batches(
    datasets: Sequence[Dataset],
    passages: Passages,
    tokenizer: prompts.Tokenizer,
    mixture: Mixture,
    stream: int = 0,
    streams: int = 1,
) -> CountingBatches:
    """Packed batches without end, their arrays shaped [micro-batches, rows, ...].

    Every dataset is reshuffled each time it is exhausted. Each stream has its own
    part of the mixture: every ``streams``-th instance, before packing.

    Raises:
        ValueError: rows do not divide, or a dataset is empty (as ``instances``).
    """
    if not 0 <= mixture.plain_text_share < 1:
        raise ValueError(
            f"lm_ft.plain_text_share = {mixture.plain_text_share} must be at least 0 "
            "and less than 1"
        )
    parts = streams * mixture.micro_batches
    if mixture.rows % parts:
        raise ValueError(
            f"lm_ft.rows = {mixture.rows} does not divide over {streams} streams x "
            f"{mixture.micro_batches} micro-batches; the nearest multiple is "
            f"{max(round(mixture.rows / parts), 1) * parts}"
        )
    sources = []
    for i, dataset in enumerate(datasets):
        pairs = instances(dataset, mixture.passages_per_example)
        renderer = _Renderer(i, dataset, passages, tokenizer, mixture)
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
            .map(_PlainText(len(datasets), passages, tokenizer, mixture))
        )
    mixed = grain.MapDataset.mix(sources, mixture_weights(datasets, mixture))
    rows = mixture.rows // parts
    # Few reading threads: rendering is Python, and the device may be this very CPU.
    ds = mixed[stream::streams].to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
    )
    names = [dataset.name for dataset in datasets]
    names += [PLAIN_TEXT] * bool(mixture.plain_text_share)
    bins = max(mixture.packing_bins // streams, rows)
    ds = _pack(ds, mixture, bins).map(_Count(len(names)))
    ds = ds.batch(rows).batch(mixture.micro_batches)
    ahead = grain.experimental.ThreadPrefetchIterDataset(ds, prefetch_buffer_size=2)
    return CountingBatches(lambda: iter(ahead), names, SEEN)


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
                prompts.pieces(example),
                mixture.row_tokens,
                passage=passage,
                bos=mixture.bos,
            )
            source.append(features(prompt, mixture.row_targets, example.id))
    return pack_all(source, mixture, rows)


def pack_all(source: Sequence[dict], mixture: Mixture, rows: int) -> Iterator[Packed]:
    """Pack instances that are all there, in batches of ``rows``; the last is padded."""
    order = grain.MapDataset.source(source).to_iter_dataset()
    bins = max(mixture.packing_bins, rows)
    packed = list(_pack(order, mixture, bins).map(_absolute_sites))
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
    sequences: Sequence[prompts.Prompt], mixture: Mixture, step: int = 0
) -> Iterator[ScoringBatch]:
    """Sequences packed to be scored, in batches of ``mixture.rows``.

    Sequences with the same beginning (<bos> and background) share it: a passage is read
    once for all the questions asked about it. The last token of a sequence is scored
    and need not be read.

    Args:
        sequences: with their targets.
        mixture: the shape of a batch.
        step: the last batch has a multiple of so many rows; 0: as many as the others.

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
    step = step or mixture.rows
    while chosen := list(itertools.islice(rows, mixture.rows)):
        size = min(-(-len(chosen) // step) * step, mixture.rows)
        fields = zip(*(row.batch for row in chosen), strict=True)
        yield ScoringBatch(
            Packed(*(_stack(arrays, size) for arrays in fields)),
            _stack([row.prefix_ids_BL for row in chosen], size),
            _stack([row.owners_BT for row in chosen], size, fill=-1),
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
        more = len(prompt.tokens) - 1 - beginning
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
        own = prompt.tokens[size:-1]
        tokens += own
        places += range(size, size + len(own))
        parts += [number] * len(own)
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
