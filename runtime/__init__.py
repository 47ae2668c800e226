"""The device side: sessions, measurements and memory over stock llama.cpp. Needs numpy, gguf and llama-cpp-python, never torch.

Importing this package loads none of them: the parts are imported by name (`from edgeq.runtime.session import load`).
"""
