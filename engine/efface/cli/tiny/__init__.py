"""``--scale tiny``: a recipe end to end on a CPU, with small models of its architecture taught on the spot."""
