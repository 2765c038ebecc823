"""The words of the English-Italian corpus, one entry a line or a cell, and how they are read.

A noun is `english italian gender`, with `/plural` where no rule gives it (`man/men uomo/uomini m`)
and two genders where they differ (`egg uovo/uova mf`); `-` after the gender marks nouns that are
only used in the singular, `--` those that cannot be counted either. A verb is `base/past/participle
italian/participle` with the kinds of objects it takes; `+` after the Italian marks verbs with
-isc-, `=` states that have no progressive form. Kinds are single letters:

    P person   K kin       A animal   R fruit      D dish    B beverage    T text    C clothes
    M motor    V vehicle   E opening  N container  O thing   F furniture   I instrument
    U sound    H show      G building L place      X crossing              W view
"""

from functools import cache
from typing import NamedTuple

from msfs_functional.synthetic.english_italian import english, italian

_NOUNS = """
P: boy ragazzo m, girl ragazza f, man/men uomo/uomini m, woman/women donna f,
   child/children bambino m, friend amico/amici m, teacher insegnante m, student studente m,
   doctor medico/medici m, nurse infermiera f, lawyer avvocato m, writer scrittore m,
   cook cuoco m, waiter cameriere m, farmer contadino m, tourist turista m, artist artista m,
   neighbour vicino m, queen regina f, scientist scienziato m, actress attrice f, dancer ballerina f
K: father padre m-, mother madre f-, brother fratello m, sister sorella f, uncle zio/zii m,
   aunt zia f, grandfather nonno m-, grandmother nonna f-, son figlio m, daughter figlia f,
   husband marito m-, wife/wives moglie/mogli f-, cousin cugino m
A: dog cane m, cat gatto m, horse cavallo m, bird uccello m, cow mucca f, wolf/wolves lupo m,
   lion leone m, elephant elefante m, mouse/mice topo m, bee ape f, fox volpe f, duck anatra f,
   squirrel scoiattolo m
R: apple mela f, orange arancia f, strawberry fragola f, tomato pomodoro m, onion cipolla f,
   mushroom fungo m
D: bread pane m--, cheese formaggio m--, cake torta f, egg uovo/uova mf, soup zuppa f-,
   sandwich panino m, meat carne f--, pizza pizza f, fish pesce m--
B: water acqua f--, wine vino m--, milk latte m--, coffee caffè m--, tea tè m--
T: book libro m, letter lettera f, newspaper giornale m, story storia f, message messaggio m,
   article articolo m, postcard cartolina f
C: hat cappello m, coat cappotto m, dress vestito m, shirt camicia/camicie f, jacket giacca f,
   shoe scarpa f, scarf/scarves sciarpa f, boot stivale m
M: car macchina f, bus autobus m, truck camion m
V: bicycle bicicletta f, train treno m, boat barca f, airplane aereo m
E: door porta f, window finestra f, wardrobe armadio m
N: box scatola f, suitcase valigia/valigie f, bottle bottiglia f, bag borsa f, backpack zaino m
O: mirror specchio m, lamp lampada f, clock orologio m, key chiave f, pen penna f,
   knife/knives coltello m, glass bicchiere m, plate piatto m, phone telefono m,
   photograph fotografia f, painting quadro m, gift regalo m, flower fiore m, toy giocattolo m,
   ring anello m, umbrella ombrello m
F: table tavolo m, chair sedia f, bed letto m, sofa divano m
I: guitar chitarra f, violin violino m, piano pianoforte m
U: song canzone f, concert concerto m
H: film film m, match partita f, show spettacolo m
G: house casa f, museum museo m, theatre teatro m, hotel albergo m, hospital ospedale m,
   library biblioteca f, restaurant ristorante m, castle castello m, church chiesa f,
   school scuola f, station stazione f, shop negozio m, airport aeroporto m,
   university università f
L: garden giardino m, park parco m, market mercato m, beach spiaggia f, village villaggio m,
   zoo zoo m, island isola f, city città f, kitchen cucina f
X: street strada f, river fiume m, bridge ponte m, square piazza f, forest foresta f
W: moon luna f--, sea mare m--, sky cielo m--, star stella f, tree albero m, lake lago m
"""

# english italian[/masculine plural], then the kinds it fits; ^ stands before the Italian noun.
_ADJECTIVES = """
red rosso RCMVENOFI, green verde RCMVENOFW, yellow giallo RCMVENOFW, black nero ACMVENOI,
white bianco ACMVENOFGW, blue blu CMVENOFW, new nuovo TCMVENOFIUHG, broken rotto ENOFIMV,
heavy pesante NOFICT, clean pulito CMVENOFGLX, dirty sporco CMVENOFGLX,
expensive costoso BCMVNOFIDGH, old ^vecchio PAMVENOFITCGLXW, small ^piccolo ARNOFVMEGLXWDI,
big ^grande ARNOFVMEGLXWDI, beautiful ^bello PACONFIUHGLXWTV, young ^giovane PA, good ^buono RDB,
tall alto PW, strange strano PATUHOCGL, happy felice PA, sad triste PAUHT, tired stanco PA,
rich ricco P, poor povero P, famous famoso PTUHG, intelligent intelligente PA, strong forte PA,
elegant elegante PC, nervous nervoso PA, sweet dolce RDB, hot caldo DB, quiet tranquillo PAGLX,
interesting interessante TUHGL, difficult difficile T, long lungo TXHC, fast veloce MVA
"""

_TRANSITIVE = """
eat/ate/eaten mangiare RD, drink/drank/drunk bere B, read/read leggere/letto T,
write/wrote/written scrivere/scritto T, wear/wore/worn indossare C, drive/drove/driven guidare M,
open aprire/aperto EN, close chiudere/chiuso EN, buy/bought comprare RDBTCMVNOFI,
sell/sold vendere RDBTCMVNOFIA, find/found trovare TCNOA, see/saw/seen vedere/visto= PAMVOGLXWH,
look_at guardare PAOWHTV, look_for cercare PATCNO, wait_for aspettare PKV, listen_to ascoltare UP,
clean pulire+ FEGMO, wash lavare CMRA, break/broke/broken rompere/rotto OE,
hide/hid/hidden nascondere/nascosto TNO, choose/chose/chosen scegliere/scelto CTOD,
forget/forgot/forgotten dimenticare CTNO, love amare= PKA, finish finire+ TD, repair riparare MVI,
call chiamare PK, help aiutare PK, invite invitare PK, meet/met incontrare PK, visit visitare GL,
cross attraversare X, play suonare I, take/took/taken prendere/preso OVNC,
correct correggere/corretto T, sing/sang/sung cantare U, watch guardare H
"""

_INTRANSITIVE = """
sleep/slept dormire PKA, work lavorare PK, swim/swam/swum nuotare PKA, dance ballare PK,
laugh ridere/riso PK, smile sorridere/sorriso PK, run/ran/run correre/corso PKA,
have/had_lunch pranzare PK, have/had_dinner cenare PK, arrive arrivare* PKV,
leave/left partire* PKV, stay restare* PK, wake/woke/woken_up svegliarsi PK,
get/got_up alzarsi PK, get/got_dressed vestirsi PK, fall/fell/fallen_asleep addormentarsi PKA,
have/had_fun divertirsi PK
"""

_DITRANSITIVE = """
give/gave/given dare OTR, show mostrare OTC, bring/brought portare OBDT, send/sent mandare TO
"""

NAMES = {
    "Marco": "m", "Paolo": "m", "Luca": "m", "Giorgio": "m", "Antonio": "m",
    "Anna": "f", "Maria": "f", "Giulia": "f", "Elena": "f", "Sara": "f",
}  # fmt: skip
CITIES = {"Rome": "Roma", "Milan": "Milano", "Venice": "Venezia", "Florence": "Firenze",
          "Naples": "Napoli", "Turin": "Torino"}  # fmt: skip
NUMBERS = {
    "two": "due", "three": "tre", "four": "quattro", "five": "cinque", "six": "sei",
    "seven": "sette", "eight": "otto", "nine": "nove", "ten": "dieci", "eleven": "undici",
    "twelve": "dodici", "twenty": "venti",
}  # fmt: skip
SENSATIONS = {
    "hungry": "fame", "thirsty": "sete", "sleepy": "sonno", "afraid": "paura", "cold": "freddo",
    "right": "ragione",
}  # fmt: skip
# Adverbs of time by the tenses they go with.
TIMES = {
    "present": {
        "every day": "ogni giorno", "every morning": "ogni mattina", "today": "oggi",
        "in the evening": "la sera", "on Monday": "il lunedì", "on Sunday": "la domenica",
        "in summer": "in estate", "in winter": "in inverno",
    },
    "progressive": {"now": "adesso", "today": "oggi", "this morning": "stamattina"},
    "past": {
        "yesterday": "ieri", "last week": "la settimana scorsa", "last year": "l'anno scorso",
        "this morning": "stamattina", "two days ago": "due giorni fa",
        "yesterday evening": "ieri sera",
    },
    "future": {
        "tomorrow": "domani", "next week": "la settimana prossima", "next year": "l'anno prossimo",
        "tonight": "stasera", "tomorrow morning": "domani mattina",
    },
}  # fmt: skip


class Noun(NamedTuple):
    """A noun of both languages; `genders` are those of the singular and of the plural."""

    english: tuple[str, str]
    italian: tuple[str, str]
    genders: str
    kind: str
    plural: bool
    countable: bool

    @property
    def lemma(self) -> str:
        return self.english[0]


class Adjective(NamedTuple):
    """An adjective; `italian` holds its four forms by gender and number ("m", "f", "mp", "fp")."""

    english: str
    italian: dict[str, str]
    before: bool
    kinds: str


class Verb(NamedTuple):
    """A verb with the kinds of its objects (transitive) or subjects (intransitive)."""

    english: english.Verb
    italian: italian.Verb
    kinds: str
    state: bool

    @property
    def lemma(self) -> str:
        return self.english.base + self.english.tail


class Lexicon(NamedTuple):
    """Every open-class word, ready to inflect."""

    nouns: dict[str, list[Noun]]
    adjectives: dict[str, list[Adjective]]
    transitive: list[Verb]
    intransitive: list[Verb]
    ditransitive: list[Verb]


def _cells(table: str) -> list[list[str]]:
    return [cell.split() for cell in " ".join(table.split()).split(",")]


def _noun(cell: list[str], kind: str) -> Noun:
    word, parola, marks = cell
    genders = marks.rstrip("-")
    singular, _, plural = word.partition("/")
    singolare, _, plurale = parola.partition("/")
    return Noun(
        english=(singular, plural or english.plural(singular)),
        italian=(singolare, plurale or italian.plural(singolare, genders[0])),
        genders=genders * (3 - len(genders)),
        kind=kind,
        plural="-" not in marks,
        countable="--" not in marks,
    )


def _adjective(cell: list[str]) -> Adjective:
    word, parola, kinds = cell
    parola, _, plural = parola.partition("/")
    base = parola.removeprefix("^")
    return Adjective(word, italian.adjective(base, plural), parola.startswith("^"), kinds)


def _verb(cell: list[str]) -> Verb:
    word, parola, kinds = cell
    forms, _, tail = word.partition("_")
    base, *past = forms.split("/")
    parola, _, participle = parola.partition("/")
    marks = (parola + participle)[len((parola + participle).rstrip("+*=")) :]
    verb = italian.verb(
        parola.rstrip("+*="),
        participle=participle.rstrip("+*=") or None,
        with_isc="+" in marks,
        essere="*" in marks,
    )
    return Verb(english.verb(base, *past, tail=tail), verb, kinds, "=" in marks)


@cache
def nouns_of(kinds: str) -> tuple[Noun, ...]:
    """Every noun of some kinds."""
    return tuple(noun for kind in kinds for noun in lexicon().nouns[kind])


@cache
def transitive_verb(lemma: str) -> Verb:
    """The transitive verb with an English lemma."""
    return next(verb for verb in lexicon().transitive if verb.lemma == lemma)


@cache
def lexicon() -> Lexicon:
    """Reads the tables, once."""
    nouns: dict[str, list[Noun]] = {}
    for line in _NOUNS.strip().replace("\n   ", " ").splitlines():
        kind, _, cells = line.partition(":")
        nouns[kind] = [_noun(cell, kind) for cell in _cells(cells)]
    adjectives: dict[str, list[Adjective]] = {kind: [] for kind in nouns}
    for entry in map(_adjective, _cells(_ADJECTIVES)):
        for kind in entry.kinds.replace("P", "PK"):
            adjectives[kind].append(entry)
    tables = (_TRANSITIVE, _INTRANSITIVE, _DITRANSITIVE)
    return Lexicon(nouns, adjectives, *([_verb(cell) for cell in _cells(t)] for t in tables))
