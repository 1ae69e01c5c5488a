"""Few-shot prompts of the evaluation: whose demonstrations stand before a question."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from radit_jax.batch import Example
from radit_jax.data.corpus import PassageStore
from radit_jax.data.fewshot import Demonstration, choose, prefix
from radit_jax.data.registry import DATASETS
from radit_jax.stages.retrieve import SHOTS, nothing, read_retrieved, read_splits


class Shots:
    """Demonstrations of the datasets of ``data.shots``, with their own top passage.

    Args:
        config: ``evaluate.shots`` is their number; 0 for none.
        store: the corpus; None: demonstrations without passages, from the files.
        asked: dataset -> its questions, none of which is shown as a demonstration.

    Raises:
        ValueError: a dataset has no pool, or one that is too small.
    """

    def __init__(
        self,
        config: ConfigDict,
        store: PassageStore | None,
        asked: dict[str, list[Example]],
    ):
        # (Dataset, kind, whether passages are shown) -> texts.
        self._texts: dict[tuple[str, str, bool], list[str]] = {}
        count = config.evaluate.shots
        if not count:
            return
        if store is None:
            drawn_from = read_splits(config).get(SHOTS, {})
            pools = {n: (e, nothing(len(e), 1)) for n, e in drawn_from.items()}
        else:
            pools = read_retrieved(Path(config.workdir), SHOTS)
        for name, examples in asked.items():
            # A pool of another name serves only where there is no choice.
            pool = name if name in pools or len(pools) != 1 else next(iter(pools))
            if pool not in pools:
                raise ValueError(
                    f"evaluate.shots = {count}: data.shots has no dataset {name}, only "
                    f"{', '.join(pools) or 'none at all'}"
                )
            everything, found = pools[pool]
            top = {
                e.id: int(ids[0]) for e, ids in zip(everything, found.ids, strict=True)
            }
            for kind in dict.fromkeys(map(_kind, examples)):
                drawn = choose(
                    [example for example in everything if _kind(example) == kind],
                    count,
                    config.seed,
                    examples,
                )
                for example in drawn:
                    id, text = top[example.id], ""
                    if store is not None and id >= 0:
                        text = store[id].display
                    for read, passage in ((True, text), (False, "")):
                        self._texts.setdefault((name, kind, read), []).append(
                            prefix([Demonstration(example, passage)])
                        )

    def __call__(self, example: Example, dataset: str, read: bool) -> Sequence[str]:
        """Texts of the demonstrations before a question, the nearest one last.

        Args:
            example: the question.
            dataset: that it is of.
            read: whether they are shown with their passages.
        """
        return self._texts.get((dataset, _kind(example), read), [])


def _kind(example: Example) -> str:
    """MMLU's demonstrations are of the question's own subject."""
    spec = DATASETS.get(example.dataset)
    return example.kind if spec is not None and spec.category == "MMLU" else ""
