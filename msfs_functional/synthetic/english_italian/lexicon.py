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
   painter pittore m, singer cantante m, cook cuoco m, waiter cameriere m, farmer contadino m,
   gardener giardiniere m, tourist turista m, journalist giornalista m, artist artista m,
   neighbour vicino m, guest ospite m, queen regina f, lady signora f, soldier soldato m,
   scientist scienziato m, psychologist psicologo/psicologi m, foreigner straniero m,
   engineer ingegnere m, actress attrice f, dancer ballerina f
K: father padre m-, mother madre f-, brother fratello m, sister sorella f, uncle zio/zii m,
   aunt zia f, grandfather nonno m-, grandmother nonna f-, son figlio m, daughter figlia f,
   husband marito m-, wife/wives moglie/mogli f-, cousin cugino m
A: dog cane m, cat gatto m, horse cavallo m, bird uccello m, cow mucca f, wolf/wolves lupo m,
   lion leone m, elephant elefante m, mouse/mice topo m, spider ragno m, bee ape f,
   butterfly farfalla f, duck anatra f, hen gallina f, fox volpe f, bear orso m,
   monkey scimmia f, zebra zebra f, frog rana f, snake serpente m, eagle aquila f,
   squirrel scoiattolo m
R: apple mela f, pear pera f, orange arancia f, strawberry fragola f, tomato pomodoro m,
   onion cipolla f, mushroom fungo m, carrot carota f, lemon limone m, potato patata f
D: bread pane m--, cheese formaggio m--, cake torta f, egg uovo/uova mf, soup zuppa f-,
   salad insalata f-, sandwich panino m, biscuit biscotto m, meat carne f--, rice riso m--,
   pizza pizza f, fish pesce m--
B: water acqua f--, wine vino m--, milk latte m--, coffee caffè m--, tea tè m--, juice succo m--
T: book libro m, letter lettera f, newspaper giornale m, magazine rivista f, poem poesia f,
   story storia f, message messaggio m, article articolo m, novel romanzo m, postcard cartolina f
C: hat cappello m, coat cappotto m, dress vestito m, shirt camicia/camicie f, skirt gonna f,
   jacket giacca f, shoe scarpa f, scarf/scarves sciarpa f, sweater maglione m, glove guanto m,
   boot stivale m, uniform uniforme f
M: car macchina f, truck camion m, bus autobus m, taxi taxi m
V: bicycle bicicletta f, train treno m, boat barca f, airplane aereo m, ship nave f
E: door porta f, window finestra f, drawer cassetto m, gate cancello m, wardrobe armadio m
N: box scatola f, suitcase valigia/valigie f, bottle bottiglia f, bag borsa f, backpack zaino m,
   basket cesto m
O: mirror specchio m, lamp lampada f, clock orologio m, key chiave f, pen penna f,
   pencil matita f, knife/knives coltello m, glass bicchiere m, plate piatto m,
   spoon cucchiaio m, phone telefono m, photograph fotografia f, painting quadro m, map mappa f,
   gift regalo m, flower fiore m, ball palla f, doll bambola f, toy giocattolo m, coin moneta f,
   ring anello m, umbrella ombrello m, computer computer m, screen schermo m, sword spada f
F: table tavolo m, chair sedia f, bed letto m, sofa divano m, shelf/shelves scaffale m
I: guitar chitarra f, violin violino m, piano pianoforte m, trumpet tromba f, flute flauto m
U: song canzone f, concert concerto m, radio radio f
H: film film m, match partita f, show spettacolo m, documentary documentario m
G: house casa f, museum museo m, theatre teatro m, hotel albergo m, hospital ospedale m,
   library biblioteca f, restaurant ristorante m, castle castello m, stadium stadio m,
   church chiesa f, school scuola f, station stazione f, shop negozio m, factory fabbrica f,
   airport aeroporto m, university università f
L: garden giardino m, park parco m, market mercato m, beach spiaggia f, village villaggio m,
   zoo zoo m, island isola f, city città f, kitchen cucina f, office ufficio m, mountain montagna f
X: street strada f, river fiume m, bridge ponte m, square piazza f, forest foresta f, field campo m
W: moon luna f--, sun sole m--, sea mare m--, sky cielo m--, star stella f, cloud nuvola f,
   tree albero m, lake lago m
"""

# english italian[/masculine plural], then the kinds it fits; ^ stands before the Italian noun.
_ADJECTIVES = """
red rosso RCMVENOFI, green verde RCMVENOFW, yellow giallo RCMVENOFW, black nero ACMVENOI, white
bianco ACMVENOFGW, blue blu CMVENOFW, grey grigio ACMVNW, new nuovo TCMVENOFIUHG, broken rotto
ENOFIMV, heavy pesante NOFICT, light leggero NOC, empty vuoto NEGLX, clean pulito CMVENOFGLX,
dirty sporco CMVENOFGLX, expensive costoso BCMVNOFIDGH, old ^vecchio PAMVENOFITCGLXW, small
^piccolo ARNOFVMEGLXWDI, big ^grande ARNOFVMEGLXWDI, beautiful ^bello PACONFIUHGLXWTV, young
^giovane PA, good ^buono RDB, tall alto PWG, strange strano PATUHOCGL, happy felice PA, sad triste
PAUHT, tired stanco PA, kind gentile P, rich ricco P, poor povero P, famous famoso PTUHG,
intelligent intelligente PA, strong forte PA, lazy pigro PA, brave coraggioso PA, elegant elegante
PC, nervous nervoso PA, sick malato PA, Italian italiano PTUHDCM, fresh fresco RDB, sweet dolce
RDB, delicious delizioso RD, hot caldo DB, cold freddo DBW, modern moderno GTUHF, ancient
antico/antichi GTXOL, quiet tranquillo PAGLX, noisy rumoroso PAMGLX, interesting interessante
TUHGL, boring noioso TUHP, difficult difficile T, long lungo TXHC, fast veloce MVA, slow lento
MVA, dangerous pericoloso MXAL, round rotondo OFNEW
"""

_TRANSITIVE = """
eat/ate/eaten mangiare RD, cook cucinare D, drink/drank/drunk bere B, read/read leggere/letto T,
write/wrote/written scrivere/scritto T, wear/wore/worn indossare C, drive/drove/driven guidare M,
open aprire/aperto EN, close chiudere/chiuso EN, buy/bought comprare RDBTCMVNOFI, sell/sold
vendere RDBTCMVNOFIA, find/found trovare TCNOA, lose/lost perdere/perso TCNO, see/saw/seen
vedere/visto= PAMVOGLXWH, look_at guardare PAOWHTV, look_for cercare PATCNO, wait_for aspettare
PKV, listen_to ascoltare UP, hear/heard sentire= UPA, carry portare NOFI, clean pulire+ FEGMO,
wash lavare CMRA, break/broke/broken rompere/rotto OE, paint dipingere/dipinto FEWG,
draw/drew/drawn disegnare PAWG, hide/hid/hidden nascondere/nascosto TNO, steal/stole/stolen rubare
OMVC, choose/chose/chosen scegliere/scelto CTOD, forget/forgot/forgotten dimenticare CTNO, prefer
preferire+= BTCDRUH, love amare= PKA, hate odiare= PAUC, understand/understood capire+= TPK,
finish finire+ TD, prepare preparare DB, repair riparare MVI, admire ammirare= WPO, call chiamare
PK, help aiutare PK, greet salutare PK, follow seguire PAM, invite invitare PK, thank ringraziare
PK, meet/met incontrare PK, photograph fotografare AWG, visit visitare GL, cross attraversare X,
play suonare I, study studiare T, build/built costruire+ GFV, take/took/taken prendere/preso OVNC,
touch toccare OAF, correct correggere/corretto T, translate tradurre T, remember ricordare= TUPH,
sing/sang/sung cantare U, watch guardare H
"""

_INTRANSITIVE = """
sleep/slept dormire PKA, work lavorare PK, swim/swam/swum nuotare PKA, dance ballare PK, cry
piangere/pianto PK, laugh ridere/riso PK, travel viaggiare PK, smile sorridere/sorriso PK,
run/ran/run correre/corso PKA, walk camminare PKA, shout gridare PK, have/had_lunch pranzare PK,
have/had_dinner cenare PK, arrive arrivare* PKV, leave/left partire* PKV, go/went/gone_out uscire*
PK, come/came/come_back tornare* PKA, fall/fell/fallen cadere* PKO, stay restare* PK,
wake/woke/woken_up svegliarsi PK, get/got_up alzarsi PK, get/got_dressed vestirsi PK,
fall/fell/fallen_asleep addormentarsi PKA, get/got_bored annoiarsi PK, have/had_fun divertirsi PK,
get/got_angry arrabbiarsi PK, stop fermarsi PKMV, get/got_lost perdersi/perso PK
"""

_DITRANSITIVE = """
give/gave/given dare OTR, show mostrare OTC, bring/brought portare OBDT, send/sent mandare TO,
lend/lent prestare OTMC, offer offrire/offerto BDRO, sell/sold vendere ORMI
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
