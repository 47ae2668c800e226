"""Encoder embedding models of the BERT family: read from a Hugging Face folder or an ONNX file, written as ONNX packages."""
