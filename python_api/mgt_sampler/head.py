"""Guidance folded into a model's last layer, on the rows of masked positions alone.

Where the last layer is linear, l = W h + b, guided logits are those of guided hidden states:

    u + s (c - u) = W (h_u + s (h_c - h_u)) + b

so one product of R rows takes the place of two of B N each, and the draw reads half as many logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .arguments import kind
from .deferred import HeadLogits
from .quantization.layer import Int4Linear
from .state import Logits

# of a class of transformers, by its name, where its last layer is; add to it for models of your own
HEADS = {
    # of the bundled model
    "Transformer": "head",
    # aMUSEd's, in diffusers
    "UVit2DModel": "mlm_layer.conv2",
    # Meissonic's; the class of this name in diffusers has no such layer
    "Transformer2DModel": "mlm_layer.conv2",
}


class Head:
    """A linear last layer, applied to the hidden states of some positions.

        l = W h + b

    Args:
        layer: a `torch.nn.Linear`, an `Int4Linear`, or a `torch.nn.Conv2d` of one pixel: nothing else may happen in its
            call, no hooks, no parametrization, no forward that was set on it.
        name: what an error calls it.

    Attributes:
        layer: the layer.
        width: C, of its hidden states.
        num_logits: V.

    Raises:
        TypeError: a layer of another class, or of a subclass with a forward of its own.
        ValueError: a convolution of more than a pixel, or a layer whose call does something else.
    """

    def __init__(self, layer: nn.Module, name: str = "head") -> None:
        """Check the layer."""
        check_head(layer, name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        self.layer = layer
        self.name = name

    @property
    def width(self) -> int:
        """C, of the hidden states."""
        return self.layer.in_features if isinstance(self.layer, nn.Linear) else self.layer.in_channels

    @property
    def num_logits(self) -> int:
        """V, of the logits."""
        return self.layer.out_features if isinstance(self.layer, nn.Linear) else self.layer.out_channels

    def grid(self, hidden: Tensor) -> tuple[int, ...]:
        """The shape of the tokens whose hidden states these are: (B, N), of a convolution (B, H, W).

        Raises:
            TypeError: no tensor.
            ValueError: of another width than the layer's.
        """
        if not isinstance(hidden, Tensor):
            raise TypeError(f"{self.name}: expected a tensor of hidden states, got {kind(hidden)}")
        axis = self._axis(hidden)
        if hidden.ndim < 2 or hidden.shape[axis] != self.width:
            raise ValueError(f"{self.name}: expected hidden states of width {self.width}, got {tuple(hidden.shape)}")
        return tuple(hidden.movedim(axis, -1).shape[:-1])

    def take(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The hidden states (R, C) of rows (R,), flat indices in the grid; a tensor of its own."""
        return hidden.movedim(self._axis(hidden), -1).reshape(-1, self.width).index_select(0, rows)

    def _axis(self, hidden: Tensor) -> int:
        return 1 if isinstance(self.layer, nn.Conv2d) and hidden.ndim == 4 else -1

    def logits(self, hidden: Tensor, uncond_hidden: Tensor | None = None, scale: float | Tensor = 1.0) -> Tensor:
        """Guided logits (R, V) of rows' hidden states (R, C), combined in float32; scale: a number or (R,)."""
        if uncond_hidden is not None:
            conditional, unconditional = hidden.float(), uncond_hidden.float()
            if isinstance(scale, Tensor) and scale.ndim:
                scale = scale[:, None]
            hidden = torch.add(unconditional, scale * (conditional - unconditional))
        hidden = hidden.to(self.layer.weight.dtype)
        if isinstance(self.layer, nn.Conv2d):
            return F.linear(hidden, self.layer.weight.flatten(1), self.layer.bias)
        return self.forward(hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """All logits, as the layer's class makes them."""
        forward: Callable[..., Tensor] = type(self.layer).forward
        return forward(self.layer, hidden)


def folded_logits(
    head: nn.Module | Head,
    hidden: Tensor,
    masked: Tensor,
    *,
    uncond_hidden: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Logits:
    """Guided logits of the masked positions alone, by one product with the head.

        u + s (c - u) = W (h_u + s (h_c - h_u)) + b

    The draw of these is the draw of all logits, bit for bit where the logits of a row are the same bits. A loop over a
    model of one's own, whose last layer is `model.out` and all before it `model.body`:

        state = begin(tokens, seed=seeds, mask_token_id=MASK, num_inference_steps=12)
        for k in range(12):
            hidden, uncond_hidden = model.body(state.tokens, labels), model.body(state.tokens, None)
            logits = folded_logits(model.out, hidden, state.masked, uncond_hidden=uncond_hidden, guidance_scale=3.0)
            state = take_step(rule, logits, state)[0].but(step=k + 1)

    Args:
        head: the last layer, as for `Head`.
        hidden: (B, N, C), or (B, C, H, W) where the head is a convolution: what the head is given for the condition.
        masked: bool (B, N) or (B, H, W), the positions that are to be drawn. On a GPU their number is waited for.
        uncond_hidden: of the unconditional half, like hidden; None: no guidance.
        guidance_scale: s, a number, or a tensor (B,) of one for each sample.

    Returns:
        `Logits` with rows, in the head's dtype: what the draw of a `Rule` takes.

    Raises:
        TypeError: a head that is not linear, or no tensors.
        ValueError: a head whose call does something else, hidden states of another width than the head's, or shapes
            that disagree.
    """
    head = head if isinstance(head, Head) else Head(head)
    grid = head.grid(hidden)
    if not isinstance(masked, Tensor) or masked.dtype != torch.bool:
        raise TypeError(f"masked: expected a bool tensor, got {kind(masked)}")
    if tuple(masked.shape) != grid:
        raise ValueError(f"masked: expected shape {grid} as of the hidden states, got {tuple(masked.shape)}")
    if uncond_hidden is not None and (head.grid(uncond_hidden) != grid or uncond_hidden.device != hidden.device):
        raise ValueError(f"uncond_hidden: expected {kind(hidden)} as hidden, got {kind(uncond_hidden)}")
    rows = masked.flatten().nonzero().squeeze(-1)
    taken = head.take(hidden, rows)
    if uncond_hidden is None:
        return Logits(head.logits(taken), rows=rows)
    if isinstance(guidance_scale, Tensor) and guidance_scale.ndim:
        guidance_scale = guidance_scale.to(rows.device)[rows // max(1, masked[0].numel())] if len(masked) else rows
    return Logits(head.logits(taken, head.take(uncond_hidden, rows), guidance_scale), rows=rows)


def check_head(layer: object, name: str = "head") -> None:
    """Check that the call of a layer is W h + b and nothing else; errors as `Head` has them."""
    expected = "a torch.nn.Linear, an Int4Linear or a torch.nn.Conv2d of one pixel"
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise TypeError(f"{name}: expected {expected}, got {type(layer).__name__}")
    if parametrize.is_parametrized(layer):
        raise ValueError(f"{name}: expected a layer without parametrizations, got {type(layer).__name__} with some")
    if type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward, Int4Linear.forward):
        raise TypeError(f"{name}: expected {expected}, got {type(layer).__name__}, which has a forward of its own")
    if isinstance(layer, nn.Conv2d):
        one_pixel = (
            layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding in ((0, 0), "valid", "same")
        )
        if not one_pixel or layer.groups != 1:
            raise ValueError(f"{name}: expected a convolution of one pixel, got {layer}")
    if "forward" in vars(layer):
        raise ValueError(f"{name}: expected a layer with the forward of its class, got one that was set on it")
    hooks = [kind for kind in ("_forward_pre_hooks", "_forward_hooks") if getattr(layer, kind)]
    if hooks:
        raise ValueError(f"{name}: expected a layer without hooks, got {hooks[0].strip('_').replace('_', ' ')}")
    if isinstance(layer, Int4Linear) and layer.num_scales > 1:
        raise ValueError(
            f"{name}: expected one activation scale, got {layer.num_scales}: rows of both halves go through it at once"
        )


def find_head(transformer: nn.Module, name: str = "transformer") -> nn.Module:
    """The last layer of a transformer whose class, or a class that it derives from, `HEADS` has.

    Raises:
        TypeError: a class that is not there, or a transformer without that layer.
    """
    for found in type(transformer).__mro__:
        path = HEADS.get(found.__name__)
        if path is None:
            continue
        layer: Any = transformer
        for part in path.split("."):
            layer = getattr(layer, part, None)
        if layer is None:
            raise TypeError(f"{name}: expected a {found.__name__} with {path}, got one without")
        assert isinstance(layer, nn.Module)
        return layer
    raise TypeError(
        f"{name}: expected one of {', '.join(HEADS)}, whose last layer is known, got {type(transformer).__name__}; "
        "mgt_sampler.head.HEADS[class name] = path of the layer makes another known"
    )


class HeadForward:
    """The forward of a head in a pipeline: it returns what stands for the logits, see `deferred.HeadLogits`.

    With gradients, and in compiled code, it returns the logits themselves.
    """

    def __init__(self, head: Head) -> None:
        """Hold the head."""
        self.head = head

    def __call__(self, hidden: Tensor) -> Tensor | HeadLogits:
        """Check the hidden states and keep them."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.head.forward(hidden)
        self.head.grid(hidden)
        return HeadLogits(self.head, hidden)
