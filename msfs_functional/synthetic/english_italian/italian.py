"""Italian word forms: plurals, agreement, articles and contractions, conjugation, verb groups.

Rules as in any school grammar; what no rule gives is written out below. Persons are counted 0 to 5
for io, tu, lui or lei, noi, voi, loro; forms of agreement are "m", "f", "mp", "fp".
"""

from functools import cache
from typing import NamedTuple

VOWELS = "aeiouàèéìòù"
REFLEXIVE = ("mi", "ti", "si", "ci", "vi", "si")


def agreement(gender: str, plural: bool) -> str:
    """The key of a form: "m", "f", "mp" or "fp"."""
    return gender + "p" if plural else gender


def plural(noun: str, gender: str) -> str:
    """Regular plural: libri, case, turisti, funghi, barche, arance, orologi; città stays."""
    if noun[-1] not in "aeo" or noun in ("zoo", "radio"):
        return noun
    stem, last = noun[:-1], noun[-1]
    if last == "e":
        return stem + "i"
    if stem.endswith(("c", "g")):
        stem += "h"
    if last == "a" and gender == "f":
        if stem.endswith(("ci", "gi")) and stem[-3] not in VOWELS:
            stem = stem[:-1]
        return stem + "e"
    return stem.removesuffix("i") + "i"


@cache
def adjective(base: str, masculine_plural: str = "") -> dict[str, str]:
    """The four forms: rosso rossa rossi rosse, verde verde verdi verdi, blu in all."""
    if base.endswith("o"):
        feminine = base[:-1] + "a"
        forms = base, feminine, masculine_plural or plural(base, "m"), plural(feminine, "f")
    elif base.endswith("e"):
        forms = base, base, plural(base, "m"), plural(base, "f")
    else:
        forms = (base,) * 4
    return dict(zip(("m", "f", "mp", "fp"), forms, strict=True))


def _onset(word: str) -> str:
    """How a word begins, for its article: "vowel", "strong" (lo, gli) or "plain"."""
    word = word.lower()
    if word[0] in VOWELS + "h":
        return "vowel"
    if word[0] in "zxy" or word[:2] in ("gn", "ps", "pn"):
        return "strong"
    return "strong" if word[0] == "s" and word[1] not in VOWELS else "plain"


_DEFINITE = {
    "m": {"plain": "il", "strong": "lo", "vowel": "l'"},
    "f": {"plain": "la", "strong": "la", "vowel": "l'"},
    "mp": {"plain": "i", "strong": "gli", "vowel": "gli"},
    "fp": {"plain": "le", "strong": "le", "vowel": "le"},
}
_CONTRACTED = {"di": "de", "a": "a", "da": "da", "in": "ne", "su": "su"}


def join(*words: str) -> str:
    """Words with spaces between them, none after an apostrophe and none for empty words."""
    return " ".join(word for word in words if word).replace("' ", "'")


def conjunction(word: str, following: str) -> str:
    """e, which is ed before e; ma."""
    return "ed" if word == "e" and following[0] in "eEè" else word


def definite(words: str, form: str) -> str:
    """With il, lo, l', la, i, gli or le, as the first word wants it."""
    return join(_DEFINITE[form][_onset(words)], words)


def indefinite(words: str, form: str) -> str:
    """With un, uno, una or un'."""
    onset = _onset(words)
    if form == "f":
        return join("un'" if onset == "vowel" else "una", words)
    return join("uno" if onset == "strong" else "un", words)


def preposition(name: str, words: str, form: str | None) -> str:
    """A preposition before words; `form` is given where a definite article stands between.

    di, a, da, in and su melt with the article: del, allo, dall', nei, sugli.
    """
    if form is None:
        euphonic = name == "a" and words[0] in "aA"
        return join("ad" if euphonic else name, words)
    if name not in _CONTRACTED:
        return join(name, definite(words, form))
    article = _DEFINITE[form][_onset(words)]
    stem = _CONTRACTED[name]
    melted = stem + (
        article[1:] if article == "il" else "l" + article if article[0] == "l" else article
    )
    return join(melted, words)


def shaped(word: str, following: str, form: str) -> str:
    """bello, quello, buono, questo and their like before a word, cut as the article is.

    bel libro, bello specchio, bell'uomo, bei libri, begli specchi; buon vino, quest'isola.
    """
    onset = _onset(following)
    if word in ("bello", "quello"):
        stem = word[:-3]
        endings = {
            "m": {"plain": "l", "strong": "llo", "vowel": "ll'"},
            "f": {"plain": "lla", "strong": "lla", "vowel": "ll'"},
            "mp": {"plain": "i", "strong": "gli", "vowel": "gli"},
            "fp": {"plain": "lle", "strong": "lle", "vowel": "lle"},
        }
        return join(stem + endings[form][onset], following)
    if word == "buono" and form == "m" and onset != "strong":
        return join("buon", following)
    if word == "questo" and form in ("m", "f") and onset == "vowel":
        return join("quest'", following)
    return join(adjective(word)[form], following)


class Verb(NamedTuple):
    """Forms of a verb by person; `essere` marks its auxiliary, `reflexive` verbs like alzarsi."""

    infinitive: str
    present: tuple[str, ...]
    imperfect: tuple[str, ...]
    future: tuple[str, ...]
    participle: str
    gerund: str
    essere: bool
    reflexive: bool


_PRESENT = {
    "essere": "sono sei è siamo siete sono", "avere": "ho hai ha abbiamo avete hanno",
    "andare": "vado vai va andiamo andate vanno", "dare": "do dai dà diamo date danno",
    "stare": "sto stai sta stiamo state stanno", "uscire": "esco esci esce usciamo uscite escono",
    "potere": "posso puoi può possiamo potete possono",
    "volere": "voglio vuoi vuole vogliamo volete vogliono",
    "dovere": "devo devi deve dobbiamo dovete devono",
    "sapere": "so sai sa sappiamo sapete sanno", "dire": "dico dici dice diciamo dite dicono",
    "scegliere": "scelgo scegli sceglie scegliamo scegliete scelgono",
    "venire": "vengo vieni viene veniamo venite vengono",
    "piacere": "piaccio piaci piace piacciamo piacete piacciono",
}  # fmt: skip
_FUTURE_STEM = {
    "essere": "sar", "avere": "avr", "andare": "andr", "dare": "dar", "stare": "star",
    "potere": "potr", "volere": "vorr", "dovere": "dovr", "sapere": "sapr", "vedere": "vedr",
    "cadere": "cadr", "venire": "verr", "bere": "berr", "tradurre": "tradurr",
}  # fmt: skip
# Infinitives that were shortened: their other forms come from the full one.
_FULL = {"bere": "bevere", "tradurre": "traducere", "dire": "dicere"}
_PARTICIPLE = {
    "bere": "bevuto", "tradurre": "tradotto", "dire": "detto", "essere": "stato",
    "venire": "venuto", "piacere": "piaciuto",
}  # fmt: skip


def _soft(stem: str, ending: str) -> str:
    """Keeps the sound of -are stems before i and e: cerchi, mangi, mangerò, studi."""
    if stem.endswith(("c", "g")):
        return stem + "h" + ending
    if stem.endswith("i") and (ending[0] == "i" or stem.endswith(("ci", "gi"))):
        return stem[:-1] + ending
    return stem + ending


@cache
def verb(
    infinitive: str,
    *,
    participle: str | None = None,
    with_isc: bool = False,
    essere: bool = False,
) -> Verb:
    """All forms of a verb by the rules of its conjugation."""
    reflexive = infinitive.endswith("rsi")
    if reflexive:
        infinitive, essere = infinitive[:-2] + "e", True
    full = _FULL.get(infinitive, infinitive)
    stem, theme = full[:-3], full[-3]
    if theme == "a":
        present = (
            stem + "o",
            _soft(stem, "i"),
            stem + "a",
            _soft(stem, "iamo"),
            stem + "ate",
            stem + "ano",
        )
        future_stem, gerund, regular = _soft(stem, "er"), stem + "ando", stem + "ato"
    else:
        isc = stem + "isc" if with_isc else stem
        present = (isc + "o", isc + "i", isc + "e", stem + "iamo", stem + theme + "te", isc + "ono")
        future_stem, gerund = stem + theme + "r", stem + "endo"
        regular = stem + ("ito" if theme == "i" else "uto")
    if infinitive in _PRESENT:
        present = tuple(_PRESENT[infinitive].split())
    imperfect = tuple(stem + theme + "v" + e for e in ("o", "i", "a", "amo", "ate", "ano"))
    if infinitive == "essere":
        imperfect = ("ero", "eri", "era", "eravamo", "eravate", "erano")
    future_stem = _FUTURE_STEM.get(infinitive, future_stem)
    future = tuple(future_stem + e for e in ("ò", "ai", "à", "emo", "ete", "anno"))
    participle = participle or _PARTICIPLE.get(infinitive, regular)
    return Verb(infinitive, present, imperfect, future, participle, gerund, essere, reflexive)


_ESSERE, _AVERE, _STARE = verb("essere"), verb("avere"), verb("stare")
_MODALS = {
    "can": verb("potere").present,
    "must": verb("dovere").present,
    "want": verb("volere").present,
    "wanted": verb("volere").imperfect,
}


def group(
    verb: Verb,
    tense: str,
    person: int,
    form: str,
    *,
    negative: bool = False,
    clitic: str = "",
    dative: bool = False,
    adverb: str = "",
) -> str:
    """The verb group of a tense: non, clitic, finite verb, adverb, participle or infinitive.

    Args:
        tense: as in `english.group`.
        person, form: of the subject; the participle agrees with it after essere.
        clitic: mi ti lo la ci li le, or gli and le with `dative`; the participle after avere
            agrees with a direct lo la li le, and lo and la lose their vowel before avere.
        adverb: sempre, spesso, mai, già, ancora: stands after the finite verb.
    """
    if verb.reflexive:
        clitic = REFLEXIVE[person]
    before, after, finite = clitic, "", ""
    match tense:
        case "present":
            finite = verb.present[person]
        case "used":
            finite = verb.imperfect[person]
        case "future":
            finite = verb.future[person]
        case "progressive":
            finite, after = _STARE.present[person], verb.gerund
        case "was":
            finite, after = _STARE.imperfect[person], verb.gerund
        case "past" | "perfect":
            finite = (_ESSERE if verb.essere else _AVERE).present[person]
            if verb.essere:
                after = adjective(verb.participle)[form]
            else:
                agrees = {"la": "f", "li": "mp", "le": "fp"}.get(clitic, "m")
                after = adjective(verb.participle)["m" if dative else agrees]
                before = "l'" if clitic in ("lo", "la") else clitic
        case _:
            finite, before = _MODALS[tense][person], ""
            after = verb.infinitive
            if clitic:
                after = after.removesuffix("e").removesuffix("r") + "r" + clitic
    return join("non" if negative else "", before, finite, adverb, after)


def imperative(verb: Verb, *, negative: bool = False) -> str:
    """To one person: mangia, leggi, finisci; non mangiare."""
    if negative:
        return "non " + verb.infinitive
    return verb.present[2 if verb.infinitive.endswith("are") else 1]
