"""A reference model in a few hundred kilobytes: enough for a device to check a package without the source model and without torch.

For every position of the gate's passages it holds the reference's TOP likeliest tokens with their log-probabilities and that of the
token that followed, and for every text of the gate the token ids. The file is a .npz (a zip of .npy arrays), neither
compressed nor dated, so that its bytes depend on what it holds only:

    facts                          JSON: version, thresholds, n_ctx, special_ids, texts [name, text], and cases [text, add_special,
                                   parse_special], text by its place in the list
    case_ids, case_lengths         int32, ids of all cases end to end, and how many each has
    window_ids, window_lengths     int32, the same for the windows of the passages
    top_ids                        int32 (positions, TOP), likeliest first
    top_logprobs                   float16 (positions, TOP)
    next_logprobs                  float32 (positions,), of the token that followed; 0 at the last position of a window

KL from a fingerprint is over the TOP tokens and one more outcome, "any other", with what is left of both distributions. Merging
outcomes never adds divergence, so this is at most the full KL, and what passed the full gate passes here. Rounding to float16
adds about 1e-6.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import PackageError, RuntimeFailure, SourceError, TokenizerError, UnsupportedError
from edgeq.gate import GateResult, ReferenceScores, Thresholds
from edgeq.gate_prompts import gate_prompts
from edgeq.model import Tokenizer
from edgeq.progress import Progress, silent
from edgeq.runtime.engine import fitting_n_ctx
from edgeq.runtime.likelihood import Doubles, Floats, log_sum_exp, row_chunks
from edgeq.runtime.quality import Agreement, Totals
from edgeq.runtime.verify import Finding, Tokenization, check_agreement, check_tokenizer, conversation_cases, refused, text_cases, verdict
from edgeq.runtime.worker import ScoringWorker

TOP = 32
VERSION = 1
STEP = "verify"
_LEAST_REST = 1e-9  # probability of "any other" token when rounding leaves it nothing

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a file of this format holds; `top_*` and `next_logprobs` go over the positions of all windows in order."""

    thresholds: Thresholds
    n_ctx: int
    special_ids: Mapping[str, int]
    cases: Sequence[Tokenization]
    windows: Sequence[Sequence[int]]
    top_ids: Ints
    top_logprobs: npt.NDArray[np.float16]
    next_logprobs: Floats

    def save(self, path: Path) -> None:
        texts = list(dict.fromkeys((case.name, case.text) for case in self.cases))
        facts = {
            "version": VERSION,
            "thresholds": asdict(self.thresholds),
            "n_ctx": self.n_ctx,
            "special_ids": dict(self.special_ids),
            "texts": texts,
            "cases": [[texts.index((case.name, case.text)), case.add_special, case.parse_special] for case in self.cases],
        }
        case_ids, case_lengths = _joined(case.ids for case in self.cases)
        window_ids, window_lengths = _joined(self.windows)
        arrays: dict[str, npt.NDArray[Any]] = {
            "facts": np.frombuffer(json.dumps(facts, ensure_ascii=False).encode(), dtype=np.uint8),
            "case_ids": case_ids,
            "case_lengths": case_lengths,
            "window_ids": window_ids,
            "window_lengths": window_lengths,
            "top_ids": self.top_ids.astype("<i4"),
            "top_logprobs": self.top_logprobs.astype("<f2"),
            "next_logprobs": self.next_logprobs.astype("<f4"),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                entry.create_system = 3
                archive.writestr(entry, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Fingerprint:
        """Raises PackageError for a file that is missing, damaged or of another version."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls._from_arrays(dict(file))
        except FileNotFoundError as err:
            raise PackageError(f"{path} is missing. The package is damaged; copy it again.") from err
        except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as err:
            raise PackageError(f"{path} is no readable fingerprint ({err}). The package is damaged; copy it again.") from err

    @classmethod
    def _from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Fingerprint:
        facts = json.loads(arrays["facts"].tobytes())
        if facts["version"] != VERSION:
            raise ValueError(f"version {facts['version']}, this edgeq reads version {VERSION}")
        sizes = {name: len(arrays[name]) for name in ("window_ids", "top_ids", "top_logprobs", "next_logprobs")}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"arrays of different lengths: {sizes}")
        ids = _split(arrays["case_ids"], arrays["case_lengths"])
        return cls(
            thresholds=Thresholds(**facts["thresholds"]),
            n_ctx=facts["n_ctx"],
            special_ids=facts["special_ids"],
            cases=[_case(facts["texts"], *case, ids=case_ids) for case, case_ids in zip(facts["cases"], ids, strict=True)],
            windows=_split(arrays["window_ids"], arrays["window_lengths"]),
            top_ids=arrays["top_ids"],
            top_logprobs=arrays["top_logprobs"],
            next_logprobs=arrays["next_logprobs"],
        )


def make_fingerprint(reference: ReferenceScores, *, tokenizer: Tokenizer, thresholds: Thresholds) -> Fingerprint:
    """Fingerprint of a reference whose first windows are the gate's passages, as `edgeq.gate_prompts.gate_windows` gives them."""
    windows = [tuple(window) for window in reference.windows[: len(gate_prompts().passages)]]
    tops = [_top(reference.logits(i), window) for i, window in enumerate(windows)]
    tells_time = "strftime_now" in (tokenizer.vocabulary.chat_template or "")  # a package does not depend on the clock
    return Fingerprint(
        thresholds=thresholds,
        n_ctx=reference.n_ctx,
        special_ids={role: tokenizer.vocabulary.special_ids[role] for role in ("bos", "eos") if role in tokenizer.vocabulary.special_ids},
        cases=text_cases(tokenizer) + ([] if tells_time else conversation_cases(tokenizer)),
        windows=windows,
        top_ids=np.concatenate([top for top, _, _ in tops]),
        top_logprobs=np.concatenate([logprobs for _, logprobs, _ in tops]),
        next_logprobs=np.concatenate([logprobs for _, _, logprobs in tops]),
    )


def _top(logits: Floats, window: Sequence[int]) -> tuple[Ints, npt.NDArray[np.float16], Floats]:
    """Per position: the TOP likeliest ids, equally likely ones by id, their log-probabilities, and that of the next token."""
    n_tokens, n_vocab = logits.shape
    top = min(TOP, n_vocab)
    ids, values = np.empty((n_tokens, top), dtype=np.int32), np.empty((n_tokens, top), dtype=np.float16)
    following = np.zeros(n_tokens, dtype=np.float32)
    targets = np.asarray(window[1:], dtype=np.int64)
    for part in row_chunks(n_tokens, n_vocab):
        rows = logits[part].astype(np.float64)
        rows -= log_sum_exp(rows)[:, None]
        best = np.sort(np.argpartition(-rows, top - 1, axis=1)[:, :top], axis=1)
        order = np.argsort(-np.take_along_axis(rows, best, axis=1), axis=1, kind="stable")
        ids[part] = np.take_along_axis(best, order, axis=1)
        values[part] = np.take_along_axis(rows, ids[part].astype(np.int64), axis=1)
        wanted = targets[part]
        following[part.start : part.start + len(wanted)] = rows[np.arange(len(wanted)), wanted]
    return ids, values, following


def check_fingerprint(artifact: Path, fingerprint: Fingerprint, *, threads: int | None = None, progress: Progress = silent) -> GateResult:
    """Judge an artifact by a fingerprint, as `edgeq.runtime.verify.run_gate` does by the model itself, on this machine's CPU.

    Chat templates are not compared: there is no source to render. Raises MissingDependency without the runtime.
    """
    thresholds = fingerprint.thresholds
    try:
        worker = ScoringWorker(artifact, n_ctx=fitting_n_ctx(artifact, fingerprint.n_ctx), threads=threads)
    except (RuntimeFailure, SourceError, TokenizerError, UnsupportedError) as err:
        return verdict("fingerprint", thresholds, [refused(artifact, err)])
    findings = [Finding({"runtime": f"{worker.facts.library} on CPU"})]
    with worker:
        try:
            findings.append(check_tokenizer(worker, fingerprint.cases, fingerprint.special_ids))
            findings.append(check_agreement(_compare(worker, fingerprint, thresholds.tie_margin, progress), thresholds))
        except RuntimeFailure as err:
            findings.append(Finding(failures=[str(err)]))
    return verdict("fingerprint", thresholds, findings)


def _compare(worker: ScoringWorker, fingerprint: Fingerprint, tie_margin: float, progress: Progress) -> Agreement:
    totals, before = Totals(), 0
    for window in fingerprint.windows:
        logits = worker.logits(window)
        if fingerprint.top_ids.max() >= logits.shape[1]:
            raise RuntimeFailure(f"the artifact has {logits.shape[1]} tokens, the reference has more. It is another model.")
        for part in row_chunks(*logits.shape):
            span = slice(before + part.start, before + part.stop)
            targets = np.asarray(window[1:], dtype=np.int64)[part]
            top = fingerprint.top_ids[span].astype(np.int64), fingerprint.top_logprobs[span].astype(np.float64)
            _compare_rows(totals, *top, fingerprint.next_logprobs[span].astype(np.float64), logits[part], targets, tie_margin)
        before += len(window)
        progress(STEP, before, len(fingerprint.top_ids))
    return totals.agreement()


def _compare_rows(
    totals: Totals,
    top_ids: npt.NDArray[np.int64],
    top_logprobs: Doubles,
    next_logprobs: Doubles,
    logits: Floats,
    targets: npt.NDArray[np.int64],
    tie_margin: float,
) -> None:
    rows = logits.astype(np.float64)
    if totals.count_broken(artifact=rows):
        return
    best = rows.argmax(axis=1)
    rows -= log_sum_exp(rows)[:, None]
    gap = np.where(top_ids == best[:, None], top_logprobs[:, :1] - top_logprobs, np.inf).min(axis=1)
    scored = np.arange(len(targets))
    totals.add(
        kl=_coarse_kl(top_logprobs, np.take_along_axis(rows, top_ids, axis=1)),
        agree=gap <= tie_margin,
        nll_reference=-next_logprobs[: len(targets)],
        nll_artifact=-rows[scored, targets],
    )


def _coarse_kl(p: Doubles, q: Doubles) -> Doubles:
    """KL over some outcomes and one more that stands for all others: log-probabilities (n, k) to (n,)."""
    p_rest, q_rest = (np.maximum(1 - np.exp(x).sum(axis=1), _LEAST_REST) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=1) + p_rest * (np.log(p_rest) - np.log(q_rest))


def _case(texts: Sequence[Sequence[str]], text: int, add_special: bool, parse_special: bool, *, ids: Sequence[int]) -> Tokenization:
    return Tokenization(name=texts[text][0], text=texts[text][1], add_special=add_special, parse_special=parse_special, ids=ids)


def _joined(lists: Iterable[Sequence[int]]) -> tuple[Ints, Ints]:
    parts = [np.asarray(part, dtype="<i4") for part in lists]
    return np.concatenate([np.empty(0, dtype="<i4"), *parts]), np.array([len(part) for part in parts], dtype="<i4")


def _split(ids: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> list[list[int]]:
    if lengths.sum() != len(ids) or (lengths < 0).any():
        raise ValueError(f"{len(ids)} ids for parts of {lengths.sum()}")
    bounds = np.cumsum(lengths)[:-1]
    return [part.tolist() for part in np.split(ids, bounds)] if len(lengths) else []
