"""What the words of a report mean, for its end. The bench and the evaluation define them in full where they compute them."""

DEFINITIONS = (
    ("rate", "Fraction of block parameters removed by a cut; embeddings, final norm and head do not count."),
    ("load", "Loading the model and making its context in a fresh process, its files in the system's cache; cold: not in the cache."),
    ("TTFT", "Time to first token: computing the prompt from an empty cache, and choosing the first token."),
    ("prefill", "Tokens of the prompt per second of computing it."),
    ("decode", "Tokens per second after the prompt, greedy."),
    ("ITL", "Inter-token latency: time between tokens, percentiles over all steps of all repeats."),
    ("peak memory", "Most memory that the process ever had resident, Python and libraries included; on a GPU the process's VRAM."),
    ("model, KV, compute", "Bytes of tensors, of keys and values of the context, and of buffers for intermediate results."),
    ("of base", "The figure divided by that of the artifact that the bench was told to compare with, pairwise over repeats."),
    ("energy", "Joules per decoded token by the device's own counters; what others use at the time is in it."),
    ("medians", "Single figures are medians over repeats, in brackets or as bars with a 95 % bootstrap interval where it was computed."),
    ("perplexity", "exp of the mean negative log-likelihood of a text in windows that do not overlap, first tokens of windows not scored."),
    ("KL", "Nats by which the prediction differs from the reference's, per token: mean, and what 1 % of tokens exceed (p99)."),
    ("top-1 agreement", "Share of tokens where the likeliest next token is the reference's."),
    ("acc, acc norm", "Share of multiple-choice items whose answer has the highest log-likelihood, as it is and per byte of UTF-8."),
    ("exact match", "Share of items answered greedily with just the expected text, white space aside."),
    ("±", "Standard error over items, or over windows of a text. A difference's is over the same items or windows of both."),
    ("frontier", "Variants that no other beats: none is at least as good in decode speed, memory and quality, and better in one."),
    ("slower though smaller", "Both intervals do not meet or, without intervals, more than 3 % apart; run alike."),
)
