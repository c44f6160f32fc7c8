"""Random samples that are like those of LLaVA-1.5's two sets in length, rounds, modality and supervised share.

finetune: the sources of llava_v1_5_mix665k.json with their true counts (LLaVA issue 702) and rounds about as the paper builds them
(Liu et al. 2023, arXiv 2310.03744, appendix A.2). The lengths are chosen so that the original's sampler pads as much as it does on
the real set: 0.3 of its tokens. pretrain: LCS-558K, an image and its caption.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastllava.batch import IMAGE_ID, ImageSpec
from fastllava.config import Stage
from fastllava.data.loader import Sample
from fastllava.model.weights import Origin
from fastllava.train.metrics.flops import Work

CAP = 2048
"""Tokens at which a sample is cut, its image's patches included."""
PREFIX = 34
"""Ids that the v1 prompt has before the first question."""
SHORTEST = 12
"""Ids of the shortest round, "USER:", " ASSISTANT:" and </s> included."""
SPECIAL = 4
"""Ids below this are no text: <unk>, <s>, </s>, and one that other implementations may give to the image."""
IDS_A_WORD = 1.3

Between = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """One source of the mix, and what its records are like."""

    records: int
    median: int
    """Median number of ids in a conversation, without the prompt before it."""
    spread: float
    """Standard deviation of the logarithm of the number of ids."""
    supervised: float
    """Share of the ids that are answers."""
    rounds: Between
    """Fewest and most rounds."""
    has_image: bool = True


MIX665K: Sequence[Source] = (
    Source(157_712, 190, 0.60, 0.75, (1, 4)),  # LLaVA-Instruct
    Source(40_688, 1_100, 0.80, 0.60, (1, 8), has_image=False),  # ShareGPT
    Source(82_783, 180, 0.50, 0.15, (3, 8)),  # VQAv2
    Source(72_140, 190, 0.45, 0.15, (3, 8)),  # GQA
    Source(8_998, 75, 0.30, 0.10, (1, 2)),  # OKVQA
    Source(80_000, 180, 0.35, 0.30, (3, 8)),  # OCR-VQA
    Source(66_160, 120, 0.25, 0.05, (1, 1)),  # A-OKVQA
    Source(21_953, 140, 0.30, 0.15, (1, 1)),  # TextCaps
    Source(48_447, 280, 0.45, 0.50, (3, 9)),  # RefCOCO
    Source(86_417, 330, 0.40, 0.50, (10, 10)),  # VG
)
LONGEST = 1024
"""Most ids of a first question: after a longer one the cut might leave no answer, and `fastllava prepare` takes no such record."""
CAPTION: Between = (8, 38)
"""Fewest and most ids of a caption of LCS-558K, the line's end included."""
SET_SIZE: Mapping[Stage, int] = {"pretrain": 558_128, "finetune": sum(source.records for source in MIX665K)}


@dataclass(eq=False)
class Samples:
    """Drawn samples: their lengths, as the sampler reads them (`fastllava.data.plan.Lengths`), and the content of each when asked for."""

    spec: ImageSpec
    vocabulary: int
    seed: int
    turns: Sequence[NDArray[np.int64]]
    """For each sample int64 [rounds, 2]: ids of each question, the template's words included, and of each answer."""
    has_image: NDArray[np.bool_]
    n_tokens: NDArray[np.int32]
    n_supervised: NDArray[np.int32]
    n_images: NDArray[np.int8]
    length_key: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.n_tokens)

    def sample(self, index: int, weight: float) -> Sample:
        """Sample `index`; the same whenever it is asked for."""
        rng = np.random.default_rng((self.seed, index))
        lengths = self.turns[index].ravel()
        ids = rng.integers(SPECIAL, self.vocabulary, int(lengths.sum()), dtype=np.int32)
        ids[0] = 1
        ends = np.cumsum(lengths).reshape(-1, 2)
        supervised = np.stack((ends[:, 0], ends[:, 1]), axis=1)
        images: list[NDArray[np.uint8]] = []
        if self.has_image[index]:
            at = min(PREFIX, int(ends[0, 0]) - 1)
            ids[at] = IMAGE_ID
            images.append(rng.integers(0, 256, (3, self.spec.size, self.spec.size), dtype=np.uint8))
        kept = int(self.n_tokens[index]) - len(images) * (self.spec.patches - 1)
        supervised = np.minimum(supervised, kept)
        return Sample(ids[:kept], supervised[supervised[:, 0] < supervised[:, 1]].astype(np.int32), images, weight)

    def work(self, samples: NDArray[np.int64]) -> Work:
        """The work that a step of these samples is, for counting its operations."""
        return Work.of(self.n_tokens[samples], self.n_images[samples], self.n_supervised[samples])


def draw_like(stage: Stage, count: int, origin: Origin) -> Samples:
    """`count` samples, 0 for as many as the stage's set has, for a model as its folders describe it."""
    return draw(stage, count or SET_SIZE[stage], origin.spec, origin.llm.vocab_size)


def draw(stage: Stage, count: int, spec: ImageSpec, vocabulary: int, seed: int = 0) -> Samples:
    """`count` samples in a random order. The same arguments give the same samples."""
    rng = np.random.default_rng((seed, count))
    turns, has_image = _mix(rng, count) if stage == "finetune" else _captions(rng, count)
    # The mark of an image is an id among the others.
    extra = has_image * (spec.patches - 1)
    n_ids = np.array([int(each.sum()) for each in turns])
    n_tokens = np.minimum(n_ids + extra, CAP)
    n_supervised = np.array([_supervised(each, kept) for each, kept in zip(turns, n_tokens - extra, strict=True)])
    words = np.maximum(1, (n_ids - PREFIX) / IDS_A_WORD).astype(np.int32)
    return Samples(
        spec=spec,
        vocabulary=vocabulary,
        seed=seed,
        turns=turns,
        has_image=has_image,
        n_tokens=n_tokens.astype(np.int32),
        n_supervised=n_supervised.astype(np.int32),
        n_images=has_image.astype(np.int8),
        length_key=np.where(has_image, words, -words).astype(np.int32),
    )


def _mix(rng: np.random.Generator, count: int) -> tuple[list[NDArray[np.int64]], NDArray[np.bool_]]:
    records = np.array([source.records for source in MIX665K])
    sources = [MIX665K[i] for i in rng.choice(len(MIX665K), count, p=records / records.sum()).tolist()]
    return [_conversation(rng, source) for source in sources], np.array([source.has_image for source in sources])


def _conversation(rng: np.random.Generator, source: Source) -> NDArray[np.int64]:
    """Draw a conversation: int64 [rounds, 2], as `Samples.turns`."""
    total = int(source.median * np.exp(rng.normal(0.0, source.spread)))
    rounds = min(int(rng.integers(*source.rounds, endpoint=True)), max(1, total // SHORTEST))
    # Cuts at random places that leave every round its least.
    cuts = np.sort(rng.integers(0, max(1, total - rounds * SHORTEST) + 1, rounds - 1))
    lengths = SHORTEST + np.diff(np.concatenate(([0], cuts, [max(0, total - rounds * SHORTEST)])))
    answers = np.maximum(2, (source.supervised * lengths).astype(np.int64))
    questions = lengths - answers
    questions[0] = min(questions[0], LONGEST)
    # The system prompt and USER:, and the image's mark.
    questions[0] += PREFIX + source.has_image
    return np.stack((questions, answers), axis=1)


def _captions(rng: np.random.Generator, count: int) -> tuple[list[NDArray[np.int64]], NDArray[np.bool_]]:
    captions = rng.integers(*CAPTION, count, endpoint=True)
    return [np.array([[2, length]]) for length in captions.tolist()], np.ones(count, np.bool_)


def _supervised(turns: NDArray[np.int64], kept: int) -> int:
    """Count the ids of answers among the first `kept` ids."""
    ends = np.minimum(np.cumsum(turns.ravel()), kept).reshape(-1, 2)
    return int((ends[:, 1] - ends[:, 0]).sum())
