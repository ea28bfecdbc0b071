"""The demo: its data, its story, its plots, its command."""
