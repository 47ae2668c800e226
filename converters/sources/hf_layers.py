"""What config.json says about each attention layer: how far it looks back, and which rotary embedding it applies."""

from __future__ import annotations

from dataclasses import dataclass

from edgeq.converters.sources.hf_dialects import Dialect
from edgeq.converters.sources.json_file import Section
from edgeq.errors import SourceError, UnsupportedError
from edgeq.spec import RopeUse

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    window: int | None
    rope: RopeUse


def layer_kinds(config: Section, row: Dialect, n_layers: int, n_ctx: int) -> list[LayerKind]:
    """One kind per layer.

    A window that no context of n_ctx tokens can leave is none; where windowed layers are a kind of their own, they keep it.
    Raises SourceError when the config contradicts itself, UnsupportedError for a layer type that is neither full nor sliding.
    """
    windows = _windows(config, row, n_layers)
    if row.window == "local":
        return [LayerKind(window=window, rope="main" if window is None else "local") for window in windows]
    rotates = _rotating(config, n_layers) if row.skips_rope else [True] * n_layers
    windows = [window if window is not None and window < n_ctx else None for window in windows]
    return [LayerKind(window=window, rope="main" if r else "none") for window, r in zip(windows, rotates, strict=True)]


def _windows(config: Section, row: Dialect, n_layers: int) -> list[int | None]:
    """Tokens each layer may look back as the config states it, None for all."""
    if row.window == "none":
        return [None] * n_layers
    window = config.optional_integer("sliding_window")
    if row.window == "all":
        return [window] * n_layers
    if row.window != "local" and not config.boolean("use_sliding_window", default=False):
        window = None
    types = _layer_types(config, row, n_layers, window)
    if window is None and SLIDING in types:
        raise SourceError(f"{config.where('layer_types')} has {SLIDING!r} layers, but no sliding_window is in use. Make them agree.")
    return [window if kind == SLIDING else None for kind in types]


def _layer_types(config: Section, row: Dialect, n_layers: int, window: int | None) -> list[str]:
    stated = config.optional_list("layer_types")
    config.used |= {"max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}
    if stated is not None:
        if len(stated) != n_layers:
            raise SourceError(f"{config.where('layer_types')} has {len(stated)} entries for {n_layers} layers")
        for kind in stated:
            if kind not in (FULL, SLIDING):
                raise UnsupportedError(f"{config.where('layer_types')} contains {kind!r}; supported: {FULL}, {SLIDING}")
        return stated
    if row.window == "local":
        pattern = config.optional_integer("sliding_window_pattern") or config.optional_integer("_sliding_window_pattern") or 6
        sliding = [(i + 1) % pattern != 0 for i in range(n_layers)]
    elif row.window == "upper":
        # max_window_layers may be 0, so it is not a positive number
        first = config.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise SourceError(f"{config.where('max_window_layers')} is {first!r}, expected a whole number")
        sliding = [window is not None and i >= first for i in range(n_layers)]
    else:
        sliding = [window is not None and not rotates for rotates in _rotating(config, n_layers)]
    return [SLIDING if s else FULL for s in sliding]


def _rotating(config: Section, n_layers: int) -> list[bool]:
    """SmolLM3: which layers apply the rotary embedding."""
    stated = config.optional_list("no_rope_layers")
    interval = config.integer("no_rope_layer_interval")
    if stated is None:
        return [(i + 1) % interval != 0 for i in range(n_layers)]
    if len(stated) < n_layers or any(type(v) is not int or v not in (0, 1) for v in stated):
        raise SourceError(f"{config.where('no_rope_layers')} is {stated!r}, expected a 0 or 1 for each of {n_layers} layers")
    return [bool(v) for v in stated[:n_layers]]
