"""Measurements of an engine in this process, without HTTP: what adapters cost, and what happens when they change."""
