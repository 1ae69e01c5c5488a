"""The corpus by Apache Beam: the steps of ``parts``, file by file in parallel.

Texts stay in scratch files, which all workers must see under the same path; only
hashes, positions and counts travel between workers. What is written is the same as by
``corpus.write_passages``, to the byte.
"""

import difflib
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from radit_jax.data import parts, shards
from radit_jax.data.corpus import PassageStore, check_passages, check_settings
from radit_jax.data.documents import CorpusFile, read_file
from radit_jax.data.duplicates import (
    BAND_BUCKET_BITS,
    Marks,
    band_rows,
    repeats,
    similar,
    split_rows,
)
from radit_jax.data.parts import Kept, Part
from radit_jax.data.shards import CorpusCounts


class Rules(NamedTuple):
    """How the corpus is made, and where."""

    scratch: Path
    folder: Path
    max_damaged: float
    max_words: int
    passages_per_shard: int
    keep_lines: bool
    near_duplicates: float


def write_passages(
    files: Sequence[CorpusFile],
    folder: str | Path,
    max_damaged: float,
    options: str,
    max_words: int,
    passages_per_shard: int = 100_000,
    keep_lines: bool = True,
    near_duplicates: float = 0.0,
) -> CorpusCounts:
    """Split the documents of files and write their passages as ArrayRecord shards.

    Args:
        files: See ``find_files``. Every file is read by one worker.
        folder: As in ``corpus.write_passages``; on a file system of all workers.
        max_damaged: As in ``read_file``.
        options: Of Beam, as on its command line. Without ``--runner`` the pipeline runs
            on this machine.
        max_words: As in ``corpus.write_passages``.
        passages_per_shard: As in ``corpus.write_passages``.
        keep_lines: As in ``corpus.write_passages``.
        near_duplicates: As in ``corpus.write_passages``.

    Returns:
        What was read, dropped and written.

    Raises:
        ValueError: As ``read_file`` and ``corpus.write_passages``, or a file is not
            there. What else may go wrong is raised as the runner does.
    """
    check_settings(passages_per_shard, near_duplicates)
    # A worker may run in another folder.
    files = [file._replace(path=file.path.absolute()) for file in files]
    folder = Path(folder).absolute()
    shards.clear(folder)
    flags = PipelineOptions(shlex.split(options))
    runner = None
    if not flags.view_as(StandardOptions).runner:
        _check_options(flags)
        # Beam's own default downloads a program first.
        runner = FnApiRunner()
    with parts.scratch(folder) as scratch:
        rules = Rules(
            scratch=scratch,
            folder=folder,
            max_damaged=max_damaged,
            max_words=max_words,
            passages_per_shard=passages_per_shard,
            keep_lines=keep_lines,
            near_duplicates=near_duplicates,
        )
        try:
            with beam.Pipeline(runner, flags) as pipeline:
                _build(pipeline, files, rules)
        except Exception as error:
            if _problem(scratch).is_file():
                raise ValueError(_problem(scratch).read_text("utf-8")) from error
            raise
    return PassageStore(folder).counts


def _check_options(flags: PipelineOptions) -> None:
    """Refuse what Beam does not know. It passes over it, for a runner might."""
    known = flags.get_all_options()
    for name in flags.get_all_options(retain_unknown_options=True).keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise ValueError(f"corpus.beam_options: Beam knows no --{name}{hint}")


def _build(pipeline: beam.Pipeline, files: Sequence[CorpusFile], rules: Rules) -> None:
    as_list, as_dict = beam.pvalue.AsList, beam.pvalue.AsDict
    cut = (
        pipeline
        | "files" >> beam.Create(list(enumerate(files)))
        | "spread files" >> beam.Reshuffle()
        | "cut" >> beam.Map(_cut, rules)
    )
    suspects = (
        cut
        | "id hashes" >> beam.FlatMap(_bucketed, parts.document_rows)
        | "group ids" >> beam.GroupByKey()
        | "repeated ids" >> beam.Map(_id_suspects)
    )
    checked = (
        pipeline
        | "once" >> beam.Create([rules])
        | "check" >> beam.Map(_check, as_list(cut), as_list(suspects))
    )
    equal = (
        cut
        | "text hashes" >> beam.FlatMap(_bucketed, parts.passage_rows)
        | "group texts" >> beam.GroupByKey()
        | "equal texts" >> beam.FlatMap(_equal)
    )
    marked = _mark(cut, equal, "equal")
    if rules.near_duplicates:
        near = (
            marked
            | "bands" >> beam.FlatMap(_bands, rules)
            | "group bands" >> beam.GroupByKey()
            | "similar texts" >> beam.FlatMap(_similar, rules, len(files))
        )
        marked = _mark(marked, near, "similar")
    kept = as_dict(marked | "count" >> beam.Map(_count))
    spans = (
        marked
        | "spans" >> beam.FlatMap(_spans, kept)
        | "group spans" >> beam.GroupByKey()
        | "save spans" >> beam.Map(_save_spans, rules)
    )
    written = (
        marked
        | "assign" >> beam.FlatMap(_assign, kept, rules.passages_per_shard)
        | "group shards" >> beam.GroupByKey()
        # The side input makes it wait for the check.
        | "write" >> beam.Map(_write_shard, rules, as_list(checked))
    )
    _ = (
        pipeline
        | "at last" >> beam.Create([rules])
        | "finish"
        >> beam.Map(_finish, as_list(marked), kept, as_dict(spans), as_list(written))
    )


def _mark(
    found: beam.PCollection, dropped: beam.PCollection, step: str
) -> beam.PCollection:
    """Note in the files of the parts which passages are dropped."""
    numbered = found | f"number, {step}" >> beam.Map(lambda part: (part.number, part))
    return (
        {"part": numbered, "places": dropped}
        | f"group, {step}" >> beam.CoGroupByKey()
        | f"mark, {step}" >> beam.Map(_save_marks, step)
    )


def _cut(numbered: tuple[int, CorpusFile], rules: Rules) -> Part:
    number, file = numbered
    folder = _part_folder(rules.scratch, number)
    work = _unique(folder)
    documents = read_file(file, rules.max_damaged)
    with _noted(rules.scratch):
        part = parts.cut(documents, work, number, rules.max_words, rules.keep_lines)
    try:
        work.rename(folder)
    except OSError:
        # Another attempt at the same step was faster; it wrote the same.
        if not folder.is_dir():
            raise
        shutil.rmtree(work)
    return part._replace(folder=folder)


@contextmanager
def _noted(scratch: Path) -> Iterator[None]:
    """Leave what is wrong with the corpus where ``write_passages`` finds it: a runner
    passes it on as the end of a long text."""
    try:
        yield
    except (ValueError, OSError) as error:
        _problem(scratch).write_text(str(error), "utf-8")
        raise


def _problem(scratch: Path) -> Path:
    return scratch / "problem"


def _part_folder(scratch: Path, number: int) -> Path:
    return scratch / f"part-{number:05d}"


def _unique(path: Path) -> Path:
    """A name beside a path, for a step may be tried twice at the same time."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}")


def _bucketed(
    part: Part, rows: Callable[[Part], Iterator[np.ndarray]]
) -> Iterator[tuple[int, np.ndarray]]:
    for block in rows(part):
        yield from split_rows(block)


def _id_suspects(bucket: tuple[int, Iterable[np.ndarray]]) -> np.ndarray:
    return parts.suspects([repeats(np.concatenate(list(bucket[1])))])


def _check(rules: Rules, cut: Iterable[Part], suspects: Iterable[np.ndarray]) -> None:
    in_order = sorted(cut, key=lambda part: part.number)
    with _noted(rules.scratch):
        check_passages(in_order)
        parts.check_ids(np.unique(np.concatenate(list(suspects))), in_order)


def _equal(
    bucket: tuple[int, Iterable[np.ndarray]],
) -> Iterator[tuple[int, np.ndarray]]:
    yield from parts.by_part(repeats(np.concatenate(list(bucket[1])))[1])


def _save_marks(grouped: tuple[int, Mapping[str, Iterable[Any]]], step: str) -> Part:
    _, found = grouped
    (part,) = found["part"]
    dropped = _dropped(part) if step == "similar" else Marks(part.passages)
    for places in found["places"]:
        dropped.mark(places)
    work = _unique(part.folder / step)
    with work.open("wb") as file:
        dropped.bits.tofile(file)
    work.rename(part.folder / step)
    return part


def _dropped(part: Part) -> Marks:
    """What the last step has marked."""
    files = [part.folder / step for step in ("similar", "equal")]
    (file, *_) = (file for file in files if file.is_file())
    return Marks(part.passages, np.fromfile(file, np.uint8))


def _bands(part: Part, rules: Rules) -> Iterator[tuple[int, np.ndarray]]:
    for positions, texts in parts.texts(part, _dropped(part)):
        rows = band_rows(positions, texts, rules.near_duplicates)
        yield from split_rows(rows, BAND_BUCKET_BITS)


def _similar(
    bucket: tuple[int, Iterable[np.ndarray]], rules: Rules, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    folders = [_part_folder(rules.scratch, number) for number in range(count)]
    rows = np.concatenate(list(bucket[1]))
    with parts.TextReader(folders) as text:
        yield from parts.by_part(similar(rows, text, rules.near_duplicates))


def _count(part: Part) -> tuple[int, Kept]:
    return part.number, parts.count_kept(part, _dropped(part))


def _first_id(number: int, kept: Mapping[int, Kept]) -> int:
    return sum(kept[before].passages for before in range(number))


def _spans(part: Part, kept: Mapping[int, Kept]) -> Iterator[tuple[int, np.ndarray]]:
    first = _first_id(part.number, kept)
    for rows in parts.spans(part, _dropped(part), first):
        yield from split_rows(rows)


def _save_spans(
    bucket: tuple[int, Iterable[np.ndarray]], rules: Rules
) -> tuple[int, tuple[Path, int]]:
    number, blocks = bucket
    file = _unique(rules.scratch / f"spans-{number:05d}")
    rows = np.concatenate(list(blocks))
    rows.tofile(file)
    return number, (file, len(rows))


def _assign(
    part: Part, kept: Mapping[int, Kept], passages_per_shard: int
) -> Iterator[tuple[int, tuple[Part, int, int]]]:
    """The shards of a part: which, how many passages are before, how many are in it."""
    first = _first_id(part.number, kept)
    last = first + kept[part.number].passages
    for shard in range(first // passages_per_shard, -(-last // passages_per_shard)):
        start = max(first, shard * passages_per_shard)
        stop = min(last, (shard + 1) * passages_per_shard)
        yield shard, (part, start - first, stop - start)


def _write_shard(
    shard: tuple[int, Iterable[tuple[Part, int, int]]], rules: Rules, _: Sequence[None]
) -> int:
    number, pieces = shard
    records = (
        islice(parts.kept_records(part, _dropped(part), skip), count)
        for part, skip, count in sorted(pieces, key=lambda piece: piece[0].number)
    )
    path = shards.shard_path(rules.folder, number)
    work = _unique(rules.scratch / path.name)
    shards.write_shard(work, chain.from_iterable(records))
    work.rename(path)
    return number


def _finish(
    rules: Rules,
    marked: Iterable[Part],
    kept: Mapping[int, Kept],
    spans: Mapping[int, tuple[Path, int]],
    _: Sequence[int],
) -> None:
    in_order = sorted(marked, key=lambda part: part.number)
    buckets = [spans[number] for number in sorted(spans)]
    shards.write_documents(
        rules.folder / shards.DOCUMENTS,
        (np.fromfile(file, np.int64).reshape(-1, 3) for file, _ in buckets),
        sum(count for _, count in buckets),
    )
    equal = [
        Marks(part.passages, np.fromfile(part.folder / "equal", np.uint8)).count()
        for part in in_order
    ]
    shards.write_table(
        rules.folder,
        in_order,
        [kept[part.number] for part in in_order],
        sum(equal),
        rules.max_words,
        rules.passages_per_shard,
    )
