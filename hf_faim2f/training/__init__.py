"""Training: recipes as data, and transformers' Trainer with what this family needs in addition."""

from .recipe import RECIPES, Recipe, find_recipe

__all__ = ["RECIPES", "Recipe", "find_recipe"]
