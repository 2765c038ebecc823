"""English word forms: plurals, verb forms, the article and verb groups with do-support."""

from typing import NamedTuple

VOWELS = "aeiou"
BE = ("am", "are", "is", "are", "are", "are")
WAS = ("was", "were", "was", "were", "were", "were")
# Verbs that double their last consonant: getting, beginning.
_DOUBLING = {"begin", "forget", "get", "run", "swim"}


class Verb(NamedTuple):
    """Forms of a verb; `tail` is what follows it ("at" of "look at"), with the space before it."""

    base: str
    third: str
    past: str
    participle: str
    gerund: str
    tail: str


def plural(noun: str) -> str:
    """Regular plural: boxes, cities, boys."""
    if noun.endswith(("s", "sh", "ch", "x", "z")) or noun in ("tomato", "potato"):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + "s"


def verb(base: str, past: str = "", participle: str = "", *, tail: str = "") -> Verb:
    """All forms of a verb; an irregular past is given, its participle too where it differs."""
    third = "has" if base == "have" else base + "es" if base == "go" else plural(base)
    stem = base + base[-1] if base in _DOUBLING else base
    if not past:
        past = stem + "d" if stem.endswith("e") else stem + "ed"
        if base.endswith("y") and base[-2] not in VOWELS:
            past = base[:-1] + "ied"
    drops_e = stem.endswith("e") and not stem.endswith("ee")
    gerund = (stem[:-1] if drops_e else stem) + "ing"
    return Verb(base, third, past, participle or past, gerund, " " + tail if tail else "")


def indefinite(words: str) -> str:
    """The words with a or an before them, by sound: an egg, a university."""
    return ("an " if words[0] in VOWELS and not words.startswith("uni") else "a ") + words


def group(verb: Verb, tense: str, person: int) -> tuple[str, str]:
    """(auxiliary, main verb) of a tense; the auxiliary of a plain form is "".

    Args:
        tense: present, progressive, past, perfect, was (was ...ing), used (used to), future, or a
            modal: can, must, want, wanted.
        person: 0 to 5 for I, you, he or she, we, you, they.
    """
    third = person == 2
    match tense:
        case "present":
            return "", (verb.third if third else verb.base) + verb.tail
        case "past":
            return "", verb.past + verb.tail
        case "progressive":
            return BE[person], verb.gerund + verb.tail
        case "was":
            return WAS[person], verb.gerund + verb.tail
        case "perfect":
            return ("has" if third else "have"), verb.participle + verb.tail
        case "used":
            return "", "used to " + verb.base + verb.tail
        case "future":
            return "will", verb.base + verb.tail
        case "can" | "must":
            return tense, verb.base + verb.tail
        case "want":
            return "", ("wants to " if third else "want to ") + verb.base + verb.tail
        case "wanted":
            return "", "wanted to " + verb.base + verb.tail
    raise ValueError(f"no tense {tense!r}")


def supported(verb: Verb, tense: str, person: int) -> tuple[str, str]:
    """`group`, with "do" where the plain form has no auxiliary: for questions and negation."""
    auxiliary, main = group(verb, tense, person)
    if auxiliary:
        return auxiliary, main
    base = verb.base + verb.tail
    do = "does" if person == 2 else "do"
    match tense:
        case "present":
            return do, base
        case "past":
            return "did", base
        case "used":
            return "did", "use to " + base
        case "want":
            return do, "want to " + base
        case "wanted":
            return "did", "want to " + base
    raise ValueError(f"no tense {tense!r}")
