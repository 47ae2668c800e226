"""Settings for every test: no network, and no threads that spin against each other on a small machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once by OpenMP, so before torch or llama.cpp load; children inherit it
