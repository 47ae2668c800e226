"""Which of the things that MODEL may be are encoders, and opening them."""

from __future__ import annotations

from pathlib import Path

from edgeq.converters.encoders.hf_bert import is_encoder_folder, open_hf_encoder
from edgeq.converters.encoders.onnx_bert import open_onnx_encoder
from edgeq.encoder_spec import EncoderModel


def is_encoder(ref: str | Path) -> bool:
    """Whether `open_encoder` is for it: a folder whose config.json names an encoder family, or a .onnx file."""
    path = Path(ref)
    return path.suffix == ".onnx" if not path.is_dir() else is_encoder_folder(path)


def open_encoder(ref: str | Path) -> EncoderModel:
    """Raises what the readers raise."""
    path = Path(ref)
    return open_hf_encoder(path) if path.is_dir() else open_onnx_encoder(path)
