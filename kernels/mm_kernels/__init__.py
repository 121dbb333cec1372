"""The core operations of mm: tensors in, tensors out. Dense tensors are `[B, N, H, D]`, packed ones `[T, H, D]`."""

from mm_kernels.adaln_modulate import adaln_modulate
from mm_kernels.attention import attention, attention_jvp
from mm_kernels.contrastive_loss import contrastive_loss
from mm_kernels.qk_norm_rope import qk_norm_rope, rms_norm, rotate
from mm_kernels.ragged import Ragged

__all__ = [
    "Ragged",
    "adaln_modulate",
    "attention",
    "attention_jvp",
    "contrastive_loss",
    "qk_norm_rope",
    "rms_norm",
    "rotate",
]
