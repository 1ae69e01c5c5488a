"""The dimension key, and the few tuples that cross from one room to another.

Array names end in the letters of their axes, outermost first, so that
``jnp.einsum("BE,BCE->BC", query_BE, passages_BCE)`` can be checked by eye.

========  =====================================================
``B``     rows of a batch
``C``     passages (candidates) per example
``L``     tokens of a row (queries of attention)
``M``     attended tokens (keys of attention)
``T``     loss-carrying tokens of a row
``D``     model width
``H``     query heads
``G``     key/value heads
``K``     size of one head
``F``     MLP width
``V``     vocabulary
``E``     embedding width of the retriever
``N``     passages in the index
``S``     stacked layers
========  =====================================================
"""

from typing import Any, NamedTuple

import numpy as np

# A numpy array on the host, a jax array on the mesh; this file knows only numpy.
Array = Any


class Passage(NamedTuple):
    """One retrievable chunk of a document."""

    id: int  # position in the corpus, 0 .. N-1, and row of the index
    document: str  # id of the document it was cut from
    title: str
    section: str  # "" when the document has none
    text: str

    @property
    def display(self) -> str:
        """``title: section text``, what the encoder and the LM both read.

        The layout is the paper's (Table 15; Atlas folds the section into the title).
        """
        head = f"{self.title}: {self.section}" if self.section else self.title
        return f"{head} {self.text}".strip()


class Example(NamedTuple):
    """One question with the answers a person would accept."""

    id: str
    question: str  # in a dialogue: what the user says last
    answers: tuple[str, ...]  # the first one is trained on
    context: str = ""  # a given (gold) context, "" when there is none
    dataset: str = ""  # for the mixture and the report
    kind: str = ""  # kind of question; "" when the file does not say
    document: str = ""  # id of the document that holds the answer, when known
    evidence: str = ""  # verbatim words of that document, when known
    template: str = "qa"  # how its prompt is laid out, see data.prompts
    query: str = ""  # what is searched for; "": the question
    turns: tuple[str, ...] = ()  # of a dialogue before the question, the user's first
    rationale: str = ""  # a chain of thought that leads to the answer
    choices: tuple[str, ...] = ()  # options; where there are some, an answer is one
    # Id of the passage whose beginning is the question and whose end is the answer; it
    # is not retrieved for it. -1: this is a question.
    source: int = -1

    @property
    def search_text(self) -> str:
        """What the retriever is asked."""
        return self.query or self.question


class Retrieved(NamedTuple):
    """Top-k passages of a list of examples, best first."""

    ids: np.ndarray  # int64 [examples, k]; -1 where the corpus had fewer than k
    scores: np.ndarray  # float32 [examples, k], raw dot products; -inf where id is -1


class Packed(NamedTuple):
    """A packed batch for the language model; numpy on the host, jax on the mesh.

    Several segments share a row. Attention and positions never cross a segment.
    ``sites_BT`` lists the tokens whose *successor* carries loss, so that the
    output head runs only where it is needed.
    """

    tokens_BL: Array  # int32
    segment_ids_BL: Array  # int32; 0 is padding, segments count from 1
    positions_BL: Array  # int32, restart at 0 in every segment
    sites_BT: Array  # int32 index into L
    targets_BT: Array  # int32 token that follows the site
    weights_BT: Array  # float32; 0 where the site is unused


class Candidates(NamedTuple):
    """A batch for the retriever: questions and the passages to tell apart.

    Passages come as embeddings, or as tokens where the context encoder trains too.
    """

    tokens_BL: Array  # int32
    mask_BL: Array  # bool, False: padding
    ids_BC: Array  # int32, of the passages; -1: none
    log_targets_BC: Array  # float32 log p_LSR; -1e30 where that is 0
    passages_BCE: Array | None = None  # float32; whatever where there is no passage
    passage_tokens_BCL: Array | None = None  # int32
    passage_mask_BCL: Array | None = None  # bool
    token_log_p_BTC: Array | None = None  # float32, of EMDR2; see losses.emdr2
