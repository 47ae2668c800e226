"""LoRA as PEFT writes it, and the kinds that are a LoRA once read: AdaLoRA, VeRA, RandLoRA, TinyLoRA, DeLoRA, HiRA, GraLoRA, MiSS.

Scales: alpha / r, with rsLoRA alpha / sqrt r (`LoraLayer.update_layer`). Formulas: the `get_delta_weight` of each PEFT layer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgeq.converters.adapters.module import Module
from edgeq.converters.sources.json_file import Section
from edgeq.deltas import blocks, lora
from edgeq.deltas.decomposed import KaSA
from edgeq.deltas.delta import AnyFloats, Change, Delta, f64
from edgeq.deltas.hadamard import HiRA
from edgeq.deltas.lora import DoRA, LoRA
from edgeq.errors import ShapeError, SourceError, UnsupportedError

Deltas = dict[str, Delta]

_RESIDUAL = {
    "pissa": "the largest singular directions",
    "olora": "an orthonormal part",
    "corda": "the directions of its calibration data",
    "loftq": "what its 4-bit form cannot hold",
    "lora_ga": "its gradient's directions",
}


def check_lora(config: Section) -> None:
    """Refuse options under which the file is not an adapter of the base model itself, or not a change of weights at all."""
    init = config.get("init_lora_weights")
    changed = next((name for name in _RESIDUAL if isinstance(init, str) and init.lower().startswith(name)), None)
    if changed is not None:
        raise UnsupportedError(
            f"{config.where('init_lora_weights')} is {init!r}: training took {_RESIDUAL[changed]} out of the base, so this adapter "
            "belongs to what was left of it. Save it as a plain LoRA with PEFT: model.save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=FOLDER_OF_THE_UNTRAINED_ADAPTER), or merge it there."
        )
    refuse(config, "layer_replication", "it stacks copies of layers into a deeper model; merge it with PEFT into a model of its own")
    refuse(config, "megatron_config", "its tensors are split for Megatron; convert the adapter to one for transformers")
    refuse(config, "target_parameters", "it adapts single parameters of expert layers, which no supported family has")
    refuse(config, "alora_invocation_tokens", "it acts from its invocation tokens on only (aLoRA), which no merged weight can")
    refuse(config, "arrow_config", "it routes each token to other adapters (Arrow), which no merged weight can")


def refuse(config: Section, key: str, why: str) -> None:
    """Raise UnsupportedError unless the option is absent or empty."""
    value = config.get(key)
    if value:
        raise UnsupportedError(f"{config.where(key)} is {value!r:.60}: {why}")


def strength(module: Module, rank: int, alpha: float) -> float:
    return alpha / math.sqrt(rank) if module.config.boolean("use_rslora", default=False) else alpha / rank


def build_lora(module: Module) -> Deltas:
    rank, alpha = module.integer("r", pattern="rank_pattern"), module.number("lora_alpha", pattern="alpha_pattern")
    scale = strength(module, rank, alpha)
    embedding = module.site.kind == "embedding"
    if embedding:
        n_vocab, n_embd = module.site.matrix
        low = LoRA(
            a=module.take("lora_embedding_B", shape=(n_embd, rank)).T,
            b=module.take("lora_embedding_A", shape=(rank, n_vocab)).T,
            scale=scale,
        )
    else:
        low = _linear(module, rank, scale)
    magnitude = [name for name in ("lora_magnitude_vector.weight", "lora_magnitude_vector") if module.has(name)]
    dora = module.config.boolean("use_dora", default=False)
    if dora != bool(magnitude):
        what = "has no magnitudes" if dora else "has magnitudes"
        raise SourceError(f"{module.where} {what}, but use_dora is {str(dora).lower()}. File and config do not belong together.")
    deltas: Deltas = {"weight": low}
    if dora:
        axis = 0 if embedding else 1
        deltas["weight"] = DoRA(lora=low, magnitude=module.take(*magnitude, shape=(low.shape[1 - axis],)), axis=axis)
    elif module.config.get("kasa_config") is not None:
        deltas["weight"] = KaSA(lora=lora.with_diagonal(low.a, module.take("lora_diag", shape=(rank,)), low.b, scale))
    if module.config.boolean("lora_bias", default=False) and not embedding:
        bias = module.take("lora_B.bias", shape=(module.site.n_out,))
        deltas["bias"] = Change(scale * f64(bias))
    return deltas


def _linear(module: Module, rank: int, scale: float) -> LoRA:
    """Factors of a linear module, whatever form the file has them in."""
    n_out, n_in = module.site.matrix
    core = next((name for name in module.names if name.endswith("lora_latent_mapping.weight")), None)
    if core is not None and not module.has("lora_A.weight", "lora_B.weight"):
        raise SourceError(
            f"{module.where} has the core of LoRA-XS or LoRA-SB, but not the factors around it. They come from a singular value "
            "decomposition whose signs nobody can guess: save the adapter together with lora_A and lora_B."
        )
    width, height, blocks_a, blocks_b = _block_diagonal(module)
    group = module.config.integer("qalora_group_size") if module.config.boolean("use_qalora", default=False) else 1
    if n_in % (width * group):
        raise ShapeError(f"{module.where}: {n_in} inputs do not divide into {width * group} groups")
    a = module.take("lora_A.weight", shape=(rank, n_in // width // group))
    b = module.take("lora_B.weight", shape=(n_out, rank // height))
    if blocks_a:
        a = _spread(a, width)
    if blocks_b:
        b = _spread(b, height)
    if group > 1:  # inputs are averaged by group, times the number of groups
        a = np.repeat(f64(a), group, axis=1) * (n_in / group / group)
    if core is None:
        return LoRA(a=a, b=b, scale=scale)
    return lora.with_core(a, module.take(core, shape=(rank, rank)), b, scale)


def _block_diagonal(module: Module) -> tuple[int, int, bool, bool]:
    """BD-LoRA: into how many blocks a's columns and b's columns are folded, and which of the two."""
    options = module.config.get("use_bdlora")
    if not options:
        return 1, 1, False, False
    if not isinstance(options, dict) or type(options.get("nblocks")) is not int or options["nblocks"] < 1:
        raise SourceError(f"{module.config.where('use_bdlora')} is {options!r:.80}, expected an object with nblocks")
    n, name = options["nblocks"], module.site.path
    in_a = any(part in name for part in options.get("target_modules_bd_a") or [])
    in_b = any(part in name for part in options.get("target_modules_bd_b") or [])
    return (n if in_a else 1), (n if in_b else 1), in_a, in_b


def _spread(folded: AnyFloats, n: int) -> AnyFloats:
    """(rows, cols / n) to (rows, cols): block i of the rows keeps to block i of the columns."""
    if len(folded) % n:
        raise ShapeError(f"{len(folded)} rows do not divide into {n} diagonal blocks")
    height, width = len(folded) // n, folded.shape[1]
    whole = np.zeros((n, height, n, width), dtype=folded.dtype)
    for i in range(n):
        whole[i, :, i] = folded[i * height : (i + 1) * height]
    return whole.reshape(n * height, n * width)


def build_adalora(module: Module) -> Deltas:
    """b @ (a * e) * alpha / (init_r + 1e-5), also for modules pruned to a lower rank. One pruned to rank 0 changes nothing."""
    n_out, n_in = module.site.matrix
    if module.has("lora_A") and module.file.shape(module.names["lora_A"])[0] == 0:
        for rest in ("lora_A", "lora_B", "lora_E"):
            module.take(rest)
        return {}
    a = module.take("lora_A", shape=(None, n_in))
    rank = len(a)
    e = module.take("lora_E", shape=(rank, 1))
    b = module.take("lora_B", shape=(n_out, rank))
    if module.has("ranknum"):
        module.take("ranknum")
    module.config.get("rank_pattern")  # which directions were left; the tensors have them alone
    ranknum = module.config.integer("init_r")
    alpha = module.config.get("lora_alpha")
    if type(alpha) not in (int, float):
        raise SourceError(f"{module.config.where('lora_alpha')} is {alpha!r}, expected a number")
    scale = alpha if alpha > 0 else float(rank)
    return {"weight": lora.with_diagonal(a, e[:, 0], b, scale / (ranknum + 1e-5))}


def build_vera(module: Module) -> Deltas:
    n_out, n_in = module.site.matrix
    rank, shared = module.integer("r"), module.shared
    if "vera_A" in shared.names and "vera_B" in shared.names:
        a, b = shared.take("vera_A", (rank, None)), shared.take("vera_B", (None, rank))
    else:
        a, b = shared.cache.setdefault("vera", _vera_bases(module, rank))
    if a.shape[1] < n_in or b.shape[0] < n_out:
        raise ShapeError(
            f"{module.where}: vera_A and vera_B are {list(a.shape)} and {list(b.shape)}, too small for a module of {n_out} x {n_in}"
        )
    lambda_d, lambda_b = module.take("vera_lambda_d", shape=(rank,)), module.take("vera_lambda_b", shape=(n_out,))
    return {"weight": lora.vera(a[:, :n_in], b[:n_out], lambda_d, lambda_b)}


def _vera_bases(module: Module, rank: int) -> tuple[AnyFloats, AnyFloats]:
    """The shared matrices from their seed, as PEFT draws them on a CPU: Kaiming-uniform with gain sqrt 2, a before b."""
    import torch

    n_out, n_in = module.shared.largest()
    generator = torch.Generator().manual_seed(seed(module.config, "projection_prng_key"))
    drawn = []
    for shape in ((rank, n_in), (n_out, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy())
    return drawn[0], drawn[1]


def seed(config: Section, key: str) -> int:
    value = config.get(key)
    if type(value) is not int:
        raise SourceError(f"{config.where(key)} is {value!r}, expected the whole number that the random parts are drawn with")
    return value


def build_randlora(module: Module) -> Deltas:
    rank, shared = module.integer("r"), module.shared
    saved = "randlora_A" in shared.names and "randlora_B" in shared.names
    if saved:
        a, b = shared.take("randlora_A", (rank, 1, None)), shared.take("randlora_B", (None, None, rank))
    if module.has("randlora_A", "randlora_B"):  # PEFT writes the shared bases once more with every module
        a, b = module.take("randlora_A", shape=(rank, 1, None)), module.take("randlora_B", shape=(None, None, rank))
    elif not saved:
        if "randlora" not in shared.cache:
            shared.cache["randlora"] = _randlora_bases(module, rank)
        a, b = shared.cache["randlora"]
    n = -(-min(module.site.matrix) // rank)
    strengths = module.take("randlora_lambda", shape=(rank, n))
    gamma = module.take("randlora_gamma", shape=(n, min(module.site.matrix)))
    scale = module.number("randlora_alpha") / rank
    return {"weight": blocks.randlora(a, b, strengths, gamma, shape=module.site.matrix, scale=scale)}


def _randlora_bases(module: Module, rank: int) -> tuple[AnyFloats, AnyFloats]:
    """The shared bases from their seed, as PEFT draws them on a CPU."""
    import torch

    config, (n_out, n_in) = module.config, module.shared.largest()
    small, large = min(n_out, n_in), max(n_out, n_in)
    n = -(-small // rank)
    generator = torch.Generator().manual_seed(seed(config, "projection_prng_key"))
    very_sparse, sparse = config.boolean("very_sparse", default=False), config.boolean("sparse", default=False)
    if very_sparse or sparse:
        edge = 1 / (2 * (math.sqrt(small) if very_sparse else 3))
        drawn = [torch.rand(shape, generator=generator) for shape in ((rank, 1, small), (large, n, rank))]
        signs = [(d > 1 - edge).float() - (d < edge).float() for d in drawn]
        a, b = (s / s.std() for s in signs)
    else:

        def draw(shape: tuple[int, ...]) -> Any:
            return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)

        a, b = draw((rank, 1, small)), torch.cat([draw((large, 1, rank)) for _ in range(n)], dim=1)
        a, b = a / a.std(), b / b.std()
    return a.float().numpy(), b.float().numpy()


def build_tinylora(module: Module) -> Deltas:
    """b @ (sum of v_i P_i) @ a. v is shared by groups of modules, in the order in which PEFT meets them."""
    n_out, n_in = module.site.matrix
    a = module.take("tinylora_A", shape=(None, n_in))
    rank, u = len(a), module.integer("u")
    b = module.take("tinylora_B", shape=(n_out, rank))
    tying = module.config.get("weight_tying")
    if tying is not None and (type(tying) not in (int, float) or not 0 <= tying <= 1):
        raise SourceError(f"{module.config.where('weight_tying')} is {tying!r}, expected a number from 0 to 1")
    total = len(module.shared.sites)
    groups = max(1, round(total * (1.0 - (tying or 0.0))))
    group = min(module.index // max(1, total // groups), groups - 1)
    name = f"tinylora_v.{group}"
    if name not in module.shared.names:
        raise SourceError(f"{module.where}: its shared vector {name} is missing. The adapter is not complete: save or download it again.")
    v = module.shared.take(name, (u,))
    stored = [rest for rest in module.names if rest.startswith("tinylora_P")]
    if stored:
        projections = module.take(*stored, shape=(u, rank, rank))
    else:
        import torch

        generator = torch.Generator().manual_seed(seed(module.config, "projection_seed") + module.index)
        projections = torch.normal(mean=0.0, std=1.0 / rank**0.5, size=(u, rank, rank), generator=generator).numpy()
    return {"weight": lora.with_core(a, np.einsum("i,ijk->jk", f64(v), f64(projections)), b)}


def build_delora(module: Module) -> Deltas:
    n_out, n_in = module.site.matrix
    rank = module.integer("r", pattern="rank_pattern")
    a, b = module.take("delora_A", shape=(rank, n_in)), module.take("delora_B", shape=(n_out, rank))
    strength_, norms = module.take("delora_lambda", shape=(1,)), module.take("delora_w_norm", shape=(n_in,))
    return {"weight": lora.delora(a, b, float(strength_[0]), norms)}


def build_hira(module: Module) -> Deltas:
    rank = module.integer("r", pattern="rank_pattern")
    if module.site.kind == "embedding":
        n_vocab, n_embd = module.site.matrix
        a, b = module.take("hira_embedding_B", shape=(n_embd, rank)).T, module.take("hira_embedding_A", shape=(rank, n_vocab)).T
    else:
        n_out, n_in = module.site.matrix
        a, b = module.take("hira_A", shape=(rank, n_in)), module.take("hira_B", shape=(n_out, rank))
    return {"weight": HiRA(product=LoRA(a=a, b=b))}


def build_gralora(module: Module) -> Deltas:
    n_out, n_in = module.site.matrix
    k, rank, hybrid = module.integer("gralora_k"), module.integer("r"), module.config.get("hybrid_r") or 0
    if type(hybrid) is not int or hybrid < 0:
        raise SourceError(f"{module.config.where('hybrid_r')} is {hybrid!r}, expected a whole number from 0")
    scale = module.number("alpha") / (rank + hybrid)
    a, b = module.take("gralora_A", shape=(k, n_in // k, rank)), module.take("gralora_B", shape=(k, rank, n_out // k))
    low = blocks.gralora(a, b, scale)
    if hybrid:
        more_a = module.take("gralora_A_general.weight", shape=(hybrid, n_in))
        more_b = module.take("gralora_B_general.weight", shape=(n_out, hybrid))
        low = LoRA(a=np.concatenate([low.a, more_a]), b=np.concatenate([low.b, more_b], axis=1), scale=scale)
    return {"weight": low}


def build_miss(module: Module) -> Deltas:
    """MiSS, and Bone as older PEFT versions call it."""
    n_out, n_in = module.site.matrix
    rank, form = module.integer("r"), module.config.get("init_weights")
    if form == "bat":
        return {"weight": blocks.MissBat(block=module.take("miss_block", "bone_block", shape=(n_out // rank, rank, rank)), n_in=n_in)}
    if form == "mini":
        small = module.integer("mini_r")
        block: AnyFloats = np.tile(f64(module.take("miss_block", shape=(rank, small))), (1, n_out // small))
    else:
        block = module.take("miss_block", "bone_block", shape=(rank, n_out))
    return {"weight": blocks.miss(block, n_in)}
