"""WAGEUBN's golden vectors: quantizers, batch norm, layers and a block, the integer momentum, data widths."""

from __future__ import annotations

from schemes.vector_table import Kind, VectorFile
from schemes.wageubn_vectors_layers import check_layers
from schemes.wageubn_vectors_momentum import check_integer_update, check_momentum
from schemes.wageubn_vectors_norm import check_batch_norm
from schemes.wageubn_vectors_package import check_package
from schemes.wageubn_vectors_publication import check_publication
from schemes.wageubn_vectors_quantizers import check_quantizers

FILES = {
    "tf_quantizers": VectorFile(
        {
            r"x|act|err|err_sat|grad_w|grad_bn|gout|uniform|lr": Kind.INPUT,
            r"(weight|act)_k\d+_(y|grad_x)|(E1|E2flag)_k\d+_err(_sat)?_out": Kind.OUTPUT,
            r"CQ_dr\d+_y|(gradbn|lr|Q)_k\d+_y": Kind.OUTPUT,
        },
        check_quantizers,
    ),
    "tf_batchnorm": VectorFile(
        {
            r"x|gamma|beta|gout|eps|moving_(mean|var)0": Kind.INPUT,
            r"kx\d+_(train_y|eval_y|grad_(x|gamma|beta)|batch_(mean|var))|moving_(mean|var)1": Kind.OUTPUT,
        },
        check_batch_norm,
    ),
    "tf_layers": VectorFile(
        {
            r"conv_(x|w_oihw|gout)|conv_s2_gout|lin_(x|w|gout)|block_(x|gamma|beta)": Kind.INPUT,
            r"(conv|conv_s2|lin)_y|(conv_E2k\d+|conv_s2|lin)_grad_(x|w|w_oihw)": Kind.OUTPUT,
            r"block_kx\d+_(act|y|err_before_E1|grad_(x|gamma|beta|w_oihw))": Kind.OUTPUT,
        },
        check_layers,
    ),
    "tf_momentum": VectorFile(
        {
            r"w0|bn0|grads|grads_bn|uniform|lr|dr|momentum": Kind.INPUT,
            r"gq|gq_bn|lr_q|w|bn|acc_w|acc_bn": Kind.OUTPUT,
        },
        check_momentum,
    ),
    "np_integer_update": VectorFile(
        {r"(w0|g|lr|mom)_int|frac": Kind.INPUT, r"(w|acc)_int": Kind.OUTPUT}, check_integer_update
    ),
    "pypi_package": VectorFile(
        {
            r"x|gout|grad_int|conv_(x|w|b|gout)|bn_(x|gamma|beta|mean|var|gout)": Kind.INPUT,
            r"(direct_k\d+|alldirect_dec\d+_all\d+|shift_k\d+)_(y|grad_x)": Kind.OUTPUT,
            r"const_dr\d+_k\d+_y|gwquant_gw\d+_dr\d+_grad_x|gbnquant_k\d+_grad_x": Kind.OUTPUT,
            r"conv_iostrict[01]_(y|grad_[xwb])|bn_eval_iostrict[01]_(y|grad_(x|gamma|beta))": Kind.OUTPUT,
            r"relu6?_iostrict[01]_(y|grad_x)": Kind.OUTPUT,
        },
        check_package,
    ),
    "np_publication_form": VectorFile(
        {
            r"x|err|uniform|zeros|obs_x|il_[awe]|il_exp": Kind.INPUT,
            r"(direct|weight|shift|flagE2)_k\d+|const_dr\d+_kgc\d+": Kind.OUTPUT,
            r"shift_k\d+_(int|exp)|flagE2_k\d+_(flag|int|exp_big|exp_small)": Kind.OUTPUT,
            r"zeros_(shift_k\d+|flagE2_k\d+|const_dr\d+)": Kind.OUTPUT,
            r"obs_absmax|obs_int_bits_(max|mse)_(un)?signed_k\d+": Kind.OUTPUT,
            r"il_(y|dx|dw)(_acc)?|il_exp_out": Kind.OUTPUT,
        },
        check_publication,
    ),
}
