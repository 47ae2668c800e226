"""Which modules an adapter's config selects, by the rules of PEFT's `check_target_module_exists` and `get_pattern_key`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from edgeq.converters.adapters.sites import Site
from edgeq.converters.sources.json_file import Section
from edgeq.errors import SourceError

MAX_PATTERN = 2000  # characters of a regular expression; real ones have a few hundred


def selected(config: Section, sites: Iterable[Site], kinds: tuple[str, ...]) -> list[str]:
    """Paths of modules of these kinds that target_modules and its companions select, in the model's order; all of them if it is null."""
    targets = names_or_regex(config, "target_modules")
    exclude = names_or_regex(config, "exclude_modules")
    saved = names_or_regex(config, "modules_to_save")
    layers, pattern = _layers(config), names_or_regex(config, "layers_pattern")
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    found = []
    for site in sites:
        if site.kind not in kinds or _excluded(config, exclude, site.path) or is_saved(saved, site.path):
            continue
        if all_linear:
            chosen = site.kind == "linear" and not site.path.endswith("lm_head")
        elif isinstance(targets, str):
            chosen = _full_match(config, "target_modules", targets, site.path)
        else:
            chosen = targets is None or _ends_with(targets, site.path)
            chosen = chosen and (layers is None or _layer_number(config, pattern, site.path) in layers)
        if chosen:
            found.append(site.path)
    return found


def is_saved(saved: str | list[str] | None, path: str) -> bool:
    """Whether modules_to_save names this module or something around it."""
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in ([saved] if isinstance(saved, str) else saved or []))


def pattern_value(config: Section, key: str, path: str, default: Any) -> Any:
    """What a pattern table (rank_pattern, alpha_pattern, ...) says of a module: the first key that matches its end, else `default`."""
    table = config.get(key)
    if table is None:
        return default
    if not isinstance(table, Mapping):
        raise SourceError(f"{config.where(key)} is {table!r}, expected an object")
    for pattern, value in table.items():
        if len(pattern) <= MAX_PATTERN and _match(config, key, rf"(.*\.)?({pattern})$", path):
            return value
    return default


def names_or_regex(config: Section, key: str) -> str | list[str] | None:
    value = config.get(key)
    if value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return value
    if not isinstance(value, str) or len(value) > MAX_PATTERN:
        raise SourceError(f"{config.where(key)} is {value!r:.80}, expected module names or one regular expression")
    return value


def _layers(config: Section) -> set[int] | None:
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(n) is int for n in numbers):
        raise SourceError(f"{config.where('layers_to_transform')} is {value!r}, expected layer numbers")
    return set(numbers)


def _layer_number(config: Section, pattern: str | list[str] | None, path: str) -> int | None:
    if not pattern:
        found = re.match(r".*?\.[^.]*\.(?P<i>\d+)\.", path)
    else:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        matches = (_match(config, "layers_pattern", rf"(?:^|.*?\.){p}\.(?P<i>\d+)\.", path) for p in patterns)
        found = next((m for m in matches if m), None)
    return int(found["i"]) if found else None


def _excluded(config: Section, exclude: str | list[str] | None, path: str) -> bool:
    if isinstance(exclude, str):
        return _full_match(config, "exclude_modules", exclude, path)
    return _ends_with(exclude or [], path)


def _ends_with(names: list[str], path: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _full_match(config: Section, key: str, pattern: str, path: str) -> bool:
    return bool(_match(config, key, rf"(?:{pattern})\Z", path))


def _match(config: Section, key: str, pattern: str, path: str) -> re.Match[str] | None:
    try:
        return re.match(pattern, path)
    except re.error as err:
        raise SourceError(f"{config.where(key)} contains {pattern!r:.80}, which is no regular expression ({err})") from err
