"""F8Net's golden vectors: numbers, layers, networks in training, evaluation and integers."""

from __future__ import annotations

from schemes.f8net_numerics_vectors import FILES_NUMERICS
from schemes.f8net_vectors_deployed import check_model
from schemes.f8net_vectors_layers import check_layer, check_linear
from schemes.vector_table import Kind, VectorFile

LAYERS = (
    "conv1x1_signed_std", "conv3x3_floating_clip", "conv3x3_floating_noclip", "conv3x3_grid_alpha",
    "conv3x3_grid_noclip", "conv3x3_grid_wl4", "conv3x3_mae", "conv3x3_perchannel_std", "conv3x3_rms",
    "conv3x3_std_alpha", "dw3x3_grid_signed", "dw3x3_std", "first_weight_only",
)  # fmt: skip
LINEARS = ("grid_alpha_norescale", "grid_noclip", "std_alpha", "std_rescale_stddev", "std_signed")
MODELS = (
    "mbv2_grid_noclip", "mbv2_std_alpha", "resnet_bottleneck_std_alpha", "resnet_grid_noclip", "resnet_std_alpha",
    "resnet_std_alpha_m01", "resnet_std_alpha_sharedfl", "mbv2_std_alpha_avgpool_fused", "resnet_std_alpha_avgpool",
)  # fmt: skip

LAYER = {
    "cfg|weight|bias|gamma|beta|rm0|rv0|alpha|alpha_next|fl0|fl_next|e_x": Kind.INPUT,
    r"t\d+_(x|go)": Kind.INPUT,
    r"t\d+_(y|g(x|w|b|gamma|beta|alpha|alpha_next)|g(alpha|alpha_next)_none|fl|rm|rv)": Kind.OUTPUT,
    "e_(y|y_qbias|fix_scaling|fix_scaling_next|weight_fl|float_weight|float_bias|int_weight|int_bias)": Kind.OUTPUT,
}
MODEL = {
    r"cfg|init/.*|s\d+/[xt]|eval/x|int/order": Kind.INPUT,
    r"s\d+/(logits|loss|grad/.*|fraclen/.*)|final/.*": Kind.OUTPUT,
    r"eval/(logits(_qbias|_int_infer)?|(next_)?fix_scaling/.*|(input|weight)_fl/.*)": Kind.OUTPUT,
    r"int/(x|logits|logits_fl|logits_integize_float|block/.*/out(_fl)?)": Kind.OUTPUT,
    r"int/.*/(in|out|weight|bias|input_fl|weight_fl|signed)": Kind.OUTPUT,
}
# Published, a fixed fraclen has a moving average beside it that nothing moves, and nobody reads.
UNREAD = r"t\d+_fl|s\d+/fraclen/head\.0|final/head\.0\.(input_fraclen|alpha)"
# Published pool fusing multiplies the last layer before a mean in the integers, and not in evaluation: ours never does.
FUSED_POOL = {
    r"int/(logits|logits_integize_float)|int/classifier\.0/(in|out)": Kind.QUIRK,
    "eval/logits_int_infer": Kind.QUIRK,
    **MODEL,
}


def layer(name: str) -> VectorFile:
    return VectorFile({UNREAD: Kind.QUIRK, **LAYER} if "weight_only" in name else LAYER, check_layer)


def model(name: str) -> VectorFile:
    keys = FUSED_POOL if "avgpool" in name else MODEL
    return VectorFile(keys if "noclip" in name else {UNREAD: Kind.QUIRK, **keys}, check_model)


FILES = {
    **FILES_NUMERICS,
    **{f"layer_{name}": layer(name) for name in LAYERS},
    **{f"linear_{name}": VectorFile(LAYER, check_linear) for name in LINEARS},
    **{f"model_{name}": model(name) for name in MODELS},
}
