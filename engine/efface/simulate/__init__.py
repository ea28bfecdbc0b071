"""Fictitious data and small models: what a recipe runs on where no checkpoint and no data set can be downloaded."""
