"""Recipes: the published systems, and one for every method, as YAML files of flags (see README.md)."""

from efface.recipes.recipe import Recipe, known_recipes, load_recipe, local_source

__all__ = ["Recipe", "known_recipes", "load_recipe", "local_source"]
