"""Shapes of published models, by name: what is known of one before its weights are.

The variants of recipes that bear these names (``configs/lm_ft.py:llama_65b``) have the
batch and the mesh for it; ``configs/plan.py`` compiles them without any weights.
"""

from ml_collections import ConfigDict

LLAMA_3_ROPE = {
    "theta": 500_000.0,
    "kind": "llama3",
    "factor": 8.0,
    "original_length": 8192,
    "low_factor": 1.0,
    "high_factor": 4.0,
}


def _llama(
    width: int,
    layers: int,
    heads: int,
    mlp_width: int,
    kv_heads: int = 0,
    vocab_size: int = 32_000,
    max_length: int = 2048,
    rope: dict | None = None,
) -> dict:
    return {
        "vocab_size": vocab_size,
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads or heads,
        "head_size": 128,
        "mlp_width": mlp_width,
        "max_length": max_length,
        "rope": rope or {},
    }


# Touvron et al., 2023a (Table 2) and 2023b; Grattafiori et al., 2024 (Table 3, 3.1).
LLAMAS = {
    "llama_7b": _llama(4096, 32, 32, 11_008),
    "llama_13b": _llama(5120, 40, 40, 13_824),
    "llama_33b": _llama(6656, 60, 52, 17_920),
    "llama_65b": _llama(8192, 80, 64, 22_016),
    "llama2_70b": _llama(8192, 80, 64, 28_672, kv_heads=8, max_length=4096),
    "llama3_8b": _llama(4096, 32, 32, 14_336, 8, 128_256, 131_072, LLAMA_3_ROPE),
    "llama3_70b": _llama(8192, 80, 64, 28_672, 8, 128_256, 131_072, LLAMA_3_ROPE),
}
# BERT-base (Devlin et al., 2019), pooled as DRAGON+ (Lin et al., 2023).
ENCODERS = {
    "dragon_plus": {
        "vocab_size": 30_522,
        "width": 768,
        "layers": 12,
        "heads": 12,
        "mlp_width": 3072,
        "max_length": 512,
    }
}


def shape(name: str) -> ConfigDict:
    """The shape of a model, with the names of ``LlamaConfig`` or ``EncoderConfig``."""
    return ConfigDict((LLAMAS | ENCODERS)[name])
