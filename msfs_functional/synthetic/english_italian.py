"""English sentences and their Italian translations, from a seeded grammar."""

import random
from typing import NamedTuple

Pair = tuple[str, str]


class Corpus(NamedTuple):
    """Lists of (English, Italian)."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


_NOUNS = {
    "boy": "il ragazzo", "girl": "la ragazza", "dog": "il cane", "student": "lo studente",
    "friend": "l'amico", "teacher": "l'insegnante", "doctor": "il medico", "child": "il bambino",
    "woman": "la donna", "man": "l'uomo", "cat": "il gatto", "aunt": "la zia",
}  # fmt: skip
_THINGS = {
    "book": "il libro", "house": "la casa", "apple": "la mela", "mirror": "lo specchio",
    "car": "la macchina", "letter": "la lettera", "tree": "l'albero", "island": "l'isola",
}  # fmt: skip
_ADJECTIVES = {
    "red": ("rosso", "rossa"), "green": ("verde", "verde"), "new": ("nuovo", "nuova"),
    "old": ("vecchio", "vecchia"), "small": ("piccolo", "piccola"), "strange": ("strano", "strana"),
}  # fmt: skip
_FEMININE = {"girl", "woman", "aunt", "house", "apple", "car", "letter", "island"}
_VERBS = {
    "sees": "vede", "loves": "ama", "finds": "trova", "buys": "compra", "draws": "disegna",
    "hides": "nasconde", "watches": "guarda", "sells": "vende",
}  # fmt: skip


def english_italian(seed: int = 0) -> Corpus:
    """Distinct pairs split into train, valid and test."""
    pairs = []
    for who, chi in _NOUNS.items():
        for verb, verbo in _VERBS.items():
            for thing, cosa in _THINGS.items():
                for adjective, forms in _ADJECTIVES.items():
                    form = forms[thing in _FEMININE]
                    italian = f"{chi} {verbo} {cosa} {form}."
                    pairs.append(
                        (
                            f"The {who} {verb} the {adjective} {thing}.",
                            italian[0].upper() + italian[1:],
                        )
                    )
    random.Random(seed).shuffle(pairs)
    return Corpus(pairs[:-1000], pairs[-1000:-500], pairs[-500:])
