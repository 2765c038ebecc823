"""Who, what and where: the words of the stories."""

GIRLS = ("Anna", "Clara", "Ella", "Emma", "Ivy", "June", "Lily", "Mia", "Nora", "Rosa", "Sara")
BOYS = ("Ben", "Carl", "Finn", "Hugo", "Jack", "Leo", "Max", "Noah", "Paul", "Sam", "Tom")
NAMES = (*GIRLS, *BOYS)
THINGS = (
    "ball", "bell", "boat", "book", "coin", "cup", "doll", "drum", "flute", "hat", "kite", "lamp",
    "ring", "scarf", "shell", "top",
)  # fmt: skip
ADJECTIVES = (
    "big", "blue", "golden", "green", "new", "odd", "old", "orange", "red", "shiny", "tiny",
    "white",
)  # fmt: skip
PREPOSITIONS = {
    "beach": "at", "bridge": "on", "farm": "on", "forest": "in", "garden": "in", "hill": "on",
    "kitchen": "in", "lake": "at", "library": "in", "market": "at", "school": "at", "station": "at",
}  # fmt: skip
PLACES = tuple(PREPOSITIONS)
DAYS = ("cold day", "quiet day", "sunny morning", "warm evening", "windy afternoon")
PRONOUNS = {"he": ("he", "she"), "his": ("his", "her"), "him": ("him", "her")}


def pronoun(name: str, case: str) -> str:
    """The form of "he", "his" or "him" that goes with a name."""
    return PRONOUNS[case][name in GIRLS]


def article(adjective: str) -> str:
    return "an" if adjective[0] in "aeiou" else "a"
