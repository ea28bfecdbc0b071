"""Recipes: YAML files of flags for published unlearned models and for every method; see README.md."""

from efface.recipes.recipe import Recipe, known_recipes, load_recipe, local_source

__all__ = ["Recipe", "known_recipes", "load_recipe", "local_source"]
