"""How a language model answers questions from passages: ensembles and choices.

===============  =====================================================================
ensemble         what is said
===============  =====================================================================
``paper``        each passage is read on its own; of each unique answer the weighted
                 probabilities of the passages that gave it are summed (RA-DIT 2.4)
``rescored``     the same, but every answer is scored after every passage (eq. 2)
``token``        next-token probabilities are mixed after every token (REPLUG)
``concatenated`` one prompt with all passages, the best first
===============  =====================================================================

Options of a multiple-choice question are compared by their weighted mean probability
over passages, one pass for all options of a prompt.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from radit_jax.batch import Example, Passage
from radit_jax.data import prompts
from radit_jax.data.tokenize import Tokenizer
from radit_jax.evaluation import metrics
from radit_jax.evaluation.tasks import (
    UNCONDITIONAL,
    Task,
    mixed_option_score,
    option_score,
    task_of,
)
from radit_jax.inference.ensemble import vote
from radit_jax.inference.generate import Generated, generate, generate_mixed
from radit_jax.models.llama import Llama
from radit_jax.stages.scoring import PromptScorer
from radit_jax.stages.shots import Shots
from radit_jax.stages.stage import attention_kernel, compute_dtype
from radit_jax.tracker import Progress, progress

ENSEMBLES = ("paper", "rescored", "token", "concatenated")
# Room for everything: what is scored has been cut already.
UNLIMITED = 10**9


class Asked(NamedTuple):
    """A question with what it is answered from."""

    dataset: str
    example: Example
    passages: Sequence[Passage]  # best first; none: closed book
    weights: Sequence[float]  # of the passages


class Said(NamedTuple):
    """What comes of one prompt."""

    prompt: str  # exactly what was read, special tokens shown
    text: str | None = None  # None where the prompt alone says nothing
    log_probability: float | None = None  # of that, nats


class Answered(NamedTuple):
    """What comes of all prompts of a question."""

    prediction: str
    confidence: float  # share of the probability that is behind it
    said: Sequence[Said]  # one per passage, or one alone
    choice_scores: Sequence[float] = ()  # of the options; the highest is the prediction


def task(config: ConfigDict, dataset: str, example: Example) -> Task:
    """What is done with a dataset's questions; fields of the config come first."""
    found = task_of(dataset, bool(example.choices))
    evaluate = config.evaluate
    return found._replace(
        max_new_tokens=evaluate.max_new_tokens or found.max_new_tokens,
        stop=tuple(evaluate.stop) or found.stop,
    )


class Reader:
    """Answers questions from passages with one language model.

    What it has said once it remembers: a gold passage is often among the retrieved.

    Args:
        config: its evaluate section is used.
        model: on the current mesh.
        tokenizer: of the model.
        bos: whether prompts begin with <bos>.
        shots: demonstrations, if any.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: Llama,
        tokenizer: Tokenizer,
        bos: bool,
        shots: Shots,
    ):
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.bos = bos
        self.shots = shots
        self.dtype = compute_dtype(config)
        self.kernel = attention_kernel(config, model.config.head_size)
        self._known: dict[tuple[tuple[int, ...], Task], Generated] = {}
        self._sizes: dict[str, int] = {}
        self._scoring: PromptScorer | None = None

    def _limit(self, new: int = 0) -> int:
        """Tokens of a prompt that leaves room for some new ones."""
        limit = min(self.config.evaluate.prompt_tokens, self.model.config.max_length)
        return limit - new

    def _before(self, shots: Sequence[str], room: int) -> str:
        """The nearest demonstrations that fit; they stand last."""
        first = len(shots)
        while first:
            room -= self._size(shots[first - 1])
            if room < 0:
                break
            first -= 1
        return "".join(shots[first:])

    def _size(self, shot: str) -> int:
        """Tokens of a demonstration, which many prompts share."""
        if shot not in self._sizes:
            self._sizes[shot] = len(self.tokenizer.encode(shot))
        return self._sizes[shot]

    def render(
        self, example: Example, passage: str, limit: int, shots: Sequence[str] = ()
    ) -> prompts.Prompt:
        """The prompt of a question and one passage ("" for none), without its answer.

        Demonstrations that there is no room for are left out, the first ones first;
        then the passage is cut, and the question last.

        Args:
            example: the question.
            passage: text.
            limit: tokens of the prompt.
            shots: texts of the demonstrations, the nearest one last.
        """
        render = functools.partial(
            prompts.render,
            self.tokenizer,
            prompts.pieces(example),
            passage=passage,
            answered=False,
            bos=self.bos,
        )
        prompt = render(limit)
        before = self._before(shots, limit - len(prompt.tokens))
        return render(UNLIMITED, before=before) if before else prompt

    def render_options(
        self,
        options: Sequence[Sequence[prompts.Piece]],
        passage: str,
        limit: int,
        shots: Sequence[str] = (),
    ) -> list[prompts.Prompt]:
        """Prompts that differ in their answers alone, each with its own.

        What is cut is cut for all of them alike, so that they share what is read.

        Args:
            options: pieces of the question with each of its answers.
            passage: text; "" for none.
            limit: tokens of the longest of them.
            shots: texts of the demonstrations, the nearest one last.
        """
        render = functools.partial(
            prompts.render, self.tokenizer, passage=passage, bos=self.bos, eos=False
        )
        found = [render(pieces, UNLIMITED) for pieces in options]
        longest = max(len(prompt.tokens) for prompt in found)
        before = self._before(shots, limit - longest)
        if before or longest > limit:
            answers = [len(prompt.tokens) - prompt.answer_start for prompt in found]
            rest = UNLIMITED if before else limit - max(answers)
            found = [
                render(pieces, rest + answer, before=before)
                for pieces, answer in zip(options, answers, strict=True)
            ]
        # The scorer reads what is before it once for all of them.
        return [prompt._replace(question_start=prompt.answer_start) for prompt in found]

    def answer(self, name: str, asked: Sequence[Asked]) -> list[Answered]:
        """Answer questions, those of one task together.

        Args:
            name: of the system, for the display.
            asked: the questions.

        Raises:
            ValueError: a question's task is to choose, and it has no options.
        """
        tasks = [task(self.config, a.dataset, a.example) for a in asked]
        found: dict[int, Answered] = {}
        for of_task in dict.fromkeys(tasks):
            places = [i for i, one in enumerate(tasks) if one == of_task]
            how = self._choose if of_task.kind == "choose" else self._say
            total = sum(self._prompts_of(of_task, asked[i]) for i in places)
            with progress(total, f"evaluate {name}", "prompts") as bar:
                parts = how(of_task, [asked[i] for i in places], bar)
            found |= dict(zip(places, parts, strict=True))
        return [found[i] for i in range(len(asked))]

    def _prompts_of(self, of: Task, a: Asked) -> int:
        """How many a question takes, for the display."""
        passages = max(len(a.passages), 1)
        if of.kind == "choose":
            passages += of.score == "nll_compl"
            return passages * len(a.example.choices)
        together = self.config.evaluate.ensemble in ("token", "concatenated")
        return 1 if together else passages

    # Generation.

    def _say(self, of: Task, asked: Sequence[Asked], bar: Progress) -> list[Answered]:
        ensemble = self.config.evaluate.ensemble
        rendered = [self._prompts(of, a) for a in asked]
        if ensemble == "token":
            return self._say_together(of, asked, rendered, bar)
        self._generate(of, rendered, bar)
        results = [[self._known[prompt, of] for prompt in ps] for ps in rendered]
        said = [
            [
                Said(self._shown(prompt), result.text, _score(of, result))
                for prompt, result in zip(ps, rs, strict=True)
            ]
            for ps, rs in zip(rendered, results, strict=True)
        ]
        if ensemble == "rescored":
            return self._rescored(of, asked, said)
        return [
            _voted(said_C, [1.0] if len(said_C) == 1 else a.weights)
            for a, said_C in zip(asked, said, strict=True)
        ]

    def _prompts(self, of: Task, a: Asked) -> list[tuple[int, ...]]:
        """One per passage, or one without any or with all of them."""
        shots = self.shots(a.example, a.dataset, bool(a.passages))
        texts = [passage.display for passage in a.passages] or [""]
        if self.config.evaluate.ensemble == "concatenated":
            texts = ["\n\n".join(texts)]
        limit = self._limit(of.max_new_tokens)
        return [
            tuple(self.render(a.example, text, limit, shots).tokens) for text in texts
        ]

    def _generate(
        self,
        of: Task,
        rendered: Sequence[Sequence[tuple[int, ...]]],
        bar: Progress,
    ) -> None:
        """Have an answer to every prompt among those that are known."""
        every = [prompt for ps in rendered for prompt in ps]
        new = [p for p in dict.fromkeys(every) if (p, of) not in self._known]
        bar.skip(len(every) - len(new))
        found = generate(
            self.model,
            self.tokenizer,
            new,
            max_new_tokens=of.max_new_tokens,
            stop=of.stop,
            batch_tokens=self.config.evaluate.batch_tokens,
            dtype=self.dtype,
            kernel=self.kernel,
            progress=bar.update,
        )
        self._known |= zip(((p, of) for p in new), found, strict=True)

    def _shown(self, prompt: Sequence[int]) -> str:
        return self.tokenizer.decode(prompt, special=True)

    def _say_together(
        self,
        of: Task,
        asked: Sequence[Asked],
        rendered: Sequence[Sequence[tuple[int, ...]]],
        bar: Progress,
    ) -> list[Answered]:
        """Token by token, from the mixture of all passages."""
        found = generate_mixed(
            self.model,
            self.tokenizer,
            rendered,
            [list(a.weights) or [1.0] for a in asked],
            max_new_tokens=of.max_new_tokens,
            stop=of.stop,
            batch_tokens=self.config.evaluate.batch_tokens,
            dtype=self.dtype,
            kernel=self.kernel,
            progress=bar.update,
        )
        return [
            Answered(
                result.text,
                # Rounding may leave a certain token a little above 1.
                min(float(np.exp(_score(of, result))), 1.0),
                [Said(self._shown(prompt)) for prompt in ps],
            )
            for result, ps in zip(found, rendered, strict=True)
        ]

    def _rescored(
        self, of: Task, asked: Sequence[Asked], said: Sequence[Sequence[Said]]
    ) -> list[Answered]:
        """Every unique answer after every passage."""
        unique = [
            # An answer of nothing has no tokens whose probability could be asked.
            list(
                {
                    metrics.normalise(s.text): s.text for s in reversed(ss) if s.text
                }.values()
            )
            for ss in said
        ]
        scores = iter(
            self._score_options(
                of,
                [
                    (a, [a.example._replace(answers=(text,)) for text in texts])
                    for a, texts in zip(asked, unique, strict=True)
                    if texts
                ],
            )
        )
        found = []
        for a, texts, ss in zip(asked, unique, said, strict=True):
            if not texts:
                found.append(Answered("", 1.0, ss))
                continue
            score_O = next(scores).mixed(of, a.weights)
            best = int(np.argmax(score_O))
            found.append(Answered(texts[best], _share(score_O, best), ss))
        return found

    # Choice.

    def _choose(
        self, of: Task, asked: Sequence[Asked], bar: Progress
    ) -> list[Answered]:
        options = [
            (a, [a.example._replace(answers=(c,)) for c in a.example.choices])
            for a in asked
        ]
        found = []
        for (a, _), scores in zip(
            options, self._score_options(of, options, bar.update), strict=True
        ):
            choices = a.example.choices
            score_O = scores.mixed(of, a.weights)
            best = int(np.argmax(score_O))
            alone_C = scores.alone(of).argmax(axis=1)
            said = [
                Said(self._shown(prompt), choices[one], float(log_p_O[one]))
                for prompt, one, log_p_O in zip(
                    scores.prompts, alone_C, scores.log_p_CO, strict=True
                )
            ]
            found.append(
                Answered(choices[best], _share(score_O, best), said, score_O.tolist())
            )
        return found

    def _score_options(
        self,
        of: Task,
        asked: Sequence[tuple[Asked, Sequence[Example]]],
        advance: Callable[[int], None] = lambda n: None,
    ) -> list["Scores"]:
        """Scores of each question's options, after each of its passages."""
        sequences: list[prompts.Prompt] = []
        characters = []
        for a, options in asked:
            pieces = [prompts.pieces(option) for option in options]
            characters.append(np.array([len(p[-1].text.strip()) for p in pieces]))
            shots = self.shots(a.example, a.dataset, bool(a.passages))
            for text in [passage.display for passage in a.passages] or [""]:
                sequences += self.render_options(pieces, text, self._limit(), shots)
            if of.score == "nll_compl":
                bare = [[prompts.Piece(UNCONDITIONAL), *p[-1:]] for p in pieces]
                sequences += self.render_options(bare, "", self._limit())
        scored = self._scorer().score(sequences, advance)
        log_p, found, start = scored.log_p, [], 0
        for (a, options), characters_O in zip(asked, characters, strict=True):
            size = len(options)
            rows = max(len(a.passages), 1) + (of.score == "nll_compl")
            log_p_CO = log_p[start : start + rows * size].reshape(rows, size)
            at = range(start, start + rows * size, size)
            unconditional_O = None
            if of.score == "nll_compl":
                log_p_CO, unconditional_O = log_p_CO[:-1], log_p_CO[-1]
            found.append(
                Scores(
                    log_p_CO,
                    characters_O,
                    scored.tokens[start : start + size],
                    unconditional_O,
                    [sequences[i].tokens[: sequences[i].answer_start] for i in at][
                        : len(log_p_CO)
                    ],
                )
            )
            start += rows * size
        return found

    def _scorer(self) -> PromptScorer:
        if self._scoring is None:
            rows = ConfigDict({**self.config.evaluate, "row_tokens": self._limit()})
            self._scoring = PromptScorer(
                "evaluate", rows, self.model, self.dtype, self.kernel
            )
        return self._scoring


class Scores(NamedTuple):
    """Log-likelihoods of a question's options."""

    log_p_CO: np.ndarray  # after each passage, nats
    characters_O: np.ndarray
    tokens_O: np.ndarray
    unconditional_O: np.ndarray | None  # log p(y|"Answer:"), where that is asked for
    prompts: Sequence[Sequence[int]]  # one per passage

    def alone(self, of: Task) -> np.ndarray:
        """By what options are compared after one passage, [C, O]."""
        return option_score(
            of.score,
            self.log_p_CO,
            self.characters_O,
            self.tokens_O,
            self.unconditional_O,
        )

    def mixed(self, of: Task, weights: Sequence[float]) -> np.ndarray:
        """By what they are compared after all passages, [O]."""
        return mixed_option_score(
            of.score,
            self.log_p_CO,
            np.array(weights or [1.0]),
            self.characters_O,
            self.tokens_O,
            self.unconditional_O,
        )


def _score(of: Task, result: Generated) -> float:
    """The log-probability behind an answer: of all its tokens, or their mean."""
    if of.score == "nll_token":
        return result.log_probability / max(len(result.tokens), 1)
    return result.log_probability


def _voted(said_C: Sequence[Said], weights: Sequence[float]) -> Answered:
    votes = vote(
        [said.text or "" for said in said_C],
        [said.log_probability or 0.0 for said in said_C],
        weights,
        metrics.normalise,
    )
    total = sum(found.weight for found in votes)
    return Answered(votes[0].text, votes[0].weight / total if total else 0.0, said_C)


def _share(score_O: np.ndarray, best: int) -> float:
    """Of the probability of one option in that of all."""
    share_O = np.exp(score_O - score_O.max())
    return float(share_O[best] / share_O.sum())
