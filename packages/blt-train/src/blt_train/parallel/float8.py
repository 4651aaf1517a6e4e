"""Matrix products in float8 by torchao, for GPUs that have them.

All matrices of the latent transformer, and the feed-forward matrices of the local blocks: where the arithmetic is. The
others (heads, projections, local attention) are small, and losing digits there gains nothing. Inputs, weights and
gradients are scaled by their largest value, tensor by tensor, at each product. The weights themselves, and what is
gathered and saved of them, keep their dtype.

Products of a backward pass sum over positions, of which the units take 16 at once, so a micro batch must hold a
multiple of 16.
"""

from __future__ import annotations

import torch
from torch import nn

from blt_model import BLT, ByteLM
from blt_train.errors import ConfigError

#: Sizes of a product must be multiples of this.
MULTIPLE = 16
#: The first GPUs with float8 units.
_CAPABILITY = (8, 9)


def float8_maps(model: BLT | ByteLM) -> list[str]:
    """Return the names of the linear maps that are run in float8.

    Args:
        model: of either kind; a byte LM's blocks are treated as a latent transformer's.
    """
    whole = "blocks." if isinstance(model, ByteLM) else "latent.blocks."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (name.startswith(whole) or (".blocks." in name and ".feed_forward." in name))
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    ]


def check_float8(device: torch.device, positions: tuple[int, ...]) -> None:
    """Refuse what float8 products cannot be had with.

    Args:
        device: where the model computes.
        positions: of each kind (tokens, patches) in a micro batch.

    Raises:
        ConfigError: the device lacks them, or the micro batch is of another size.
    """
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise ConfigError(
            f"parallel.float8 is true, but this device ({kind}) has no float8 units: use a GPU of compute capability "
            f"{_CAPABILITY[0]}.{_CAPABILITY[1]} or above, or set it to false"
        )
    for count in positions:
        if count % MULTIPLE:
            raise ConfigError(
                f"parallel.float8 is true, but a micro batch holds {count} positions, which is no multiple of "
                f"{MULTIPLE}: change data.sequence_tokens, data.sequence_patches or batch.sequences_per_micro_batch"
            )


def use_float8(model: BLT | ByteLM, *, emulate: bool = False) -> None:
    """Replace linear maps by those of torchao; names and weights stay.

    Args:
        model: on any device, such as meta, not compiled and not sharded yet.
        emulate: round to float8 but multiply in float32, on devices without float8 units.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            "parallel.float8 is true, but torchao is not installed: install blt-train[float8], or set it to false"
        ) from error
    chosen = set(float8_maps(model))
    convert_to_float8_training(
        model, module_filter_fn=lambda _module, name: name in chosen, config=Float8LinearConfig(emulate=emulate)
    )
