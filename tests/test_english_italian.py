"""The embedded corpus: right Italian, one translation a sentence, splits that test composition."""

import hashlib
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest

from msfs_functional.synthetic.english_italian import Corpus, english_italian
from msfs_functional.synthetic.english_italian import corpus as corpus_module
from msfs_functional.synthetic.english_italian import english as en
from msfs_functional.synthetic.english_italian import italian as it
from msfs_functional.synthetic.english_italian.clauses import Mood, Predicate, clause, question
from msfs_functional.synthetic.english_italian.corpus import PATTERNS, held_out, sentences
from msfs_functional.synthetic.english_italian.lexicon import lexicon, nouns_of, transitive_verb
from msfs_functional.synthetic.english_italian.nouns import (
    HE,
    SHE,
    SUBJECT_PRONOUNS,
    Phrase,
    both,
    phrase,
)

NOUNS = {noun.lemma: noun for noun in nouns_of("".join(lexicon().nouns))}
ADJECTIVES = {entry.english: entry for fit in lexicon().adjectives.values() for entry in fit}


@pytest.fixture(scope="module")
def made() -> tuple[Corpus, dict[str, frozenset[tuple[str, str]]], float]:
    """The default corpus, the combinations in each English sentence, and the CPU seconds."""
    pairs_of = {}

    def recorded(seed):
        for sentence in sentences(seed):
            pairs_of[sentence.english] = sentence.pairs
            yield sentence

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "sentences", recorded)
        start = time.process_time()
        return english_italian(), pairs_of, time.process_time() - start


@pytest.fixture(scope="module")
def corpus(made) -> Corpus:
    return made[0]


# ---------------------------------------------------------------- the corpus as a whole


def test_it_is_made_in_seconds_with_the_sizes_asked_for(made):
    corpus, _, seconds = made
    assert [len(part) for part in corpus] == [30_000, 500, 1000]
    assert seconds < 6, "2 s on an idle core"


def test_the_same_seed_gives_the_same_corpus_in_every_process():
    script = (
        "from msfs_functional.synthetic.english_italian import english_italian\n"
        "from hashlib import sha256\n"
        "corpus = english_italian(7, train=800, valid=20, test=40)\n"
        "print(sha256(repr(corpus).encode()).hexdigest())\n"
    )
    here = english_italian(7, train=800, valid=20, test=40)
    expected = hashlib.sha256(repr(here).encode()).hexdigest()
    for hash_seed in "12":
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )  # fmt: skip
        assert run.stdout.strip() == expected
    assert english_italian(8, train=800, valid=20, test=40) != here


def test_every_english_sentence_is_there_once(corpus):
    counts = Counter(source for part in corpus for source, _ in part)
    assert max(counts.values()) == 1


def test_english_decides_the_italian():
    """Sentences drawn again and again, other seeds too, never get a second translation."""
    rng, seen = random.Random(11), {}
    patterns = list(PATTERNS)
    for i in range(12_000):
        sentence = patterns[i % len(patterns)](rng)
        assert seen.setdefault(sentence.english, sentence.italian) == sentence.italian


def test_sentences_are_short_clean_and_punctuated(corpus):
    for source, target in corpus.train:
        assert 2 <= len(source.split()) <= 12
        for text in (source, target):
            assert re.fullmatch(r"[A-ZÈ]['\w, ]*[.?!]", text), text
            assert "  " not in text and " ," not in text and "' " not in text.replace("s' ", ""), (
                text
            )
        assert (source[-1], ) == (target[-1], )  # fmt: skip
    # The only apostrophe before a space is the English one: the sisters' house.
    assert not any("' " in target for _, target in corpus.train)


def test_held_out_combinations_are_in_the_test_alone(made):
    corpus, pairs_of, _ = made
    for split, part in zip(("train", "valid", "test"), corpus, strict=True):
        for source, _ in part:
            splits = {held_out(pair) for pair in pairs_of[source]} - {"train"}
            assert splits == ({split} - {"train"}), source


def test_held_out_adjectives_never_stand_before_their_nouns_in_training(corpus):
    """The same, read off the text alone."""
    forbidden = {
        f"{adjective} {word}"
        for adjective in ADJECTIVES
        for noun in NOUNS.values()
        for word in noun.english
        if held_out((adjective, noun.lemma)) != "train"
    }
    for source, _ in corpus.train:
        words = re.findall(r"\w+", source)
        assert not forbidden & {f"{a} {b}" for a, b in pairwise(words)}, source
    found = sum(any(bigram in source for bigram in forbidden) for source, _ in corpus.test)
    assert found > 150


def test_every_word_of_the_test_is_known_from_training(corpus):
    for side in (0, 1):
        known = {word for pair in corpus.train for word in pair[side].split()}
        for pair in corpus.valid + corpus.test:
            assert known.issuperset(pair[side].split())


def test_the_vocabulary_is_real_and_learnable(corpus):
    """A few hundred lemmas, and most words often enough to be learned."""
    lemmas = len(NOUNS) + len(ADJECTIVES) + sum(map(len, lexicon()[2:]))
    assert 250 <= lemmas <= 400
    counts = Counter(w for _, text in corpus.train for w in re.findall(r"\w+", text.lower()))
    tokens = sum(counts.values())
    assert sum(n for n in counts.values() if n >= 20) / tokens > 0.95


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"test \(0\) must be at least 1"):
        english_italian(test=0)
    with pytest.raises(ValueError, match="5 training sentences know the words of too few"):
        english_italian(train=5, valid=1, test=50)


# ---------------------------------------------------------------- Italian by independent rules

NOMINAL: dict[str, set[str]] = {}  # Italian noun or adjective form -> agreements it can have
for _noun in NOUNS.values():
    for _plural in (False, True):
        _form = _noun.genders[_plural] + "p" * _plural
        NOMINAL.setdefault(_noun.italian[_plural], set()).add(_form)
NOUN_FORMS = {word: set(forms) for word, forms in NOMINAL.items()}
for _entry in ADJECTIVES.values():
    for _form, _word in _entry.italian.items():
        NOMINAL.setdefault(_word, set()).add(_form)

VERB_FORMS = {
    form
    for table in lexicon()[2:]
    for verb in table
    for form in (*verb.italian.present, verb.italian.participle)
}
VOWEL = re.compile(r"[aeiouàèéìòùh]")
IMPURE = re.compile(r"(s[^aeiouàèéìòù]|z|gn|ps|pn|x|y)")


def onset(word: str) -> str:
    return "vowel" if VOWEL.match(word) else "impure" if IMPURE.match(word) else "plain"


# What may follow each determiner: agreement and onsets of the next word.
RULES: dict[str, tuple[str, str]] = {}
for _stem in ("", "de", "a", "da", "ne", "su"):
    RULES[{"": "il", "a": "al", "da": "dal"}.get(_stem, _stem + "l")] = ("m", "plain")
    RULES[f"{_stem}{'l' if _stem else ''}lo"] = ("m", "impure")
    RULES[f"{_stem}{'l' if _stem else ''}l'"] = ("m f", "vowel")
    RULES[f"{_stem}i" if _stem else "i"] = ("mp", "plain")
    RULES[f"{_stem}gli"] = ("mp", "vowel impure")
    RULES[f"{_stem}{'l' if _stem else ''}la"] = ("f", "plain impure")
    RULES[f"{_stem}{'l' if _stem else ''}le"] = ("fp", "plain impure vowel")
RULES |= {
    "un": ("m", "plain vowel"), "uno": ("m", "impure"), "una": ("f", "plain impure"),
    "un'": ("f", "vowel"), "quel": ("m", "plain"), "quello": ("m", "impure"),
    "quell'": ("m f", "vowel"), "quei": ("mp", "plain"), "quegli": ("mp", "vowel impure"),
    "quella": ("f", "plain impure"), "quelle": ("fp", "plain impure vowel"),
    "questo": ("m", "plain impure"), "quest'": ("m f", "vowel"),
    "questa": ("f", "plain impure"), "questi": ("mp", "plain impure vowel"),
    "queste": ("fp", "plain impure vowel"), "bel": ("m", "plain"), "bei": ("mp", "plain"),
    "begli": ("mp", "vowel impure"), "bell'": ("m f", "vowel"), "buon": ("m", "plain vowel"),
}  # fmt: skip
# Judged only before nouns and adjectives, since they have other uses: lo vedo, questa è, tu dai.
OTHER_USES = {"lo", "la", "l'", "gli", "le", "quello", "quella", "questo", "questa", "dai"}


def tokens_of(text: str) -> list[str]:
    return re.findall(r"\w+'|\w+|[^\w\s]", text.lower())


def test_articles_and_contractions_fit_the_next_word(corpus):
    judged = Counter()
    for _, text in corpus.train + corpus.test:
        words = tokens_of(text)
        for word, following in pairwise(words):
            nominal = following in NOMINAL and following not in VERB_FORMS
            if word not in RULES or (word in OTHER_USES and not nominal):
                continue
            forms, onsets = (rule.split() for rule in RULES[word])
            if following[0].isalpha():
                assert onset(following) in onsets, (word, following, text)
            if nominal and following != "sera":
                assert NOMINAL[following] & set(forms), (word, following, text)
                judged[word] += 1
    assert len(judged) > 50 and min(judged[w] for w in ("lo", "gli", "l'", "dell'", "uno")) > 50


def test_nouns_and_the_adjectives_behind_them_agree(corpus):
    adjectives = {w: {f for f, x in e.italian.items() if x == w}
                  for e in ADJECTIVES.values() for w in e.italian.values()}  # fmt: skip
    judged = 0
    for _, text in corpus.train:
        words = tokens_of(text)
        for noun, adjective in pairwise(words):
            if noun in NOUN_FORMS and adjective in adjectives and adjective not in NOUN_FORMS:
                assert NOUN_FORMS[noun] & adjectives[adjective], (noun, adjective, text)
                judged += 1
    assert judged > 2000


def test_no_preposition_stands_before_an_article_it_should_melt_with(corpus):
    articles = {"il", "i", "gli", "l'", "lo"}
    for _, text in corpus.train:
        words = tokens_of(text)
        for word, following in pairwise(words):
            assert not (word in {"di", "a", "da", "in", "su"} and following in articles), text


def test_essere_participles_agree_with_their_subjects(corpus):
    """Feminine names end in a: Anna è andata, never Anna è andato."""
    pattern = re.compile(
        r"^(Marco|Paolo|Luca|Anna|Maria|Giulia|Elena|Sara) (?:non )?(?:si )?"
        r"è (?:mai |già |appena |ancora )?(?!molto)(\w+t[oa])\b"
    )
    endings = Counter()
    for _, text in corpus.train:
        for name, participle in pattern.findall(text):
            feminine = name in ("Anna", "Maria", "Giulia", "Elena", "Sara")
            assert participle.endswith("a" if feminine else "o"), text
            endings[participle[-1]] += 1
    assert min(endings["a"], endings["o"]) > 30


# ---------------------------------------------------------------- hand-checked word forms


def test_plurals():
    cases = (
        "libro libri m, casa case f, cane cani m, chiave chiavi f, turista turisti m, "
        "cuoco cuochi m, fungo funghi m, lago laghi m, barca barche f, arancia arance f, "
        "spiaggia spiagge f, orologio orologi m, specchio specchi m, città città f, zoo zoo m, "
        "film film m, autobus autobus m, camion camion m, caffè caffè m, mucca mucche f"
    )
    for case in cases.split(", "):
        singular, plural, gender = case.split()
        assert it.plural(singular, gender) == plural
    listed = {"man": "uomini", "friend": "amici", "doctor": "medici", "uncle": "zii",
              "egg": "uova", "wife": "mogli", "suitcase": "valigie",
              "shirt": "camicie"}  # fmt: skip
    for lemma, plural in listed.items():
        assert NOUNS[lemma].italian[1] == plural
    assert NOUNS["egg"].genders == "mf" and NOUNS["wolf"].english[1] == "wolves"


def test_english_verb_forms():
    cases = """
        eat ate eaten: eat eats ate eaten eating
        begin began begun: begin begins began begun beginning
        try: try tries tried tried trying
        finish: finish finishes finished finished finishing
        write wrote written: write writes wrote written writing
        play: play plays played played playing
        forget forgot forgotten: forget forgets forgot forgotten forgetting
        have had: have has had had having
        go went gone: go goes went gone going
        cross: cross crosses crossed crossed crossing
        run ran run: run runs ran run running
    """
    for case in cases.strip().splitlines():
        given, forms = case.split(": ")
        assert " ".join(en.verb(*given.split())[:5]) == forms
    assert [en.indefinite(word) for word in ("egg", "university", "book", "old hat")] == [
        "an egg", "a university", "a book", "an old hat",
    ]  # fmt: skip


def test_adjective_forms():
    cases = {
        "rosso": "rosso rossa rossi rosse", "verde": "verde verde verdi verdi",
        "blu": "blu blu blu blu", "bianco": "bianco bianca bianchi bianche",
        "lungo": "lungo lunga lunghi lunghe", "vecchio": "vecchio vecchia vecchi vecchie",
    }  # fmt: skip
    for base, forms in cases.items():
        assert " ".join(it.adjective(base).values()) == forms


def test_articles_prepositions_and_shortened_words():
    cases = {
        it.definite("libro", "m"): "il libro",
        it.definite("studente", "m"): "lo studente",
        it.definite("zio", "m"): "lo zio",
        it.definite("psicologo", "m"): "lo psicologo",
        it.definite("uomo", "m"): "l'uomo",
        it.definite("isola", "f"): "l'isola",
        it.definite("altro studente", "m"): "l'altro studente",
        it.definite("amici", "mp"): "gli amici",
        it.definite("sedie", "fp"): "le sedie",
        it.definite("serpente", "m"): "il serpente",
        it.indefinite("zaino", "m"): "uno zaino",
        it.indefinite("amico", "m"): "un amico",
        it.indefinite("amica", "f"): "un'amica",
        it.preposition("di", "libro", "m"): "del libro",
        it.preposition("di", "zoo", "m"): "dello zoo",
        it.preposition("a", "università", "f"): "all'università",
        it.preposition("in", "giardino", "m"): "nel giardino",
        it.preposition("in", "occhi", "mp"): "negli occhi",
        it.preposition("su", "tavoli", "mp"): "sui tavoli",
        it.preposition("su", "spiaggia", "f"): "sulla spiaggia",
        it.preposition("da", "amiche", "fp"): "dalle amiche",
        it.preposition("con", "libro", "m"): "con il libro",
        it.preposition("a", "Anna", None): "ad Anna",
        it.preposition("a", "Marco", None): "a Marco",
        it.preposition("di", "Elena", None): "di Elena",
        it.shaped("bello", "libro", "m"): "bel libro",
        it.shaped("bello", "specchio", "m"): "bello specchio",
        it.shaped("bello", "uccello", "m"): "bell'uccello",
        it.shaped("bello", "isola", "f"): "bell'isola",
        it.shaped("bello", "libri", "mp"): "bei libri",
        it.shaped("bello", "uccelli", "mp"): "begli uccelli",
        it.shaped("bello", "case", "fp"): "belle case",
        it.shaped("quello", "zaino", "m"): "quello zaino",
        it.shaped("quello", "studenti", "mp"): "quegli studenti",
        it.shaped("questo", "uomo", "m"): "quest'uomo",
        it.shaped("questo", "uomini", "mp"): "questi uomini",
        it.shaped("buono", "vino", "m"): "buon vino",
        it.shaped("buono", "torta", "f"): "buona torta",
        it.shaped("grande", "albero", "m"): "grande albero",
    }
    for found, expected in cases.items():
        assert found == expected


def test_conjugation():
    cases = {
        ("mangiare", "present"): "mangio mangi mangia mangiamo mangiate mangiano",
        ("cercare", "present"): "cerco cerchi cerca cerchiamo cercate cercano",
        ("studiare", "present"): "studio studi studia studiamo studiate studiano",
        ("leggere", "present"): "leggo leggi legge leggiamo leggete leggono",
        ("dormire", "present"): "dormo dormi dorme dormiamo dormite dormono",
        ("scegliere", "present"): "scelgo scegli sceglie scegliamo scegliete scelgono",
        ("bere", "present"): "bevo bevi beve beviamo bevete bevono",
        ("andare", "present"): "vado vai va andiamo andate vanno",
        ("mangiare", "future"): "mangerò mangerai mangerà mangeremo mangerete mangeranno",
        ("cercare", "future"): "cercherò cercherai cercherà cercheremo cercherete cercheranno",
        ("studiare", "future"): "studierò studierai studierà studieremo studierete studieranno",
        ("vedere", "future"): "vedrò vedrai vedrà vedremo vedrete vedranno",
        ("venire", "future"): "verrò verrai verrà verremo verrete verranno",
        ("bere", "future"): "berrò berrai berrà berremo berrete berranno",
        ("partire", "imperfect"): "partivo partivi partiva partivamo partivate partivano",
        ("bere", "imperfect"): "bevevo bevevi beveva bevevamo bevevate bevevano",
        ("essere", "imperfect"): "ero eri era eravamo eravate erano",
    }
    for (infinitive, tense), forms in cases.items():
        assert " ".join(getattr(it.verb(infinitive), tense)) == forms
    finire = it.verb("finire", with_isc=True)
    assert " ".join(finire.present) == "finisco finisci finisce finiamo finite finiscono"
    gerunds = {"bere": "bevendo", "dare": "dando", "dormire": "dormendo", "dire": "dicendo"}
    assert all(it.verb(infinitive).gerund == gerund for infinitive, gerund in gerunds.items())
    assert [it.imperative(it.verb(v)) for v in ("guardare", "aprire", "bere")] == [
        "guarda", "apri", "bevi",
    ]  # fmt: skip
    assert it.imperative(it.verb("guardare"), negative=True) == "non guardare"


# ---------------------------------------------------------------- hand-checked constructions


def the(lemma: str, *adjectives: str, by: str | Phrase = "the", plural: bool = False) -> Phrase:
    return phrase(
        NOUNS[lemma], by, plural=plural, adjectives=[ADJECTIVES[word] for word in adjectives]
    )


MARCO, ANNA = Phrase("Marco", "Marco", "m"), Phrase("Anna", "Anna", "f")
I_, YOU, _, _, WE, THEY = SUBJECT_PRONOUNS


@pytest.mark.parametrize(
    ("made", "english", "italian"),
    [
        (the("boy"), "the boy", "il ragazzo"),
        (the("student", plural=True), "the students", "gli studenti"),
        (the("egg", plural=True), "the eggs", "le uova"),
        (the("house", "red", plural=True), "the red houses", "le case rosse"),
        (the("house", "old", "white"), "the old white house", "la vecchia casa bianca"),
        (the("bird", "beautiful", plural=True), "the beautiful birds", "i begli uccelli"),
        (the("wine", "good"), "the good wine", "il buon vino"),
        (the("scientist", "tall", by="a"), "a tall scientist", "uno scienziato alto"),
        (the("scientist", "young", by="a"), "a young scientist", "un giovane scienziato"),
        (the("apple", by="a"), "an apple", "una mela"),
        (the("orange", "old", by="a"), "an old orange", "una vecchia arancia"),
        (the("university", by="a"), "a university", "un'università"),
        (the("mother", by="my"), "my mother", "mia madre"),
        (the("mother", by="their"), "their mother", "la loro madre"),
        (the("mother", "tired", by="my"), "my tired mother", "la mia madre stanca"),
        (the("sister", by="your", plural=True), "your sisters", "le tue sorelle"),
        (the("friend", by="his", plural=True), "his friends", "i suoi amici"),
        (the("mirror", by="this"), "this mirror", "questo specchio"),
        (the("man", by="this"), "this man", "quest'uomo"),
        (the("mirror", by="that"), "that mirror", "quello specchio"),
        (the("tree", by="that", plural=True), "those trees", "quegli alberi"),
        (the("dog", by="three"), "three dogs", "tre cani"),
        (the("dog", "black", by="the two"), "the two black dogs", "i due cani neri"),
        (the("letter", by="many"), "many letters", "molte lettere"),
        (the("letter", by="few"), "few letters", "poche lettere"),
        (the("boy", by="some"), "some boys", "alcuni ragazzi"),
        (the("city", by="every"), "every city", "ogni città"),
        (the("city", by="all the"), "all the cities", "tutte le città"),
        (the("student", by="the other"), "the other student", "l'altro studente"),
        (the("student", by="another"), "another student", "un altro studente"),
        (the("artist", by="the other", plural=True), "the other artists", "gli altri artisti"),
        (the("car", "new", by=the("uncle", by="my")), "my uncle's new car",
         "la macchina nuova di mio zio"),
        (the("car", by=the("doctor", plural=True)), "the doctors' car", "la macchina dei medici"),
        (the("car", by=ANNA), "Anna's car", "la macchina di Anna"),
        (both(ANNA, Phrase("Elena", "Elena", "f")), "Anna and Elena", "Anna ed Elena"),
    ],
)  # fmt: skip
def test_noun_phrases(made, english, italian):
    assert (made.english, made.direct) == (english, italian)


def says(who, lemma, mood, *, what: Phrase | None = None, clitic=("", ""), dative=False):
    tables = lexicon().intransitive + lexicon().ditransitive
    verb = next((v for v in tables if v.lemma == lemma), None) or transitive_verb(lemma)
    words, parole = (what.english, what.direct) if what else ("", "")
    predicate = Predicate(verb, f"{words} {clitic[0]}".strip(), parole, clitic[1], dative)
    english, italian, _ = clause(who, predicate, mood)
    return english, italian


GIRL, CHILDREN, APPLE = the("girl"), the("child", plural=True), the("apple")


@pytest.mark.parametrize(
    ("made", "english", "italian"),
    [
        (says(GIRL, "eat", Mood("present"), what=APPLE), "the girl eats the apple",
         "la ragazza mangia la mela"),
        (says(THEY, "eat", Mood("past"), what=APPLE), "they ate the apple",
         "hanno mangiato la mela"),
        (says(I_, "finish", Mood("present"), what=the("book")), "I finish the book",
         "finisco il libro"),
        (says(WE, "look at", Mood("future"), what=the("moon")), "we will look at the moon",
         "guarderemo la luna"),
        (says(HE, "write", Mood("used"), what=the("letter", plural=True)),
         "he used to write the letters", "scriveva le lettere"),
        (says(YOU, "read", Mood("progressive"), what=the("book")), "you are reading the book",
         "stai leggendo il libro"),
        (says(I_, "drink", Mood("was"), what=the("water")), "I was drinking the water",
         "stavo bevendo l'acqua"),
        (says(GIRL, "eat", Mood("present", True), what=APPLE), "the girl does not eat the apple",
         "la ragazza non mangia la mela"),
        (says(GIRL, "eat", Mood("past", True), what=APPLE), "the girl did not eat the apple",
         "la ragazza non ha mangiato la mela"),
        (says(MARCO, "eat", Mood("present", adverb="never"), what=APPLE),
         "Marco never eats the apple", "Marco non mangia mai la mela"),
        (says(MARCO, "eat", Mood("present", adverb="always"), what=APPLE),
         "Marco always eats the apple", "Marco mangia sempre la mela"),
        (says(MARCO, "eat", Mood("perfect", adverb="already"), what=APPLE),
         "Marco has already eaten the apple", "Marco ha già mangiato la mela"),
        (says(WE, "eat", Mood("perfect", adverb="never"), what=APPLE),
         "we have never eaten the apple", "non abbiamo mai mangiato la mela"),
        (says(WE, "eat", Mood("perfect", True, "yet"), what=APPLE),
         "we have not eaten the apple yet", "non abbiamo ancora mangiato la mela"),
        (says(GIRL, "arrive", Mood("past")), "the girl arrived", "la ragazza è arrivata"),
        (says(CHILDREN, "leave", Mood("past")), "the children left", "i bambini sono partiti"),
        (says(both(ANNA, GIRL), "leave", Mood("past")), "Anna and the girl left",
         "Anna e la ragazza sono partite"),
        (says(SHE, "wake up", Mood("past")), "she woke up", "si è svegliata"),
        (says(I_, "get up", Mood("present", True)), "I do not get up", "non mi alzo"),
        (says(WE, "get dressed", Mood("must")), "we must get dressed", "dobbiamo vestirci"),
        (says(CHILDREN, "fall asleep", Mood("progressive")), "the children are falling asleep",
         "i bambini si stanno addormentando"),
        (says(ANNA, "sleep", Mood("can", True)), "Anna cannot sleep", "Anna non può dormire"),
        (says(CHILDREN, "have fun", Mood("want")), "the children want to have fun",
         "i bambini vogliono divertirsi"),
        (says(THEY, "see", Mood("present"), clitic=("me", "mi")), "they see me", "mi vedono"),
        (says(MARCO, "see", Mood("past"), clitic=("her", "la")), "Marco saw her",
         "Marco l'ha vista"),
        (says(MARCO, "see", Mood("past"), clitic=("them", "li")), "Marco saw them",
         "Marco li ha visti"),
        (says(WE, "love", Mood("past"), clitic=("her", "la")), "we loved her", "l'abbiamo amata"),
        (says(ANNA, "see", Mood("past", True), clitic=("him", "lo")), "Anna did not see him",
         "Anna non l'ha visto"),
        (says(SHE, "call", Mood("want"), clitic=("us", "ci")), "she wants to call us",
         "vuole chiamarci"),
        (says(WE, "wait for", Mood("progressive"), clitic=("her", "la")),
         "we are waiting for her", "la stiamo aspettando"),
        (says(ANNA, "give", Mood("past"), what=APPLE, clitic=("to her", "le"), dative=True),
         "Anna gave the apple to her", "Anna le ha dato la mela"),
        (says(I_, "show", Mood("must"), what=the("photograph"), clitic=("to him", "gli"),
              dative=True), "I must show the photograph to him", "devo mostrargli la fotografia"),
    ],
)  # fmt: skip
def test_clauses(made, english, italian):
    assert made == (english, italian)


def test_questions():
    eat = Predicate(transitive_verb("eat"), "the apple", "la mela")
    open_door = Predicate(transitive_verb("open"))
    assert question(GIRL, eat, Mood("past"))[:2] == (
        "Did the girl eat the apple?", "La ragazza ha mangiato la mela?",
    )  # fmt: skip
    assert question(THEY, eat, Mood("present", True), ("why", "perché"))[:2] == (
        "Why do they not eat the apple?", "Perché non mangiano la mela?",
    )  # fmt: skip
    assert question(GIRL, open_door, Mood("future"), ("what", "che cosa"), invert=True)[:2] == (
        "What will the girl open?", "Che cosa aprirà la ragazza?",
    )  # fmt: skip


# Drawn sentences of each pattern, proofread by hand: pattern, seed, English; Italian.
PROOFREAD = """
transitive 8: Giulia writes the lawyer's difficult letters.
    Giulia scrive le lettere difficili dell'avvocato.
transitive 11: A rich lawyer does not write the newspaper.
    Un avvocato ricco non scrive il giornale.
acting 10: Elena gets dressed.
    Elena si veste.
acting 13: The children have not woken up in that dirty hospital yet.
    I bambini non si sono ancora svegliati in quell'ospedale sporco.
moving 9: Elena will go to the river.
    Elena andrà al fiume.
moving 12: In winter the woman comes from the university.
    In inverno la donna viene dall'università.
copula 1: Two farmers are strong.
    Due contadini sono forti.
copula 7: Is Anna happy?
    Anna è felice?
copula 11: The writers were always famous.
    Gli scrittori erano sempre famosi.
comparison 6: A famous article was more beautiful than the article.
    Un articolo famoso era più bello dell'articolo.
comparison 11: All the castles are bigger than the church.
    Tutti i castelli sono più grandi della chiesa.
superlative 5: That is the most interesting article.
    Quello è l'articolo più interessante.
superlative 12: This is the most beautiful school in the village.
    Questa è la scuola più bella del villaggio.
existence 6: There were many scientists near the sea.
    C'erano molti scienziati vicino al mare.
existence 9: There was a yellow onion on the sofa.
    C'era una cipolla gialla sul divano.
giving 7: Antonio showed her pens to me.
    Antonio mi ha mostrato le sue penne.
giving 9: Giorgio did not show the heavy gift to your sisters.
    Giorgio non ha mostrato il regalo pesante alle tue sorelle.
clitic 7: She loved me.
    Mi ha amato.
clitic 13: The tall queens looked for him.
    Le regine alte l'hanno cercato.
consecutive 9: He took the heavy pen and hid it.
    Ha preso la penna pesante e l'ha nascosta.
consecutive 11: The strong neighbours will take a shoe and sell it.
    I vicini forti prenderanno una scarpa e la venderanno.
liking 0: Anna and Antonio like your phone.
    Ad Anna e Antonio piace il tuo telefono.
liking 8: We liked the famous story.
    Ci è piaciuta la storia famosa.
liking 13: She likes to drive those white cars.
    Le piace guidare quelle macchine bianche.
relative_subject 6: The queen who is finishing that bread is sad.
    La regina che sta finendo quel pane è triste.
relative_subject 13: The tourist who bought the soup had lunch.
    Il turista che ha comprato la zuppa ha pranzato.
relative_object 1: These scarves that Marco wore are beautiful.
    Queste sciarpe che Marco ha indossato sono belle.
relative_object 12: Marco will wait for the happy waiters that his nervous sons listen to.
    Marco aspetterà i camerieri felici che i suoi figli nervosi ascoltano.
yes_no 6: Did her sisters run?
    Le sue sorelle hanno corso?
yes_no 11: Will a rich lawyer find two messages?
    Un avvocato ricco troverà due messaggi?
asking 0: How many bicycles did Anna and Antonio repair?
    Quante biciclette hanno riparato Anna e Antonio?
asking 1: What did my elegant son eat?
    Che cosa ha mangiato il mio figlio elegante?
asking 5: Why will my daughter come to the hotel?
    Perché mia figlia verrà all'albergo?
asking 7: Where did Anna run?
    Dove ha corso Anna?
where_is 6: How old are Marco and Maria?
    Quanti anni hanno Marco e Maria?
where_is 10: What colour are our bags?
    Di che colore sono le nostre borse?
where_is 13: Where was your neighbour?
    Dov'era il tuo vicino?
having 9: Elena is hungry.
    Elena ha fame.
having 10: Our brother is thirsty.
    Nostro fratello ha sete.
having 12: The woman had a cat.
    La donna aveva un gatto.
controlling 10: Elena decided to come to Florence.
    Elena ha deciso di venire a Firenze.
controlling 13: My brothers tried to swim in the sea.
    I miei fratelli hanno cercato di nuotare nel mare.
ordering 3: Let us buy the bicycle!
    Compriamo la bicicletta!
ordering 9: Clean the small quiet castle!
    Pulisci il piccolo castello tranquillo!
ordering 12: Do not clean my clocks!
    Non pulire i miei orologi!
joined 5: When the actress has lunch, she is rich.
    Quando l'attrice pranza, è ricca.
joined 8: Giulia laughed because she was hungry.
    Giulia ha riso perché aveva fame.
reporting 9: Paolo says that Anna arrived.
    Paolo dice che Anna è arrivata.
reporting 13: We say that the children were afraid.
    Diciamo che i bambini avevano paura.
profession 10: Your aunt is an elegant dancer.
    Tua zia è una ballerina elegante.
profession 11: Anna is a beautiful actress.
    Anna è una bell'attrice.
"""


def test_proofread_sentences_of_every_pattern():
    patterns = {pattern.__name__: pattern for pattern in PATTERNS}
    done = set()
    lines = PROOFREAD.strip().splitlines()
    for english, italian in zip(lines[::2], lines[1::2], strict=True):
        key, _, english = english.partition(": ")
        name, seed = key.split()
        assert patterns[name](random.Random(int(seed)))[:2] == (english, italian.strip())
        done.add(name)
    assert done == set(patterns)
