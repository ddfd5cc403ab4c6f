"""Recipes: a merge written down in mergekit's YAML dialect, checked, and resolved to values for every tensor.

A `Recipe` that exists is a valid one: its keys, parameters, types and ranges were checked when it was made. This
package knows the methods' declarations and the names of tensors; it opens no checkpoint and computes no merge.

Differences from mergekit that are deliberate:
- an unknown key, parameter or value is an error, with the nearest known one;
- a gradient gives `lm_head` and the final norm its last value (`gradient_outer: mergekit` restores the first);
- `linear` with a `base_model` that is not among `models` keeps the rest of the weight on the base (WiSE-FT);
- arithmetic is always float32, so `dtype` is the dtype of the output, and float64 is refused;
- `normalize` of the methods that elect signs is `auto`: true with two or more task vectors, false with one, whose
  weight it would cancel (mergekit: always true for ties and della, always false for dare_ties and breadcrumbs_ties);
- `rescale` of dare and della is `expectation`, the papers' 1/density (mergekit: `l1`);
- of several recipes in a file one output is kept; a module that a recipe leaves out is an error.
A merge warns of the gradient, of `linear`, of `rescale`, and of `normalize` with two or more task vectors, where they
change a result and the recipe does not choose.
"""

from dapt_merge.recipe.advice import recipe_warnings
from dapt_merge.recipe.chain import NamedRecipe, load_recipes
from dapt_merge.recipe.fingerprint import recipe_fingerprint
from dapt_merge.recipe.making import make_recipe
from dapt_merge.recipe.reading import load_recipe
from dapt_merge.recipe.resolving import ResolvedParameters, resolve
from dapt_merge.recipe.schema import ModelInput, Recipe

__all__ = [
    "ModelInput",
    "NamedRecipe",
    "Recipe",
    "ResolvedParameters",
    "load_recipe",
    "load_recipes",
    "make_recipe",
    "recipe_fingerprint",
    "recipe_warnings",
    "resolve",
]
