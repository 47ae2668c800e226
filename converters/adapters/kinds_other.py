"""The other kinds as PEFT writes them: products, rotations, scalings, spectra, sparse changes, norms.

Formulas: the `get_delta_weight` and `merge` of each PEFT layer.
"""

from __future__ import annotations

import numpy as np

from edgeq.converters.adapters.kinds_lora import Deltas, seed
from edgeq.converters.adapters.module import Module
from edgeq.converters.adapters.targets import pattern_value
from edgeq.deltas import rotation
from edgeq.deltas.delta import AnyFloats, Replace, f64
from edgeq.deltas.hadamard import LoHa, LoKr
from edgeq.deltas.lora import LoRA
from edgeq.deltas.scaling import RoAd, Scale
from edgeq.deltas.spectral import Circulant, Entries, Fourier, Hadamard, SHiRA, Wavelet
from edgeq.errors import ShapeError, SourceError, UnsupportedError


def build_loha(module: Module) -> Deltas:
    n_out, n_in = module.site.matrix
    rank = module.integer("r", pattern="rank_pattern")
    scale = module.number("alpha", pattern="alpha_pattern") / rank
    one, two = (
        LoRA(a=module.take(f"hada_w{i}_b", shape=(rank, n_in)), b=module.take(f"hada_w{i}_a", shape=(n_out, rank)), scale=s)
        for i, s in ((1, scale), (2, 1.0))
    )
    return {"weight": LoHa(first=one, second=two)}


def build_lokr(module: Module) -> Deltas:
    n_out, n_in = module.site.matrix
    rank = module.integer("r", pattern="rank_pattern")
    scale = module.number("alpha", pattern="alpha_pattern") / rank
    left: AnyFloats
    if module.has("lokr_w1"):
        left = module.take("lokr_w1", shape=(None, None))
    else:
        left = f64(module.take("lokr_w1_a", shape=(None, rank))) @ f64(module.take("lokr_w1_b", shape=(rank, None)))
    if n_out % left.shape[0] or n_in % left.shape[1]:
        raise ShapeError(f"{module.where}: a Kronecker factor of {list(left.shape)} does not divide a module of {n_out} x {n_in}")
    shape = (n_out // left.shape[0], n_in // left.shape[1])
    right: AnyFloats | LoRA
    if module.has("lokr_w2"):
        right = module.take("lokr_w2", shape=shape)
    else:
        right = LoRA(a=module.take("lokr_w2_b", shape=(rank, shape[1])), b=module.take("lokr_w2_a", shape=(shape[0], rank)))
    return {"weight": LoKr(left=left, right=right, scale=scale)}


def build_ia3(module: Module) -> Deltas:
    """(n_out, 1) scales outputs, bias included; (1, n_in) scales the inputs of feed-forward modules."""
    module.config.get("feedforward_modules")
    vector = module.take("ia3_l", shape=(None, None))
    n_out, n_in = module.site.matrix
    if vector.shape == (n_out, 1):
        deltas: Deltas = {"weight": Scale(vector=vector[:, 0], base_shape=module.site.matrix, axis=0)}
        if module.site.has_bias:
            deltas["bias"] = Scale(vector=vector[:, 0], base_shape=(n_out,), axis=0)
        return deltas
    if vector.shape == (1, n_in):
        return {"weight": Scale(vector=vector[0], base_shape=module.site.matrix, axis=1)}
    raise ShapeError(f"{module.where}: ia3_l has shape {list(vector.shape)}, expected [{n_out}, 1] or [1, {n_in}]")


def build_road(module: Module) -> Deltas:
    n_out, _ = module.site.matrix
    group, variant = module.integer("group_size"), module.config.get("variant")
    if group % 2 or n_out % group:
        raise ShapeError(f"{module.where}: {n_out} outputs do not divide into groups of {group}, an even number")
    values = {"road_1": n_out // 2, "road_2": n_out, "road_4": 2 * n_out}
    if variant not in values:
        raise UnsupportedError(f"{module.config.where('variant')} is {variant!r}; supported: {', '.join(values)}")
    theta, alpha = (f64(module.take(f"road_{name}", shape=(values[variant],))) for name in ("theta", "alpha"))
    if variant == "road_4":
        theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        cos, sin = (alpha[:, 0] * np.cos(theta[:, 0])).reshape(-1), (alpha[:, 1] * np.sin(theta[:, 1])).reshape(-1)
    else:
        if variant == "road_1":
            theta, alpha = (np.repeat(v.reshape(-1, group // 2), 2, axis=0).reshape(-1) for v in (theta, alpha))
        cos, sin = alpha * np.cos(theta), alpha * np.sin(theta)
    deltas: Deltas = {"weight": RoAd(cos=cos, sin=sin, group=group, base_shape=module.site.matrix)}
    if module.site.has_bias:
        deltas["bias"] = RoAd(cos=cos, sin=sin, group=group, base_shape=(n_out,))
    return deltas


def build_oft(module: Module) -> Deltas:
    n_out, _ = module.site.matrix
    vectors = module.take("oft_R.weight", shape=(None, None))
    config = module.config
    shared = config.boolean("block_share", default=False)
    n_blocks, size = _oft_blocks(module, len(vectors), vectors.shape[1], shared)
    matrices = rotation.skew(vectors, size)
    if config.boolean("coft", default=False):
        matrices = rotation.constrain(matrices, module.number("eps"))
    if config.boolean("use_cayley_neumann", default=True):
        terms = config.optional_integer("num_cayley_neumann_terms")
        turned = rotation.cayley_neumann(matrices, 5 if terms is None else terms)
    else:
        turned = rotation.cayley(matrices)
    blocks = np.repeat(turned, n_blocks, axis=0) if shared else turned
    return {"weight": rotation.BlockRotation(blocks=blocks, n_out=n_out)}


def _oft_blocks(module: Module, n_stored: int, n_values: int, shared: bool) -> tuple[int, int]:
    """Number and size of blocks. Config has one of them, but PEFT moves it to a divisor of the inputs, so the tensor decides."""
    module.config.get("r"), module.config.get("oft_block_size")
    n_in = module.site.matrix[1]
    size = round((1 + (1 + 8 * n_values) ** 0.5) / 2)
    n_blocks = n_in // size
    if size * (size - 1) // 2 != n_values or n_in % size or n_stored != (1 if shared else n_blocks):
        raise ShapeError(
            f"{module.where}: oft_R.weight of [{n_stored}, {n_values}] does not make blocks of {n_in} inputs"
            f"{' that share one rotation' if shared else ''}. PEFT before 0.16 wrote another form: save the adapter again with a newer one."
        )
    return n_blocks, size


def build_boft(module: Module) -> Deltas:
    n_out, n_in = module.site.matrix
    stored = f64(module.take("boft_R", shape=(None, None, None, None)))
    m, n_blocks, size, other = stored.shape
    if size != other or n_blocks * size != n_in:
        raise ShapeError(f"{module.where}: boft_R of {list(stored.shape)} does not make blocks of {n_in} inputs")
    for key in ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"):
        module.config.get(key)  # the tensor's shape says all three
    turned = np.stack([rotation.cayley(0.5 * (blocks - blocks.swapaxes(1, 2))) for blocks in stored])
    orders: tuple[tuple[int, ...], ...] = (tuple(range(n_in)),)
    if m > 1:
        orders = tuple(rotation.butterfly_order(n_in, n_blocks // 2**i, size // 2) for i in range(m))
    scale = module.take("boft_s", shape=(n_out, 1))[:, 0]
    return {"weight": rotation.Butterfly(blocks=turned, orders=orders, scale=scale)}


def build_hra(module: Module) -> Deltas:
    n_out, n_in = module.site.matrix
    u = module.take("hra_u", shape=(n_in, module.integer("r")))
    return {"weight": rotation.Householder(u=u, n_out=n_out, orthogonal=module.config.boolean("apply_GS", default=False))}


def build_shira(module: Module) -> Deltas:
    rank, (n_out, n_in) = module.integer("r"), module.site.matrix
    indices = module.take_indices("shira_indices")
    values = module.take("shira_weight", shape=(rank * (n_out + n_in),))
    if indices.shape != (2, len(values)):
        raise ShapeError(f"{module.where}: shira_indices has shape {list(indices.shape)}, expected [2, {len(values)}]")
    return {"weight": SHiRA(entries=Entries(rows=indices[0], cols=indices[1], values=values, shape=module.site.matrix))}


def build_fourier(module: Module) -> Deltas:
    scale = module.number("scaling")
    return {"weight": Fourier(entries=_drawn(module, "fourierft_spectrum", "n_frequency"), scale=scale)}


def build_wave(module: Module) -> Deltas:
    scale, family = module.number("scaling"), module.config.get("wavelet_family")
    entries = _drawn(module, "waveft_spectrum", "n_frequency")
    if not module.config.boolean("use_idwt", default=True):
        return {"weight": SHiRA(entries=entries, scale=scale)}
    if not isinstance(family, str):
        raise SourceError(f"{module.config.where('wavelet_family')} is {family!r}, expected a wavelet's name")
    return {"weight": Wavelet(entries=entries, scale=scale, family=family)}


def _drawn(module: Module, name: str, key: str) -> Entries:
    """Coefficients at places that a seed draws: the first of a random permutation of all places, as torch makes it on a CPU."""
    import torch

    n_out, n_in = module.site.matrix
    spectrum = module.take(name, shape=(None,))
    if not module.config.get("proportional_parameters"):
        wanted = pattern_value(module.config, f"{key}_pattern", module.site.path, module.config.integer(key))
        if len(spectrum) != wanted:
            raise ShapeError(f"{module.where}: {name} has {len(spectrum)} values, the config says {wanted}")
    generator = torch.Generator().manual_seed(seed(module.config, "random_loc_seed"))
    if len(spectrum) > n_out * n_in:
        raise ShapeError(f"{module.where}: {name} has {len(spectrum)} values for {n_out * n_in} places")
    places = torch.randperm(n_out * n_in, generator=generator)[: len(spectrum)].numpy()
    return Entries(rows=places // n_in, cols=places % n_in, values=spectrum, shape=module.site.matrix)


def build_qwha(module: Module) -> Deltas:
    """QHFT of QWHA's fork of PEFT: values, places and scale are all in the file, the last two with the adapter's name behind them.

    Counts and seeds that lie beside them only say how the places were drawn.
    """
    n_out, _ = module.site.matrix
    values = module.take("qhft_spectrum", shape=(None,))
    places, scale = (next((r for r in module.names if r.startswith(f"qhft_{n}")), f"qhft_{n}") for n in ("indices", "scaling"))
    indices = module.take_indices(places)
    if indices.shape != (2, len(values)):
        raise ShapeError(f"{module.where}: {places} has shape {list(indices.shape)}, expected [2, {len(values)}]")
    for rest in module.names:
        if rest.startswith(("qhft_n_frequency", "qhft_random_loc_seed")):
            module.take_indices(rest)
    scaling = module.take(scale)
    if scaling.size != 1:
        raise ShapeError(f"{module.where}: {scale} has shape {list(scaling.shape)}, expected one number")
    entries = Entries(rows=indices[0], cols=indices[1], values=values, shape=module.site.matrix)
    return {"weight": Hadamard(entries=entries, scale=float(scaling.reshape(-1)[0]) / float(n_out) ** 0.5)}


def build_c3a(module: Module) -> Deltas:
    size = module.integer("block_size", pattern="block_size_pattern")
    n_out, n_in = module.site.matrix
    if n_out % size or n_in % size:
        raise ShapeError(f"{module.where}: a module of {n_out} x {n_in} does not divide into blocks of {size}")
    return {"weight": Circulant(kernel=module.take("c3a_kernel", shape=(n_out // size, n_in // size, size)))}


def build_norms(module: Module) -> Deltas:
    """LN tuning: the norm itself, trained."""
    values = module.take("ln_tuning_layers.weight", shape=module.site.shape)
    return {"weight": Replace(values + values.dtype.type(module.site.offset), module.site.shape)}
