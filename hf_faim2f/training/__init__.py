"""Training: recipes as data, and transformers' Trainer with this family's losses, averaging and evaluation."""

from .recipe import RECIPES, Recipe, find_recipe

__all__ = ["RECIPES", "Recipe", "find_recipe"]
