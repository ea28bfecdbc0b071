"""``efface sweep``: a recipe with many settings, as one study of trials."""
