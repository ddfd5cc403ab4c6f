"""A corpus: texts of many kinds in; packed rows of tokens, and a manifest of what became of every document, out.

The data flow is the order of the modules: `reading`, `cleaning`, `cleaned_file`, `thinning` (by `contamination` and
`duplicates`), `documents`, `tokens`, `mixing`, `packing`, `manifest`; `building` tells the story. Models and training
are not known here.
"""

from dapt_merge.corpus.building import build_corpus, corpus_fingerprint
from dapt_merge.corpus.built import BuiltCorpus, open_corpus
from dapt_merge.corpus.config import CorpusConfig, CorpusDocuments, CorpusSource, load_corpus_config

__all__ = [
    "BuiltCorpus",
    "CorpusConfig",
    "CorpusDocuments",
    "CorpusSource",
    "build_corpus",
    "corpus_fingerprint",
    "load_corpus_config",
    "open_corpus",
]
