"""English sentences and their Italian from a seeded grammar: a corpus that needs no download."""

from msfs_functional.synthetic.english_italian.corpus import Corpus, english_italian

__all__ = ["Corpus", "english_italian"]
