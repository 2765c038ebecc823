"""Supervised fine-tuning: prompts are read, answers are learned, several examples share a row.

prompt + answer   [B p p a a E]  [B p a E]
tokens             B p p a a     B p a          a packed row, as in `packing`
labels             . . a a E     . a E          a dot is PAD: prompts are not learned
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor

from msfs_functional.packing import Packed, PackedBatches, pack
from msfs_functional.tokenizer import PAD


def pack_answers(documents: Sequence[Sequence[int]], prompts: Sequence[int], length: int) -> Packed:
    """Packed rows whose labels are PAD on prompts.

    Args:
        documents: ids of prompt and answer, BOS and EOS included.
        prompts: how many tokens of each document are its prompt, BOS included.
        length: tokens of a row.
    """
    rows = pack(documents, length)
    pairs = zip(documents, prompts, strict=True)
    answers = [[PAD] * n + list(document[n:]) for document, n in pairs]
    return rows._replace(labels=pack(answers, length).labels)


@dataclass
class AnswerBatches(PackedBatches):
    """`PackedBatches` of examples whose prompts are not learned.

    Args:
        prompts: how many tokens of each document are its prompt.
    """

    prompts: Sequence[int] = field(default_factory=tuple)

    def rows(self) -> Packed:
        if self._packed is None or self._packed[0] != self.epoch:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.documents))
            documents = [self.documents[i] for i in order]
            packed = pack_answers(documents, [self.prompts[i] for i in order], self.length)
            self._packed = self.epoch, packed
        return self._packed[1]


def dynamic_losses(logps: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """-p log p with p held fixed, in place of -log p: improbable tokens do not rule the gradient.

    The gradient of -log p weighs a token by 1 / p, as a reward for it alone would; this takes that
    weight away. Give it to `masked.masked_mean`.

    Args:
        logps: log-probabilities of the demonstrations' tokens, nats.

    Source: Wu et al. 2025, "On the generalization of SFT" (dynamic fine-tuning), equation 9.
    """
    return -logps.detach().exp() * logps
