"""Jacinto's golden vectors: numbers, merged layers, training steps, straight-through variants, bias calibration."""

from __future__ import annotations

from functools import partial

from schemes.jacinto_vectors_bias import check_bias_calibration
from schemes.jacinto_vectors_merge import check_merge_weights
from schemes.jacinto_vectors_models import check_clean, check_steps
from schemes.jacinto_vectors_numerics import (
    check_fake_quant_act,
    check_pact2_updates,
    check_quant_dequant,
    check_range_search,
)
from schemes.jacinto_vectors_variants import check_ste_variants
from schemes.vector_table import Kind, VectorFile

MODEL = {
    r"(init|eval)\.(?!y).*|s\d+\.[xt]|lr|logit_scale": Kind.INPUT,
    r"s\d+\.(y|loss|(grad|param_after|clips_act|limits|act|running_mean|running_var)\..*)|eval\.y": Kind.OUTPUT,
}

FILES = {
    "range_search": VectorFile({r"\w+\.x": Kind.INPUT, r"\w+\.p[\d.]+": Kind.OUTPUT}, check_range_search),
    "pact2_updates": VectorFile(
        {"x": Kind.INPUT, r"\w+\.(clips_act|limits|y|y_eval0|nbt)": Kind.OUTPUT}, check_pact2_updates
    ),
    "quant_dequant": VectorFile(
        {r"x|\w+\.args": Kind.INPUT, r"\w+\.(y|grad)|(ceil2|floor2|round2)_func": Kind.OUTPUT}, check_quant_dequant
    ),
    "fake_quant_act": VectorFile(
        {"x": Kind.INPUT, r"\w+\.(y|grad|clips_act|y_eval0)": Kind.OUTPUT}, check_fake_quant_act
    ),
    "merge_weights": VectorFile(
        {r"\w+\.(W|b|bn|in_clips|opt)": Kind.INPUT, r"\w+\.(Wq|bq)": Kind.OUTPUT}, check_merge_weights
    ),
    "model_steps_clean": VectorFile(MODEL, check_clean),
    "model_steps_frozen": VectorFile(MODEL, check_steps),
    "model_steps_as_shipped": VectorFile(MODEL, partial(check_steps, snap=True)),
    "ste_variants_f64": VectorFile(
        {r"(float|wq|fold)\.s\d+\.(y|grad\..*)|s\d+\.\w+\.(Wq|bq|ws|y)": Kind.OUTPUT}, check_ste_variants
    ),
    "bias_calibration": VectorFile(
        {r"init\..*|s\d+\.x": Kind.INPUT, r"s\d+\.(y|(param|clips_act)\..*)": Kind.OUTPUT}, check_bias_calibration
    ),
}
