"""Stage ``corpus``: documents -> passages/.

    python -m radit_jax.main --config configs/corpus.py \\
        --config.corpus.documents=docs.jsonl --config.workdir=runs/mine

A document is a record with ``text`` (or ``raw_content``), and with ``id``, ``title``
and ``section`` where it has some: a line of JSONL (``.gz`` too) or a row of Parquet. A
``.txt`` file is a document too: its path is the id, its name the title. What is longer
than ``max_words`` is cut into chunks of about equal size.

``documents`` are files, folders or globs, separated by commas. ``PATH@WORDS`` cuts
those of one path into passages of another size. So the paper's corpus (section 4:
Wikipedia of December 2021 with infoboxes in chunks of fewer than 200 words, CommonCrawl
in chunks of fewer than 100; 399M in all) is, in the files of Atlas,

    --config.corpus.documents="wiki/text-list-100-sec.jsonl,wiki/infobox.jsonl,cc@100"
    --config.corpus.keep_lines=False

An id is unique in its file. Where there are several files, the file's path below the
folder that holds them all stands in front, with ``.`` for ``/``:
``wiki.infobox.jsonl:17``. A record without an id gets ``FILE:RECORD``. A folder of text
files counts as one file. A path with a comma in it cannot be named.

One process takes 20 MB of text a second on one core. Its memory does not grow with the
corpus, but for some bits per passage: 210 MB with 0.2 GB of text and with 2 GB
(benchmarks/corpus.py). It needs disk for the text once more while it works.

``engine="beam"`` writes the same bytes with Apache Beam (``pip install
'radit-jax[beam]'``), file by file in parallel. Text does not travel between workers,
but files and workdir must have the same path on all of them. On this machine it runs in
one process unless told otherwise,

    --config.corpus.engine=beam --config.corpus.beam_options="--direct_num_workers=8 \\
        --direct_running_mode=multi_processing"

and then keeps the hashes in memory, some 0.2 kB per passage. ``--runner=FlinkRunner
...`` and the like run it elsewhere.
"""

from ml_collections import ConfigDict

from configs.base import FACTBOOK, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    c = config.corpus = ConfigDict()
    c.documents = ""  # PATH or PATH@WORDS of JSONL, Parquet, .txt; see above
    c.max_words = 200  # of a passage, white-space words
    c.keep_lines = True  # cut at line breaks where that fits; False: as the paper
    c.max_damaged = 0.0  # share of a file's records that may be unreadable, left out
    # Drop passages whose Jaccard similarity (of runs of five words) to an earlier one
    # is at least this, such as 0.8; 0: only equal ones. It takes twice as long, and 350
    # bytes of disk per passage while it works, but no more memory.
    c.near_duplicates = 0.0
    c.passages_per_shard = 100_000
    c.engine = "single"  # or "beam"; the passages are the same
    c.beam_options = ""  # as of Beam's command line; "": in this process
    if variant in (*FACTBOOK, "tiny"):
        c.documents = config.get_ref("workdir") + "/inputs/documents.jsonl"
    if variant in FACTBOOK:
        c.max_words = 80  # short passages: the demo's reader runs on two CPU cores
    if variant == "tiny":
        c.max_words = 12
        c.passages_per_shard = 50


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("corpus", variant)
    section(config, variant)
    return config
