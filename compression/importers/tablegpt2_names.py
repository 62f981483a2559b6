"""What the authors of TableGPT2 call the tensors that an import takes as they are."""

# Tensors of the result and of the published model: names that only differ.
_HALVES = {"across": "0", "across_mlp": "1", "down": "2", "down_mlp": "3"}
_ATTENTION = {"norm": "norm", "query_key_value": "fn.fn.to_qkv", "output": "fn.fn.to_out"}
_MLP = {"norm": "norm", "up": "fn.fn.net.0", "down": "fn.fn.net.3"}
_CODE = {"norm": "ln_1", "output": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out"}


def published_name(target: str, kind: str) -> str:
    """What the authors call a tensor that is taken as it is."""
    part, _, inner = target.partition(".")
    if part == "language_model":
        return f"decoder.{inner}"
    if part == "projector":
        index, _, leaf = inner.partition(".")
        return f"projector.{'model.' if kind == 'cells' else ''}{2 * int(index)}.{leaf}"
    if kind == "markup":
        return _code_name(inner)
    first, *path, leaf = inner.split(".")
    if first == "sentence":
        return f"encoder.st.{'.'.join(path)}.{leaf}"
    if first == "summary":
        return f"encoder.qformer.ff.{_MLP[path[-1]]}.{leaf}"
    index, half, linear = path
    named = _MLP if half.endswith("mlp") else _ATTENTION
    return f"encoder.transformer.layers.{index}.{_HALVES[half]}.{named[linear]}.{leaf}"


def _code_name(inner: str) -> str:
    if inner.startswith("blocks."):
        _, index, linear, leaf = inner.split(".")
        return f"encoder.h.{index}.{_CODE[linear]}.{leaf}"
    return {"tokens.weight": "encoder.wte.weight"}.get(inner, f"encoder.ln_f.{inner.rpartition('.')[2]}")
