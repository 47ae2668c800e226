"""Readers of adapter files: each brings a file into `edgeq.deltas.adapter.Adapter`, or refuses it."""
