"""Sources: every form a model may come in, opened as one `edgeq.model.Model`.

`resolve.open_model` is the way in. Import it from there: this package itself loads nothing.
"""
