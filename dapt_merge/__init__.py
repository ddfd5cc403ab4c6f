"""dapt-merge: the best merge of a base language model and its continued-pre-training checkpoints.

    import dapt_merge as dm
    merged = dm.merge("base/", "dapt/", method="ties", weight=0.6, density=0.3)
    merged.save("out/")

Every public name is imported when it is first used, so that `import dapt_merge` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "BuiltCorpus",
    "Checkpoint",
    "CorpusConfig",
    "DaptMergeError",
    "InputError",
    "LazyMerge",
    "MergeReport",
    "PretrainConfig",
    "Recipe",
    "ResidentMerger",
    "StudyConfig",
    "__version__",
    "build_corpus",
    "evaluate",
    "export_trial",
    "get_method",
    "load_corpus_config",
    "load_pretrain_config",
    "load_recipe",
    "load_study_config",
    "load_suite",
    "make_recipe",
    "merge",
    "merge_to_disk",
    "method_names",
    "open_checkpoint",
    "open_corpus",
    "paired_bootstrap",
    "plan_merge",
    "pretrain",
    "search",
]

# Module → the public names that it defines.
_HOMES = {
    "checkpoints": ("Checkpoint", "open_checkpoint"),
    "corpus": ("BuiltCorpus", "CorpusConfig", "build_corpus", "load_corpus_config", "open_corpus"),
    "errors": ("DaptMergeError", "InputError"),
    "evaluation": ("evaluate", "load_suite", "paired_bootstrap"),
    "merging": ("LazyMerge", "MergeReport", "ResidentMerger", "merge", "merge_to_disk", "plan_merge"),
    "methods.registry": ("get_method", "method_names"),
    "pretraining": ("PretrainConfig", "load_pretrain_config", "pretrain"),
    "recipe": ("Recipe", "load_recipe", "make_recipe"),
    "study": ("StudyConfig", "export_trial", "load_study_config"),
}
_PLACES = {name: (module, name) for module, names in _HOMES.items() for name in names}
_PLACES["search"] = ("study", "run_study")

if TYPE_CHECKING:
    from dapt_merge.checkpoints import Checkpoint, open_checkpoint
    from dapt_merge.corpus import BuiltCorpus, CorpusConfig, build_corpus, load_corpus_config, open_corpus
    from dapt_merge.errors import DaptMergeError, InputError
    from dapt_merge.evaluation import evaluate, load_suite, paired_bootstrap
    from dapt_merge.merging import LazyMerge, MergeReport, ResidentMerger, merge, merge_to_disk, plan_merge
    from dapt_merge.methods.registry import get_method, method_names
    from dapt_merge.pretraining import PretrainConfig, load_pretrain_config, pretrain
    from dapt_merge.recipe import Recipe, load_recipe, make_recipe
    from dapt_merge.study import StudyConfig, export_trial, load_study_config
    from dapt_merge.study import run_study as search


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dapt-merge")
    if name not in _PLACES:
        raise AttributeError(f"module 'dapt_merge' has no attribute '{name}'")
    module, attribute = _PLACES[name]
    value = getattr(import_module(f"dapt_merge.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
