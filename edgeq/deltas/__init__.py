"""Adapters as functions of a base weight: one module per algebra, and merging them into a model.

`delta` says what a Delta is; the others are named after what they know. Readers of adapter files are in converters.
"""
