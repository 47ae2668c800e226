"""The device side: sessions, measurements and memory over stock llama.cpp and ONNX Runtime. Needs numpy, gguf and one of them, never torch.

Importing this package loads none of them: the parts are imported by name (`from edgeq.runtime.session import load`).
"""
